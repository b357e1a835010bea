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
from flowformer.ops.mobile import MobileOptions, mobile_options

ROWS = 1024  # rows of an attention matrix that exist at a time

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Bias = Callable[[range, int], Tensor]  # w of some queries and the first keys


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


def _phi(x: Tensor, options: FlowOptions | MobileOptions) -> Tensor:
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


def mobile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **overrides: Any,
) -> Tensor:
    """:func:`flowformer.ops.mobile_attention` in float64."""
    options = mobile_options(**overrides)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        L, heads = q.shape[:2]
        Q, K, incoming, allocation, O_conserved = _mobile_flows(q, k, options)
        out = []
        for rows in _row_batches(L):
            n = torch.tensor(rows, dtype=q.dtype)[:, None, None] + 1 if causal else torch.full((1, 1, 1), L).to(q)
            competition = torch.ones_like(O_conserved).T.expand(len(rows), -1, -1)
            if options.competition == "sequence":
                logits = O_conserved.T.expand(len(rows), -1, -1)
                competition = n * (_lower(logits, rows, -torch.inf) if causal else logits).softmax(-1)
            elif options.competition == "heads":
                competition = (heads * O_conserved.softmax(1)).T.expand(len(rows), -1, -1)
            weights = (allocation / incoming)[rows, :, None] * torch.einsum("ihk,jhk->ihj", Q[rows], K) * competition
            weights = _lower(weights, rows) if causal else weights
            out.append(torch.einsum("ihj,jhv->ihv", weights, v) / (n if options.normalize else 1))
        return torch.cat(out)

    return _per_sequence(attend, q, k, v, key_padding_mask, None, cu_seqlens)


