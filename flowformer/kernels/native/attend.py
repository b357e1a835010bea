"""Linear attention of features by the C++ kernels as operators of PyTorch: what mechanisms of this family call.

    out_i = a_i phi(q_i) . sum_j gamma(i, j) w_j phi(k_j) v_j^T

with weights w of sources and scales a of sinks, each or none; or divided by the sums of weights

    phi(q_i) . sum_j gamma(i, j) w_j phi(k_j) + eps

over the token and the earlier ones, or over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import adjacent, refuse_second_gradients
from flowformer.core.checks import Masks
from flowformer.core.feature_products import Past
from flowformer.kernels.native.arguments import (
    check_bounds,
    check_inputs,
    check_log_decay,
    check_one_mask,
    check_one_side,
    check_packing,
    check_part,
    check_whole,
)
from flowformer.kernels.native.calls import (
    AttendCall,
    FlowCall,
    StepCall,
    Tokens,
    empty_gradients,
    empty_log_decay_gradient,
    empty_out,
    like_log_decay,
    number_view,
    state_addresses,
    tokens_of,
)
from flowformer.kernels.native.kernels import View, address, contiguous, empty_like, run, view

MAPS = 4  # feature maps: see FlowCall in source/call.h
GIVEN = 3  # of these: q and k are features already


def attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, masks: Masks, *, feature_map: int, log_decay: Tensor | None = None,
    weight: Tensor | None = None, scale: Tensor | None = None, eps: float | None = None, causal: bool = False,
    keys: Tensor | None = None, memory: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Linear attention of features.

    Args:
        op: Name of the operation, for messages.
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        masks: Which keys and queries are real.
        feature_map: Of queries and keys: 0 sigmoid, 1 relu + 1e-6, 2 elu + 1, 3 none, they are features.
        log_decay: (heads,) or (batch, L, heads).
        weight: Of sources, (batch, S, heads).
        scale: Of sinks, (batch, L, heads).
        eps: Outputs are divided by the sums of weights and eps; ``None``: they are not.
        causal: Which form.
        keys: The sum of weighted features of keys before the first token, (batch, heads, K), float64; where ``eps`` is
            given. With ``memory``, or neither: then nothing is before.
        memory: The sum of their products with values, (batch, heads, K, V), float64; if causal.
        cu_seqlens: (N + 1,) boundaries of a packed batch of size 1; states are of batch N.

    Returns:
        Output (batch, L, heads, V), and ``keys`` (``None`` without ``eps``) and ``memory`` after the last token.
    """
    log_decay, weight, scale = (None if x is None else x.float() for x in (log_decay, weight, scale))
    if not causal:
        out = torch.ops.flowformer.attend_native(
            q, k, v, *masks, cu_seqlens, log_decay, weight, scale, feature_map, eps
        )
        return out, None, None
    out, *after = torch.ops.flowformer.attend_causal_native(
        q, k, v, masks.key, cu_seqlens, log_decay, weight, scale, keys, memory, feature_map, eps
    )
    return out, None if eps is None else after[0], after[1]


def products(
    op: str, Q: Tensor, K: Tensor, V: Tensor, past: Past | None = None, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor, Past | None]:
    """Return both sums over keys of :mod:`flowformer.core.feature_products`, as its ``Products`` do.

    Totals are the products with one more channel of values, of ones.

    Args:
        op: Name of the operation, for messages.
        Q: Features of queries (batch, L, heads, F), zeros at padding.
        K: Features of keys (batch, S, heads, F), likewise.
        V: Values (batch, S, heads, V).
        past: Of the tokens before, of a causal form; L is S then.
        log_decay: (batch, L, heads), of a causal form, zeros at padding.

    Returns:
        Totals (batch, L, heads, 1), products (batch, L, heads, V), and the past after the last token.
    """
    V = torch.nn.functional.pad(V, (0, 1), value=1.0)
    memory = None if past is None else torch.cat([past[1], past[0].unsqueeze(-1)], -1)
    out, _, memory = attend(
        op, Q, K, V, Masks(None, None), feature_map=GIVEN, log_decay=log_decay, causal=past is not None, memory=memory
    )
    after = None if memory is None else (memory[..., -1].contiguous(), memory[..., :-1].contiguous())
    product, total = out.split([V.shape[-1] - 1, 1], -1)  # not slices, whose gradients are padded and added up
    return total, product, after


