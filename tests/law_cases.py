"""How the laws call each mechanism: shapes of its inputs, and the variants in which they are checked.

A mechanism that is not named here is checked in one variant, without options or learned tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from flowformer import ops
from flowformer.mechanisms import Mechanism, find_attention, list_attentions

Sizes = tuple[int, ...]

# The float64 truth of each operation, by the operation's name.
reference = SimpleNamespace(
    **{find_attention(name).operation.__name__: find_attention(name).truth for name in list_attentions()}
)


@dataclass(frozen=True)
class Variant:
    """One way to call an operation.

    Attributes:
        options: Keyword arguments of the operation, of its truth, of its step and of its state.
        learned: Shapes of the learned tensors that the operation takes after v and the step after the state, for
            sequences of up to ``length`` tokens and for ``heads``. One entry for each argument: a ``torch.Size``, or a
            tuple of them where the argument is a tuple of tensors; ``None`` for an argument that is absent.
        quadratic: Whether a learned tensor is quadratic in length, and so memory too.
        decays: Whether the first learned tensor is of log-decays. A variant that decays knows the order of tokens, and
            has no cross-attention.
        by_token: Whether those are of tokens, (batch, length, heads): then they are an input like q, k and v, and
            ``learned`` gives the others.
        ordered: Whether the variant knows the order of tokens otherwise.
        drawn: Shapes of the random tensors that the operation takes after v, before the learned ones, for ``heads`` and
            the channels of keys. They have no gradients.
        by_channels: Whether ``learned`` takes the channels of keys as well.
        scale: Standard deviation of the learned tensors.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    learned: Callable[..., tuple[Any, ...]] = lambda length, heads: ()
    quadratic: bool = False
    decays: bool = False
    by_token: bool = False
    ordered: bool = False
    drawn: Callable[[int, int], tuple[torch.Size, ...]] = lambda heads, channels: ()
    by_channels: bool = False
    scale: float = 1.0


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


def _rotations(heads: int, channels: int) -> tuple[torch.Size, ...]:
    return (torch.Size((2, channels, 2)),)


def _projection(length: int, heads: int) -> tuple[Any, ...]:
    return (torch.Size((3, length)),)


def _projections_by_head(length: int, heads: int) -> tuple[Any, ...]:
    return ((torch.Size((heads, 3, length)), torch.Size((heads, 3, length))),)


def _tables_by_head(length: int, heads: int) -> tuple[Any, ...]:
    return (torch.Size((heads, length, length)),)


def _dense_factors(length: int, heads: int, channels: int) -> tuple[Any, ...]:
    root = math.isqrt(length) + 1
    return ((torch.Size((heads, channels, root)), torch.Size((heads, channels, root))),)


def _landmarks(length: int, heads: int, channels: int) -> tuple[Any, ...]:
    width = torch.Size((channels,))
    return ((torch.Size((channels, channels)), width, width), torch.Size((heads, 5)))


VARIANTS: dict[str, dict[str, Variant]] = {
    "flow": {
        **{preset: Variant({"preset": preset}) for preset in ops.PRESETS if preset != "distance"},
        "no-competition": Variant({"competition": None}),
        "no-allocation": Variant({"allocation": False}),
        "rescale": Variant({"rescale": True}),
        "relu": Variant({"feature_map": "relu"}),
        "decay": Variant({"decay": "learned", "feature_map": "elu"}, _heads, decays=True),
        "distance": Variant({"preset": "distance"}, decays=True, by_token=True),
        "temperature": Variant({"temperature": True, "feature_map": "softmax", "clamp": 8.0}, _temperatures),
    },
    "linear": {
        "default": Variant(),
        "decay": Variant({"decay": "learned"}, _heads, decays=True),
        "decay-token": Variant({"decay": "token"}, decays=True, by_token=True),
    },
    "softmax": {
        "default": Variant(),
        "rotary": Variant({"rotary": True}, ordered=True),
        "decay-token": Variant({"decay": "token"}, decays=True, by_token=True),
    },
    "mobile": {
        "default": Variant(),
        "normalized": Variant({"normalize": True}),
        "no-competition": Variant({"competition": None}),
        "heads": Variant({"competition": "heads", "normalize": True}),
        "no-allocation": Variant({"allocation": False}),
        "no-clamp": Variant({"clamp": None}),
        # eps bounds what is divided by: with 1e-6 and relu, outputs of few heads and channels are beyond float16.
        "relu": Variant({"feature_map": "relu", "eps": 1e-2}),
    },
    # Of the size that projections to rank 256 have in a new module: with 1, scores at length 65,536 are in
    # the hundreds, where rounding a score to float32 changes its exponential by 3e-5.
    "linformer": {
        "shared": Variant(learned=_projection, scale=0.036),
        "by-head": Variant(learned=_projections_by_head, scale=0.036),
    },
    "nystromformer": {"conv": Variant({"num_landmarks": 4, "value_conv": 5}, _filters)},
    # With dot products, which make outputs depend on keys; tests/mechanisms/test_synthesizer.py has the others.
    "synthesizer": {
        "random": Variant({"kind": "random"}, _tables_by_head, quadratic=True),
        "factorized-dense": Variant({"kind": "factorized_dense"}, _dense_factors, by_channels=True),
    },
    "soft": {"conv": Variant({"num_landmarks": 4, "value_conv": 5, "iterations": 8}, _landmarks, by_channels=True)},
    "aft_full": {"factors": Variant(learned=_factors), "free": Variant(learned=_table, quadratic=True)},
    "aft_local": {
        "factors": Variant({"window": 3}, _factors),
        "free": Variant({"window": 40}, _table, quadratic=True),
        "hard": Variant({"window": 3, "hard": True}, _factors),
    },
    "reformer": {"paper": Variant({"chunk_length": 4}, drawn=_rotations)},
    "sinkhorn": {"top": Variant({"bucket_length": 4, "num_top": 2})},
    "aft_conv": {"default": Variant(learned=_filters), "hard": Variant({"hard": True}, _filters)},
}


def variants_of(row: Mechanism) -> Mapping[str, Variant]:
    """The ways to call a mechanism, by name."""
    return VARIANTS.get(row.name, {"default": Variant()})


def shapes_of(row: Mechanism, heads: int, key: int, value: int) -> tuple[Sizes, Sizes, Sizes]:
    """Axes of q, k and v after (batch, length)."""
    if row.layout.axes.count(",") == 3:
        return (heads, key), (heads, key), (heads, value)
    width = (heads * value,)
    return width, (heads,) if row.layout.heads else width, width
