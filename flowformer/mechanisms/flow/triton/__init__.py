"""Flow-Attention by Triton kernels: what the operations call, and the operators of PyTorch that run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import implements, refuse_second_gradients
from flowformer.core.checks import Masks
from flowformer.core.masks import run_packed
from flowformer.core.run import Checked
from flowformer.kernels.triton.operators import like_decays, operator, with_adjacent_channels
from flowformer.mechanisms.flow.equations import Learned, features_first, single, state_of
from flowformer.mechanisms.flow.options import FlowOptions, KernelOptions
from flowformer.mechanisms.flow.state import FlowState, init_flow_state

MOST_CHANNELS = 256  # of keys and of values, behind the feature map


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
    _check_channels(q, k, v)
    log_decay = single(learned.log_decay)
    if not causal:
        out, *_ = torch.ops.flowformer.flow_bidirectional_triton(q, k, v, *masks, log_decay, *values)
        return out.to(dtype), None
    assert state is not None
    found = torch.ops.flowformer.flow_causal_triton(q, k, v, masks.key, log_decay, *state_of(state, learned), *values)
    return found[0].to(dtype), FlowState(*found[1:5])


@implements("flow_attention_step", "triton")
def step(
    q: Tensor, k: Tensor, v: Tensor, state: FlowState, learned: Learned, options: FlowOptions, *, plain: bool
) -> tuple[Tensor, ...]:
    """Compute one token: output, and parts of the state after it."""
    dtype, log_decay = v.dtype, single(learned.log_decay)
    tokens = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    *tokens, values = features_first(*tokens, Masks(None, None), learned, options)
    _check_channels(*tokens)
    before = state_of(state, learned)
    given = (*tokens, *before) if log_decay is None else (*tokens, log_decay, *before)
    if plain or not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        tokens = (x.squeeze(1) for x in tokens)
        out, *after = torch.ops.flowformer.flow_step_triton(*tokens, log_decay, *before, *values)
        return out.to(dtype), *after
    if log_decay is not None and log_decay.ndim == 2:
        log_decay = log_decay.unsqueeze(1)
    # A sequence of one token: that has a backward pass.
    found = torch.ops.flowformer.flow_causal_triton(*tokens, None, log_decay, *before, *values)
    return found[0].squeeze(1).to(dtype), *found[1:5]


def _check_channels(q: Tensor, k: Tensor, v: Tensor) -> None:
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MOST_CHANNELS:
        raise ValueError(f"flow_attention: the Triton kernels have {MOST_CHANNELS} channels at most, got {widest}")


# ------------------------------------------------------------------------------------------------------- the operators

_OPTIONS = "str feature_map, float? clamp, float eps, float flow_eps, str? competition, bool allocation, bool rescale"
_TENSORS = "Tensor q, Tensor k, Tensor v"
_CAUSAL = (
    f"{_TENSORS}, Tensor? mask, Tensor? log_decay, Tensor tokens, Tensor sums, Tensor log_normaliser, Tensor memory"
)
_GRADIENTS = (
    "Tensor out, Tensor flows, Tensor grad_out, Tensor? grad_tokens, Tensor? grad_sums, Tensor? grad_log_normaliser, "
    "Tensor? grad_memory, bool of_decay"
)
_BIDIRECTIONAL = f"{_TENSORS}, Tensor? key_mask, Tensor? query_mask, Tensor? log_decay"


def _fake_causal(q: Tensor, k: Tensor, v: Tensor, mask: Any, log_decay: Any, *rest: Any) -> tuple[Tensor, ...]:
    flows = q.new_empty(4, q.shape[0] * q.shape[2], q.shape[1], dtype=torch.float32)
    return v.new_empty(v.shape), *(part.new_empty(part.shape) for part in rest[:4]), flows


@operator("flow_causal_triton", f"{_CAUSAL}, {_OPTIONS}", _fake_causal, 6)
def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_decay: Tensor | None, *rest: Any) -> Any:
    from flowformer.mechanisms.flow.triton import causal

    state, options = FlowState(*rest[:4]), KernelOptions(*rest[4:])
    q, k, v = with_adjacent_channels(q, k, v)
    out, after, flows = causal.forward(q, k, v, mask, log_decay, state, options)
    return out, *after, torch.stack(flows)


def _fake_causal_backward(q: Tensor, k: Tensor, v: Tensor, mask: Any, log_decay: Any, *rest: Any) -> tuple[Tensor, ...]:
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    return *grads, *(part.new_empty(part.shape) for part in rest[:4]), like_decays(None, log_decay, q)


@operator("flow_causal_triton_backward", f"{_CAUSAL}, {_GRADIENTS}, {_OPTIONS}", _fake_causal_backward, 8)
def _causal_backward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_decay: Tensor | None, *rest: Any) -> Any:
    from flowformer.mechanisms.flow.triton import causal
    from flowformer.mechanisms.flow.triton.setting import Flows

    state, (out, flows, grad_out), grad_state = FlowState(*rest[:4]), rest[4:7], rest[7:11]
    of_decay, options = rest[11] and log_decay is not None, KernelOptions(*rest[12:])
    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    given = (q, k, v, mask, log_decay, state, options, out, Flows(*flows), grad_out, grad_state, of_decay)
    found = causal.backward(*given)
    return found.q, found.k, found.v, *found.state, like_decays(found.log_decay, log_decay, q)


def _fake_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, *rest: Any) -> tuple[Tensor, ...]:
    return v.new_empty(v.shape), *(part.new_empty(part.shape) for part in rest[:4])


_STEP = f"{_TENSORS}, Tensor? log_decay, Tensor tokens, Tensor sums, Tensor log_normaliser, Tensor memory"


@operator("flow_step_triton", f"{_STEP}, {_OPTIONS}", _fake_step, 5)
def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *rest: Any) -> Any:
    from flowformer.mechanisms.flow.triton.step import run_step

    out, after = run_step(q, k, v, log_decay, FlowState(*rest[:4]), KernelOptions(*rest[4:]))
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
    form, options = _form_of(rest[0]), KernelOptions(*rest[1:])
    return form.forward(*with_adjacent_channels(q, k, v), key_mask, query_mask, rest[0], options)


def _fake_bidirectional_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), like_decays(None, rest[2], q)


@operator(
    "flow_bidirectional_triton_backward",
    f"{_BIDIRECTIONAL}, Tensor out, Tensor flows, Tensor grad_out, bool of_decay, {_OPTIONS}",
    _fake_bidirectional_backward,
    4,
)
def _bidirectional_backward(q: Tensor, k: Tensor, v: Tensor, key_mask: Any, query_mask: Any, *rest: Any) -> Any:
    log_decay, out, flows, grad_out, of_decay, *options = rest
    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    found = _form_of(log_decay).backward(
        q, k, v, key_mask, query_mask, log_decay, KernelOptions(*options), out, flows, grad_out, of_decay
    )
    return *found[:3], like_decays(found[3], log_decay, q)


# ---------------------------------------------------------------------------------------------------------- gradients


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], output[0], output[5])
    ctx.mark_non_differentiable(output[5])
    ctx.options = inputs[9:]


def _differentiate_causal(ctx: Any, grad_out: Tensor | None, *grad_state: Tensor | None) -> Any:
    refuse_second_gradients("Triton")
    *given, out, flows = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    wanted = any(ctx.needs_input_grad[4:6])  # of the log-decays, and of the count before
    grads = torch.ops.flowformer.flow_causal_triton_backward(
        *given, out, flows, grad_out, *grad_state[:4], wanted, *ctx.options
    )
    return *grads[:3], None, grads[7] if given[4] is not None else None, *grads[3:7], *(None for _ in ctx.options)


def _keep_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[6:]


def _differentiate_bidirectional(ctx: Any, grad_out: Tensor, _: Any) -> Any:
    refuse_second_gradients("Triton")
    *given, out, flows = ctx.saved_tensors
    *grads, of_decay = torch.ops.flowformer.flow_bidirectional_triton_backward(
        *given, out, flows, grad_out, ctx.needs_input_grad[5], *ctx.options
    )
    return *grads, None, None, None if given[5] is None else of_decay, *(None for _ in ctx.options)


torch.library.register_autograd("flowformer::flow_causal_triton", _differentiate_causal, setup_context=_keep_causal)
torch.library.register_autograd(
    "flowformer::flow_bidirectional_triton", _differentiate_bidirectional, setup_context=_keep_bidirectional
)
