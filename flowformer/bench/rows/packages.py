"""Published packages beside this library: the same function of the same numbers, by both.

In the operations ``packages-...`` each package that is installed is a contender, and so is ``NAME-ours``: our operation
with the options that compute what the package does. Both are compared with our float64 truth of that, or with our
operation in float64 where the truth has no such option. Packages get q, k and v in place of their projections of
inputs, so that neither side projects.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.bench import registry
from flowformer.bench.rows.attention import FAMILIES
from flowformer.bench.rows.forms import Form
from flowformer.bench.rows.variants import CLUSTER_WINDOW, Draw, Kind, Variant, find_variant
from flowformer.mechanisms import find_attention

HASHES, BUCKET, WINDOW, LANDMARKS = 8, 64, 64, 64
LONG_WINDOW, BLOCK = 512, 64
# Scores of tokens with themselves are -5e4 (-1e5 in transformers), and float32 has steps of 4e-3 (8e-3) there: by so
# much are the weights of hashes off in which a token sees nothing else.
COARSE = 1e-2
SEED = 0  # of hashes, which packages draw at each call
Attend = Callable[..., Tensor]


class _Given(nn.Module):
    """In place of a projection: what it is given, whatever the input."""

    value: Any

    def forward(self, x: Tensor) -> Any:
        return self.value


class _Chunks(tuple[Tensor, ...]):
    """In place of one tensor of queries, keys and values, which would have to be copied together."""

    def chunk(self, count: int, dim: int) -> tuple[Tensor, ...]:
        """Those that it is made of."""
        return self


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch * heads, length, channels)."""
    return tuple(x.flatten(0, 1) for x in _heads_first(*tensors))


def _config(q: Tensor, **more: Any) -> Any:
    """What layers of transformers read."""
    heads, channels = q.shape[2:]
    return SimpleNamespace(
        hidden_size=heads * channels, num_attention_heads=heads, attention_probs_dropout_prob=0.0, **more
    )


def _put(layer: Any, names: str, *tensors: Any) -> None:
    for name, tensor in zip(names.split(), tensors, strict=True):
        if not isinstance(getattr(layer, name), _Given):
            setattr(layer, name, _Given())
        getattr(layer, name).value = tensor


# ----------------------------------------------------------------------------------------------------- the packages


def performer(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, causal: bool) -> Tensor:
    """``FastAttention`` of performer-pytorch."""
    made = importlib.import_module("performer_pytorch").FastAttention
    layer = made(q.shape[-1], nb_features=8, causal=causal)
    layer.projection_matrix = projection
    return layer(*_heads_first(q, k, v)).transpose(1, 2)


@lru_cache(maxsize=4)
def _lsh(bucket: int, causal: bool) -> Any:
    made = importlib.import_module("reformer_pytorch").LSHAttention
    return made(bucket_size=bucket, n_hashes=HASHES, causal=causal).eval()


