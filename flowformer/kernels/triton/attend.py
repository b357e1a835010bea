"""Linear attention of features by Triton kernels as operators of PyTorch: what mechanisms of this family call.

:mod:`flowformer.kernels.triton.linear` has the equations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import refuse_second_gradients
from flowformer.core.checks import Masks
from flowformer.core.feature_products import Past
from flowformer.kernels.triton.operators import (
    MOST_CHANNELS,
    check_channels,
    like_decays,
    operator,
    with_adjacent_channels,
)

MOST_FEATURES = 128  # of a group: see products()
GIVEN = 3  # of device.py: q and k are features already


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
    check_channels(op, q, v)
    if not causal:
        out, _ = torch.ops.flowformer.attend_triton(q, k, v, *masks, log_decay, weight, scale, feature_map, eps, False)
        return out, None, None
    assert memory is not None
    first = memory.new_zeros(0) if keys is None else keys
    out, after, memory, _ = torch.ops.flowformer.attend_causal_triton(
        q, k, v, masks.key, log_decay, weight, scale, first, memory, feature_map, eps, False
    )
    return out, None if keys is None else after, memory


def products(
    op: str, Q: Tensor, K: Tensor, V: Tensor, past: Past | None = None, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor, Past | None]:
    """Return both sums over keys of :mod:`flowformer.core.feature_products`, as its ``Products`` do.

    Args:
        op: Name of the operation, for messages.
        Q: Features of queries (batch, L, heads, F), any number of them, zeros at padding.
        K: Features of keys (batch, S, heads, F), likewise.
        V: Values (batch, S, heads, V).
        past: Of the tokens before, of a causal form; L is S then.
        log_decay: (batch, L, heads), of a causal form, zeros at padding.

    Returns:
        Totals (batch, L, heads, 1), products (batch, L, heads, V), and the past after the last token.

    Raises:
        ValueError: for too many channels of values.
    """
    if V.shape[-1] > MOST_CHANNELS:
        raise ValueError(f"{op}: the Triton kernels have {MOST_CHANNELS} channels of values at most, got {V.shape[-1]}")
    groups = -(-Q.shape[-1] // MOST_FEATURES)
    found = []
    for group in range(groups):
        q, k = (x.tensor_split(groups, -1)[group] for x in (Q, K))
        before = past and (past[0].tensor_split(groups, -1)[group], past[1].tensor_split(groups, -2)[group])
        found.append(_products_of_some(q, k, V, before, log_decay))
    total, product = (functools.reduce(torch.add, (parts[place] for parts in found)) for place in (0, 1))
    if past is None:
        return total, product, None
    after = [past for *_, past in found if past is not None]
    return total, product, (torch.cat([keys for keys, _ in after], -1), torch.cat([memory for _, memory in after], -2))


def _products_of_some(
    Q: Tensor, K: Tensor, V: Tensor, past: Past | None, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Past | None]:
    """The same for as many features as the kernels take at a time."""
    after: Past | None = None
    if past is None:
        out, totals = torch.ops.flowformer.attend_triton(Q, K, V, None, None, log_decay, None, None, GIVEN, None, True)
    else:
        out, keys, memory, totals = torch.ops.flowformer.attend_causal_triton(
            Q, K, V, None, log_decay, None, None, *past, GIVEN, None, True
        )
        after = keys, memory
    batch, length, heads = Q.shape[:3]
    return totals.view(batch, heads, length).transpose(1, 2).unsqueeze(-1), out, after


_TENSORS = "Tensor q, Tensor k, Tensor v"
_NUMBERS = "Tensor? log_decay, Tensor? weight, Tensor? scale"
_OPTIONS = "int feature_map, float? eps, bool undivided"
_CAUSAL = f"{_TENSORS}, Tensor? mask, {_NUMBERS}, Tensor keys, Tensor memory"
_BOTH = f"{_TENSORS}, Tensor? key_mask, Tensor? query_mask, {_NUMBERS}"


def _present(q: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Operators return tensors: empty ones where there is none."""
    return tuple(q.new_empty(0, dtype=torch.float32) if x is None else x for x in tensors)


def _fake_totals(q: Tensor, eps: float | None, undivided: bool) -> Tensor:
    wanted = undivided or eps is not None
    return q.new_empty((q.shape[0] * q.shape[2], q.shape[1]) if wanted else (0,), dtype=torch.float32)


def _fake_numbers(q: Tensor, *numbers: Tensor | None) -> tuple[Tensor, ...]:
    shapes = ((0,) if x is None else x.shape for x in numbers)
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


# ------------------------------------------------------------------------------------------------------------- causal