def ratio(op: str, Q: Tensor, K: Tensor, V: Tensor, least: float) -> Tensor:
    """Return product / (total + least), (batch, L, heads, V), of the bidirectional form of :func:`products`."""
    return attend(op, Q, K, V, Masks(None, None), feature_map=GIVEN, eps=least)[0]


def attend_step(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: int, memory: Tensor, log_decay: Tensor | None = None,
    weight: Tensor | None = None, scale: Tensor | None = None, eps: float | None = None, keys: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """One token of the causal form.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        feature_map: As in :func:`attend`.
        memory: Before the token, (batch, heads, K, V), float64.
        log_decay: (heads,) or (batch, heads).
        weight: (batch, heads).
        scale: (batch, heads).
        eps: As in :func:`attend`.
        keys: Before the token, (batch, heads, K), float64; where ``eps`` is given.

    Returns:
        Output (batch, heads, V), and ``keys`` (``None`` without ``eps``) and ``memory`` after the token.
    """
    numbers = [None if x is None else x.float() for x in (log_decay, weight, scale)]
    given = [x for x in (q, k, v, *numbers, keys, memory) if x is not None]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        out, *after = torch.ops.flowformer.attend_step_native(q, k, v, *numbers, keys, memory, feature_map, eps)
        return out, None if eps is None else after[0], after[1]
    tokens = (x.unsqueeze(1) for x in (q, k, v))  # a sequence of one token: that has a backward pass
    numbers = [x if x is None or x.ndim == 1 else x.unsqueeze(1) for x in numbers]
    out, *after = torch.ops.flowformer.attend_causal_native(
        *tokens, None, None, *numbers, keys, memory, feature_map, eps
    )
    return out.squeeze(1), None if eps is None else after[0], after[1]


# ------------------------------------------------------------------------------------------------------------- checks


def _check_numbers(op: str, log_decay: Any, weight: Any, scale: Any, q: Tensor, k: Tensor) -> None:
    check_log_decay(op, log_decay, q)
    check_part(op, "weight", weight, k.shape[:-1], torch.float32, q)
    check_part(op, "scale", scale, q.shape[:-1], torch.float32, q)


def _check_options(op: str, feature_map: int, eps: float | None) -> None:
    if not 0 <= feature_map < MAPS:
        raise ValueError(f"flowformer::{op}: feature_map must be 0 to {MAPS - 1}, got {feature_map}")
    if eps is not None and not 0 <= eps < math.inf:
        raise ValueError(f"flowformer::{op}: eps must be finite and at least 0, or None, got {eps}")


def _state_shapes(q: Tensor, v: Tensor, batch: int, eps: float | None) -> tuple[tuple[int, ...], ...]:
    rows = (batch, q.shape[-2])
    return (0,) if eps is None else (*rows, q.shape[-1]), (*rows, q.shape[-1], v.shape[-1])


def _new_state(q: Tensor, v: Tensor, batch: int, eps: float | None) -> list[Tensor]:
    """Allocate a state; without eps its sums are empty."""
    return [q.new_empty(shape, dtype=torch.float64) for shape in _state_shapes(q, v, batch, eps)]


def _check_state(
    op: str, keys: Any, memory: Any, q: Tensor, v: Tensor, batch: int, eps: float | None, of: str = ""
) -> None:
    shapes = _state_shapes(q, v, batch, eps)
    check_part(op, f"{of}keys", keys, shapes[0], torch.float64, q)
    check_part(op, f"{of}memory", memory, shapes[1], torch.float64, q)


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_causal(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_seqlens: Any, log_decay: Any, weight: Any, scale: Any,
    keys: Any, memory: Any, feature_map: int, eps: float | None,
) -> None:  # fmt: skip
    """Check the arguments that the causal operators share."""
    check_inputs(op, q, k, v, 4, same_length=True)
    check_part(op, "mask", mask, q.shape[:2], torch.bool, q)
    check_packing(op, cu_seqlens, q, k, mask)
    _check_numbers(op, log_decay, weight, scale, q, k)
    _check_options(op, feature_map, eps)
    if eps is not None:
        check_whole(op, keys=keys, memory=memory)
    _check_state(op, keys, memory, q, v, _sequences(q, cu_seqlens), eps)


def _check_causal_backward(op: str, *given: Any) -> None:
    tensors, (grad_out, grad_keys, grad_memory, _), options = given[:10], given[10:14], given[14:]
    _check_causal(op, *tensors, *options)
    q, v = tensors[0], tensors[2]
    check_part(op, "grad_out", grad_out, v.shape, q.dtype, q)
    _check_state(op, grad_keys, grad_memory, q, v, _sequences(q, tensors[4]), options[1], "grad_")


def _check_both(
    op: str, q: Tensor, k: Tensor, v: Tensor, key: Any, query: Any, cu_seqlens: Any, log_decay: Any, weight: Any,
    scale: Any, feature_map: int, eps: float | None,
) -> None:  # fmt: skip
    """Check the arguments that the bidirectional operators share, but for values of masks and boundaries."""
    check_inputs(op, q, k, v, 4, same_length=False)
    check_part(op, "key_mask", key, k.shape[:2], torch.bool, q)
    check_part(op, "query_mask", query, q.shape[:2], torch.bool, q)
    check_packing(op, cu_seqlens, q, k, key, query)
    _check_numbers(op, log_decay, weight, scale, q, k)
    check_one_side(op, log_decay, q, k, key, query)
    _check_options(op, feature_map, eps)


def _check_both_backward(op: str, *given: Any) -> None:
    _check_both(op, *given[:9], *given[11:])
    q, v = given[0], given[2]
    check_part(op, "grad_out", given[9], (*q.shape[:3], v.shape[3]), q.dtype, q)


# ---------------------------------------------------------------------------------------------------------- operators


def _operator(name: str, arguments: str, returns: int) -> Callable[[Any], Any]:
    """Define an operator that returns so many tensors; the decorated function computes it on the CPU."""
    returned = "Tensor" if returns == 1 else f"({', '.join(['Tensor'] * returns)})"
    torch.library.define(f"flowformer::{name}", f"({arguments}, int feature_map, float? eps) -> {returned}")

    def register(function: Any) -> Any:
        torch.library.impl(f"flowformer::{name}", "cpu", function)
        return function

    return register


def _call(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tokens, sources: Tokens, log_decay: Any, weight: Any, scale: Any,
    feature_map: int, eps: float | None,
) -> AttendCall:  # fmt: skip
    """The call without its outputs. It holds addresses: what it is made of must live until it has run."""
    flow = FlowCall(
        q=view(q), k=view(k), v=view(v), sinks=sinks.side(), sources=sources.side(), sequences=len(sinks.rows),
        threads=torch.get_num_threads(), log_decay=number_view(log_decay),
        **_sizes(q.shape, v.shape, q.dtype, feature_map, eps),
    )  # fmt: skip
    return AttendCall(flow=flow, weight=number_view(weight), scale=number_view(scale), divides=eps is not None)


def _sizes(q: torch.Size, v: torch.Size, dtype: torch.dtype, feature_map: int, eps: float | None) -> dict[str, Any]:
    return {
        "heads": q[-2], "key_channels": q[-1], "value_channels": v[-1], "half": dtype == torch.bfloat16,
        "feature_map": feature_map, "eps": 0.0 if eps is None else eps,
    }  # fmt: skip


_TENSORS = "Tensor q, Tensor k, Tensor v"
_NUMBERS = "Tensor? log_decay, Tensor? weight, Tensor? scale"
_CAUSAL = f"{_TENSORS}, Tensor? mask, Tensor? cu_seqlens, {_NUMBERS}, Tensor? keys, Tensor? memory"


def _addresses(keys: Tensor | None, memory: Tensor | None) -> Any:
    return state_addresses([None, keys, None, memory])


@_operator("attend_causal_native", _CAUSAL, 3)
def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_seqlens: Any, *rest: Any) -> Any:
    op = "attend_causal_native"
    _check_causal(op, q, k, v, mask, cu_seqlens, *rest)
    check_bounds(op, cu_seqlens, q.shape[1])
    numbers, before, options = rest[:3], contiguous(*rest[3:5]), rest[5:]
    out, after = empty_like(v, mask is not None), _new_state(q, v, _sequences(q, cu_seqlens), options[1])
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    tokens = tokens_of(q, mask, cu_seqlens)
    call = _call(q, k, v, tokens, tokens, *numbers, *options)
    call.flow.out, call.flow.before, call.flow.after = view(out), _addresses(*before), _addresses(*after)
    run("attend_causal_forward", call)
    return out, *after


