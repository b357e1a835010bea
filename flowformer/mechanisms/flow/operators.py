"""The C++ kernels of Flow-Attention as PyTorch operators, ``torch.ops.flowformer``, with gradients and tracing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import adjacent, refuse_second_gradients
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
from flowformer.kernels.native.kernels import address, contiguous, empty_like, run, view
from flowformer.mechanisms.flow.equations import FEATURE_MAPS

# ------------------------------------------------------------------------------------------- from tensors to the calls


_COMPETITIONS = {None: 0, "sequence": 1, "heads": 2}
_OPTIONS = "str feature_map, float? clamp, float eps, float flow_eps, str? competition, bool allocation, bool rescale"


def _numbers(
    shape: Sequence[int], value_channels: int, dtype: torch.dtype, options: Sequence[Any], threads: int
) -> dict[str, Any]:
    feature_map, clamp, eps, flow_eps, competition, allocation, _ = options
    if feature_map not in FEATURE_MAPS or competition not in _COMPETITIONS:
        raise ValueError(f"unknown feature map or competition: {feature_map!r}, {competition!r}")
    if not all(0 <= number < math.inf for number in (clamp or 0, eps, flow_eps)):
        raise ValueError(f"clamp, eps and flow_eps must be finite and at least 0, got {clamp}, {eps}, {flow_eps}")
    return {
        "heads": shape[-2],
        "key_channels": shape[-1],
        "value_channels": value_channels,
        "half": dtype == torch.bfloat16,
        "feature_map": FEATURE_MAPS[feature_map],
        "competition": _COMPETITIONS[competition],
        "allocation": allocation,
        "clamp": -1.0 if clamp is None else clamp,
        "eps": eps,
        "flow_eps": flow_eps,
        "threads": threads,
    }


def _call(q: Tensor, k: Tensor, v: Tensor, sinks: Tokens, sources: Tokens, options: Sequence[Any]) -> FlowCall:
    """The call without its outputs. It holds addresses: what it is made of must live until it has run."""
    return FlowCall(
        q=view(q), k=view(k), v=view(v), sinks=sinks.side(), sources=sources.side(), sequences=len(sinks.rows),
        rescale=options[-1], **_numbers(q.shape, v.shape[-1], q.dtype, options, torch.get_num_threads()),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the operators


def _operator(name: str, arguments: str, returns: str) -> Callable[[Any], Any]:
    """Define an operator of PyTorch; the decorated function computes it on the CPU."""
    torch.library.define(f"flowformer::{name}", f"({arguments}, {_OPTIONS}) -> {returns}")

    def register(function: Any) -> Any:
        torch.library.impl(f"flowformer::{name}", "cpu", function)
        return function

    return register


_TENSORS = "Tensor q, Tensor k, Tensor v"
_CAUSAL = (
    f"{_TENSORS}, Tensor? mask, Tensor? cu_seqlens, Tensor? log_decay, "
    "Tensor? tokens, Tensor? sums, Tensor? log_normaliser, Tensor? memory"
)
_BIDIRECTIONAL = f"{_TENSORS}, Tensor? key_mask, Tensor? query_mask, Tensor? cu_seqlens, Tensor? log_decay"


_STATE = ("tokens", "sums", "log_normaliser", "memory")


def _state_shapes(q: Tensor, v: Tensor, batch: int) -> tuple[tuple[int, ...], ...]:
    heads, channels, value_channels = q.shape[-2], q.shape[-1], v.shape[-1]
    of_heads = (batch, heads)
    return of_heads, (*of_heads, 4, channels), of_heads, (*of_heads, channels, value_channels)


def _new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for a state."""
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return tuple(q.new_empty(shape, dtype=torch.float64) for shape in _state_shapes(q, v, batch))


