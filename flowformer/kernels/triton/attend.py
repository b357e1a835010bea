"""Linear attention of features by Triton kernels as operators of PyTorch: what mechanisms of this family call.

:mod:`flowformer.kernels.triton.linear` has the equations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import refuse_second_gradients
from flowformer.core.checks import Masks
from flowformer.kernels.triton.operators import like_decays, operator, with_adjacent_channels

MOST_CHANNELS = 256  # of keys and of values, behind the feature map


def attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, masks: Masks, *, feature_map: int, log_decay: Tensor | None = None,
    weight: Tensor | None = None, scale: Tensor | None = None, eps: float | None = None, causal: bool = False,
    keys: Tensor | None = None, memory: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Linear attention of features.

    Args:
        op: Name of the operation, for messages.
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        masks: Which keys and queries are real.
        feature_map: Of queries and keys, by its number in device.py.
        log_decay: (heads,) or (batch, L, heads).
        weight: Of sources, (batch, S, heads).
        scale: Of sinks, (batch, L, heads), not zero.
        eps: Outputs are divided by the sums of weights and eps; ``None``: they are not.
        causal: Which form.
        keys: The sum of features of keys before the first token, (batch, heads, K); where ``eps`` is given.
        memory: The sum of their products with values, (batch, heads, K, V), float64; if causal.

    Returns:
        Output (batch, L, heads, V), and ``keys`` and ``memory`` after the last token.

    Raises:
        ValueError: for too many channels.
    """
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MOST_CHANNELS:
        raise ValueError(f"{op}: the Triton kernels have {MOST_CHANNELS} channels at most, got {widest}")
    if not causal:
        out, _ = torch.ops.flowformer.attend_triton(q, k, v, *masks, log_decay, weight, scale, feature_map, eps)
        return out, None, None
    assert memory is not None
    first = memory.new_zeros(0) if keys is None else keys
    out, after, memory, _ = torch.ops.flowformer.attend_causal_triton(
        q, k, v, masks.key, log_decay, weight, scale, first, memory, feature_map, eps
    )
    return out, None if keys is None else after, memory


_TENSORS = "Tensor q, Tensor k, Tensor v"
_NUMBERS = "Tensor? log_decay, Tensor? weight, Tensor? scale"
_OPTIONS = "int feature_map, float? eps"
_CAUSAL = f"{_TENSORS}, Tensor? mask, {_NUMBERS}, Tensor keys, Tensor memory"
_BOTH = f"{_TENSORS}, Tensor? key_mask, Tensor? query_mask, {_NUMBERS}"


