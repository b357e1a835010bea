"""Mobile-Attention by kernels for linear attention: gates and weights in PyTorch, the sum over tokens by a backend.

In the causal form a source counts at each later sink with a weight of its own, exp(O^_j - log Z_t): that at its own
time, times a decay whose logarithm at each token is log Z_{t-1} - log Z_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import Masks
from flowformer.core.masks import fill, run_packed
from flowformer.core.precision import LOG_ZERO, no_autocast
from flowformer.core.run import Checked
from flowformer.core.tracing import log_add, log_cumsum
from flowformer.mechanisms.flow.equations import FEATURE_MAPS, features
from flowformer.mechanisms.mobile.operation import (
    MobileState,
    gates_and_logits,
    init_mobile_state,
    positions,
    scale_of,
    weights_of,
)
from flowformer.mechanisms.mobile.options import MobileOptions

Attend = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]  # as in kernels/triton/attend.py


def attend_among_heads(attend: Attend, given: Checked, options: MobileOptions) -> tuple[Tensor, MobileState | None]:
    """Either form of Mobile-Attention by a backend's linear attention: the output, and the state after it."""
    q, k, v, causal, masks, cu_seqlens, state = given
    if causal and state is None:
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = init_mobile_state(sequences, q.shape[2], q.shape[3], v.shape[3], device=q.device)
    if cu_seqlens is None:
        return _dense(attend, q, k, v, masks.key, state, options)

    def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, Any]:
        return _dense(attend, q, k, v, mask, state, options)

    return run_packed(padded, (q, k, v), cu_seqlens, state)


def _dense(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: MobileState | None,
    options: MobileOptions,
) -> tuple[Tensor, MobileState | None]:  # fmt: skip
    with no_autocast(q.device):
        Q, K = features(q, mask, options.feature_map), features(k, mask, options.feature_map)
        gate, logits = gates_and_logits(Q, K, mask, options)
        given: dict[str, Any] = {"feature_map": FEATURE_MAPS[options.feature_map]}
        if state is None:
            weight = weights_of(logits, mask, options).expand(logits.shape)
            return attend("mobile_attention", q, k, v, Masks(mask, mask), scale=gate, weight=weight, **given)[0], None
        n, count = positions(state.length, mask, q)
        given["scale"] = gate * scale_of(n, options).unsqueeze(-1)
        normaliser = state.log_normaliser.clone()
        if options.competition == "sequence":
            given["weight"], given["log_decay"], normaliser = _compete(fill(logits, mask, LOG_ZERO), normaliser)
        elif options.competition == "heads":
            given["weight"] = q.shape[2] * logits.softmax(2)
        out, _, memory = attend(
            "mobile_attention", q, k, v, Masks(mask, mask), causal=True, memory=state.memory, **given
        )
        assert memory is not None
        return out, MobileState(count, normaliser, memory)


def _compete(logits: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(O^_t - log Z_t) and log Z_{t-1} - log Z_t, (batch, length, heads), and the last log Z.

    Args:
        logits: O^, (batch, length, heads); far below zero at padding.
        past: log Z before the first token, (batch, heads).
    """
    logits = logits.transpose(1, 2).to(past.dtype)
    Z = log_add(log_cumsum(logits), past.unsqueeze(-1))
    before = torch.cat([past.unsqueeze(-1), Z[..., :-1]], -1)
    return (logits - Z).exp().transpose(1, 2), (before - Z).transpose(1, 2), Z[..., -1]
