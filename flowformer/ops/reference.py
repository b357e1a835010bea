"""The truth: every mechanism in float64, written to be read beside its equations and never optimised.

Tests, benchmarks and explanations compare with these functions. They take time and memory quadratic in length (a row
of the attention matrix at a time, in batches of rows). Padding is what the word says: padded tokens are taken out, the
mechanism runs on what is left, and the outputs go back to their places. Gradients come from autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowformer.ops.flow_presets import RELU_FLOOR, FlowOptions, flow_options

ROWS = 1024  # rows of an attention matrix that exist at a time

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    preset: str = "core",
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **overrides: Any,
) -> Tensor:
    """:func:`flowformer.ops.flow_attention` in float64."""
    options = flow_options(preset, **overrides)
    flows = _causal_flows if causal else _flows

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        Q, K, incoming, allocation, competition = flows(q, k, options)
        out = []
        for rows in _row_batches(len(q)):
            weights = (allocation / incoming)[rows, :, None] * torch.einsum("ihk,jhk->ihj", Q[rows], K)
            weights = weights * competition.transpose(0, 1)
            out.append(torch.einsum("ihj,jhv->ihv", _lower(weights, rows) if causal else weights, v))
        return torch.cat(out)

    return _per_sequence(attend, q, k, v, key_padding_mask, query_padding_mask, cu_seqlens)


def _phi(x: Tensor, options: FlowOptions) -> Tensor:
    return x.sigmoid() if options.feature_map == "sigmoid" else x.relu() + RELU_FLOOR


def _flows(q: Tensor, k: Tensor, o: FlowOptions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Q, K, I, allocation and competition of one sequence: q (L, heads, K), k (S, heads, K); flows (length, heads)."""
    L, S = len(q), len(k)
    Q, K = _phi(q, o), _phi(k, o)
    I = ((Q + o.eps) * (K.sum(0) + o.eps)).sum(-1) + o.flow_eps
    O = ((K + o.eps) * (Q.sum(0) + o.eps)).sum(-1) + o.flow_eps
    I_conserved = ((Q + o.eps) * ((K / O[..., None]).sum(0) + o.eps)).sum(-1) + o.flow_eps
    O_conserved = ((K + o.eps) * ((Q / I[..., None]).sum(0) + o.eps)).sum(-1) + o.flow_eps
    if o.rescale:
        O_conserved = O_conserved * S / L
    if o.clamp is not None:
        O_conserved = O_conserved.clamp(-o.clamp, o.clamp)
    allocation = (I_conserved * L / S).sigmoid() if o.allocation else torch.ones_like(I)
    competition = torch.ones_like(O)
    if o.competition is not None:
        competition = S * O_conserved.softmax(0 if o.competition == "sequence" else 1)
    return Q, K, I, allocation, competition


def _causal_flows(q: Tensor, k: Tensor, o: FlowOptions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same with sums up to each token's own time."""
    Q, K = _phi(q, o), _phi(k, o)
    n = torch.arange(1, len(q) + 1, dtype=q.dtype, device=q.device)[:, None]
    I = ((Q + o.eps) * (K.cumsum(0) + o.eps)).sum(-1) + o.flow_eps
    O = ((K + o.eps) * (Q.cumsum(0) + o.eps)).sum(-1) + o.flow_eps
    I_conserved = ((Q + o.eps) * ((K * (n / O)[..., None]).cumsum(0) + o.eps)).sum(-1) / n + o.flow_eps
    O_conserved = ((K + o.eps) * ((Q * (n / I)[..., None]).cumsum(0) + o.eps)).sum(-1) / n + o.flow_eps
    if o.clamp is not None:
        O_conserved = O_conserved.clamp(-o.clamp, o.clamp)
    allocation = I_conserved.sigmoid() if o.allocation else torch.ones_like(I)
    competition = torch.ones_like(O)
    if o.competition == "heads":
        competition = n * O_conserved.softmax(1)
    elif o.competition == "sequence":
        normaliser = []
        for rows in _row_batches(len(q)):  # log sum_{j<=t} exp(O^_j), each from its own row
            row = O_conserved.T.expand(len(rows), -1, -1)
            normaliser.append(_lower(row, rows, -torch.inf).logsumexp(-1))
        competition = n * (O_conserved - torch.cat(normaliser)).exp()
    return Q, K, I, allocation, competition


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """:func:`flowformer.ops.linear_attention` in float64."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        Q, K = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))
        out = []
        for rows in _row_batches(len(q)):
            weights = torch.einsum("ihk,jhk->ihj", Q[rows], K)
            weights = _lower(weights, rows) if causal else weights
            out.append(torch.einsum("ihj,jhv->ihv", weights, v) / (weights.sum(-1, keepdim=True) + eps))
        return torch.cat(out)

    return _per_sequence(attend, q, k, v, key_padding_mask, query_padding_mask, cu_seqlens)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`flowformer.ops.softmax_attention` in float64."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for rows in _row_batches(len(q)):
            scores = torch.einsum("ihk,jhk->ihj", q[rows], k) / q.shape[-1] ** 0.5
            weights = (_lower(scores, rows, -torch.inf) if causal else scores).softmax(-1)
            out.append(torch.einsum("ihj,jhv->ihv", weights, v))
        return torch.cat(out)

    return _per_sequence(attend, q, k, v, key_padding_mask, query_padding_mask, cu_seqlens)


def _row_batches(length: int) -> Iterator[range]:
    for start in range(0, length, ROWS):
        yield range(start, min(start + ROWS, length))


def _lower(matrix: Tensor, rows: range, elsewhere: float = 0.0) -> Tensor:
    """Keep columns up to each row's own place, in (rows, heads, columns)."""
    place = torch.arange(matrix.shape[-1], device=matrix.device)
    future = place > torch.tensor(rows, device=matrix.device)[:, None]
    return matrix.masked_fill(future[:, None, :], elsewhere)


def _per_sequence(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Run ``attend`` on the real tokens of each sequence; zeros elsewhere, and where there is nothing to attend to."""
    q, k, v = q.double(), k.double(), v.double()
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = [attend(q[0, a:b], k[0, a:b], v[0, a:b]) for a, b in pairwise(bounds) if b > a]
        return torch.cat(pieces).unsqueeze(0)
    if query_padding_mask is None and q.shape[1] == k.shape[1]:
        query_padding_mask = key_padding_mask
    rows = []
    for row in range(len(q)):
        sinks, sources = _real(query_padding_mask, row, q), _real(key_padding_mask, row, k)
        out = q.new_zeros(*q.shape[1:3], v.shape[-1])
        if len(sinks) and len(sources):
            out = out.index_put((sinks,), attend(q[row, sinks], k[row, sources], v[row, sources]))
        rows.append(out)
    return torch.stack(rows)


def _real(mask: Tensor | None, row: int, tokens: Tensor) -> Tensor:
    """Places of the real tokens in one row."""
    if mask is None:
        return torch.arange(tokens.shape[1], device=tokens.device)
    return mask[row].nonzero().squeeze(-1)
