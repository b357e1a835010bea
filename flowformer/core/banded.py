"""Softmax attention over a band of key blocks and a few further keys, in memory linear in length.

Queries are cut into blocks. Each block sees a window of consecutive key blocks, and further keys that are picked out
one by one; a function of positions tells which pairs of them meet. Blocks are worked on a few at a time. Autograd sees
one node, which keeps its inputs, its output and one number for each query, log sum exp of its scores, and computes the
scores again in the backward pass, as FlashAttention does (Dao et al., 2022). By these numbers, the outputs over two
disjoint sets of keys are joined to the one over both, :func:`join`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import LOG_ZERO, no_autocast, state_dtype, sum_dtype, without_autocast
from flowformer.core.tracing import count_chunks, cut, frame, is_exporting, is_transformed

BLOCK = 512  # queries that are worked on at a time
KEYS = 256  # and fewer of them where they have to do with more keys than these
NOTHING = LOG_ZERO / 10  # scores and their log-sums below are of hidden keys

# ``seen(i, j)``: which queries at places i see which keys at places j, boolean. i is (1, 1, blocks, block, 1), j
# (batch or 1, heads or 1, blocks or 1, 1, keys), and so is the result, broadcast. Queries and keys count from the first
# query on; earlier keys have negative places.
Seen = Callable[[Tensor, Tensor], Tensor]


class Band(NamedTuple):
    """Windows of key blocks.

    Attributes:
        block: Queries of a block.
        before: Key blocks of a window before the block itself.
        after: Key blocks behind it.
        seen: Which of a window's pairs meet; ``None`` for none, where all keys are in :class:`Further`.
        past: Keys before the first query, at most ``before * block``.
    """

    block: int
    before: int
    after: int
    seen: Seen | None
    past: int = 0


class Further(NamedTuple):
    """Keys that blocks see besides their windows.

    Attributes:
        places: (batch or 1, heads or 1, blocks or 1, keys), int64; negative for no key. A key that is named twice
            counts twice.
        seen: Which queries see them; those without a key are hidden already.
    """

    places: Tensor
    seen: Seen


class _Plan(NamedTuple):
    """What :func:`_forward` and :func:`_backward` are given besides q, k and v."""

    band: Band
    further: Further | None
    size: int

    def groups(self, q: Tensor) -> Iterator[tuple[int, int]]:
        """Yield the first block, and the last one + 1, of each group; all in an exported graph."""
        blocks = q.shape[2] // self.band.block
        if is_exporting():
            yield 0, blocks
            return
        count = max(1, min(self.size, KEYS * self.size // self.keys) // self.band.block)
        for start in range(0, blocks, count):
            yield start, min(start + count, blocks)

    @property
    def width(self) -> int:
        """Keys of a window."""
        return 0 if self.band.seen is None else (self.band.before + 1 + self.band.after) * self.band.block

    @property
    def keys(self) -> int:
        """Keys that a block has to do with."""
        return max(1, self.width + (0 if self.further is None else self.further.places.shape[-1]))


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, band: Band, further: Further | None = None, *, size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys it sees, scaled by 1 / sqrt(K).

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, past + L, heads, K).
        v: Values (batch, past + L, heads, V).
        band: The windows.
        further: Further keys; a key that is also seen in the window counts twice.
        size: Queries that are worked on at a time.

    Returns:
        Output (batch, L, heads, V), zeros where nothing is seen, and log sum exp of scores (batch, L, heads), in the
        dtype of sums.
    """
    length, block = q.shape[1], band.block
    blocks = count_chunks(length, block)
    compute = sum_dtype(q.dtype)
    with no_autocast(q.device):
        Q = frame(q.to(compute) / q.shape[-1] ** 0.5, 0, blocks * block).transpose(1, 2)
        total = (band.before + blocks + band.after) * block
        K, V = (frame(x.to(compute), band.before * block - band.past, total).transpose(1, 2) for x in (k, v))
        plan = _Plan(band, further, size)
        if torch.compiler.is_compiling() or is_exporting() or is_transformed():
            out, log_sum = _forward(plan, Q, K, V)
        else:
            out, log_sum = _Banded.apply(plan, Q, K, V)
        return cut(out.transpose(1, 2), length), cut(log_sum.transpose(1, 2), length)


