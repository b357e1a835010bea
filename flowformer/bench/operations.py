"""The operations of attention on (batch, length, heads, channels): whole sequences, training, and one step of decoding.

Counts of floating-point operations are those of the matrix products, a multiplication and an addition counting two.
For one token and head, with K key and V value channels:

    causal           2 (2 K V + C / 2 (K + V))    the K x V matrix is read and added to, and the token meets half of its
                                                  chunk of C = 32 tokens twice, in Q K^T and in the product with V
    bidirectional    2 (2 K V)                    the K x V matrix is added to and read
    backward         3 times the causal forward, which it partly repeats; 2 times the bidirectional
    SDPA, causal     2 (L / 2 (K + V))            over L tokens, half of them masked; backward 2.5 times, with the
                                                  repeated Q K^T
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer import ops
from flowformer.bench.registry import (
    TOLERANCES,
    Call,
    Function,
    Inputs,
    Operation,
    Outputs,
    Shape,
    add_operation,
)

CHUNK = 32  # tokens of a chunk in the count of operations, whatever an implementation takes
PERIOD = 4096  # tokens after which the context of a step repeats: a million distinct ones would fill the memory
PREFILL = 65_536  # tokens of context at a time
LENGTHS = (1024, 4096, 16_384)
# Gradients of queries and keys are small differences of large terms, and lose more to rounding than outputs do.
GRADIENT_TOLERANCES = {**TOLERANCES, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
CONTEXTS = (10, 1000, 100_000, 1_000_000)


# ------------------------------------------------------------------------------------------------------ floating point


def causal_flops(shape: Shape) -> float:
    """Forward, by the formula above."""
    K, V = shape.channels, shape.value_channels
    return shape.batch * shape.length * shape.heads * 2 * (2 * K * V + CHUNK / 2 * (K + V))


def bidirectional_flops(shape: Shape) -> float:
    """Forward, by the formula above."""
    return shape.batch * shape.length * shape.heads * 2 * 2 * shape.channels * shape.value_channels


def softmax_flops(shape: Shape, *, causal: bool) -> float:
    """Forward, by the formula above."""
    pairs = shape.length**2 / (2 if causal else 1)
    return shape.batch * shape.heads * pairs * 2 * (shape.channels + shape.value_channels)


# ----------------------------------------------------------------------------------------------------- whole sequences


def random_tensor(size: tuple[int, ...], seed: int, dtype: torch.dtype, layout: str = "length-first") -> Tensor:
    """N(0, 1) numbers, the same whatever the dtype and layout but for rounding."""
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "heads-first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor


def sequences(shape: Shape, dtype: torch.dtype, layout: str) -> Inputs:
    """q, k (batch, length, heads, K) and v (batch, length, heads, V)."""
    size = (shape.batch, shape.length, shape.heads)
    channels = (shape.channels, shape.channels, shape.value_channels)
    return tuple(random_tensor((*size, width), seed, dtype, layout) for seed, width in enumerate(channels))


def sequences_and_gradient(shape: Shape, dtype: torch.dtype, layout: str) -> Inputs:
    """q, k, v, and the gradient of the output, shaped like v."""
    size = (shape.batch, shape.length, shape.heads, shape.value_channels)
    return *sequences(shape, dtype, layout), random_tensor(size, 3, dtype, layout)


def forward(function: Function, inputs: Inputs, *, causal: bool) -> Call:
    """``function(*inputs, causal=...)``, which returns one tensor or several, without gradients."""

    @torch.no_grad()
    def run() -> Outputs:
        return _as_outputs(function(*inputs, causal=causal))

    return Call(run)


def forward_and_backward(function: Function, inputs: Inputs, *, causal: bool) -> Call:
    """The same and the gradients of all inputs but the last, which is the gradient of each tensor returned."""
    *tensors, upstream = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def run() -> Outputs:
        outs = _as_outputs(function(*leaves, causal=causal))
        grads = torch.autograd.grad(outs, leaves, [upstream] * len(outs))
        return (*(out.detach() for out in outs), *grads)

    return Call(run)


def _as_outputs(result: Tensor | Outputs) -> Outputs:
    return (result,) if isinstance(result, Tensor) else result


def forward_truth(reference: Function, inputs: Inputs, *, causal: bool) -> Outputs:
    """Output of the reference."""
    return forward(reference, tuple(x.double() for x in inputs), causal=causal).run()


def forward_and_backward_truth(reference: Function, inputs: Inputs, *, causal: bool) -> Outputs:
    """Output and gradients of the reference."""
    return forward_and_backward(reference, tuple(x.double() for x in inputs), causal=causal).run()


def count_tokens(shape: Shape) -> int:
    """Tokens of a call on whole sequences."""
    return shape.batch * shape.length


def _times(factor: float, flops: Callable[[Shape], float]) -> Callable[[Shape], float]:
    return lambda shape: factor * flops(shape)


for _name, _causal, _flops, _training in (
    ("causal", True, causal_flops, 4),
    ("bidirectional", False, bidirectional_flops, 3),
):
    add_operation(
        Operation(
            _name, f"{_name} attention, forward", "length", LENGTHS, sequences,
            partial(forward, causal=_causal), partial(forward_truth, causal=_causal), _flops, count_tokens,
        )
    )  # fmt: skip
    add_operation(
        Operation(
            f"{_name}-training", f"{_name} attention, forward and backward", "length", LENGTHS, sequences_and_gradient,
            partial(forward_and_backward, causal=_causal), partial(forward_and_backward_truth, causal=_causal),
            _times(_training, _flops), count_tokens, tolerances=GRADIENT_TOLERANCES,
        )
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- one decoding step


class Token(NamedTuple):
    """What a step is made from.

    Attributes:
        q: Query of the token, (batch, heads, K).
        k: Key of the token, (batch, heads, K).
        v: Value of the token, (batch, heads, V).
        context: q, k and v of up to :data:`PERIOD` tokens, (batch, tokens, heads, channels), which repeat.
        length: Tokens of context.
        states: States after the context that contenders made before, by what they are.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    context: tuple[Tensor, Tensor, Tensor]
    length: int
    states: dict[str, Any]

    def pieces(self, size: int = PREFILL) -> list[list[Tensor]]:
        """The context as tensors (batch, up to ``size`` tokens, heads, channels)."""
        counts = [min(size, self.length - start) for start in range(0, self.length, size)]
        # All but the last are whole periods, so each piece starts where a period does.
        return [[_repeat(tensor, count) for tensor in self.context] for count in counts]