def _fake_causal(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (
        v.new_empty(v.shape),
        rest[4].new_empty(rest[4].shape),
        rest[5].new_empty(rest[5].shape),
        _fake_totals(q, *rest[7:]),
    )


@operator("attend_causal_triton", f"{_CAUSAL}, {_OPTIONS}", _fake_causal, 4)
def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Any, log_decay: Any, weight: Any, scale: Any, *rest: Any) -> Any:
    from flowformer.kernels.triton import linear

    keys, memory, *options = rest
    q, k, v = with_adjacent_channels(q, k, v)
    given = linear.Inputs(q, k, v, mask, mask, log_decay, weight, scale, *options)
    out, totals, after = linear.forward(given, linear.State(keys if given.sums else None, memory), True)
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
    f"{_CAUSAL}, Tensor out, Tensor totals, Tensor grad_out, Tensor? grad_keys, Tensor? grad_memory, "
    f"Tensor? grad_totals, bool of_decay, {_OPTIONS}",
    _fake_causal_backward,
    8,
)
def _causal_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, log_decay: Any, weight: Any, scale: Any, keys: Tensor, memory: Tensor,
    out: Tensor, totals: Tensor, grad_out: Tensor, grad_keys: Any, grad_memory: Any, grad_totals: Any, of_decay: bool,
    *options: Any,
) -> Any:  # fmt: skip
    from flowformer.kernels.triton import linear

    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    given = linear.Inputs(q, k, v, mask, mask, log_decay, weight, scale, *options)
    state = linear.State(keys if given.sums else None, memory)
    grad_state = linear.State(grad_keys if given.sums else None, grad_memory)
    of_decay = of_decay and log_decay is not None
    of_results = linear.OfResults(grad_out, grad_totals)
    found = linear.backward(given, state, True, out, totals, of_results, grad_state, of_decay)
    numbers = like_decays(found.log_decay, log_decay, q), *_present(q, found.weight, found.scale)
    return *found[:3], *numbers, *_shaped(found.state, keys, memory)


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], output[0], output[3])
    ctx.options = inputs[9:]
    if not ctx.options[-1]:
        ctx.mark_non_differentiable(output[3])


def _differentiate_causal(
    ctx: Any, grad_out: Tensor | None, grad_keys: Tensor | None, grad_memory: Tensor | None, grad_totals: Any
) -> Any:
    refuse_second_gradients("Triton")
    *given, out, totals = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_totals = _of_totals(grad_totals, totals, ctx.options)
    *grads, of_decay, of_weight, of_scale, of_keys, of_memory = torch.ops.flowformer.attend_causal_triton_backward(
        *given, out, totals, grad_out, grad_keys, grad_memory, grad_totals, ctx.needs_input_grad[4], *ctx.options
    )
    numbers = _absent((of_decay, of_weight, of_scale), given[4:7])
    return *grads, None, *numbers, of_keys, of_memory, *(None for _ in ctx.options)


def _of_totals(grad: Tensor | None, totals: Tensor, options: Any) -> Tensor | None:
    """The gradient of sums of weights where they are a result."""
    if not options[-1]:
        return None
    return torch.zeros_like(totals) if grad is None else grad.contiguous()


def _absent(grads: Any, given: Any) -> list[Tensor | None]:
    """Gradients of what was given, in its dtype."""
    return [None if x is None else grad.to(x.dtype) for grad, x in zip(grads, given, strict=True)]


# -------------------------------------------------------------------------------------------------------- bidirectional


def _fake_both(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return v.new_empty(*q.shape[:3], v.shape[3]), _fake_totals(q, *rest[6:])


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
    f"{_BOTH}, Tensor out, Tensor totals, Tensor grad_out, Tensor? grad_totals, bool of_decay, {_OPTIONS}",
    _fake_both_backward,
    6,
)
def _both_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    from flowformer.kernels.triton import linear

    out, totals, grad_out, grad_totals, of_decay, *options = rest[5:]
    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    given = linear.Inputs(q, k, v, *rest[:5], *options)
    of_decay = of_decay and given.log_decay is not None
    of_results = linear.OfResults(grad_out, grad_totals)
    found = linear.backward(given, None, False, out, totals, of_results, None, of_decay)
    return *found[:3], like_decays(found.log_decay, given.log_decay, q), *_present(q, found.weight, found.scale)


def _keep_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.options = inputs[8:]
    if not ctx.options[-1]:
        ctx.mark_non_differentiable(output[1])


def _differentiate_both(ctx: Any, grad_out: Tensor, grad_totals: Any) -> Any:
    refuse_second_gradients("Triton")
    *given, out, totals = ctx.saved_tensors
    grad_totals = _of_totals(grad_totals, totals, ctx.options)
    *grads, of_decay, of_weight, of_scale = torch.ops.flowformer.attend_triton_backward(
        *given, out, totals, grad_out, grad_totals, ctx.needs_input_grad[5], *ctx.options
    )
    numbers = _absent((of_decay, of_weight, of_scale), given[5:8])
    return *grads, None, None, *numbers, *(None for _ in ctx.options)


torch.library.register_autograd("flowformer::attend_causal_triton", _differentiate_causal, setup_context=_keep_causal)
torch.library.register_autograd("flowformer::attend_triton", _differentiate_both, setup_context=_keep_both)
