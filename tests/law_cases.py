"""How the laws call each mechanism: shapes of its inputs, and the variants in which they are checked.

A mechanism that is not named here is checked in one variant, without options or learned tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from flowformer import ops
from flowformer.mechanisms import Mechanism, find_attention, list_attentions

Sizes = tuple[int, ...]

# The float64 truth of each operation, by the operation's name.
reference = SimpleNamespace(
    **{find_attention(name).operation.__name__: find_attention(name).truth for name in list_attentions()}
)


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to call an operation.

    Attributes:
        options: Keyword arguments of the operation, of its truth, of its step and of its state.
        learned: Shapes of the learned or random tensors that the operation takes after v and the step after the state,
            for sequences of up to ``length`` tokens and for ``heads``. One entry for each argument: a ``torch.Size``,
            or a tuple of them where the argument is a tuple of tensors; ``None`` for an argument that is absent.
        by_channels: Whether ``learned`` takes the channels of keys as well.
        scale: Standard deviation of the learned tensors.
        drawn: Shapes of the random tensors that the operation takes after v, before the learned ones, for ``heads`` and
            the channels of keys. They have no gradients. Tensors of integers stand for themselves.
        for_length: Options of the operation that depend on the longest sequence.
        quadratic: Whether a learned tensor is quadratic in length, and so memory too.
        decays: Whether the first learned tensor is of log-decays. A variant that decays knows the order of tokens, and
            has no cross-attention.
        by_token: Whether those are of tokens, (batch, length, heads): then they are an input like q, k and v, and
            ``learned`` gives the others.
        ordered: Whether the variant knows the order of tokens otherwise.
        same_loops: Whether it runs the loops of another variant, of this or another mechanism, with other equations of
            a token in them. Laws of loops (many tokens, sizes of chunks and blocks, memory) and other long ones are
            slow for it.
        same_loops_in: Backends in which it does so, whatever it does in others.
        only: The only form that it has, ``"causal"`` or ``"bidirectional"``.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    learned: Callable[..., tuple[Any, ...]] = lambda length, heads: ()
    by_channels: bool = False
    scale: float = 1.0
    drawn: Callable[[int, int], tuple[torch.Size | torch.Tensor, ...]] = lambda heads, channels: ()
    for_length: Callable[[int], Mapping[str, Any]] = lambda length: {}
    quadratic: bool = False
    decays: bool = False
    by_token: bool = False
    ordered: bool = False
    same_loops: bool = False
    same_loops_in: tuple[str, ...] = ()
    only: str = ""


def _table(length: int, heads: int) -> tuple[Any, ...]:
    return (torch.Size((length, length)),)


def _factors(length: int, heads: int) -> tuple[Any, ...]:
    return ((torch.Size((length, 2)), torch.Size((length, 2))),)


def _filters(length: int, heads: int) -> tuple[Any, ...]:
    return (torch.Size((heads, 5)),)


def _heads(length: int, heads: int) -> tuple[Any, ...]:
    return (torch.Size((heads,)),)


def _temperatures(length: int, heads: int) -> tuple[Any, ...]:
    return (None, torch.Size((3, heads)))


def _features(length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return (torch.Size((6, channels)),)


def _features_by_head(length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return (torch.Size((heads, 6, channels)),)


def _no_gate(length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return (None, *_features_by_head(length, heads, channels))


def _projections_by_head(length: int, heads: int) -> tuple[Any, ...]:
    return ((torch.Size((heads, 3, length)), torch.Size((heads, 3, length))),)


def _tables_by_head(length: int, heads: int) -> tuple[Any, ...]:
    return (torch.Size((heads, length, length)),)


def _landmarks(length: int, heads: int, channels: int) -> tuple[Any, ...]:
    width = torch.Size((channels,))
    return ((torch.Size((channels, channels)), width, width), torch.Size((heads, 5)))


def _blocks(heads: int, channels: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(1000, (heads, 50, 2), generator=torch.Generator().manual_seed(0)),)


def _centroids(heads: int, channels: int) -> tuple[torch.Size, ...]:
    return (torch.Size((heads, 3, channels)),)


def _rotations(heads: int, channels: int) -> tuple[torch.Size, ...]:
    return (torch.Size((2, channels, 2)),)


VARIANTS: dict[str, dict[str, Variant]] = {
    "flow": {
        # Those of lra compete over heads, as no others do.
        **{
            preset: Variant({"preset": preset}, same_loops=preset not in ("core", "lra"))
            for preset in ops.PRESETS
            if preset != "distance"
        },
        "no-competition": Variant({"competition": None}, same_loops=True),
        "no-allocation": Variant({"allocation": False}, same_loops=True),
        "rescale": Variant({"rescale": True}, same_loops=True),
        "relu": Variant({"feature_map": "relu"}, same_loops=True),
        "decay": Variant({"decay": "learned", "feature_map": "elu"}, _heads, decays=True),
        "distance": Variant({"preset": "distance"}, decays=True, by_token=True),
        "temperature": Variant(
            {"temperature": True, "feature_map": "softmax", "clamp": 8.0}, _temperatures, same_loops=True
        ),
    },
    "linear": {
        "default": Variant(),
        "decay": Variant({"decay": "learned"}, _heads, decays=True),
        "decay-token": Variant({"decay": "token"}, decays=True, by_token=True),
    },
    "softmax": {
        "default": Variant(),
        "rotary": Variant({"rotary": True}, ordered=True, same_loops=True),
        "decay-token": Variant({"decay": "token"}, decays=True, by_token=True),
    },
    "performer": {
        "default": Variant(learned=_features, by_channels=True),
        "relu": Variant({"kernel": "relu", "projected": False, "scale": 1.0}, same_loops=True),
    },
    "rfa": {
        "default": Variant(learned=_no_gate, by_channels=True, same_loops=True),
        "gate": Variant(
            learned=_features_by_head, by_channels=True, decays=True, by_token=True, only="causal", same_loops=True
        ),
    },
    "cosformer": {
        "bounded": Variant(for_length=lambda length: {"max_length": length}, ordered=True),
        "default": Variant(ordered=True, only="bidirectional", same_loops=True),
    },
    "mobile": {
        "default": Variant(same_loops_in=("native",)),  # those of linear attention
        "normalized": Variant({"normalize": True}, same_loops=True),
        "no-competition": Variant({"competition": None}, same_loops=True),
        "heads": Variant({"competition": "heads", "normalize": True}, same_loops_in=("native",)),
        "no-allocation": Variant({"allocation": False}, same_loops=True),
        "no-clamp": Variant({"clamp": None}, same_loops=True),
        # eps bounds what is divided by: with 1e-6 and relu, outputs of few heads and channels are beyond float16.
        "relu": Variant({"feature_map": "relu", "eps": 1e-2}, same_loops=True),
    },
    # Of the size that projections to rank 256 have in a new module: with 1, scores at length 65,536 are in
    # the hundreds, where rounding a score to float32 changes its exponential by 3e-5.
    "linformer": {
        "by-head": Variant(learned=_projections_by_head, scale=0.036),
    },
    "nystromformer": {"conv": Variant({"num_landmarks": 4, "value_conv": 5}, _filters)},
    # With dot products, which make outputs depend on keys; tests/mechanisms/test_synthesizer.py has the other kinds.
    "synthesizer": {
        "random": Variant({"kind": "random"}, _tables_by_head, quadratic=True),
    },
    "soft": {"conv": Variant({"num_landmarks": 4, "value_conv": 5, "iterations": 8}, _landmarks, by_channels=True)},
    "aft_full": {"factors": Variant(learned=_factors), "free": Variant(learned=_table, quadratic=True)},
    "aft_local": {
        "factors": Variant({"window": 3}, _factors),
        "free": Variant({"window": 40}, _table, quadratic=True),
        "hard": Variant({"window": 3, "hard": True}, _factors),
    },
    "local": {"blocks": Variant({"window": 4})},
    "sparse": {
        "strided": Variant({"stride": 8}),
        "fixed": Variant({"pattern": "fixed", "stride": 4, "column_sets": 2}, same_loops=True),
    },
    "longformer": {
        "window": Variant({"window": 7}, same_loops=True),
        "global": Variant({"window": 4, "global_tokens": 2}, only="bidirectional", same_loops=True),
    },
    "bigbird": {"blocks": Variant({"block": 4}, drawn=_blocks, same_loops=True)},
    "reformer": {"paper": Variant({"chunk_length": 4}, drawn=_rotations)},
    "routing": {"default": Variant({"window": 8}, drawn=_centroids)},
    "sinkhorn": {"top": Variant({"bucket_length": 4, "num_top": 2})},
    "aft_conv": {"default": Variant(learned=_filters), "hard": Variant({"hard": True}, _filters)},
}


PLAIN = {"default": Variant()}


def variants_of(row: Mechanism) -> Mapping[str, Variant]:
    """The ways to call a mechanism, by name."""
    return VARIANTS.get(row.name, PLAIN)


def tensors_after_v(
    variant: Variant, make: Callable[[torch.Size], torch.Tensor], *, batch: int, length: int, heads: int, channels: int
) -> list[Any]:
    """The log-decays of tokens, random and learned tensors that an operation takes after v, of shapes by ``make``."""
    of_tokens = [-make(torch.Size((batch, length, heads)))] if variant.by_token else []
    learned = variant.learned(length, heads, *((channels,) if variant.by_channels else ()))
    others = tree_map(
        lambda found: make(found) if isinstance(found, torch.Size) else found,
        (*variant.drawn(heads, channels), *learned),
        is_leaf=lambda found: isinstance(found, torch.Size),
    )
    return [*of_tokens, *others]


def shapes_of(row: Mechanism, heads: int, key: int, value: int) -> tuple[Sizes, Sizes, Sizes]:
    """Axes of q, k and v after (batch, length)."""
    if row.layout.axes.count(",") == 3:
        return (heads, key), (heads, key), (heads, value)
    width = (heads * value,)
    return width, (heads,) if row.layout.heads else width, width