def join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join outputs over two disjoint sets of keys, (batch, L, heads, V) and log-sums (batch, L, heads), to one."""
    log_sum = torch.logaddexp(one[1], other[1])
    first, second = ((x[1] - log_sum).exp().unsqueeze(-1) for x in (one, other))
    return one[0] * first + other[0] * second, log_sum


def attend_all(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention of a few queries over all keys.

    Args:
        q: (batch, n, heads, K).
        k: (batch, S, heads, K).
        v: (batch, S, heads, V).
        seen: Boolean, broadcast to (batch, heads, n, S).

    Returns:
        (batch, n, heads, V) in the dtype of sums; zeros where nothing is seen.
    """
    compute = sum_dtype(q.dtype)
    with no_autocast(q.device):
        Q, K, V = (x.to(compute).transpose(1, 2) for x in (q / q.shape[-1] ** 0.5, k, v))
        weights = _hide(Q @ K.mT, seen).softmax(-1) * seen.any(-1, keepdim=True)
        return (weights @ V).transpose(1, 2)


def _hide(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen, LOG_ZERO)


# -------------------------------------------------------------------------------------------------- groups of blocks


class _Group:
    """Blocks of queries from ``start`` to ``end``, and the keys and values they see."""

    def __init__(self, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, start: int, end: int) -> None:
        self.plan, self.start, self.end = plan, start, end
        block = plan.band.block
        self.queries = slice(start * block, end * block)
        self.Q = q[:, :, self.queries].unflatten(2, (end - start, block))
        self.K, self.V = self._windows(k), self._windows(v)
        self.places = None
        if plan.further is not None:
            places = plan.further.places
            self.places = places if places.shape[2] == 1 else places[:, :, start:end]
        if self.places is not None:
            self.further_K, self.further_V = self._pick(k), self._pick(v)

    def _windows(self, x: Tensor) -> Tensor:
        """(batch, heads, blocks, width, channels)."""
        block, width = self.plan.band.block, self.plan.width
        if is_exporting():
            starts = block * torch.arange(self.end - self.start, device=x.device).unsqueeze(1)
            return x[:, :, starts + torch.arange(width, device=x.device)]
        if not width:
            return x.new_empty(*x.shape[:2], self.end - self.start, 0, x.shape[-1])
        return x[:, :, self.start * block : (self.end - 1) * block + width].unfold(2, width, block).mT

    def _index(self, x: Tensor) -> Tensor:
        """Places of further keys among the padded ones, (batch, heads, blocks or 1 times keys, channels)."""
        assert self.places is not None
        places = self.places.clamp(min=0) + self.plan.band.before * self.plan.band.block
        return places.flatten(2).unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1])

    def _pick(self, x: Tensor) -> Tensor:
        """(batch, heads, blocks or 1, keys, channels)."""
        assert self.places is not None
        return x.gather(2, self._index(x)).unflatten(2, self.places.shape[2:])

    def scores(self) -> Tensor:
        """(batch, heads, blocks, block, width and further keys)."""
        block, device = self.plan.band.block, self.Q.device
        count = self.end - self.start
        i = torch.arange(self.start * block, self.end * block, device=device).view(1, 1, count, block, 1)
        parts = []
        if self.plan.band.seen is not None:
            starts = (torch.arange(self.start, self.end, device=device) - self.plan.band.before) * block
            j = starts.view(1, 1, -1, 1, 1) + torch.arange(self.plan.width, device=device)
            parts.append(_hide(self.Q @ self.K.mT, self.plan.band.seen(i, j)))
        if self.places is not None:
            assert self.plan.further is not None
            j = self.places.unsqueeze(-2)
            parts.append(_hide(_product(self.Q, self.further_K.mT), self.plan.further.seen(i, j) & (j >= 0)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def weigh(self, weights: Tensor) -> Tensor:
        """Weights times values."""
        if self.places is None:
            return weights @ self.V
        near, far = weights.split([self.plan.width, weights.shape[-1] - self.plan.width], -1)
        out = _product(far, self.further_V)
        return out if self.plan.band.seen is None else out + near @ self.V

    def times_values(self, grad: Tensor) -> Tensor:
        """Gradients of outputs times values, like :meth:`scores`."""
        near = grad @ self.V.mT
        return near if self.places is None else torch.cat([near, _product(grad, self.further_V.mT)], -1)

    def times_keys(self, weights: Tensor) -> Tensor:
        """Gradients of scores times keys, like the queries."""
        if self.places is None:
            return weights @ self.K
        near, far = weights.split([self.plan.width, weights.shape[-1] - self.plan.width], -1)
        return near @ self.K + _product(far, self.further_K)

    def add(self, whole: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Add weights^T rows to the tokens that the windows and the further keys were taken from."""
        block, width = self.plan.band.block, self.plan.width
        near, far = weights.split([width, weights.shape[-1] - width], -1)
        if width:
            pieces = (near.mT @ rows).unflatten(3, (-1, block))
            for at in range(pieces.shape[3]):
                whole[:, :, (self.start + at) * block : (self.end + at) * block] += pieces[:, :, :, at].flatten(2, 3)
        if self.places is not None:
            shared = self.places.shape[2] == 1
            found = far.flatten(2, 3).mT @ rows.flatten(2, 3) if shared else (far.mT @ rows).flatten(2, 3)
            whole.scatter_add_(2, self._index(whole), found.to(whole.dtype))


def _product(rows: Tensor, further: Tensor) -> Tensor:
    """Multiply rows (batch, heads, blocks, block, n) with further (batch, heads, blocks or 1, n, m)."""
    if further.shape[2] != 1 or rows.shape[2] == 1:
        return rows @ further
    return (rows.flatten(2, 3) @ further.squeeze(2)).unflatten(2, rows.shape[2:4])


def _forward(plan: _Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, tokens, V) and log-sums (batch, heads, tokens)."""
    outs, log_sums = [], []
    for start, end in plan.groups(q):
        group = _Group(plan, q, k, v, start, end)
        scores = group.scores()
        most = scores.amax(-1, keepdim=True).detach().clamp(min=NOTHING)  # hidden scores are far below: exp gives 0
        weights = (scores - most).exp()
        total = weights.sum(-1, keepdim=True)
        nothing = total == 0
        total = total.masked_fill(nothing, 1.0)
        outs.append((group.weigh(weights) / total).flatten(2, 3))
        log_sums.append((most + total.log()).masked_fill(nothing, LOG_ZERO).flatten(2, 4))
    return torch.cat(outs, 2), torch.cat(log_sums, 2)


class _Banded(torch.autograd.Function):
    """The attention as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, log_sum = _forward(plan, q, k, v)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out, log_sum

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("banded attention does not support second-order gradients: omit create_graph=True")
        q, k, v, out, log_sum = ctx.saved_tensors
        grad_out, grad_log_sum = grads
        # A key that many blocks see adds up many gradients.
        wide = q.dtype if ctx.plan.further is None else state_dtype(q.device)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        # Where nothing is seen, hidden scores stay far below.
        log_sum = log_sum.clamp(min=NOTHING).unsqueeze(-1)
        change = grad_log_sum.unsqueeze(-1) - (grad_out * out).sum(-1, keepdim=True)
        for start, end in ctx.plan.groups(q):
            group = _Group(ctx.plan, q, k, v, start, end)
            sums, above, shift = (
                x[:, :, group.queries].unflatten(2, (end - start, -1)) for x in (log_sum, grad_out, change)
            )
            weights = (group.scores() - sums).exp()
            of_scores = weights * (group.times_values(above) + shift)
            of_q[:, :, group.queries] = group.times_keys(of_scores).flatten(2, 3)
            group.add(of_v, weights, above)
            group.add(of_k, of_scores, group.Q)
        return None, of_q, of_k.to(k.dtype), of_v.to(v.dtype)
