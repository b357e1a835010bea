"""Weighted means over all keys, computed in blocks of queries, for AFT-full.

A block of w is made, used in two matrix products and forgotten, so a bias given as two factors never exists as a table.
Autograd sees one node, which keeps keys, values, means and denominators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import LOG_ZERO, without_autocast
from flowformer.core.tracing import is_exporting
from flowformer.mechanisms.aft.means import (
    Gradients,
    Sources,
    Weights,
    come_back,
    finish_sources,
    is_plain,
    means,
    means_backward,
    of_weights,
    prepare,
    refuse_second_gradients,
    repair_gradients,
    weigh,
)

Bias = tuple[Tensor, ...]  # (w,) free, (T, T), or factors (u, v), each (T, d'), of w = u v^T
Rows = slice | Tensor  # places of queries: of all sequences alike, or (batch, queries)


def bias_block(bias: Bias, rows: Rows, columns: int) -> Tensor:
    """Return the bias of some queries and the first keys, (queries, columns) or (batch, queries, columns)."""
    table, *factor = bias
    return table[rows] @ factor[0][:columns].mT if factor else table[:, :columns][rows]


def _add_bias_gradient(grads: Bias, bias: Bias, rows: Rows, of_w: Tensor) -> None:
    """Add the gradient of a block, (batch or 1, queries, columns), to those of the bias."""
    columns = of_w.shape[-1]
    of_w = of_w.sum(0) if isinstance(rows, slice) else of_w.flatten(0, 1)
    flat = rows if isinstance(rows, slice) else rows.flatten()
    if len(bias) == 1:
        piece, target = of_w, grads[0][:, :columns]
    else:
        u, v = bias
        grads[1][:columns] += of_w.mT @ u[flat]
        piece, target = of_w @ v[:columns], grads[0]
    if isinstance(flat, slice):
        target[flat] += piece
    else:
        target.index_add_(0, flat, piece)


class Blocks(NamedTuple):
    """Blocks of queries, and the keys that each of them sees.

    Attributes:
        causal: Whether a query sees keys up to its own place only.
        starts: Place of the first query: a number, or (batch,) where sequences differ.
        least: The least of them.
        size: Queries of a block.
    """

    causal: bool
    starts: int | Tensor
    least: int
    size: int

    def cut(self, queries: int) -> Iterator[tuple[int, int]]:
        """Cut queries into blocks; causal ones double at first, so that each past is as long as its block.

        An exported graph has one block.
        """
        if is_exporting():
            yield 0, queries
            return
        start = 0
        while start < queries:
            size = min(self.size, max(1, self.least + start)) if self.causal else self.size
            yield start, min(start + size, queries)
            start += size

    def rows(self, start: int, end: int) -> Rows:
        """Return the positions of the queries of a block."""
        if isinstance(self.starts, int):
            return slice(self.starts + start, self.starts + end)
        return self.starts.unsqueeze(1) + torch.arange(start, end, device=self.starts.device)

    def columns(self, start: int, end: int, keys: int) -> tuple[int, int | None]:
        """Return how many keys a block sees, and how many of them are seen by all its queries."""
        if not self.causal:
            return keys, None
        return self.starts + end if isinstance(self.starts, int) else keys, self.least + start + 1

    def hide(self, w: Tensor, rows: Rows) -> Tensor:
        """Return w with a large negative value at keys that a query does not see."""
        if not self.causal:
            return w
        columns = torch.arange(w.shape[-1], device=w.device)
        places = columns[rows] if isinstance(rows, slice) else rows
        return w.masked_fill(columns > places.unsqueeze(-1), LOG_ZERO)


def block_means(bias: Bias, K: Tensor, V: Tensor, queries: int, blocks: Blocks) -> Tensor:
    """Compute weighted means over all keys, or over keys up to each query.

    Args:
        bias: Position bias, in the dtype of K.
        K: Keys (batch, keys, M), next to -infinity where there is none.
        V: Values (batch, keys, M).
        queries: How many.
        blocks: The geometry.

    Returns:
        (batch, queries, M).
    """
    if is_plain():
        return _run_blocks(bias, K, V, queries, blocks)[0]
    return _BlockMeans.apply(blocks, queries, K, V, *bias)


def _block_sources(K: Tensor, V: Tensor, columns: int, first: int | None, known: Sources | None) -> Sources:
    """Sources of a block; those of another where all blocks see the same."""
    if known is not None and first is None:
        return known
    return prepare(K[:, :columns], V[:, :columns].unsqueeze(-1), None, first)


def _run_blocks(bias: Bias, K: Tensor, V: Tensor, queries: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
    outs, totals, sources = [], [], None
    for start, end in blocks.cut(queries):
        columns, first = blocks.columns(start, end, K.shape[1])
        rows = blocks.rows(start, end)
        sources = _block_sources(K, V, columns, first, sources)
        out, total = means(_block_weights(bias, rows, columns, blocks), sources)
        outs.append(out.squeeze(-1))
        totals.append(total)
    return torch.cat(outs, 1), torch.cat(totals, 1)


def _block_weights(bias: Bias, rows: Rows, columns: int, blocks: Blocks) -> Weights:
    w = blocks.hide(bias_block(bias, rows, columns), rows)
    return weigh(w.unsqueeze(0) if w.ndim == 2 else w, False)


class _BlockMeans(torch.autograd.Function):
    """Means over all keys as one node of the graph: no block of w is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, queries: int, K: Tensor, V: Tensor, *bias: Tensor) -> Tensor:
        out, totals = _run_blocks(bias, K, V, queries, blocks)
        ctx.blocks = blocks
        ctx.save_for_backward(K, V, out, totals, *bias)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_gradients()
        blocks, grad = ctx.blocks, grads_out[0]
        K, V, out, totals, *bias = ctx.saved_tensors
        bias, of_w = tuple(bias), any(ctx.needs_input_grad[4:])
        of_bias = tuple(torch.zeros_like(part) for part in bias) if of_w else ()
        run = _causal_backward if blocks.causal else _whole_backward
        of_K, of_V = run(bias, K, V, out, totals, grad, blocks, of_bias)
        return None, None, of_K, of_V, *(of_bias if of_w else (None,) * len(bias))