def _mobile_flows(q: Tensor, k: Tensor, o: MobileOptions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Q, K, I, allocation and O^ of one sequence, q and k (L, heads, K): sums over the heads of each token."""
    Q, K = _phi(q, o), _phi(k, o)
    I = ((Q + o.eps) * (K.sum(1, keepdim=True) + o.eps)).sum(-1)
    O = ((K + o.eps) * (Q.sum(1, keepdim=True) + o.eps)).sum(-1)
    I_conserved = ((Q + o.eps) * ((K / O[..., None]).sum(1, keepdim=True) + o.eps)).sum(-1)
    O_conserved = ((K + o.eps) * ((Q / I[..., None]).sum(1, keepdim=True) + o.eps)).sum(-1)
    if o.clamp is not None:
        O_conserved = O_conserved.clamp(-o.clamp, o.clamp)
    return Q, K, I, I_conserved.sigmoid() if o.allocation else torch.ones_like(I), O_conserved


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


def aft_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: Tensor | tuple[Tensor, Tensor],
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`flowformer.ops.aft_full` in float64."""

    def bias(queries: range, keys: int) -> Tensor:
        return _table(position_bias, queries, keys)

    return _aft(q, k, v, bias, causal, key_padding_mask, query_padding_mask, cu_seqlens)


def aft_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: Tensor | tuple[Tensor, Tensor],
    window: int,
    *,
    hard: bool = False,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`flowformer.ops.aft_local` in float64."""

    def bias(queries: range, keys: int) -> Tensor:
        outside = (torch.arange(keys) - torch.tensor(queries)[:, None]).abs() >= window
        return _table(position_bias, queries, keys).masked_fill(outside, -torch.inf if hard else 0.0)

    return _aft(q, k, v, bias, causal, key_padding_mask, query_padding_mask, cu_seqlens)


def aft_simple(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`flowformer.ops.aft_simple` in float64."""

    def bias(queries: range, keys: int) -> Tensor:
        return torch.zeros(len(queries), keys, dtype=torch.float64)

    return _aft(q, k, v, bias, causal, key_padding_mask, query_padding_mask, cu_seqlens)


def aft_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    filters: Tensor,
    *,
    hard: bool = False,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`flowformer.ops.aft_conv` in float64, along a sequence and over an image: one head after the other."""
    heads, size = k.shape[-1], filters.shape[1:]
    if len(size) == 2:
        if query_padding_mask is None:
            query_padding_mask = key_padding_mask
        key, query = (None if mask is None else mask.flatten(1) for mask in (key_padding_mask, query_padding_mask))
        grid = torch.cartesian_prod(*(torch.arange(n) for n in q.shape[1:3]))
        out = _aft_conv_image(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), filters, hard, grid, key, query)
        return out.unflatten(1, q.shape[1:3])
    middle = size[0] - 1 if causal else size[0] // 2

    def bias_of(head: int) -> Bias:
        def bias(queries: range, keys: int) -> Tensor:
            tap = torch.arange(keys) - torch.tensor(queries)[:, None] + middle
            return _tap(filters[head], tap, (tap < 0) | (tap >= size[0]), hard)

        return bias

    outs = []
    for head, (one_q, one_v) in enumerate(zip(q.chunk(heads, -1), v.chunk(heads, -1), strict=True)):
        one_k = k[..., head, None].expand_as(one_v)
        outs.append(_aft(one_q, one_k, one_v, bias_of(head), causal, key_padding_mask, query_padding_mask, cu_seqlens))
    return torch.cat(outs, -1)


def _aft_conv_image(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    filters: Tensor,
    hard: bool,
    grid: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Tensor:
    """The same over an image: pixels (batch, pixels, ...) at the places ``grid`` (pixels, 2), which padding leaves."""
    heads = k.shape[-1]
    apart = grid[None] - grid[:, None]  # of keys from queries: (queries, keys, 2)
    reach = torch.tensor(filters.shape[1:]) // 2
    far = (apart.abs() > reach).any(-1)
    tap = (apart[..., 0] + reach[0]) * filters.shape[2] + apart[..., 1] + reach[1]
    rows = []
    for row in range(len(q)):
        queries, keys = _real(query_mask, row, q), _real(key_mask, row, k)
        outs = []
        for head, (one_q, one_v) in enumerate(zip(q[row].chunk(heads, -1), v[row].chunk(heads, -1), strict=True)):
            w = _tap(filters[head].flatten(), tap, far, hard)[queries][:, keys]
            out = torch.zeros_like(one_v, dtype=torch.float64)
            if len(queries) and len(keys):
                mean = _aft_mean(k[row, keys, head, None].double().expand(-1, one_v.shape[-1]), one_v[keys].double(), w)
                out = out.index_put((queries,), one_q[queries].double().sigmoid() * mean)
            outs.append(out)
        rows.append(torch.cat(outs, -1))
    return torch.stack(rows)


def _tap(w: Tensor, tap: Tensor, outside: Tensor, hard: bool) -> Tensor:
    """Taps of one filter by number; 0 outside, or nothing at all."""
    return w.double()[tap.masked_fill(outside, 0)].masked_fill(outside, -torch.inf if hard else 0.0)


def _table(position_bias: Tensor | tuple[Tensor, Tensor], queries: range, keys: int) -> Tensor:
    """The position bias of some queries and the first keys."""
    rows = torch.tensor(queries)
    if isinstance(position_bias, Tensor):
        return position_bias.double()[rows, :keys]
    u, v = position_bias
    return u.double()[rows] @ v.double()[:keys].T


def _aft(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Bias,
    causal: bool,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """sigmoid(q_t) times the mean of values under exp(k_j + w_tj), channel by channel."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for rows in _row_batches(len(q)):
            w = bias(rows, len(k))
            w = _lower(w[:, None], rows, -torch.inf)[:, 0] if causal else w
            out.append(_aft_mean(k, v, w))
        return q.sigmoid() * torch.cat(out)

    return _per_sequence(attend, q, k, v, key_padding_mask, query_padding_mask, cu_seqlens)


def _aft_mean(k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Means (queries, channels) of values (keys, channels) under exp(k_j + w_tj), w (queries, keys)."""
    weights = (k[None] + w[..., None]).softmax(1)
    return torch.einsum("tjc,jc->tc", weights, v)


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
        out = q.new_zeros(*q.shape[1:-1], v.shape[-1])
        if len(sinks) and len(sources):
            out = out.index_put((sinks,), attend(q[row, sinks], k[row, sources], v[row, sources]))
        rows.append(out)
    return torch.stack(rows)


def _real(mask: Tensor | None, row: int, tokens: Tensor) -> Tensor:
    """Places of the real tokens in one row."""
    if mask is None:
        return torch.arange(tokens.shape[1], device=tokens.device)
    return mask[row].nonzero().squeeze(-1)
