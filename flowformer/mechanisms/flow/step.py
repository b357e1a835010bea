"""One token of causal Flow-Attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import choose, implementation
from flowformer.core.checks import check_state, check_step
from flowformer.core.decay import clip_log_decay
from flowformer.core.precision import no_autocast
from flowformer.core.tracing import log_add
from flowformer.mechanisms.flow.equations import Learned, allocate, contend, query_and_key, refusals, resolve
from flowformer.mechanisms.flow.options import FlowOptions, flow_options
from flowformer.mechanisms.flow.state import FlowState, init_flow_state


def flow_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FlowState,
    log_decay: Tensor | None = None,
    temperatures: Tensor | None = None,
    feature_weights: Tensor | None = None,
    *,
    preset: str = "core",
    backend: str = "auto",
    **overrides: Any,
) -> tuple[Tensor, FlowState]:
    """Compute one token of causal Flow-Attention, in time and memory independent of the number of tokens before it.

    Args:
        q: Query before the feature map, (batch, heads, K).
        k: Key before the feature map, (batch, heads, K).
        v: Value, (batch, heads, V).
        state: State before the token, from :func:`init_flow_state`, a step, or ``flow_attention(..., causal=True,
            return_state=True)``; not changed.
        log_decay: As in :func:`flow_attention`: (heads,), or (batch, heads) where it depends on the token.
        temperatures: As in :func:`flow_attention`.
        feature_weights: As in :func:`flow_attention`.
        preset: As in :func:`flow_attention`.
        backend: As in :func:`flow_attention`.
        **overrides: As in :func:`flow_attention`.

    Returns:
        Output (batch, heads, V) in the dtype of v, and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "flow_attention_step"
    options, learned = flow_options(preset, **overrides), Learned(log_decay, temperatures, feature_weights)
    decays = log_decay is not None or options.decay is not None
    others = temperatures is not None or feature_weights is not None or options.temperature
    published = not decays and not others and not options.learns
    fits = not others and not torch.compiler.is_compiling() and _fits(q, k, v, state, log_decay, options)
    if not fits:
        check_step(op, q, k, v, state, FlowState)
        batch, heads, channels = q.shape
        fresh = init_flow_state(
            batch, heads, channels, v.shape[-1], device=q.device, preset=preset, feature_map=options.feature_map
        )
        check_state(op, state, fresh)
        learned = learned if published else resolve(op, learned, q, options, step=True)
    chosen = choose(op, backend, q, refusals(learned))
    if chosen == "torch":
        return _step(q, k, v, state, learned, options)
    out, *after = implementation(op, chosen)(q, k, v, state, learned, options, plain=fits)
    return out, FlowState(*after)


_DECAYS = (torch.float32, torch.float64)


def _fits(q: Any, k: Any, v: Any, state: Any, log_decay: Any, options: FlowOptions) -> bool:
    """Whether a step is right beyond doubt: contiguous tensors of the right shapes and dtypes, without gradients.

    The checks with error messages take ten times as long as the step of a kernel.
    """
    if type(state) is not FlowState:
        return False
    given = (q, k, v, *state) if log_decay is None else (q, k, v, log_decay, *state)
    if not all(type(t) is Tensor and t.is_contiguous() for t in given):
        return False
    if (log_decay is None and options.decay is not None) or options.feature_map in ("softmax", "learned"):
        return False
    count, sums, log_normaliser, memory = state
    shape, dtype = q.shape, q.dtype
    if len(shape) != 3 or k.shape != shape or v.ndim != 3 or v.shape[:2] != shape[:2] or 0 in shape or 0 in v.shape:
        return False
    if not dtype.is_floating_point or k.dtype != dtype or v.dtype != dtype:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    rows = shape[:2]
    if log_decay is not None and (log_decay.shape not in (shape[1:2], rows) or log_decay.dtype not in _DECAYS):
        return False
    return (
        count.shape == rows
        and sums.shape == (*rows, 4, shape[2])
        and log_normaliser.shape == rows
        and memory.shape == (*rows, shape[2], v.shape[2])
        and count.dtype == sums.dtype == log_normaliser.dtype == memory.dtype == torch.float64
        and all(t.is_cpu if q.is_cpu else t.device == q.device for t in given)
    )


def _step(
    q: Tensor, k: Tensor, v: Tensor, state: FlowState, learned: Learned, options: FlowOptions
) -> tuple[Tensor, FlowState]:
    """The step in plain PyTorch."""
    eps, flow_eps, wide = options.eps, options.flow_eps, state.memory.dtype
    with no_autocast(q.device):
        # One token is little work: do it in the dtype of the state.
        Q, K = (
            x.squeeze(1).to(wide) for x in query_and_key(q.unsqueeze(1), k.unsqueeze(1), None, None, learned, options)
        )

        def flow(a: Tensor, total: Tensor) -> Tensor:
            return ((a + eps) * (total + eps)).sum(-1)

        before = fade(state, learned.log_decay)
        n = before.tokens + 1
        key_sum, query_sum, scaled_key_sum, scaled_query_sum = before.sums.unbind(2)
        key_sum, query_sum = key_sum + K, query_sum + Q
        incoming = flow(Q, key_sum) + flow_eps
        outgoing = flow(K, query_sum) + flow_eps
        scaled_key_sum = scaled_key_sum + K * (n / outgoing).unsqueeze(-1)
        scaled_query_sum = scaled_query_sum + Q * (n / incoming).unsqueeze(-1)
        conserved_in = flow(Q, scaled_key_sum) / n + flow_eps
        conserved_out = flow(K, scaled_query_sum) / n + flow_eps
        logits = contend(conserved_out, learned.temperatures, options)
        weight, log_normaliser = _compete(logits, n, state.log_normaliser, before.log_normaliser, options)
        V = v.to(wide) * weight.unsqueeze(-1)
        memory = before.memory + K.unsqueeze(-1) * V.unsqueeze(-2)
        gate = allocate(conserved_in, learned.temperatures) / incoming if options.allocation else 1 / incoming
        out = (Q.unsqueeze(-2) @ memory).squeeze(-2) * gate.unsqueeze(-1)
    sums = torch.stack([key_sum, query_sum, scaled_key_sum, scaled_query_sum], 2)
    return out.to(v.dtype), FlowState(n, sums, log_normaliser, memory)


def fade(state: FlowState, log_decay: Tensor | None) -> FlowState:
    """Return the state after the decay of one token, (heads,) or (batch, heads)."""
    if log_decay is None:
        return state._replace(tokens=state.tokens.detach())  # a count is no function of any input
    log_decay = clip_log_decay(log_decay.to(state.memory.dtype))
    factor = log_decay.exp().expand(state.tokens.shape)
    count, sums, log_normaliser, memory = state
    return FlowState(
        count * factor, sums * factor[..., None, None], log_normaliser + log_decay, memory * factor[..., None, None]
    )


def _compete(logits: Tensor, n: Tensor, past: Tensor, decayed: Tensor, options: FlowOptions) -> tuple[Tensor, Tensor]:
    """Weight of the token's source, and the log-normaliser after it, for that before it and what has decayed of it."""
    if options.competition is None:
        return torch.ones_like(n), past.clone()
    if options.competition == "heads":
        return n * logits.softmax(1), past.clone()
    normaliser = log_add(logits, decayed)
    return n * (logits - normaliser).exp(), normaliser