def _causal_backward(
    bias: Bias, K: Tensor, V: Tensor, out: Tensor, totals: Tensor, grad: Tensor, blocks: Blocks, of_bias: Bias
) -> tuple[Tensor, Tensor]:
    """Gradients of K and V; those of the bias are added to ``of_bias``, which is empty if they are not wanted."""
    of_K, of_V = torch.zeros_like(K), torch.zeros_like(V)
    for start, end in blocks.cut(out.shape[1]):
        columns, first = blocks.columns(start, end, K.shape[1])
        rows = blocks.rows(start, end)
        sources = prepare(K[:, :columns], V[:, :columns].unsqueeze(-1), None, first)
        weights = _block_weights(bias, rows, columns, blocks)
        y, g = (x[:, start:end].unsqueeze(-1) for x in (out, grad))
        got = means_backward(weights, sources, y, totals[:, start:end], g, of_w=bool(of_bias))
        of_K[:, :columns] += got.K
        of_V[:, :columns] += got.V.squeeze(-1)
        if got.w is not None:
            _add_bias_gradient(of_bias, bias, rows, got.w)
    return of_K, of_V


def _whole_backward(
    bias: Bias, K: Tensor, V: Tensor, out: Tensor, totals: Tensor, grad: Tensor, blocks: Blocks, of_bias: Bias
) -> tuple[Tensor, Tensor]:
    """The same where all blocks see the same keys: what comes back to those is added up first, in the products."""
    sources = prepare(K, V.unsqueeze(-1), None, None)
    of_EV, of_E = torch.zeros_like(K), torch.zeros_like(K)
    repaired = []
    for start, end in blocks.cut(out.shape[1]):
        rows = blocks.rows(start, end)
        weights = _block_weights(bias, rows, K.shape[1], blocks)
        y, g = (x[:, start:end].unsqueeze(-1) for x in (out, grad))
        back = come_back(y, totals[:, start:end], g)
        A = weights.A.mT.expand(len(K), -1, -1)
        of_EV.baddbmm_(A, back.out.squeeze(-1))
        of_E.baddbmm_(A, back.total)
        of_w = of_weights(weights, sources, back) if of_bias else None
        if back.bad is not None:
            more = Gradients(torch.zeros_like(K), torch.zeros_like(sources.V), None, of_w)
            repair_gradients(more, back.bad, weights.w, sources, y, g)
            repaired.append(more)
        if of_w is not None:
            _add_bias_gradient(of_bias, bias, rows, of_w)
    of_K, of_V = finish_sources(sources, of_EV.unsqueeze(-1), of_E)
    of_V = of_V.squeeze(-1)
    for more in repaired:
        of_K += more.K
        of_V += more.V.squeeze(-1)
    return of_K, of_V
