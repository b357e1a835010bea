"""Softmax attention over a band of key blocks and a few further keys, in memory linear in length.

Queries are cut into blocks. Each block sees a window of consecutive key blocks, and further keys that are picked out
one by one; a function of positions tells which pairs of them meet. Blocks are worked on a few at a time. Autograd sees
one node, which keeps its inputs, its output and two numbers for each query, the largest of its scores and the sum of
their exponentials relative to it, and computes the scores again in the backward pass, as FlashAttention does (Dao et
al., 2022). Two numbers, since the logarithm of the sum is lost beside a score of 1e9. By them, the outputs over two
disjoint sets of keys are joined to the one over both, :func:`join`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import LOG_ZERO, no_autocast, state_dtype, sum_dtype, without_autocast
from flowformer.core.sums import sum_over_tokens, times_sum
from flowformer.core.tracing import count_chunks, cut, frame, is_exporting, is_transformed

BLOCK = 512  # queries that are worked on at a time
KEYS = 256  # and fewer of them where they have to do with more keys than these
LOG2_E = math.log2(math.e)
NOTHING = LOG_ZERO / 10  # the largest score where all keys are hidden; they are far below, and their exponentials 0

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

    def index_of(self, x: Tensor, places: Tensor) -> Tensor:
        """Places of further keys in padded ones, for gather: (batch, heads, blocks or 1 times keys, channels)."""
        places = places.clamp(min=0) + self.band.before * self.band.block
        return places.flatten(2).unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1])

    def pick(self, x: Tensor, places: Tensor) -> Tensor:
        """Further keys or values (batch, heads, blocks or 1, keys, channels)."""
        return x.gather(2, self.index_of(x, places)).unflatten(2, places.shape[2:])

    def pick_shared(self, *tensors: Tensor) -> list[Tensor] | None:
        """Those that all blocks have in common, where they have."""
        if self.further is None or self.further.places.shape[2] != 1:
            return None
        return [self.pick(x, self.further.places) for x in tensors]

    @property
    def keys(self) -> int:
        """Keys that a block has to do with."""
        return max(1, self.width + (0 if self.further is None else self.further.places.shape[-1]))


def count_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return how many tokens of (batch, length, ...) are real, (batch,); (1,) without a mask."""
    # As a tensor, so that a traced graph holds for any length.
    return torch.arange(x.shape[1], device=x.device)[-1:] + 1 if mask is None else mask.sum(1)


class Attended(NamedTuple):
    """Softmax attention over some of the keys.

    Attributes:
        out: (batch, L, heads, V) in the dtype of sums; zeros where nothing is seen.
        most: The largest score of each query, (batch, L, heads), without gradient.
        total: The sum of exp(score - most), (batch, L, heads); 0 where nothing is seen.
    """

    out: Tensor
    most: Tensor
    total: Tensor


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, band: Band, further: Further | None = None, *, size: int = BLOCK
) -> Attended:
    """Softmax attention of each query over the keys it sees, scaled by 1 / sqrt(K).

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, past + L, heads, K).
        v: Values (batch, past + L, heads, V).
        band: The windows.
        further: Further keys; a key that is also seen in the window counts twice.
        size: Queries that are worked on at a time.
    """
    length, block = q.shape[1], band.block
    blocks = count_chunks(length, block)
    compute = sum_dtype(q.dtype)
    with no_autocast(q.device):
        Q = frame(q.to(compute) / q.shape[-1] ** 0.5, 0, blocks * block).transpose(1, 2)
        total = (band.before + blocks + band.after) * block
        K, V = (frame(x.to(compute), band.before * block - band.past, total).transpose(1, 2) for x in (k, v))
        plan = _Plan(band, further, size)
        plain = torch.compiler.is_compiling() or is_exporting() or is_transformed()
        found = _forward(plan, Q, K, V, in_place=False) if plain else _Banded.apply(plan, Q, K, V)
        return Attended(*(cut(x.transpose(1, 2), length) for x in found))


