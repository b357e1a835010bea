"""The contenders from elsewhere: PyTorch's softmax attention, the published Flow-Attention, Performer."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowformer.bench import published
from flowformer.bench.contenders import Taken, cache_bytes
from flowformer.bench.operations import Token, softmax_flops
from flowformer.bench.registry import Contender, Inputs, Shape, add_contender, reference

# ---------------------------------------------------------------------------------------------------------------- SDPA


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """PyTorch's fused softmax attention, in our layout."""
    Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(Q, K, V, is_causal=causal).transpose(1, 2)


def _sdpa_step(given: Token) -> Taken:
    """One step on keys and values kept in place: the new ones are written behind the old ones, nothing is copied."""
    cache = []
    for tensor in given.context[1:]:
        batch, _, heads, width = tensor.shape
        room = tensor.new_empty(batch, heads, given.length + 1, width)
        for start in range(0, given.length, tensor.shape[1]):
            piece = tensor[:, : given.length - start].transpose(1, 2)
            room[:, :, start : start + piece.shape[2]] = piece
        cache.append(room)

    def take(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for room, new in zip(cache, (k, v), strict=True):
            room[:, :, -1] = new
        return scaled_dot_product_attention(q.unsqueeze(2), *cache).squeeze(2)

    return take, sum(room.numel() * room.element_size() for room in cache)


def _add_sdpa(operation: str, causal: bool, training: bool) -> None:
    def flops(shape: Shape) -> float:
        return (3.5 if training else 1) * softmax_flops(shape, causal=causal)

    for name, dtype in (("sdpa", torch.float32), ("sdpa-bf16", torch.bfloat16)):
        add_contender(
            Contender(
                name, operation, sdpa, reference.softmax_attention, "torch scaled_dot_product_attention", dtype=dtype,
                layout="heads-first",  # its own: it would copy others
                flops=flops,
            )
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- published


def _published_bytes(shape: Shape, *, training: bool) -> float:
    """Two tensors (batch, heads, length, K, V) of float32, four where gradients flow; a tenth for the rest."""
    one = 4.0 * shape.batch * shape.heads * shape.length * shape.channels * shape.value_channels
    return 1.1 * one * (4 if training else 2)


def _add_published(operation: str, causal: bool, training: bool) -> None:
    needs: dict[str, Any] = {"needs_bytes": partial(_published_bytes, training=training)} if causal else {}
    add_contender(
        Contender(
            "published", operation, published.flow_attention, reference.flow_attention,
            "the published formulas of Flow-Attention, as written", **needs,
        )
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- Performer


@lru_cache(maxsize=8)
def _performer_module(channels: int, causal: bool) -> Any:
    module = importlib.import_module("performer_pytorch")
    torch.manual_seed(0)  # its random features
    return module.FastAttention(dim_heads=channels, causal=causal)


def _performer(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    return _performer_module(q.shape[-1], causal)(*tensors).transpose(1, 2)


def _performer_unavailable(inputs: Inputs) -> str | None:
    if importlib.util.find_spec("performer_pytorch") is None:
        return "performer-pytorch is not installed"
    return None


def _add_performer(operation: str) -> None:
    add_contender(
        Contender(
            "performer", operation, _performer, None, "FastAttention of performer-pytorch, an approximation of softmax",
            layout="heads-first", unavailable=_performer_unavailable,
        )
    )  # fmt: skip


for _operation in ("causal", "causal-training", "bidirectional", "bidirectional-training"):
    _kind = {"causal": _operation.startswith("causal"), "training": _operation.endswith("training")}
    _add_sdpa(_operation, **_kind)
    _add_published(_operation, **_kind)
    _add_performer(_operation)
add_contender(
    Contender(
        "sdpa", "step", _sdpa_step, reference.softmax_attention,
        "torch scaled_dot_product_attention on keys and values kept in place", needs_bytes=cache_bytes,
    )
)  # fmt: skip