def _present(q: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Operators return tensors: empty ones where there is none."""
    return tuple(q.new_empty(0, dtype=torch.float32) if x is None else x for x in tensors)


def _fake_totals(q: Tensor, eps: float | None) -> Tensor:
    return q.new_empty((0,) if eps is None else (q.shape[0] * q.shape[2], q.shape[1]), dtype=torch.float32)


def _fake_numbers(q: Tensor, *numbers: Tensor | None) -> tuple[Tensor, ...]:
    shapes = ((0,) if x is None else x.shape for x in numbers)
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


# ------------------------------------------------------------------------------------------------------------- causal


def _fake_causal(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (
        v.new_empty(v.shape),
        rest[4].new_empty(rest[4].shape),
        rest[5].new_empty(rest[5].shape),
        _fake_totals(q, rest[7]),
    )


@operator("attend_causal_triton", f"{_CAUSAL}, {_OPTIONS}", _fake_causal, 4)
def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Any, log_decay: Any, weight: Any, scale: Any, *rest: Any) -> Any:
    from flowformer.kernels.triton import linear

    keys, memory, feature_map, eps = rest
    q, k, v = with_adjacent_channels(q, k, v)
    given = linear.Inputs(q, k, v, mask, mask, log_decay, weight, scale, feature_map, eps)
    out, totals, after = linear.forward(given, linear.State(None if eps is None else keys, memory), True)
    return out, *_shaped(after, keys, memory), *_present(q, totals)


def _shaped(state: Any, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """A state by heads in the shapes of that which was given; an empty sum of keys where there is none."""
    of_keys = torch.zeros_like(keys) if state.keys is None else state.keys
    return of_keys.reshape(keys.shape).to(keys.dtype), state.memory.reshape(memory.shape).to(memory.dtype)


def _fake_causal_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    return (
        *grads,
        like_decays(None, rest[1], q),
        *_fake_numbers(q, *rest[2:4]),
        *(part.new_empty(part.shape) for part in rest[4:6]),
    )


@operator(
    "attend_causal_triton_backward",
    f"{_CAUSAL}, Tensor out, Tensor totals, Tensor grad_out, Tensor? grad_keys, Tensor? grad_memory, bool of_decay, "
    f"{_OPTIONS}",
    _fake_causal_backward,
    8,
)
def _causal_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, log_decay: Any, weight: Any, scale: Any, keys: Tensor, memory: Tensor,
    out: Tensor, totals: Tensor, grad_out: Tensor, grad_keys: Any, grad_memory: Any, of_decay: bool, *options: Any,
) -> Any:  # fmt: skip
    from flowformer.kernels.triton import linear

    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    given = linear.Inputs(q, k, v, mask, mask, log_decay, weight, scale, *options)
    divides = given.eps is not None
    state = linear.State(keys if divides else None, memory)
    grad_state = linear.State(grad_keys if divides else None, grad_memory)
    of_decay = of_decay and log_decay is not None
    found = linear.backward(given, state, True, out, totals, grad_out, grad_state, of_decay)
    numbers = like_decays(found.log_decay, log_decay, q), *_present(q, found.weight, found.scale)
    return *found[:3], *numbers, *_shaped(found.state, keys, memory)


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], output[0], output[3])
    ctx.mark_non_differentiable(output[3])
    ctx.options = inputs[9:]


def _differentiate_causal(
    ctx: Any, grad_out: Tensor | None, grad_keys: Tensor | None, grad_memory: Tensor | None, _: Any
) -> Any:
    refuse_second_gradients("Triton")
    *given, out, totals = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    *grads, of_decay, of_weight, of_scale, of_keys, of_memory = torch.ops.flowformer.attend_causal_triton_backward(
        *given, out, totals, grad_out, grad_keys, grad_memory, ctx.needs_input_grad[4], *ctx.options
    )
    numbers = _absent((of_decay, of_weight, of_scale), given[4:7])
    return *grads, None, *numbers, of_keys, of_memory, *(None for _ in ctx.options)


def _absent(grads: Any, given: Any) -> list[Tensor | None]:
    """Gradients of what was given, in its dtype."""
    return [None if x is None else grad.to(x.dtype) for grad, x in zip(grads, given, strict=True)]


# -------------------------------------------------------------------------------------------------------- bidirectional


def _fake_both(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return v.new_empty(*q.shape[:3], v.shape[3]), _fake_totals(q, rest[6])


@operator("attend_triton", f"{_BOTH}, {_OPTIONS}", _fake_both, 2)
def _both(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    from flowformer.kernels.triton import linear

    q, k, v = with_adjacent_channels(q, k, v)
    out, totals, _ = linear.forward(linear.Inputs(q, k, v, *rest), None, False)
    return out, *_present(q, totals)


def _fake_both_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), like_decays(None, rest[2], q), *_fake_numbers(q, *rest[3:5])


@operator(
    "attend_triton_backward",
    f"{_BOTH}, Tensor out, Tensor totals, Tensor grad_out, bool of_decay, {_OPTIONS}",
    _fake_both_backward,
    6,
)
def _both_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    from flowformer.kernels.triton import linear

    out, totals, grad_out, of_decay, *options = rest[5:]
    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    given = linear.Inputs(q, k, v, *rest[:5], *options)
    of_decay = of_decay and given.log_decay is not None
    found = linear.backward(given, None, False, out, totals, grad_out, None, of_decay)
    return *found[:3], like_decays(found.log_decay, given.log_decay, q), *_present(q, found.weight, found.scale)


def _keep_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[8:]


def _differentiate_both(ctx: Any, grad_out: Tensor, _: Any) -> Any:
    refuse_second_gradients("Triton")
    *given, out, totals = ctx.saved_tensors
    *grads, of_decay, of_weight, of_scale = torch.ops.flowformer.attend_triton_backward(
        *given, out, totals, grad_out, ctx.needs_input_grad[5], *ctx.options
    )
    numbers = _absent((of_decay, of_weight, of_scale), given[5:8])
    return *grads, None, None, *numbers, *(None for _ in ctx.options)


torch.library.register_autograd("flowformer::attend_causal_triton", _differentiate_causal, setup_context=_keep_causal)
torch.library.register_autograd("flowformer::attend_triton", _differentiate_both, setup_context=_keep_both)