def join(one: Attended, other: Attended) -> Attended:
    """Join the attention over two disjoint sets of keys to the one over both."""
    most = torch.maximum(one.most, other.most)
    first, second = (x.total * (x.most - most).exp() for x in (one, other))
    total = first + second
    out = one.out * first.unsqueeze(-1) + other.out * second.unsqueeze(-1)
    return Attended(out / _unless_zero(total).unsqueeze(-1), most, total)


def _unless_zero(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1.0)


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
        weights = _hide(times_sum(K, Q.mT).mT, seen).softmax(-1) * seen.any(-1, keepdim=True)
        return sum_over_tokens(weights.mT, V).transpose(1, 2)


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Attended:
    """Softmax attention with all scores at a time; arguments as of :func:`attend_all`, for L queries."""
    compute = sum_dtype(q.dtype)
    with no_autocast(q.device):
        Q, K, V = (x.to(compute).transpose(1, 2) for x in (q / q.shape[-1] ** 0.5, k, v))
        scores = _hide(Q @ K.mT, seen)
        most = scores.amax(-1, keepdim=True).detach().clamp(min=NOTHING)
        weights = (scores - most).exp()
        total = weights.sum(-1, keepdim=True)
        out = (weights @ V) / _unless_zero(total)
        return Attended(out.transpose(1, 2), most.squeeze(-1).transpose(1, 2), total.squeeze(-1).transpose(1, 2))


def _hide(scores: Tensor, seen: Tensor, *, in_place: bool = False) -> Tensor:
    if not in_place:
        return scores.masked_fill(~seen, LOG_ZERO)
    if seen.numel() == scores.numel():
        return scores.masked_fill_(~seen, LOG_ZERO)
    # Heads have what is seen in common: a limit for each pair is made once, and on a CPU it is vectorized.
    limit = torch.full_like(seen, torch.inf, dtype=scores.dtype).masked_fill_(~seen, LOG_ZERO)
    return scores.clamp_(max=limit)


def _exp_(x: Tensor) -> Tensor:
    """Take exponentials in place."""
    # With MKL, torch.exp takes 30 times as long where results underflow, as those of hidden keys do.
    return x.mul_(LOG2_E).exp2_() if x.device.type == "cpu" else x.exp_()


# -------------------------------------------------------------------------------------------------- groups of blocks


class _Group:
    """Blocks of queries from ``start`` to ``end``, and the keys and values they see."""

    def __init__(
        self, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, shared: Sequence[Tensor] | None, start: int, end: int
    ) -> None:
        self.plan, self.start, self.end = plan, start, end
        block = plan.band.block
        self.queries = slice(start * block, end * block)
        self.Q = q[:, :, self.queries].unflatten(2, (end - start, block))
        self.K, self.V = self._windows(k), self._windows(v)
        self.places = None
        if plan.further is not None:
            self.places = plan.further.places if shared is not None else plan.further.places[:, :, start:end]
            self.further_K, self.further_V = (plan.pick(x, self.places) for x in (k, v)) if shared is None else shared

    def _windows(self, x: Tensor) -> Tensor:
        """(batch, heads, blocks, width, channels)."""
        block, width = self.plan.band.block, self.plan.width
        if is_exporting():
            starts = block * torch.arange(self.end - self.start, device=x.device).unsqueeze(1)
            return x[:, :, starts + torch.arange(width, device=x.device)]
        if not width:
            return x.new_empty(*x.shape[:2], self.end - self.start, 0, x.shape[-1])
        windows = x[:, :, self.start * block : (self.end - 1) * block + width].unfold(2, width, block).mT
        return windows.contiguous()  # row by row, once; products would copy transposed windows number by number

    def scores(self, *, in_place: bool = True) -> Tensor:
        """(batch, heads, blocks, block, width and further keys); ``in_place`` where nothing traces operations."""
        block, device = self.plan.band.block, self.Q.device
        count = self.end - self.start
        i = torch.arange(self.start * block, self.end * block, device=device).view(1, 1, count, block, 1)
        parts = []
        if self.plan.band.seen is not None:
            starts = (torch.arange(self.start, self.end, device=device) - self.plan.band.before) * block
            j = starts.view(1, 1, -1, 1, 1) + torch.arange(self.plan.width, device=device)
            parts.append(_hide(self.Q @ self.K.mT, self.plan.band.seen(i, j), in_place=in_place))
        if self.places is not None:
            assert self.plan.further is not None
            j = self.places.unsqueeze(-2)
            seen = self.plan.further.seen(i, j) & (j >= 0)
            parts.append(_hide(_product(self.Q, self.further_K.mT), seen, in_place=in_place))
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

    def add(self, whole: Tensor, shared: Tensor | None, weights: Tensor, rows: Tensor) -> None:
        """Add weights^T rows to the tokens that the windows and the further keys were taken from."""
        block, width = self.plan.band.block, self.plan.width
        near, far = weights.split([width, weights.shape[-1] - width], -1)
        if width:
            pieces = (near.mT @ rows).unflatten(3, (-1, block))
            for at in range(pieces.shape[3]):
                whole[:, :, (self.start + at) * block : (self.end + at) * block] += pieces[:, :, :, at].flatten(2, 3)
        if shared is not None:
            shared += (far.flatten(2, 3).mT @ rows.flatten(2, 3)).unsqueeze(2)
        elif self.places is not None:
            found = (far.mT @ rows).flatten(2, 3)
            whole.scatter_add_(2, self.plan.index_of(whole, self.places), found.to(whole.dtype))


