"""Flow-Attention by Triton kernels: what the operations call, and the operators of PyTorch that run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import implements, refuse_second_gradients
from flowformer.core.checks import Masks
from flowformer.core.masks import run_packed
from flowformer.core.run import Checked
from flowformer.kernels.triton.operators import (
    check_channels,
    like_decays,
    operator,
    wants_gradients,
    with_adjacent_channels,
)
from flowformer.mechanisms.flow.equations import Learned, features_first, single, state_of
from flowformer.mechanisms.flow.options import FlowOptions, KernelOptions
from flowformer.mechanisms.flow.state import FlowState, init_flow_state


@implements("flow_attention", "triton")
def attend(given: Checked, learned: Learned, options: FlowOptions) -> tuple[Tensor, FlowState | None]:
    """Either form of Flow-Attention: the output, and the state after it."""
    q, k, v, causal, masks, cu_seqlens, state = given
    of_tokens = (learned.log_decay,) if learned.log_decay is not None and learned.log_decay.ndim == 3 else ()
    if causal and state is None:
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        sizes = q.shape[2], q.shape[3], v.shape[3]
        state = init_flow_state(sequences, *sizes, device=q.device, feature_map=options.feature_map)
    if cu_seqlens is None:
        return _dense(q, k, v, masks, state, learned, options, causal)

    def padded(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Any]:
        *log_decay, mask, state = rest
        these = learned._replace(log_decay=log_decay[0]) if log_decay else learned
        return _dense(q, k, v, Masks(mask, mask), state, these, options, causal)

    return run_packed(padded, (q, k, v, *of_tokens), cu_seqlens, state)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, state: FlowState | None, learned: Learned, options: FlowOptions,
    causal: bool,
) -> tuple[Tensor, FlowState | None]:  # fmt: skip
    dtype = v.dtype
    q, k, v, values = features_first(q, k, v, masks, learned, options)
    check_channels("flow_attention", q, v)
    given = single(learned.log_decay), single(learned.temperatures)
    if not causal:
        out, *_ = torch.ops.flowformer.flow_bidirectional_triton(q, k, v, *masks, *given, *values)
        return out.to(dtype), None
    assert state is not None
    found = torch.ops.flowformer.flow_causal_triton(q, k, v, masks.key, *given, *state_of(state, learned), *values)
    return found[0].to(dtype), FlowState(*found[1:5])


@implements("flow_attention_step", "triton")
def step(
    q: Tensor, k: Tensor, v: Tensor, state: FlowState, learned: Learned, options: FlowOptions, *, plain: bool
) -> tuple[Tensor, ...]:
    """Compute one token: output, and parts of the state after it."""
    dtype, log_decay, temperatures = v.dtype, single(learned.log_decay), single(learned.temperatures)
    tokens = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    *tokens, values = features_first(*tokens, Masks(None, None), learned, options)
    check_channels("flow_attention", tokens[0], tokens[2])
    before = state_of(state, learned)
    given = (*tokens, log_decay, temperatures, *before)
    if plain or not wants_gradients(*given):
        tokens = (x.squeeze(1) for x in tokens)
        out, *after = torch.ops.flowformer.flow_step_triton(*tokens, log_decay, temperatures, *before, *values)
        return out.to(dtype), *after
    if log_decay is not None and log_decay.ndim == 2:
        log_decay = log_decay.unsqueeze(1)
    # A sequence of one token: that has a backward pass.
    found = torch.ops.flowformer.flow_causal_triton(*tokens, None, log_decay, temperatures, *before, *values)
    return found[0].squeeze(1).to(dtype), *found[1:5]


# ------------------------------------------------------------------------------------------------------- the operators

_OPTIONS = "str feature_map, float? clamp, float eps, float flow_eps, str? competition, bool allocation, bool rescale"
_TENSORS = "Tensor q, Tensor k, Tensor v"
_LEARNED = "Tensor? log_decay, Tensor? temperatures"
_STATE = "Tensor tokens, Tensor sums, Tensor log_normaliser, Tensor memory"
_CAUSAL = f"{_TENSORS}, Tensor? mask, {_LEARNED}, {_STATE}"
_GRADIENTS = (
    "Tensor out, Tensor flows, Tensor grad_out, Tensor? grad_tokens, Tensor? grad_sums, Tensor? grad_log_normaliser, "
    "Tensor? grad_memory, bool of_decay"
)
_BIDIRECTIONAL = f"{_TENSORS}, Tensor? key_mask, Tensor? query_mask, {_LEARNED}"


def _like_temperatures(grad: Tensor | None, temperatures: Tensor | None, q: Tensor) -> Tensor:
    """The gradient in the dtype of temperatures; nothing without any."""
    if temperatures is None:
        return q.new_zeros(0, dtype=torch.float32)
    return torch.zeros_like(temperatures) if grad is None else grad.to(temperatures.dtype)


def _fake_causal(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    flows = q.new_empty(4, q.shape[0] * q.shape[2], q.shape[1], dtype=torch.float32)
    return v.new_empty(v.shape), *(part.new_empty(part.shape) for part in rest[3:7]), flows


@operator("flow_causal_triton", f"{_CAUSAL}, {_OPTIONS}", _fake_causal, 6)
def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Any:
    from flowformer.mechanisms.flow.triton import causal

    learned, state, options = Learned(*rest[:2]), FlowState(*rest[2:6]), KernelOptions(*rest[6:])
    q, k, v = with_adjacent_channels(q, k, v)
    out, after, flows = causal.forward(q, k, v, mask, learned, state, options)
    return out, *after, torch.stack(flows)


def _fake_causal_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    of_learned = like_decays(None, rest[1], q), _like_temperatures(None, rest[2], q)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *of_learned, *(part.new_empty(part.shape) for part in rest[3:7])


@operator("flow_causal_triton_backward", f"{_CAUSAL}, {_GRADIENTS}, {_OPTIONS}", _fake_causal_backward, 9)
def _causal_backward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Any:
    from flowformer.mechanisms.flow.triton import causal
    from flowformer.mechanisms.flow.triton.setting import Flows

    learned, state, (out, flows, grad_out) = Learned(*rest[:2]), FlowState(*rest[2:6]), rest[6:9]
    of_decay, options = rest[13] and learned.log_decay is not None, KernelOptions(*rest[14:])
    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    given = (q, k, v, mask, learned, state, options, out, Flows(*flows), grad_out, rest[9:13], of_decay)
    found = causal.backward(*given)
    return *found[:3], *_of_learned(found.log_decay, found.temperatures, learned, q), *found.state


def _of_learned(
    log_decay: Tensor | None, temperatures: Tensor | None, learned: Learned, q: Tensor
) -> tuple[Tensor, Tensor]:
    return like_decays(log_decay, learned.log_decay, q), _like_temperatures(temperatures, learned.temperatures, q)


def _fake_step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return v.new_empty(v.shape), *(part.new_empty(part.shape) for part in rest[2:6])


@operator("flow_step_triton", f"{_TENSORS}, {_LEARNED}, {_STATE}, {_OPTIONS}", _fake_step, 5)
def _step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    from flowformer.mechanisms.flow.triton.step import run_step

    out, after = run_step(q, k, v, Learned(*rest[:2]), FlowState(*rest[2:6]), KernelOptions(*rest[6:]))
    return out, *after


def _form_of(log_decay: Tensor | None) -> Any:
    """The module that computes the bidirectional form, with a decay or without."""
    from flowformer.mechanisms.flow.triton import bidirectional, decayed

    return bidirectional if log_decay is None else decayed


def _fake_bidirectional(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    numbers = 2 * q.shape[0] * q.shape[2] * (q.shape[1] + k.shape[1])
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(numbers, dtype=torch.float32)


@operator("flow_bidirectional_triton", f"{_BIDIRECTIONAL}, {_OPTIONS}", _fake_bidirectional, 2)
def _bidirectional(q: Tensor, k: Tensor, v: Tensor, key_mask: Any, query_mask: Any, *rest: Any) -> Any:
    form, learned, options = _form_of(rest[0]), Learned(*rest[:2]), KernelOptions(*rest[2:])
    return form.forward(*with_adjacent_channels(q, k, v), key_mask, query_mask, learned, options)


def _fake_bidirectional_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    of_learned = like_decays(None, rest[2], q), _like_temperatures(None, rest[3], q)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *of_learned


@operator(
    "flow_bidirectional_triton_backward",
    f"{_BIDIRECTIONAL}, Tensor out, Tensor flows, Tensor grad_out, bool of_decay, {_OPTIONS}",
    _fake_bidirectional_backward,
    5,
)
def _bidirectional_backward(q: Tensor, k: Tensor, v: Tensor, key_mask: Any, query_mask: Any, *rest: Any) -> Any:
    learned, (out, flows, grad_out, of_decay, *options) = Learned(*rest[:2]), rest[2:]
    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    *grads, log_decay, temperatures = _form_of(learned.log_decay).backward(
        q, k, v, key_mask, query_mask, learned, KernelOptions(*options), out, flows, grad_out, of_decay
    )
    return *grads, *_of_learned(log_decay, temperatures, learned, q)


# ---------------------------------------------------------------------------------------------------------- gradients


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], output[0], output[5])
    ctx.mark_non_differentiable(output[5])
    ctx.options = inputs[10:]


def _differentiate_causal(ctx: Any, grad_out: Tensor | None, *grad_state: Tensor | None) -> Any:
    refuse_second_gradients("Triton")
    *given, out, flows = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    wanted = ctx.needs_input_grad[4] or ctx.needs_input_grad[6]  # of the log-decays, and of the count before
    *grads, log_decay, temperatures, tokens, sums, log_normaliser, memory = (
        torch.ops.flowformer.flow_causal_triton_backward(
            *given, out, flows, grad_out, *grad_state[:4], wanted, *ctx.options
        )
    )
    learned = None if given[4] is None else log_decay, None if given[5] is None else temperatures
    return *grads, None, *learned, tokens, sums, log_normaliser, memory, *(None for _ in ctx.options)


def _keep_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[7:]


def _differentiate_bidirectional(ctx: Any, grad_out: Tensor, _: Any) -> Any:
    refuse_second_gradients("Triton")
    *given, out, flows = ctx.saved_tensors
    *grads, log_decay, temperatures = torch.ops.flowformer.flow_bidirectional_triton_backward(
        *given, out, flows, grad_out, ctx.needs_input_grad[5], *ctx.options
    )
    learned = None if given[5] is None else log_decay, None if given[6] is None else temperatures
    return *grads, None, None, *learned, *(None for _ in ctx.options)


torch.library.register_autograd("flowformer::flow_causal_triton", _differentiate_causal, setup_context=_keep_causal)
torch.library.register_autograd(
    "flowformer::flow_bidirectional_triton", _differentiate_bidirectional, setup_context=_keep_bidirectional
)
