"""What mechanisms are given besides q, k and v when they are timed, and how many operations they take.

A mechanism that is not named here is timed in one variant, without options or learned tensors, and not counted.

Counts are those of the matrix products, whether or not they decay, a multiplication and an addition counting two. For
one token and head, with K key and V value channels:

    causal           2 (2 K V + C / 2 (K + V))    the K x V matrix is read and added to, and the token meets half of its
                                                  chunk of C = 32 tokens twice, in Q K^T and in the product with V
    bidirectional    2 (2 K V)                    the K x V matrix is added to and read
    backward         3 times the causal forward, which it partly repeats; 2 times the bidirectional
    softmax, causal  2 (L / 2 (K + V))            over L tokens, half of them masked; backward 2.5 times, with the
                                                  repeated Q K^T

For AFT on D channels, where a pair is a query and a key that it sees: L^2 of them over L tokens, half of that if
causal, and in AFT-local and AFT-conv only those within the window:

    full, local    4 D a pair, for numerators and denominators; backward twice that
    factors        2 d' a pair more in AFT-full, once for all sequences, to multiply them out; backward three times that
    conv           2 (D + heads) a pair; backward twice that
    simple         no products, so no count
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from flowformer.bench.registry import Shape
from flowformer.mechanisms import Mechanism

CHUNK = 32  # tokens of a chunk in the count of operations; implementations may take others
WINDOW = 64
FACTOR_CHANNELS = 128
TAPS = 31
FEATURES = 64  # of random features, as many as there are channels in most models
LINFORMER_RANK, SYNTHESIZER_RANK = 256, 32  # as their modules have them
RANDOM_BLOCKS = (128, 3)  # rows, and random blocks of each, as in the module of BigBird
CLUSTERS, CLUSTER_WINDOW = 8, 64  # as in the module of routing attention
Draw = Callable[..., Tensor]  # of sizes


class Kind(NamedTuple):
    """Which operation on whole sequences."""

    causal: bool
    training: bool


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to call a mechanism's operation.

    Attributes:
        name: What is added to the mechanism's name; empty for the mechanism itself.
        about: What is added to the line for help.
        options: Keyword arguments of the operation, its truth, its step and its state.
        learned: ``(draw, length, heads) -> `` what the operation takes after v and the step after the state: tensors
            (or tuples of them) that ``draw(*sizes)`` makes. Those of integers are random numbers, without gradients.
        by_channels: Whether ``learned`` takes the channels of keys as well.
        per_channel: Whether there are as many heads as channels, where the mechanism has a key for each head.
        decodes: Whether steps are timed: not where a learned tensor is quadratic in the length of the context.
        flops: ``(shape, kind) -> `` floating-point operations.
        squares: Tensors with a number for each head and pair of tokens that are in memory at a time.
    """

    name: str = ""
    about: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    learned: Callable[..., tuple[Any, ...]] = lambda draw, length, heads: ()
    by_channels: bool = False
    per_channel: bool = False
    decodes: bool = True
    flops: Callable[[Shape, Kind], float] | None = None
    squares: int = 0

    def needs_bytes(self, shape: Shape) -> float:
        """Memory of a call above its inputs, where that is quadratic in the length; else 0."""
        return 4.0 * self.squares * shape.batch * shape.heads * shape.length**2


PLAIN = Variant()


def variants_of(mechanism: Mechanism) -> tuple[Variant, ...]:
    """The ways in which a mechanism is timed."""
    return VARIANTS.get(mechanism.name, (PLAIN,))


def find_variant(mechanism: str, name: str = "") -> Variant:
    """One of the variants of a mechanism."""
    return next(variant for variant in VARIANTS.get(mechanism, (PLAIN,)) if variant.name == name)


# ------------------------------------------------------------------------------------------------------ floating point


def linear_flops(shape: Shape, kind: Kind) -> float:
    """Attention by a K x V matrix, by the formula above."""
    K, V = shape.channels, shape.value_channels
    tokens = shape.batch * shape.length * shape.heads
    if kind.causal:
        return (4 if kind.training else 1) * tokens * 2 * (2 * K * V + CHUNK / 2 * (K + V))
    return (3 if kind.training else 1) * tokens * 2 * 2 * K * V


def _pairs(shape: Shape, kind: Kind) -> float:
    return shape.length**2 / (2 if kind.causal else 1)


def softmax_flops(shape: Shape, kind: Kind) -> float:
    """Softmax attention, by the formula above."""
    once = shape.batch * shape.heads * _pairs(shape, kind) * 2 * (shape.channels + shape.value_channels)
    return (3.5 if kind.training else 1) * once


def full_flops(shape: Shape, kind: Kind) -> float:
    """AFT-full with a free bias, by the formula above."""
    return (3 if kind.training else 1) * shape.batch * _pairs(shape, kind) * 4 * shape.width


def factor_flops(shape: Shape, kind: Kind) -> float:
    """AFT-full with factors, by the formula above."""
    return full_flops(shape, kind) + (4 if kind.training else 1) * _pairs(shape, kind) * 2 * FACTOR_CHANNELS