def _repeat(tensor: Tensor, length: int) -> Tensor:
    times = -(-length // tensor.shape[1])
    return tensor.repeat(1, times, 1, 1)[:, :length] if times > 1 else tensor[:, :length]


def token(shape: Shape, dtype: torch.dtype, layout: str) -> Inputs:
    """A :class:`Token` after ``shape.length`` others."""
    tokens = min(shape.length, PERIOD)
    tensors = sequences(Shape(**{**vars(shape), "length": tokens + 1}), dtype, layout)
    q, k, v = (x[:, -1].contiguous() for x in tensors)
    return (Token(q, k, v, tuple(x[:, :-1] for x in tensors), shape.length, {}),)  # pyright: ignore[reportArgumentType]


def step(function: Function, inputs: Inputs) -> Call:
    """``function(token)`` makes the state and returns the step and the state's bytes; the step alone is timed."""
    (given,) = inputs
    with torch.no_grad():
        take, state_bytes = function(given)

    @torch.no_grad()
    def run() -> Outputs:
        return (take(given.q, given.k, given.v),)

    return Call(run, state_bytes)


def step_truth(reference: Function, inputs: Inputs) -> Outputs:
    """Last output of the reference on context and token."""
    (given,) = inputs
    new = (given.q, given.k, given.v)
    whole = [
        torch.cat([_repeat(past, given.length), x[:, None]], 1) for past, x in zip(given.context, new, strict=True)
    ]
    return (reference(*whole, causal=True)[:, -1],)


def prefill(whole: Function, pieces: Iterable[Iterable[Tensor]], *learned: Any) -> Any:
    """The state of a causal operation after a context that comes in pieces."""
    state: Any = None
    for piece in pieces:
        _, state = whole(*piece, *learned, causal=True, initial_state=state, return_state=True)
    return state


def flow_state(given: Token) -> ops.FlowState:
    """State of causal Flow-Attention after the context, computed in parallel by whichever backend is chosen."""
    if "flow" not in given.states:
        given.states["flow"] = prefill(ops.flow_attention, given.pieces())
    return given.states["flow"]


add_operation(
    Operation(
        "step", "one token of decoding", "context", CONTEXTS, token, step, step_truth, None,
        lambda shape: shape.batch, check_length=1000, measure_memory=False,
    )
)  # fmt: skip
