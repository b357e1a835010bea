"""Flows and rows of weights of Mobile-Attention, in float64; see :mod:`flowformer.mechanisms.mobile.operation`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.mechanisms.flow.weights import meet, phi
from flowformer.mechanisms.mobile.options import MobileOptions, mobile_options
from flowformer.mechanisms.weights import FlowMaps, Rows, lower


def flows(q: Tensor, k: Tensor, *, causal: bool = False, **overrides: Any) -> FlowMaps:
    """The flows among the heads of each token, (L, heads) each: q and k (L, heads, K)."""
    o = mobile_options(**overrides)
    Q, K = phi(q, o.feature_map), phi(k, o.feature_map)
    I, O = meet(Q, K.sum(1, keepdim=True), o.eps), meet(K, Q.sum(1, keepdim=True), o.eps)
    I_conserved = meet(Q, (K / O[..., None]).sum(1, keepdim=True), o.eps)
    O_conserved = meet(K, (Q / I[..., None]).sum(1, keepdim=True), o.eps)
    allocation = I_conserved.sigmoid() if o.allocation else torch.ones_like(I)
    last = torch.tensor([len(q) - 1], device=q.device)
    competition = _competition(O_conserved, last, causal, o).expand(-1, 1, len(k))[:, 0].T
    return FlowMaps(I, O, I_conserved, O_conserved, competition, allocation)


def _competition(O_conserved: Tensor, places: Tensor, causal: bool, o: MobileOptions) -> Tensor:
    """Weight of each source for the queries at ``places``, (heads, rows or 1, L)."""
    logits = O_conserved if o.clamp is None else O_conserved.clamp(-o.clamp, o.clamp)
    if o.competition is None:
        return torch.ones_like(logits).T[:, None]
    if o.competition == "heads":
        return logits.shape[1] * logits.softmax(1).T[:, None]
    if not causal:
        return len(logits) * logits.softmax(0).T[:, None]
    seen = lower(logits.T[:, None].expand(-1, len(places), -1), places, -torch.inf)
    return (places[:, None] + 1) * seen.softmax(-1)


def weights(q: Tensor, k: Tensor, *, causal: bool = False, **overrides: Any) -> Rows:
    """Rows A_i (Q_i / I_i) . K_j C_ij of one sequence, divided by the number of tokens seen with ``normalize``."""
    o = mobile_options(**overrides)
    found = flows(q, k, causal=causal, **overrides)
    Q, K = phi(q, o.feature_map), phi(k, o.feature_map)
    gate = found.allocation / found.incoming

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", Q[places] * gate[places, :, None], K)
        scores = scores * _competition(found.conserved_outgoing, places, causal, o)
        if o.normalize:
            scores = scores / (places[:, None] + 1 if causal else len(k))
        return lower(scores, places) if causal else scores

    return rows