@torch.library.register_fake("flowformer::attend_causal_native")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_seqlens: Any, *rest: Any) -> Any:
    _check_causal("attend_causal_native", q, k, v, mask, cu_seqlens, *rest)
    return empty_like(v), *_new_state(q, v, _sequences(q, cu_seqlens), rest[-1])


# Gradients of q, k, v, log-decays (zeros where of_decay is false), weights, scales, and of the parts of the state:
# empty for what is absent.
_GRADIENTS = "Tensor grad_out, Tensor? grad_keys, Tensor? grad_memory, bool of_decay"


@_operator("attend_causal_native_backward", f"{_CAUSAL}, {_GRADIENTS}", 8)
def _causal_backward(q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_seqlens: Any, *rest: Any) -> Any:
    op = "attend_causal_native_backward"
    _check_causal_backward(op, q, k, v, mask, cu_seqlens, *rest)
    check_bounds(op, cu_seqlens, q.shape[1])
    numbers, before, grad_out = rest[:3], contiguous(*rest[3:5]), adjacent(rest[5])
    grad_after, of_decay, options = contiguous(*rest[6:8]), rest[8], rest[9:]
    grads = empty_gradients(q, k, v, mask is not None)
    grad_before = _new_state(q, v, _sequences(q, cu_seqlens), options[1])
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    tokens = tokens_of(q, mask, cu_seqlens)
    call = _call(q, k, v, tokens, tokens, *numbers, *options)
    call.flow.grad_out, call.flow.before = view(grad_out), _addresses(*before)
    call.flow.grad_after, call.flow.grad_before = _addresses(*grad_after), _addresses(*grad_before)
    return *_gradients("attend_causal_backward", call, grads, numbers, of_decay, q), *grad_before