def local_flops(shape: Shape, kind: Kind) -> float:
    """AFT-local, by the formula above."""
    pairs = shape.length * min(shape.length, WINDOW if kind.causal else 2 * WINDOW - 1)
    return (3 if kind.training else 1) * shape.batch * pairs * 4 * shape.width


def conv_flops(shape: Shape, kind: Kind, *, per_channel: bool) -> float:
    """AFT-conv, by the formula above."""
    heads = shape.width if per_channel else shape.heads
    pairs = shape.length * min(shape.length, TAPS)
    return (3 if kind.training else 1) * shape.batch * pairs * 2 * (shape.width + heads)


# ---------------------------------------------------------------------------------------------------------------- data


def _table(draw: Draw, length: int, heads: int) -> tuple[Any, ...]:
    return (draw(length, length),)


def _factors(draw: Draw, length: int, heads: int) -> tuple[Any, ...]:
    return ((draw(length, FACTOR_CHANNELS), draw(length, FACTOR_CHANNELS)),)


def _filters(draw: Draw, length: int, heads: int) -> tuple[Any, ...]:
    return (draw(heads, TAPS),)


def _decays(draw: Draw, length: int, heads: int) -> tuple[Any, ...]:
    return (-draw(heads).abs(),)


def _features(draw: Draw, length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return (10 * draw(FEATURES, channels),)  # of deviation 1


def _features_by_head(draw: Draw, length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return (None, 10 * draw(heads, FEATURES // 2, channels))  # a sine and a cosine of each


def _projections(draw: Draw, length: int, heads: int) -> tuple[Any, ...]:
    return ((draw(LINFORMER_RANK, length), draw(LINFORMER_RANK, length)),)


def _scores(draw: Draw, length: int, heads: int) -> tuple[Any, ...]:
    return ((draw(heads, length, SYNTHESIZER_RANK), draw(heads, SYNTHESIZER_RANK, length)),)


def _rotations(draw: Draw, length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return (draw(8, channels, 16),)  # hashes and half of the buckets, as its module has them


def _centroids(draw: Draw, length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return (draw(heads, CLUSTERS, channels),)


def _random_blocks(draw: Draw, length: int, heads: int) -> tuple[Any, ...]:
    return ((1e6 * draw(heads, *RANDOM_BLOCKS).float()).abs().int(),)  # random integers, whatever is drawn


def _landmarks(draw: Draw, length: int, heads: int, channels: int) -> tuple[Any, ...]:
    return ((draw(channels, channels), draw(channels), draw(channels)),)


_DECAY = {"about": ", decay of each head", "options": {"decay": "learned"}, "learned": _decays}
_LINEAR = (Variant(flops=linear_flops),)
_DECAYING = (*_LINEAR, Variant("decay", flops=linear_flops, **_DECAY))
_WINDOW = {"options": {"window": WINDOW}, "flops": local_flops}
_TAPS = {"about": f", filters of {TAPS} taps", "learned": _filters}
_FREE, _TWO = ", a free position bias", f", a position bias of two factors with {FACTOR_CHANNELS} channels"
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "flow": _DECAYING,
    "mobile": _LINEAR,
    "linear": _DECAYING,
    "performer": (Variant(about=f", {FEATURES} features", learned=_features, by_channels=True),),
    "rfa": (Variant(about=f", {FEATURES} features", learned=_features_by_head, by_channels=True),),
    "cosformer": (Variant(options={"max_length": 2**20}),),
    "softmax": (Variant(flops=softmax_flops), Variant("decay", flops=softmax_flops, **_DECAY)),
    "linformer": (Variant("", f", to {LINFORMER_RANK} rows", learned=_projections),),
    "bigbird": (Variant(about=f", {RANDOM_BLOCKS[1]} random blocks", learned=_random_blocks),),
    "reformer": (Variant("", ", 8 hashes", learned=_rotations, by_channels=True),),
    "routing": (
        Variant(about=f", {CLUSTERS} clusters of {CLUSTER_WINDOW} tokens", learned=_centroids, by_channels=True),
    ),
    "soft": (Variant(learned=_landmarks, by_channels=True),),
    "synthesizer": (Variant("", ", factorized random scores", {"kind": "factorized_random"}, _scores, squares=3),),
    "aft_full": (
        Variant("", _FREE, learned=_table, decodes=False, flops=full_flops),
        Variant("factors", _TWO, learned=_factors, flops=factor_flops),
    ),
    "aft_local": (
        Variant(f"{WINDOW}", f", a window of {WINDOW}{_TWO}", learned=_factors, **_WINDOW),
        Variant(f"{WINDOW}-free", f", a window of {WINDOW}{_FREE}", learned=_table, decodes=False, **_WINDOW),
    ),
    "aft_conv": (
        Variant(flops=partial(conv_flops, per_channel=False), **_TAPS),
        Variant("channels", per_channel=True, flops=partial(conv_flops, per_channel=True), **_TAPS),
    ),
}
