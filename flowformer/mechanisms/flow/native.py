"""Flow-Attention by the C++ kernels: what the operations call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.checks import Masks
from flowformer.core.run import Checked
from flowformer.mechanisms.flow.equations import FEATURE_MAPS, Learned, features_first, single, state_of
from flowformer.mechanisms.flow.operators import run_step
from flowformer.mechanisms.flow.options import FlowOptions
from flowformer.mechanisms.flow.state import FlowState


@implements("flow_attention", "native")
def attend(given: Checked, learned: Learned, options: FlowOptions) -> tuple[Tensor, FlowState | None]:
    """Either form of Flow-Attention: the output, and the state after it."""
    q, k, v, causal, masks, cu_seqlens, state = given
    dtype = v.dtype
    q, k, v, values = features_first(q, k, v, masks, learned, options)
    log_decay = single(learned.log_decay)
    if not causal:
        return torch.ops.flowformer.flow_bidirectional(q, k, v, *masks, cu_seqlens, log_decay, *values).to(dtype), None
    before = (None, None, None, None) if state is None else state_of(state, learned)
    out, *after = torch.ops.flowformer.flow_causal(q, k, v, masks.key, cu_seqlens, log_decay, *before, *values)
    return out.to(dtype), FlowState(*after)


@implements("flow_attention_step", "native")
def step(
    q: Tensor, k: Tensor, v: Tensor, state: FlowState, learned: Learned, options: FlowOptions, *, plain: bool
) -> tuple[Tensor, ...]:
    """Compute one token: output, and parts of the state after it; ``plain``: contiguous tensors without gradients."""
    log_decay = single(learned.log_decay)
    if options.feature_map not in FEATURE_MAPS:
        return _step_of_features(q, k, v, log_decay, state, learned, options)
    if plain:
        return run_step(q, k, v, log_decay, state, options.values())
    return _step_by_operators(q, k, v, log_decay, state_of(state, learned), options.values())


def _step_of_features(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: FlowState, learned: Learned, options: FlowOptions
) -> tuple[Tensor, ...]:
    tokens = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    Q, K, V, values = features_first(*tokens, Masks(None, None), learned, options)
    Q, K, V = Q.squeeze(1), K.squeeze(1), V.squeeze(1)
    out, *after = _step_by_operators(Q, K, V, log_decay, state_of(state, learned), values)
    return out.to(v.dtype), *after


def _step_by_operators(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Sequence[Tensor], values: Sequence[Any]
) -> tuple[Tensor, ...]:
    given = (q, k, v, *state) if log_decay is None else (q, k, v, log_decay, *state)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return torch.ops.flowformer.flow_step(q, k, v, log_decay, *state, *values)
    if log_decay is not None and log_decay.ndim == 2:
        log_decay = log_decay.unsqueeze(1)
    tokens = (t.unsqueeze(1) for t in (q, k, v))  # a sequence of one token: that has a backward pass
    out, *after = torch.ops.flowformer.flow_causal(*tokens, None, None, log_decay, *state, *values)
    return out.squeeze(1), *after