def _check_state(op: str, state: Sequence[Tensor | None], q: Tensor, v: Tensor, batch: int, of: str = "") -> None:
    """Check the parts of a state, or of the gradient of one, that are given."""
    for name, part, shape in zip(_STATE, state, _state_shapes(q, v, batch), strict=True):
        check_part(op, of + name, part, shape, torch.float64, q)


def _check_causal(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_seqlens: Any, log_decay: Any, *state: Tensor | None
) -> int:
    """Check the arguments that the causal operators share; return the number of sequences."""
    check_inputs(op, q, k, v, 4, same_length=True)
    check_part(op, "mask", mask, q.shape[:2], torch.bool, q)
    check_packing(op, cu_seqlens, q, k, mask)
    check_log_decay(op, log_decay, q)
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_whole(op, **dict(zip(_STATE, state, strict=True)))
    _check_state(op, state, q, v, batch)
    return batch


def _check_causal_backward(q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_seqlens: Any, *rest: Any) -> None:
    op = "flow_causal_backward"
    batch = _check_causal(op, q, k, v, mask, cu_seqlens, *rest[:5])
    check_part(op, "grad_out", rest[5], v.shape, q.dtype, q)
    _check_state(op, rest[6:10], q, v, batch, "grad_")


def _check_bidirectional(
    op: str, q: Tensor, k: Tensor, v: Tensor, key: Any, query: Any, cu_seqlens: Any, log_decay: Any
) -> None:
    check_inputs(op, q, k, v, 4, same_length=False)
    check_part(op, "key_mask", key, k.shape[:2], torch.bool, q)
    check_part(op, "query_mask", query, q.shape[:2], torch.bool, q)
    check_packing(op, cu_seqlens, q, k, key, query)
    check_log_decay(op, log_decay, q)
    check_one_side(op, log_decay, q, k, key, query)


def _check_bidirectional_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    _check_bidirectional("flow_bidirectional_backward", q, k, v, *rest[:4])
    shape = (*q.shape[:3], v.shape[3])
    check_part("flow_bidirectional_backward", "grad_out", rest[4], shape, q.dtype, q)


def _check_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *state: Tensor) -> None:
    check_inputs("flow_step", q, k, v, 3, same_length=True)
    check_log_decay("flow_step", log_decay, q)
    _check_state("flow_step", state, q, v, q.shape[0])


@_operator("flow_causal", _CAUSAL, "(Tensor, Tensor, Tensor, Tensor, Tensor)")
def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any) -> Any:
    _check_causal("flow_causal", q, k, v, mask, cu_seqlens, *rest[:5])
    check_bounds("flow_causal", cu_seqlens, q.shape[1])
    log_decay, before, options = rest[0], contiguous(*rest[1:5]), rest[5:]
    out, after = empty_like(v, mask is not None), _new_state(q, v, cu_seqlens)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    tokens = tokens_of(q, mask, cu_seqlens)
    call = _call(q, k, v, tokens, tokens, options)
    call.log_decay = number_view(log_decay)
    call.out, call.before, call.after = view(out), state_addresses(before), state_addresses(after)
    run("causal_forward", call)
    return out, *after


@torch.library.register_fake("flowformer::flow_causal")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any) -> Any:
    _check_causal("flow_causal", q, k, v, mask, cu_seqlens, *rest[:5])
    return empty_like(v, False), *_new_state(q, v, cu_seqlens)


_CAUSAL_GRADIENTS = (
    "Tensor grad_out, Tensor? grad_tokens, Tensor? grad_sums, Tensor? grad_log_normaliser, Tensor? grad_memory, "
    "bool of_decay"
)


