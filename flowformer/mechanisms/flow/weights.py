"""Flows and rows of weights of Flow-Attention, in float64; see :mod:`flowformer.mechanisms.flow.operation`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.mechanisms.flow.options import RELU_FLOOR, flow_options
from flowformer.mechanisms.weights import FlowMaps, Rows, lower


def flows(q: Tensor, k: Tensor, *, causal: bool = False, preset: str = "core", **overrides: Any) -> FlowMaps:
    """The flows of one sequence, (length, heads) each: q (L, heads, K), k (S, heads, K)."""
    o, L, S = flow_options(preset, **overrides), len(q), len(k)
    Q, K = phi(q, o.feature_map), phi(k, o.feature_map)
    n = torch.arange(1, S + 1, dtype=q.dtype, device=q.device)[:, None] if causal else torch.ones_like(Q[:1, :1, 0])

    def total(x: Tensor) -> Tensor:
        return x.cumsum(0) if causal else x.sum(0)

    I = meet(Q, total(K), o.eps) + o.flow_eps
    O = meet(K, total(Q), o.eps) + o.flow_eps
    I_conserved = meet(Q, total(K * (n / O)[..., None]), o.eps) / n + o.flow_eps
    O_conserved = meet(K, total(Q * (n / I)[..., None]), o.eps) / n + o.flow_eps
    allocation = (I_conserved * L / S).sigmoid() if o.allocation else torch.ones_like(I)
    logits = O_conserved * S / L if o.rescale else O_conserved
    logits = logits if o.clamp is None else logits.clamp(-o.clamp, o.clamp)
    competition = torch.ones_like(O)
    if o.competition == "heads":
        competition = (n if causal else S) * logits.softmax(1)
    elif o.competition == "sequence":
        competition = n * (logits - logits.logcumsumexp(0)).exp() if causal else S * logits.softmax(0)
    return FlowMaps(I, O, I_conserved, O_conserved, competition, allocation)


def weights(q: Tensor, k: Tensor, *, causal: bool = False, preset: str = "core", **overrides: Any) -> Rows:
    """Rows A_i (Q_i / I_i) . K_j C_j of one sequence."""
    o = flow_options(preset, **overrides)
    found = flows(q, k, causal=causal, preset=preset, **overrides)
    Q, K = phi(q, o.feature_map), phi(k, o.feature_map)
    gate = found.allocation / found.incoming

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", Q[places] * gate[places, :, None], K) * found.competition.T[:, None]
        return lower(scores, places) if causal else scores

    return rows


def phi(x: Tensor, feature_map: str) -> Tensor:
    """The feature map: ``"sigmoid"``, or ``"relu"`` for relu(x) + 1e-6."""
    return x.sigmoid() if feature_map == "sigmoid" else x.relu() + RELU_FLOOR


def meet(A: Tensor, b: Tensor, eps: float) -> Tensor:
    """(A + eps) . (b + eps), channel by channel added up."""
    return ((A + eps) * (b + eps)).sum(-1)