def _gradients(
    kernel: str, call: AttendCall, grads: Sequence[Tensor], numbers: Sequence[Any], of_decay: bool, q: Tensor
) -> list[Tensor]:
    """Run a backward kernel: gradients of q, k and v, of log-decays, weights and scales."""
    log_decay, *others = numbers
    of_log_decay = empty_log_decay_gradient(log_decay, q) if of_decay else None
    of_numbers = _like_numbers(q, *others)
    call.flow.grad_q, call.flow.grad_k, call.flow.grad_v = map(view, grads)
    call.flow.grad_log_decay = number_view(of_log_decay)
    call.grad_weight, call.grad_scale = (
        View() if x is None else number_view(grad) for grad, x in zip(of_numbers, others, strict=True)
    )
    run(kernel, call)
    return [*(grad.to(q.dtype) for grad in grads), like_log_decay(of_log_decay, log_decay, q), *of_numbers]


def _like_numbers(q: Tensor, *numbers: Tensor | None) -> list[Tensor]:
    """Allocate gradients of weights and scales, zeros; empty where there are none."""
    return [q.new_zeros(0 if x is None else x.shape, dtype=torch.float32) for x in numbers]


@torch.library.register_fake("flowformer::attend_causal_native_backward")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_seqlens: Any, *rest: Any) -> Any:
    _check_causal_backward("attend_causal_native_backward", q, k, v, mask, cu_seqlens, *rest)
    return (
        *(empty_like(x) for x in (q, k, v)), like_log_decay(None, rest[0], q), *_like_numbers(q, *rest[1:3]),
        *_new_state(q, v, _sequences(q, cu_seqlens), rest[-1]),
    )  # fmt: skip


_BOTH = f"{_TENSORS}, Tensor? key_mask, Tensor? query_mask, Tensor? cu_seqlens, {_NUMBERS}"