# Gradients of q, k, v, of the parts of the state, and of log-decays: zeros where of_decay is false, as for the count.
@_operator("flow_causal_backward", f"{_CAUSAL}, {_CAUSAL_GRADIENTS}", f"({', '.join(['Tensor'] * 8)})")
def _causal_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> Any:
    _check_causal_backward(q, k, v, mask, cu_seqlens, *rest)
    check_bounds("flow_causal_backward", cu_seqlens, q.shape[1])
    log_decay, before, grad_out = rest[0], contiguous(*rest[1:5]), rest[5]
    grad_after, of_decay, options = contiguous(*rest[6:10]), rest[10], rest[11:]
    dtype, grads = q.dtype, empty_gradients(q, k, v, mask is not None)
    q, k, v, grad_out = adjacent(q), adjacent(k), adjacent(v), adjacent(grad_out)
    tokens = tokens_of(q, mask, cu_seqlens)
    grad_before = _new_state(q, v, cu_seqlens)
    call = _call(q, k, v, tokens, tokens, options)
    call.grad_q, call.grad_k, call.grad_v = map(view, grads)
    call.grad_out, call.before = view(grad_out), state_addresses(before)
    call.grad_after, call.grad_before = state_addresses(grad_after), state_addresses(grad_before)
    call.log_decay = number_view(log_decay)
    grad_log_decay = empty_log_decay_gradient(log_decay, q) if of_decay else None
    call.grad_log_decay = number_view(grad_log_decay)
    run("causal_backward", call)
    grads = (*(grad.to(dtype) for grad in grads), *grad_before)
    return *grads, like_log_decay(grad_log_decay, log_decay, q)


@torch.library.register_fake("flowformer::flow_causal_backward")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any) -> Any:
    _check_causal_backward(q, k, v, mask, cu_seqlens, *rest)
    grads = tuple(empty_like(x, False) for x in (q, k, v))
    return *grads, *_new_state(q, v, cu_seqlens), like_log_decay(None, rest[0], q)


@_operator("flow_bidirectional", _BIDIRECTIONAL, "Tensor")
def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, cu_seqlens: Tensor | None,
    log_decay: Tensor | None, *options: Any,
) -> Tensor:  # fmt: skip
    op = "flow_bidirectional"
    _check_bidirectional(op, q, k, v, key_mask, query_mask, cu_seqlens, log_decay)
    check_bounds(op, cu_seqlens, q.shape[1])
    check_one_mask(op, log_decay, key_mask, query_mask)
    out = empty_out(q, v, query_mask is not None)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    sinks, sources = tokens_of(q, query_mask, cu_seqlens), tokens_of(k, key_mask, cu_seqlens)
    call = _call(q, k, v, sinks, sources, options)
    call.out, call.log_decay = view(out), number_view(log_decay)
    run("bidirectional_forward", call)
    return out


@torch.library.register_fake("flowformer::flow_bidirectional")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    _check_bidirectional("flow_bidirectional", q, k, v, *rest[:4])
    return empty_out(q, v, False)


@_operator(
    "flow_bidirectional_backward",
    f"{_BIDIRECTIONAL}, Tensor grad_out, bool of_decay",
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _bidirectional_backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, cu_seqlens: Tensor | None,
    log_decay: Tensor | None, grad_out: Tensor, of_decay: bool, *options: Any,
) -> Any:  # fmt: skip
    op = "flow_bidirectional_backward"
    _check_bidirectional_backward(q, k, v, key_mask, query_mask, cu_seqlens, log_decay, grad_out)
    check_bounds(op, cu_seqlens, q.shape[1])
    check_one_mask(op, log_decay, key_mask, query_mask)
    dtype = q.dtype
    grad_q, grad_k, grad_v = grads = empty_gradients(q, k, v, False)
    if query_mask is not None:
        grad_q.zero_()
    if key_mask is not None:
        grad_k.zero_()
        grad_v.zero_()
    q, k, v, grad_out = adjacent(q), adjacent(k), adjacent(v), adjacent(grad_out)
    sinks, sources = tokens_of(q, query_mask, cu_seqlens), tokens_of(k, key_mask, cu_seqlens)
    call = _call(q, k, v, sinks, sources, options)
    call.grad_out = view(grad_out)
    call.grad_q, call.grad_k, call.grad_v = map(view, grads)
    grad_log_decay = empty_log_decay_gradient(log_decay, q) if of_decay else None
    call.log_decay, call.grad_log_decay = number_view(log_decay), number_view(grad_log_decay)
    run("bidirectional_backward", call)
    return *(grad.to(dtype) for grad in grads), like_log_decay(grad_log_decay, log_decay, q)


