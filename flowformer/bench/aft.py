"""AFT: its operations on (batch, length, channels), and this library's forms of it.

The heads of a shape are laid side by side: D = heads x channels. Besides q, k and v a form has inputs that a model
would learn, N(0, 0.1^2) here: a position bias, its factors, or filters. Training takes the gradients of those too.

Counts of floating-point operations are those of the matrix products, a multiplication and an addition counting two.
A pair is a query and a key that it sees: L^2 of them over L tokens, half of that if causal, and in AFT-local and
AFT-conv only those within the window.

    full, local    4 D a pair, for numerators and denominators; backward twice that
    factors        2 d' a pair more in AFT-full, once for all sequences, to multiply them out; backward three times that
    conv           2 (D + heads) a pair; backward twice that
    simple         no products, so no count
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer import ops
from flowformer.bench.operations import (
    count_tokens,
    forward,
    forward_and_backward,
    random_tensor,
    sequences_and_gradient,
)
from flowformer.bench.registry import (
    BACKENDS,
    Call,
    Contender,
    Function,
    Inputs,
    Operation,
    Outputs,
    Shape,
    add_contender,
    add_operation,
    reference,
)
from flowformer.core import backends as backend

LENGTHS = (1024, 4096)
# The truth holds length x length x D numbers of float64, several times where gradients flow.
CHECK_LENGTH = 384
# Outputs are means, whose weights are positive: no sum cancels. Gradients of keys and of what is learned are sums of
# differences from the mean, and lose a digit more.
TOLERANCES = {torch.float32: 2e-6}
GRADIENT_TOLERANCES = {torch.float32: 1e-5}
STD = 0.1  # of what is learned
WINDOW = 64
FACTOR_CHANNELS = 128
TAPS = 31
OPERATIONS = {
    "aft-bidirectional": (False, False), "aft-bidirectional-training": (False, True),
    "aft-causal": (True, False), "aft-causal-training": (True, True),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- inputs


class Given:
    """Inputs of a point: q, k, v and the gradient of the output, each (batch, length, D), and what forms learn."""

    def __init__(self, shape: Shape, dtype: torch.dtype, layout: str = "length-first") -> None:
        self.shape, self.dtype = shape, dtype
        self.q, self.k, self.v, self.upstream = (x.flatten(2) for x in sequences_and_gradient(shape, dtype, layout))

    @cached_property
    def bias(self) -> Tensor:
        """A free position bias, (length, length)."""
        return _learned((self.shape.length, self.shape.length), 10, self.dtype)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Factors of a position bias, (length, d') each."""
        return make_factors(self.shape.length, self.dtype)


