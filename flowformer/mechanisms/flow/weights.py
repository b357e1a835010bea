"""Flows and rows of weights of Flow-Attention, in float64; see :mod:`flowformer.mechanisms.flow.operation`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.mechanisms.decay import decayed, default_decay, log_decayed, log_gammas
from flowformer.mechanisms.flow.equations import allocate, contend, phi
from flowformer.mechanisms.flow.options import FlowOptions, flow_options
from flowformer.mechanisms.weights import FlowMaps, Rows, lower


def flows(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    temperatures: Tensor | None = None,
    feature_weights: Tensor | None = None,
    *,
    causal: bool = False,
    preset: str = "core",
    **overrides: Any,
) -> FlowMaps:
    """Return the flows of one sequence, (length, heads) each: q (L, heads, K), k (S, heads, K)."""
    o, L, S = flow_options(preset, **overrides), len(q), len(k)
    Q, K = _features(q, k, feature_weights, o)
    log_decay = default_decay(log_decay, o.decay, q)

    def total(x: Tensor) -> Tensor:
        if log_decay is not None:
            return decayed(x, log_decay, causal)
        return x.cumsum(0) if causal else x.sum(0)

    def log_total(x: Tensor) -> Tensor:
        if log_decay is not None:
            return log_decayed(x, log_decay, causal)
        return x.logcumsumexp(0) if causal else x.logsumexp(0)

    n = total(torch.ones_like(K[..., 0]))
    given = n if causal else torch.ones_like(n)  # what each side gives, or takes, in all

    I = meet(Q, total(K), o.eps) + o.flow_eps
    O = meet(K, total(Q), o.eps) + o.flow_eps
    I_conserved = meet(Q, total(K * (given / O)[..., None]), o.eps) / given + o.flow_eps
    O_conserved = meet(K, total(Q * (given / I)[..., None]), o.eps) / given + o.flow_eps
    allocation = _by_head(allocate, I_conserved * L / S, temperatures) if o.allocation else torch.ones_like(I)
    logits = _by_head(contend, O_conserved * S / L if o.rescale else O_conserved, temperatures, o)
    competition = torch.ones_like(O)
    if o.competition == "heads":
        competition = n * logits.softmax(1)
    elif o.competition == "sequence":
        competition = n * (logits - log_total(logits)).exp()
    return FlowMaps(I, O, I_conserved, O_conserved, competition, allocation)


def weights(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    temperatures: Tensor | None = None,
    feature_weights: Tensor | None = None,
    *,
    causal: bool = False,
    preset: str = "core",
    **overrides: Any,
) -> Rows:
    """Return rows A_i (Q_i / I_i) . K_j C_j gamma(i, j) of one sequence; log_decay (heads,) or (L, heads)."""
    o = flow_options(preset, **overrides)
    found = flows(q, k, log_decay, temperatures, feature_weights, causal=causal, preset=preset, **overrides)
    Q, K = _features(q, k, feature_weights, o)
    log_decay = default_decay(log_decay, o.decay, q)
    gate = found.allocation / found.incoming

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", Q[places] * gate[places, :, None], K) * found.competition.T[:, None]
        if log_decay is not None:
            scores = scores * log_gammas(log_decay, len(K), places).exp()
        return lower(scores, places) if causal else scores

    return rows


def _features(q: Tensor, k: Tensor, weights: Tensor | None, options: FlowOptions) -> tuple[Tensor, Tensor]:
    if weights is not None:
        q, k = torch.einsum("lhk,hkf->lhf", q, weights[0]), torch.einsum("lhk,hkf->lhf", k, weights[1])
    return phi(q, options.feature_map), phi(k, options.feature_map)


def _by_head(function: Any, flow: Tensor, *arguments: Any) -> Tensor:
    """Call what takes flows (batch, heads, length) with those of one sequence, (length, heads)."""
    return function(flow.T.unsqueeze(0), *arguments).squeeze(0).T


def meet(A: Tensor, b: Tensor, eps: float) -> Tensor:
    """Return (A + eps) . (b + eps), summed over channels."""
    return ((A + eps) * (b + eps)).sum(-1)