def reformer(q: Tensor, k: Tensor, v: Tensor, rotations: Tensor, *, causal: bool) -> Tensor:
    """``LSHAttention`` of reformer-pytorch, in which queries are keys."""
    torch.manual_seed(SEED)
    out = _lsh(min(BUCKET, q.shape[1] // 2), causal)(*_rows(q, v))[0]
    return out.view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)


@lru_cache(maxsize=4)
def _linformer(width: int, heads: int, rank: int) -> Any:
    layer = importlib.import_module("linformer").LinformerSelfAttention(width, 1, k=rank, heads=heads)
    del layer.proj_k, layer.proj_v
    layer.to_out = nn.Identity()
    return layer


def linformer(q: Tensor, k: Tensor, v: Tensor, projection: tuple[Tensor, Tensor], *, causal: bool) -> Tensor:
    """``LinformerSelfAttention`` of linformer."""
    layer = _linformer(q.shape[2] * q.shape[3], q.shape[2], len(projection[0]))
    layer.seq_len, layer.proj_k, layer.proj_v = q.shape[1], projection[0].T, projection[1].T
    flat = [x.flatten(2) for x in (q, k, v)]
    _put(layer, "to_q to_k to_v", *flat)
    return layer(flat[0]).view_as(v)


@lru_cache(maxsize=4)
def _nystrom(width: int, heads: int) -> Any:
    made = importlib.import_module("nystrom_attention").NystromAttention
    layer = made(width, dim_head=width // heads, heads=heads, num_landmarks=LANDMARKS, residual=False)
    layer.to_out = nn.Identity()
    return layer


def nystrom(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """``NystromAttention`` of nystrom-attention, without its convolution of values."""
    layer = _nystrom(q.shape[2] * q.shape[3], q.shape[2])
    flat = [x.flatten(2) for x in (q, k, v)]
    _put(layer, "to_qkv", _Chunks(flat))
    return layer(flat[0]).view_as(v)


def local(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """``LocalAttention`` of local-attention, without positions."""
    made = importlib.import_module("local_attention").LocalAttention
    layer = made(min(WINDOW, q.shape[1]), causal=causal, use_rotary_pos_emb=False)
    return layer(*_heads_first(q, k, v)).transpose(1, 2)


def sinkhorn(q: Tensor, k: Tensor, v: Tensor, *nulls: Tensor, causal: bool) -> Tensor:
    """The attention of sinkhorn-transformer, between its projections."""
    module = importlib.import_module("sinkhorn_transformer.sinkhorn_transformer")
    made = module.SinkhornCausalAttention if causal else module.SinkhornAttention
    length, heads, channels = q.shape[1:]
    layer = made(min(BUCKET, length // 2), heads * channels, channels, heads, length)
    if causal:
        del layer.null_keys, layer.null_values
        layer.null_keys, layer.null_values = (x.unsqueeze(1) for x in nulls)
    return layer(*_heads_first(q, k, v)).transpose(1, 2)


@lru_cache(maxsize=4)
def _clusters(clusters: int, window: int, heads: int, channels: int) -> Any:
    made = importlib.import_module("routing_transformer.routing_transformer").KmeansAttention
    return made(clusters, window, heads, channels).eval()


def routing(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, *, causal: bool) -> Tensor:
    """``KmeansAttention`` of routing-transformer, with clusters as given."""
    heads, clusters, channels = centroids.shape
    layer = _clusters(clusters, CLUSTER_WINDOW, heads, channels)
    layer.kmeans.means = centroids.detach()
    layer.kmeans.initted.fill_(True)
    return layer(*_heads_first(q, k, v))[0].transpose(1, 2)


def _layer(model: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


def hf_longformer(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """``LongformerSelfAttention`` of transformers, without global tokens."""
    window = min(LONG_WINDOW, q.shape[1])
    layer = _layer("longformer", "LongformerSelfAttention")(_config(q, attention_window=[window]), 0).eval()
    # It scales queries in place; and it asks for projections of (length, batch, channels).
    flat = [x.flatten(2).transpose(0, 1) for x in (q.clone(), k, v)]
    _put(layer, "query key value", *flat)
    none = q.new_zeros(q.shape[:2])
    options = {"is_index_masked": none.bool(), "is_index_global_attn": none.bool(), "is_global_attn": False}
    return layer(q.flatten(2), attention_mask=none, **options)[0].view_as(v)


def hf_bigbird(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, *, causal: bool) -> Tensor:
    """``BigBirdBlockSparseAttention`` of transformers in evaluation, where block 0 takes the place of random ones."""
    block = min(BLOCK, q.shape[1] // 8)
    more = {"max_position_embeddings": q.shape[1], "num_random_blocks": 3, "block_size": block, "use_bias": False}
    layer = _layer("big_bird", "BigBirdBlockSparseAttention")(_config(q, **more)).eval()
    flat = [x.flatten(2) for x in (q, k, v)]
    _put(layer, "query key value", *flat)
    masks = _layer("big_bird", "BigBirdModel").create_masks_for_block_sparse_attn(q.new_ones(q.shape[:2]), block)
    blocked, band, from_mask, to_mask = masks
    return layer(flat[0], band, from_mask, to_mask, blocked, blocked)[0].view_as(v)


def hf_nystromformer(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """``NystromformerSelfAttention`` of transformers, without its convolution of values."""
    more = {"num_landmarks": min(LANDMARKS, q.shape[1]), "segment_means_seq_len": q.shape[1]}
    config = _config(q, **more, conv_kernel_size=None, inv_coeff_init_option=False)
    layer = _layer("nystromformer", "NystromformerSelfAttention")(config)
    _put(layer, "query key value", *(x.flatten(2) for x in (q, k, v)))
    return layer(q.flatten(2))[0].view_as(v)


def hf_yoso(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """``YosoSelfAttention`` of transformers, its expectation."""
    more = {"use_expectation": True, "hash_code_len": 9, "conv_window": None, "use_fast_hash": False, "num_hash": 64}
    layer = _layer("yoso", "YosoSelfAttention")(_config(q, **more, lsh_backward=True))
    _put(layer, "query key value", *(x.flatten(2) for x in (q, k, v)))
    return layer(q.flatten(2), attention_mask=q.new_zeros(q.shape[:2]))[0].view_as(v)


def hf_reformer(q: Tensor, k: Tensor, v: Tensor, rotations: Tensor, *, causal: bool) -> Tensor:
    """``LSHSelfAttention`` of transformers, in which queries are keys."""
    length, heads, channels = q.shape[1:]
    config = importlib.import_module("transformers").ReformerConfig(
        hidden_size=heads * channels, num_attention_heads=heads, attention_head_size=channels, is_decoder=causal,
        lsh_attn_chunk_length=min(BUCKET, length // 2), num_hashes=HASHES, num_buckets=_buckets(length),
        lsh_num_chunks_after=0 if causal else 1, hash_seed=SEED, lsh_attention_probs_dropout_prob=0.0,
        axial_pos_embds_dim=[1, heads * channels - 1],
    )  # fmt: skip
    layer = _layer("reformer", "LSHSelfAttention")(config).eval()
    flat = [x.flatten(2) for x in (q, v)]
    _put(layer, "query_key value", *flat)
    return layer(flat[0]).hidden_states.view_as(v)


# ------------------------------------------------------------------------------------------------------ what is ours


def _buckets(length: int) -> int:
    return length // min(BUCKET, length // 2)


def _rotations(draw: Draw, length: int, heads: int, channels: int) -> tuple[Any, ...]:
    """Those that reformer-pytorch draws, in its order."""
    size = (channels, HASHES, _buckets(length) // 2)
    return (torch.randn(size, generator=torch.Generator().manual_seed(SEED)).transpose(0, 1),)


def _rotations_by_head(draw: Draw, length: int, heads: int, channels: int) -> tuple[Any, ...]:
    """Those that transformers draws."""
    size = (heads, channels, HASHES, _buckets(length) // 2)
    return (torch.randn(size, generator=torch.Generator().manual_seed(SEED)).transpose(1, 2),)


def _nulls(draw: Draw, length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return draw(heads, channels), draw(heads, channels)


def _shared(function: Attend) -> Attend:
    """Queries are keys."""
    return lambda q, k, v, *rest, **options: function(q, q, v, *rest, **options)


def _performer_variant(kind: Kind) -> Variant:
    released = {"detach": True, "maximum": "all", "sum_eps": 1e-6} if kind.causal else {"detach": True}
    return replace(find_variant("performer"), options=released)


def _sinkhorn_variant(kind: Kind) -> Variant:
    if not kind.causal:
        return Variant(options={"bucket_length": BUCKET, "values": "keys"})
    options = {"bucket_length": BUCKET, "num_top": 2, "temperature": 1.0}
    return Variant(options=options, learned=_nulls, by_channels=True)


def _reformer_variant(kind: Kind) -> Variant:
    options = {"chunk_length": BUCKET, "sees_future": kind.causal}
    return Variant(options=options, learned=_rotations, by_channels=True)


def _hf_reformer_variant(kind: Kind) -> Variant:
    options = {"chunk_length": BUCKET, "sees_future": kind.causal, "form": "hf", "chunks_after": int(not kind.causal)}
    return Variant(options=options, learned=_rotations_by_head, by_channels=True)


def _with(**options: Any) -> Callable[[Kind], Variant]:
    return lambda kind: Variant(options=options)


@dataclass(frozen=True)
class Package:
    """A published implementation and what of ours computes the same.

    Attributes:
        name: Of its contender.
        module: What is to be installed.
        attend: ``(q, k, v, *learned, causal) -> output``.
        mechanism: Ours.
        variant: ``kind -> `` our options, and what is learned on both sides.
        multiple: It takes lengths that are multiples of this.
        causal: Whether it has a causal form.
        shared: Whether queries are keys.
        released: Whether our float64 truth lacks the options, since results depend on other sequences or heads.
    """

    name: str
    module: str
    attend: Attend
    mechanism: str
    variant: Callable[[Kind], Variant]
    multiple: int = 1
    causal: bool = True
    shared: bool = False
    released: bool = False

    def refusal(self, inputs: registry.Inputs) -> str | None:
        """Why the two cannot be compared, or ``None``."""
        length = inputs[0].q.shape[1]
        return (
            f"{self.name} takes multiples of {self.multiple} tokens, got {length}" if length % self.multiple else None
        )

    def lacks_truth(self, kind: Kind) -> bool:
        """Whether our operation in float64 is the truth."""
        return self.released and not kind.causal

    @property
    def about(self) -> str:
        """The first line of the docstring of ``attend``."""
        return (self.attend.__doc__ or "").split("\n")[0].rstrip(".")


_EVALUATED = {"released": "huggingface-eval", "block": BLOCK}
PACKAGES = (
    Package("performer-pytorch", "performer_pytorch", performer, "performer", _performer_variant),
    Package("reformer-pytorch", "reformer_pytorch", reformer, "reformer", _reformer_variant, 2 * BUCKET, shared=True),
    Package(
        "linformer-package", "linformer", linformer, "linformer", lambda kind: find_variant("linformer"), causal=False
    ),
    Package(
        "nystrom-attention", "nystrom_attention", nystrom, "nystromformer",
        _with(num_landmarks=LANDMARKS, segments="front", start="batch"), LANDMARKS, causal=False, released=True,
    ),
    Package("local-attention", "local_attention", local, "local", _with(window=WINDOW), WINDOW),
    Package(
        "sinkhorn-transformer", "sinkhorn_transformer", sinkhorn, "sinkhorn", _sinkhorn_variant, 2 * BUCKET,
        released=True,
    ),
    Package(
        "routing-transformer", "routing_transformer", routing, "routing", lambda kind: find_variant("routing"),
        causal=False,
    ),
    Package(
        "hf-longformer", "transformers", hf_longformer, "longformer", _with(window=LONG_WINDOW), LONG_WINDOW,
        causal=False,
    ),
    Package(
        "hf-bigbird", "transformers", hf_bigbird, "bigbird",
        lambda kind: replace(find_variant("bigbird"), options=_EVALUATED), 8 * BLOCK, causal=False,
    ),
    Package(
        "hf-nystromformer", "transformers", hf_nystromformer, "nystromformer",
        _with(num_landmarks=LANDMARKS, segments="positions", start="batch"), LANDMARKS, causal=False, released=True,
    ),
    Package("hf-yoso", "transformers", hf_yoso, "yoso", _with(gradient="surrogate"), causal=False),
    Package("hf-reformer", "transformers", hf_reformer, "reformer", _hf_reformer_variant, 2 * BUCKET, shared=True),
)  # fmt: skip


@lru_cache(maxsize=len(PACKAGES) * 4)
def _pair(package: Package, operation: str, kind: Kind) -> tuple[registry.Contender, registry.Contender]:
    """The package and ours; made once, so that both have one truth."""
    row, variant = find_attention(package.mechanism), package.variant(kind)
    truth = row.operation if package.lacks_truth(kind) else row.truth
    ours, truth = (_shared(x) if package.shared else x for x in (row.operation, truth))
    made = partial(
        registry.Contender,
        operation=operation,
        reference=Form(truth, variant=variant),
        dtypes=(torch.float32,),
        unavailable=package.refusal,
    )
    name = f"{package.name}-ours"
    about = f"what {package.name} computes, by ops.{row.operation.__name__}"
    return (
        made(name=name, function=Form(ours, variant=variant), about=about, ours=True),
        made(
            name=package.name,
            function=Form(package.attend, variant=replace(variant, options={})),
            about=package.about,
            twin=name,
            tolerance=COARSE if package.shared and kind.causal else None,
        ),
    )


def installed(packages: tuple[Package, ...] = PACKAGES) -> list[Package]:
    """Those that can be imported here."""
    return [package for package in packages if importlib.util.find_spec(package.module) is not None]


def _operations() -> Mapping[str, Kind]:
    family = next(family for family in FAMILIES if not family.prefix)
    return {f"packages-{name}": kind for name, kind in family.operations()}


@registry.add_contenders
def published_packages() -> Iterator[registry.Contender]:
    """Every package that is installed, and ours."""
    for operation, kind in _operations().items():
        for package in installed():
            if package.causal or not kind.causal:
                yield from _pair(package, operation, kind)


for _name in _operations():
    _plain = registry.OPERATIONS[_name.removeprefix("packages-")]
    registry.add_operation(
        replace(_plain, name=_name, about=f"{_plain.about}: published packages and ours", lengths=(1024, 4096))
    )