@_operator("attend_native", _BOTH, 1)
def _both(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    op, (key, query, cu_seqlens, *numbers), options = "attend_native", rest[:6], rest[6:]
    _check_both(op, q, k, v, *rest)
    check_bounds(op, cu_seqlens, q.shape[1])
    check_one_mask(op, numbers[0], key, query)
    out = empty_out(q, v, query is not None)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    sinks, sources = tokens_of(q, query, cu_seqlens), tokens_of(k, key, cu_seqlens)
    call = _call(q, k, v, sinks, sources, *numbers, *options)
    call.flow.out = view(out)
    run("attend_forward", call)
    return out


@torch.library.register_fake("flowformer::attend_native")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_both("attend_native", q, k, v, *rest)
    return empty_out(q, v, False)


@_operator("attend_native_backward", f"{_BOTH}, Tensor grad_out, bool of_decay", 6)
def _both_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    op, (key, query, cu_seqlens, *numbers, grad_out, of_decay), options = "attend_native_backward", rest[:8], rest[8:]
    _check_both_backward(op, q, k, v, *rest)
    check_bounds(op, cu_seqlens, q.shape[1])
    check_one_mask(op, numbers[0], key, query)
    grads = empty_gradients(q, k, v, key is not None or query is not None)
    q, k, v, grad_out = adjacent(q), adjacent(k), adjacent(v), adjacent(grad_out)
    sinks, sources = tokens_of(q, query, cu_seqlens), tokens_of(k, key, cu_seqlens)
    call = _call(q, k, v, sinks, sources, *numbers, *options)
    call.flow.grad_out = view(grad_out)
    return _gradients("attend_backward", call, grads, numbers, of_decay, q)


@torch.library.register_fake("flowformer::attend_native_backward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_both_backward("attend_native_backward", q, k, v, *rest)
    log_decay, *others = rest[3:6]
    return *(empty_like(x) for x in (q, k, v)), like_log_decay(None, log_decay, q), *_like_numbers(q, *others)


_STEP = f"{_TENSORS}, {_NUMBERS}, Tensor? keys, Tensor memory"


def _check_step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    op, (log_decay, weight, scale, keys, memory), options = "attend_step_native", rest[:5], rest[5:]
    check_inputs(op, q, k, v, 3, same_length=True)
    _check_numbers(op, log_decay, weight, scale, q, k)
    _check_options(op, *options)
    if options[1] is not None:
        check_whole(op, keys=keys, memory=memory)
    _check_state(op, keys, memory, q, v, q.shape[0], options[1])


@_operator("attend_step_native", _STEP, 3)
def _step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_step(q, k, v, *rest)
    (log_decay, weight, scale, keys, memory), (feature_map, eps) = contiguous(*rest[:5]), rest[5:]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    keys = None if eps is None else keys
    out, after = torch.empty_like(v), _new_state(q, v, q.shape[0], eps)
    call = StepCall(
        batch=q.shape[0], threads=torch.get_num_threads(), decay_of_rows=log_decay is not None and log_decay.ndim == 2,
        **_sizes(q.shape, v.shape, q.dtype, feature_map, eps),
    )  # fmt: skip
    run("attend_step", call, *map(address, (q, k, v, out, log_decay, weight, scale, keys, memory, *after)))
    return out, *after


@torch.library.register_fake("flowformer::attend_step_native")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_step(q, k, v, *rest)
    return v.new_empty(v.shape), *_new_state(q, v, q.shape[0], rest[-1])


# ---------------------------------------------------------------------------------------------------------- gradients


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _differentiate_causal(ctx: Any, grad_out: Tensor | None, grad_keys: Tensor | None, grad_memory: Any) -> Any:
    refuse_second_gradients("native")
    saved = ctx.saved_tensors  # once: checkpointing hands them out only once
    if grad_out is None:
        grad_out = torch.zeros_like(saved[2])
    grads = torch.ops.flowformer.attend_causal_native_backward(
        *saved, grad_out, grad_keys, grad_memory, ctx.needs_input_grad[5], *ctx.options
    )
    others = (None if x is None else grad for grad, x in zip(grads[3:], saved[5:], strict=True))
    return *grads[:3], None, None, *others, *(None for _ in ctx.options)


torch.library.register_autograd("flowformer::attend_causal_native", _differentiate_causal, setup_context=_keep_causal)


def _keep_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _differentiate_both(ctx: Any, grad_out: Tensor) -> Any:
    refuse_second_gradients("native")
    saved = ctx.saved_tensors
    grads = torch.ops.flowformer.attend_native_backward(*saved, grad_out, ctx.needs_input_grad[6], *ctx.options)
    others = (None if x is None else grad for grad, x in zip(grads[3:], saved[6:], strict=True))
    return *grads[:3], None, None, None, *others, *(None for _ in ctx.options)


torch.library.register_autograd("flowformer::attend_native", _differentiate_both, setup_context=_keep_both)
