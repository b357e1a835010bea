"""Performer attention's rows of weights in float64, for references and attention maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.mechanisms.performer.options import PerformerOptions, performer_options
from flowformer.mechanisms.weights import Rows, lower


def performer_weights(
    q: Tensor, k: Tensor, projection: Tensor | None = None, *, causal: bool = False, **overrides: Any
) -> Rows:
    """Return rows phi(q_i) . phi(k_j) / sum_j phi(q_i) . phi(k_j) of one sequence."""
    options = performer_options(**overrides)
    if not options.exponential:
        Q, K = (options.project(x, projection).relu() + options.offset for x in (q, k))
        return _relu_rows(Q, K, causal, options)
    queries, keys = (options.exponents(x, projection) for x in (q, k))
    of_keys, root = keys.largest, keys.projected.shape[-1] ** -0.5
    Q = root * (queries.features(queries.largest) + options.offset)
    K = keys.features(of_keys)

    def rows(places: Tensor) -> Tensor:
        # Features of key j as query i sees them: exp(b_j - M_i) + eps = K_j exp(of_keys_j - M_i) + eps.
        running = causal and options.maximum == "past"
        largest = of_keys.cummax(0).values[places] if running else of_keys.amax(0, keepdim=True).expand(len(places), -1)
        apart = of_keys.T.unsqueeze(1) - largest.T.unsqueeze(2)  # (heads, rows, S)
        apart = lower(apart, places, -torch.inf) if causal else apart
        near = torch.einsum("ihf,jhf->hij", Q[places], K) * apart.exp()
        offset = options.offset * Q[places].sum(-1).T.unsqueeze(-1).expand_as(near)
        scores = root * (near + (lower(offset, places) if causal else offset))
        return scores / _denominator(scores, Q[places], options)

    return rows


def _relu_rows(Q: Tensor, K: Tensor, causal: bool, options: PerformerOptions) -> Rows:
    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihf,jhf->hij", Q[places], K)
        scores = lower(scores, places) if causal else scores
        return scores / _denominator(scores, Q[places], options)

    return rows


def _denominator(scores: Tensor, Q: Tensor, options: PerformerOptions) -> Tensor:
    total = scores.sum(-1, keepdim=True) + options.sum_eps * Q.sum(-1).T.unsqueeze(-1)
    return torch.where(total <= options.least, total + 2 * options.least, total)