def _learned(size: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return STD * random_tensor(size, seed, dtype)


def make_factors(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Factors of a position bias, (length, d') each."""
    one, other = (_learned((length, FACTOR_CHANNELS), seed, dtype) for seed in (11, 12))
    return one, other


def make_filters(heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Filters of AFT-conv, (heads, taps)."""
    return _learned((heads, TAPS), 13, dtype)


Take = Callable[[Given], tuple[Tensor, ...]]


class Form(NamedTuple):
    """A form of AFT, or its truth: called with what is given, it returns its function and the tensors for it.

    Attributes:
        function: ``(*tensors, causal) -> `` output (batch, length, D).
        take: Chooses the tensors; gradients are of those.
    """

    function: Function
    take: Take

    def __call__(self, given: Given) -> tuple[Function, tuple[Tensor, ...]]:
        """The function and its tensors."""
        return self.function, self.take(given)


def take_sequences(given: Given) -> tuple[Tensor, ...]:
    """q, k and v."""
    return given.q, given.k, given.v


def take_bias(given: Given) -> tuple[Tensor, ...]:
    """q, k, v and the position bias."""
    return given.q, given.k, given.v, given.bias


def take_factors(given: Given) -> tuple[Tensor, ...]:
    """q, k, v and the factors of a position bias."""
    return given.q, given.k, given.v, *given.factors


def take_filters(given: Given) -> tuple[Tensor, ...]:
    """q, keys of one channel for each head, v, and a filter for each head."""
    heads = given.shape.heads
    return given.q, given.k[..., :heads].contiguous(), given.v, make_filters(heads, given.dtype)


def take_filters_of_channels(given: Given) -> tuple[Tensor, ...]:
    """q, k, v and a filter for each channel."""
    return given.q, given.k, given.v, make_filters(given.k.shape[-1], given.dtype)


def _biased(function: Function, *arguments: Any) -> Function:
    """``function`` of q, k, v and a position bias, whether that comes as one tensor or as two factors."""

    def run(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, causal: bool) -> Tensor:
        return function(q, k, v, bias[0] if len(bias) == 1 else bias, *arguments, causal=causal)

    return run


def _inputs(shape: Shape, dtype: torch.dtype, layout: str) -> Inputs:
    return (Given(shape, dtype, layout),)


def _bind(form: Function, inputs: Inputs, *, causal: bool, training: bool, double: bool = False) -> Call:
    (given,) = inputs
    function, tensors = form(given)
    tensors = (*tensors, given.upstream) if training else tensors
    if double:
        tensors = tuple(x.double() for x in tensors)
    return (forward_and_backward if training else forward)(function, tensors, causal=causal)


def _truth(form: Function, inputs: Inputs, **kind: bool) -> Outputs:
    return _bind(form, inputs, **kind, double=True).run()


def _add_operation(name: str, causal: bool, training: bool) -> None:
    what = f"{'causal' if causal else 'bidirectional'} AFT, forward{' and backward' if training else ''}"
    kind = {"causal": causal, "training": training}
    add_operation(
        Operation(
            name, what, "length", LENGTHS, _inputs, partial(_bind, **kind), partial(_truth, **kind), None, count_tokens,
            check_length=CHECK_LENGTH, tolerances=GRADIENT_TOLERANCES if training else TOLERANCES,
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ floating point


class Kind(NamedTuple):
    """Which operation."""

    causal: bool
    training: bool


def _width(shape: Shape) -> int:
    return shape.heads * shape.channels


def full_flops(shape: Shape, kind: Kind) -> float:
    """AFT-full with a free bias, by the formula above."""
    pairs = shape.length**2 / (2 if kind.causal else 1)
    return (3 if kind.training else 1) * shape.batch * pairs * 4 * _width(shape)


def factor_flops(shape: Shape, kind: Kind) -> float:
    """AFT-full with factors, by the formula above."""
    pairs = shape.length**2 / (2 if kind.causal else 1)
    return full_flops(shape, kind) + (4 if kind.training else 1) * pairs * 2 * FACTOR_CHANNELS


def local_flops(shape: Shape, kind: Kind) -> float:
    """AFT-local, by the formula above."""
    pairs = shape.length * min(shape.length, WINDOW if kind.causal else 2 * WINDOW - 1)
    return (3 if kind.training else 1) * shape.batch * pairs * 4 * _width(shape)


def conv_flops(shape: Shape, kind: Kind, *, of_channels: bool) -> float:
    """AFT-conv, by the formula above."""
    heads = _width(shape) if of_channels else shape.heads
    pairs = shape.length * min(shape.length, TAPS)
    return (3 if kind.training else 1) * shape.batch * pairs * 2 * (_width(shape) + heads)


# ---------------------------------------------------------------------------------------------------------- contenders


def unavailable(inputs: Inputs) -> str | None:
    """Why AFT cannot run on these inputs, or ``None``."""
    given = inputs[0]
    if given.k.shape[-1] != given.v.shape[-1]:
        return "AFT has as many channels in values as in keys: --channels and --value-channels must be equal"
    return None


def _simple_unavailable(name: str, inputs: Inputs) -> str | None:
    try:
        backend.choose("aft_simple", name, inputs[0].q)
    except ValueError as error:
        return str(error)
    return unavailable(inputs)


def truths() -> dict[str, Form]:
    """The references, by form."""
    conv = reference.aft_conv
    return {
        "full": Form(_biased(reference.aft_full), take_bias),
        "full-factors": Form(_biased(reference.aft_full), take_factors),
        "local": Form(_biased(reference.aft_local, WINDOW), take_factors),
        "local-free": Form(_biased(reference.aft_local, WINDOW), take_bias),
        "simple": Form(reference.aft_simple, take_sequences),
        "conv": Form(conv, take_filters),
        "conv-channels": Form(conv, take_filters_of_channels),
    }


TRUTHS = truths() if hasattr(reference, "aft_full") else {}  # an old commit, to be compared with, may have no AFT


def add(name: str, operation: str, function: Function, form: str, about: str, **fields: Any) -> None:
    """Enter a contender that is to equal a form of AFT."""
    truth = TRUTHS[form]
    row = Contender(name, operation, Form(function, truth.take), truth, about, **{"unavailable": unavailable, **fields})
    add_contender(row)


def _add_ours(operation: str, kind: Kind) -> None:
    full, local = _biased(ops.aft_full), _biased(ops.aft_local, WINDOW)
    conv = partial(conv_flops, kind=kind, of_channels=False)
    conv_of_channels = partial(conv_flops, kind=kind, of_channels=True)
    for name, function, form, about, flops in (
        ("aft-full", full, "full", "ops.aft_full, a free position bias", partial(full_flops, kind=kind)),
        ("aft-full-factors", full, "full-factors", f"the same, a bias of two factors with {FACTOR_CHANNELS} channels",
         partial(factor_flops, kind=kind)),
        (f"aft-local-{WINDOW}", local, "local", f"ops.aft_local, a window of {WINDOW}, a bias of two factors",
         partial(local_flops, kind=kind)),
        (f"aft-local-{WINDOW}-free", local, "local-free", "the same, a free bias", partial(local_flops, kind=kind)),
        ("aft-conv", ops.aft_conv, "conv", f"ops.aft_conv, filters of {TAPS} taps", conv),
        ("aft-conv-channels", ops.aft_conv, "conv-channels", "the same, with as many heads as channels",
         conv_of_channels),
    ):  # fmt: skip
        add(name, operation, function, form, about, ours=True, flops=flops)
    for name in BACKENDS:
        add(
            f"aft-simple-{name}", operation, partial(ops.aft_simple, backend=name), "simple",
            f"ops.aft_simple, backend {name}", ours=True, unavailable=partial(_simple_unavailable, name),
        )  # fmt: skip


for _name, _kind in OPERATIONS.items():
    _add_operation(_name, *_kind)
    if TRUTHS:
        _add_ours(_name, Kind(*_kind))