def _product(rows: Tensor, further: Tensor) -> Tensor:
    """Multiply rows (batch, heads, blocks, block, n) with further (batch, heads, blocks or 1, n, m)."""
    if further.shape[2] != 1:
        return rows @ further
    return (rows.flatten(2, 3) @ further.squeeze(2)).unflatten(2, rows.shape[2:4])


def _forward(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`Attended` has, with the heads before the tokens; ``in_place`` where nothing traces operations."""
    found, shared = [], plan.pick_shared(k, v)
    for start, end in plan.groups(q):
        group = _Group(plan, q, k, v, shared, start, end)
        scores = group.scores(in_place=in_place)
        most = scores.amax(-1, keepdim=True).detach().clamp(min=NOTHING)
        weights = _exp_(scores.sub_(most)) if in_place else (scores - most).exp()
        total = weights.sum(-1, keepdim=True)
        out = group.weigh(weights) / _unless_zero(total)
        found.append((out.flatten(2, 3), most.flatten(2, 4), total.flatten(2, 4)))
    out, most, total = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return out, most, total


class _Banded(torch.autograd.Function):
    """The attention as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, most, total = _forward(plan, q, k, v, in_place=True)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, most, total)
        ctx.mark_non_differentiable(most)
        return out, most, total

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("banded attention does not support second-order gradients: omit create_graph=True")
        q, k, v, out, most, total = ctx.saved_tensors
        plan, (grad_out, _, grad_total) = ctx.plan, grads
        shared = plan.pick_shared(k, v)
        # A key that many blocks see adds up many gradients.
        wide = q.dtype if plan.further is None else state_dtype(q.device)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        of_shared = [None, None] if shared is None else [torch.zeros_like(x, dtype=wide) for x in shared]
        change = (grad_total * total).unsqueeze(-1) - (grad_out * out).sum(-1, keepdim=True)
        of_queries = (most.unsqueeze(-1), _unless_zero(total).unsqueeze(-1), grad_out, change)
        for start, end in plan.groups(q):
            group = _Group(plan, q, k, v, shared, start, end)
            top, below, above, shift = (x[:, :, group.queries].unflatten(2, (end - start, -1)) for x in of_queries)
            weights = _exp_(group.scores().sub_(top)).div_(below)
            of_scores = group.times_values(above).add_(shift).mul_(weights)
            of_q[:, :, group.queries] = group.times_keys(of_scores).flatten(2, 3)
            group.add(of_v, of_shared[1], weights, above)
            group.add(of_k, of_shared[0], of_scores, group.Q)
        if plan.further is not None:
            for whole, found in zip((of_k, of_v), of_shared, strict=True):
                if found is not None:
                    whole.scatter_add_(2, plan.index_of(whole, plan.further.places), found.flatten(2, 3))
        return None, of_q, of_k.to(k.dtype), of_v.to(v.dtype)