@torch.library.register_fake("flowformer::flow_bidirectional_backward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_bidirectional_backward(q, k, v, *rest)
    return *(empty_like(x, False) for x in (q, k, v)), like_log_decay(None, rest[3], q)


_STEP = f"{_TENSORS}, Tensor? log_decay, Tensor tokens, Tensor sums, Tensor log_normaliser, Tensor memory"


@_operator("flow_step", _STEP, "(Tensor, Tensor, Tensor, Tensor, Tensor)")
def _step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_step(q, k, v, *rest[:5])
    log_decay = None if rest[0] is None else rest[0].contiguous()
    before = [part.contiguous() for part in rest[1:5]]
    return run_step(q.contiguous(), k.contiguous(), v.contiguous(), log_decay, before, rest[5:])


def run_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Sequence[Tensor], options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Run a step on contiguous, checked tensors: output and state."""
    of_rows = log_decay is not None and log_decay.ndim == 2
    call = _step_call(q.shape, v.shape[-1], q.dtype, options, torch.get_num_threads(), of_rows)
    after = (torch.empty_like(v), *map(torch.empty_like, state))
    of_state = (part.data_ptr() for part in (*state, *after[1:]))
    run("step", call, *(part.data_ptr() for part in (q, k, v, after[0])), address(log_decay), *of_state)
    return after


@functools.lru_cache(64)
def _step_call(
    shape: tuple[int, ...], value_channels: int, dtype: torch.dtype, options: tuple[Any, ...], threads: int,
    decay_of_rows: bool,
) -> StepCall:  # fmt: skip
    return StepCall(
        batch=shape[0], decay_of_rows=decay_of_rows, **_numbers(shape, value_channels, dtype, options, threads)
    )


@torch.library.register_fake("flowformer::flow_step")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_step(q, k, v, *rest[:5])
    return v.new_empty(v.shape), *(part.new_empty(part.shape) for part in rest[1:5])


# ---------------------------------------------------------------------------------------------------------- gradients


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _differentiate_causal(ctx: Any, grad_out: Tensor | None, *grad_state: Tensor | None) -> Any:
    refuse_second_gradients("native")
    saved = ctx.saved_tensors  # once: checkpointing hands them out only once
    if grad_out is None:
        grad_out = torch.zeros_like(saved[2])
    wanted = any(ctx.needs_input_grad[5:7])  # of the log-decays, and of the count before
    grads = torch.ops.flowformer.flow_causal_backward(*saved, grad_out, *grad_state, wanted, *ctx.options)
    of_state = grads[3:7] if saved[6] is not None else (None, None, None, None)
    of_decay = grads[7] if saved[5] is not None else None
    return *grads[:3], None, None, of_decay, *of_state, *(None for _ in ctx.options)


def _keep_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _differentiate_bidirectional(ctx: Any, grad_out: Tensor) -> Any:
    refuse_second_gradients("native")
    saved = ctx.saved_tensors
    *grads, of_decay = torch.ops.flowformer.flow_bidirectional_backward(
        *saved, grad_out, ctx.needs_input_grad[6], *ctx.options
    )
    return *grads, None, None, None, None if saved[6] is None else of_decay, *(None for _ in ctx.options)


torch.library.register_autograd("flowformer::flow_causal", _differentiate_causal, setup_context=_keep_causal)
torch.library.register_autograd(
    "flowformer::flow_bidirectional", _differentiate_bidirectional, setup_context=_keep_bidirectional
)
