"""Weighted means over sliding windows of keys, in chunks of queries, for AFT-simple, AFT-local and AFT-conv.

Queries of a chunk share one window of keys, whose weights are one matrix product; what lies before and behind the
window is one more key, see :class:`flowformer.mechanisms.aft.means.Past`. Autograd sees one node, which keeps its
inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, without_autocast
from flowformer.core.tracing import count_chunks, cut, frame, is_exporting, window_tokens
from flowformer.mechanisms.aft.means import (
    Past,
    Sources,
    Weights,
    accumulate,
    is_plain,
    join,
    means,
    means_backward,
    prepare,
    refuse_second_gradients,
    summarise,
    weigh,
)

CHUNK = 64  # queries that see the same window
BLOCK = 1024  # keys of windows that are worked on at a time


class Windows(NamedTuple):
    """Chunks of queries and their windows of keys: chunk c sees keys ``c chunk`` to ``c chunk + width`` individually.

    Attributes:
        chunk: Queries of a chunk.
        width: Keys of a window.
        first: Leading keys of a window that its first query sees; ``None`` where queries see later keys too.
        heads: Whether w differs between the columns M of the keys.
        block: Keys that are worked on at a time.
    """

    chunk: int
    width: int
    first: int | None
    heads: bool
    block: int

    def groups(self, chunks: int) -> Iterator[tuple[int, int]]:
        """Yield the first chunk, and the last one + 1, of each group computed at once; all in an exported graph."""
        if is_exporting():
            yield 0, chunks
            return
        # With heads, products are small: chunks add columns.
        size = max(1, (4 if self.heads else 1) * self.block // self.width)
        for start in range(0, chunks, size):
            yield start, min(start + size, chunks)

    def cut(self, x: Tensor, start: int, end: int) -> Tensor:
        """Return the windows of chunks: x (batch, tokens, ...) to (batch, chunks, width, ...)."""
        if is_exporting():
            return window_tokens(x, end, self.chunk, self.width)
        tokens = x[:, start * self.chunk : (end - 1) * self.chunk + self.width]
        return tokens.unfold(1, self.width, self.chunk).movedim(-1, 2)

    def arrange(self, x: Tensor) -> Tensor:
        """Permute (batch, chunks, n, M, ...) for matrix products: with heads, (M, n, batch chunks, ...)."""
        return x.movedim(3, 0).movedim(3, 1).flatten(2, 3).contiguous() if self.heads else x

    def arrange_past(self, past: Past | None) -> Past | None:
        """Permute the past of some chunks, (batch, chunks, M, ...), likewise."""
        if past is None or not self.heads:
            return past
        return Past(*(part.movedim(2, 0).flatten(1, 2) for part in past))

    def restore(self, x: Tensor, chunks: int) -> Tensor:
        """Invert :meth:`arrange`."""
        return x.unflatten(2, (-1, chunks)).movedim(1, 3).movedim(0, 3) if self.heads else x

    def restore_past(self, past: Past, chunks: int) -> Past:
        """Invert :meth:`arrange_past`."""
        return Past(*(part.unflatten(1, (-1, chunks)).movedim(0, 2) for part in past)) if self.heads else past


def window_means(w: Tensor, K: Tensor, V: Tensor, past: Past | None, windows: Windows) -> Tensor:
    """Compute weighted means over windows.

    Args:
        w: (batch or 1, chunks or 1, chunk, width); with heads (M, chunk, width). Next to -infinity where nothing is
            seen.
        K: Keys (batch, tokens, M), tokens = (chunks - 1) chunk + width or more.
        V: Values (batch, tokens, M, e).
        past: What each chunk sees besides, (batch, chunks, M), or ``None``.
        windows: The geometry.

    Returns:
        (batch, chunks chunk, M, e).
    """
    parts = (None, None) if past is None else past
    if is_plain():
        return _run_windows(w, K, V, past, windows)[0]
    return _WindowMeans.apply(windows, w, K, V, *parts)


def _cut_past(past: Past | None, start: int, end: int) -> Past | None:
    return None if past is None else Past(*(part[:, start:end] for part in past))


def _weigh_groups(w: Tensor, windows: Windows, chunks: int, has_past: bool) -> Iterator[tuple[int, int, Weights]]:
    """First and last chunk + 1 of each group, and its weights: made once where all chunks share them."""
    shared = weigh(w, has_past) if windows.heads or w.shape[1] == 1 else None
    for start, end in windows.groups(chunks):
        yield start, end, shared or weigh(w[:, start:end], has_past)


def _prepare_group(K: Tensor, V: Tensor, past: Past | None, windows: Windows, start: int, end: int) -> Sources:
    keys, values = (windows.arrange(windows.cut(x, start, end)) for x in (K, V))
    return prepare(keys, values, windows.arrange_past(_cut_past(past, start, end)), windows.first)


def _run_windows(w: Tensor, K: Tensor, V: Tensor, past: Past | None, windows: Windows) -> tuple[Tensor, list[Tensor]]:
    """The means, and the denominators of each group."""
    chunks = (K.shape[1] - windows.width) // windows.chunk + 1
    outs, totals = [], []
    for start, end, weights in _weigh_groups(w, windows, chunks, past is not None):
        sources = _prepare_group(K, V, past, windows, start, end)
        out, total = means(weights, sources)
        outs.append(windows.restore(out, end - start).flatten(1, 2))
        totals.append(total)
    return torch.cat(outs, 1), totals


class _WindowMeans(torch.autograd.Function):
    """Means over windows as one node of the graph: what is between is computed again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, windows: Windows, w: Tensor, K: Tensor, V: Tensor, log_weight: Tensor | None, mean: Tensor | None
    ) -> Tensor:
        past = None if log_weight is None or mean is None else Past(log_weight, mean)
        out, totals = _run_windows(w, K, V, past, windows)
        ctx.windows, ctx.has_past = windows, past is not None
        ctx.save_for_backward(w, K, V, out, *(past or ()), *totals)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_gradients()
        windows, of_w = ctx.windows, ctx.needs_input_grad[1]
        w, K, V, out, *rest = ctx.saved_tensors
        past = Past(*rest[:2]) if ctx.has_past else None
        totals = rest[2 if ctx.has_past else 0 :]
        grad = grads_out[0]
        of_K, of_V, of_weights, of_past = torch.zeros_like(K), torch.zeros_like(V), [], []
        chunks = out.shape[1] // windows.chunk
        groups = _weigh_groups(w, windows, chunks, past is not None)
        for (start, end, weights), total in zip(groups, totals, strict=True):
            tokens = slice(start * windows.chunk, end * windows.chunk)
            y, g = (windows.arrange(x[:, tokens].unflatten(1, (end - start, windows.chunk))) for x in (out, grad))
            sources = _prepare_group(K, V, past, windows, start, end)
            got = means_backward(weights, sources, y, total, g, of_w=of_w)
            for whole, piece in ((of_K, got.K), (of_V, got.V)):
                _add_windows(whole, windows.restore(piece, end - start), start, windows)
            if got.w is not None:
                of_weights.append(got.w.sum_to_size(weights.w.shape))
            if got.past is not None:
                of_past.append(windows.restore_past(got.past, end - start))
        shared = windows.heads or w.shape[1] == 1
        whole_w = None if not of_w else sum(of_weights) if shared else torch.cat(of_weights, 1)
        whole_past = (None, None) if past is None else (torch.cat(parts, 1) for parts in zip(*of_past, strict=True))
        return None, whole_w, of_K, of_V, *whole_past  # pyright: ignore[reportReturnType]


def _add_windows(whole: Tensor, pieces: Tensor, start: int, windows: Windows) -> None:
    """Add (batch, chunks, width, ...) to the tokens (batch, tokens, ...) they were cut from."""
    for index in range(pieces.shape[1]):
        place = (start + index) * windows.chunk
        whole[:, place : place + windows.width] += pieces[:, index]


def causal_means(
    w: Tensor,
    K: Tensor,
    V: Tensor,
    buffer: tuple[Tensor, Tensor],
    past: Past,
    real: Tensor | None,
    windows: Windows,
    *,
    hard: bool = False,
) -> tuple[Tensor, Past, tuple[Tensor, Tensor]]:
    """Compute the means of a causal form, and its state after the last token.

    Args:
        w: Bias within windows, see :func:`window_means`.
        K: Keys (batch, L, M).
        V: Values (batch, L, M, e).
        buffer: The ``width - chunk`` keys and values before them.
        past: What is before those, (batch, M).
        real: Which tokens are real, (batch, L), the real ones in front; ``None`` for all.
        windows: The geometry.
        hard: See nothing outside of windows.

    Returns:
        Means (batch, L, M, e); the past, and the buffer, after the last token.
    """
    back, chunk, length = windows.width - windows.chunk, windows.chunk, K.shape[1]
    chunks = count_chunks(length, chunk)
    K, V = (torch.cat([old.to(new.dtype), new], 1) for old, new in zip(buffer, (K, V), strict=True))
    K, V = frame(K, 0, back + chunks * chunk, LOG_ZERO), frame(V, 0, back + chunks * chunk)
    ends = torch.full_like(K[:, 0, 0], length, dtype=torch.int64) if real is None else real.sum(1)
    older = (cut(K, chunks * chunk), cut(V, chunks * chunk)) if back else (K, V)
    if back and (is_exporting() or length % chunk or real is not None):
        # The last keys stay within reach: they are not yet past.
        gone = torch.arange(chunks * chunk, device=K.device) < ends.unsqueeze(1)
        older = (fill(older[0], gone, LOG_ZERO), fill(older[1], gone))
    pieces = summarise(*(x.unflatten(1, (chunks, chunk)) for x in older))
    pieces = accumulate(Past(*(torch.cat([a.unsqueeze(1), b], 1) for a, b in zip(past, pieces, strict=True))))
    before = None if hard else Past(*(part[:, :-1] for part in pieces))
    mean = window_means(w, K, V, before, windows)
    after = Past(*(part[:, -1] for part in pieces))
    return cut(mean, length), after, _last(buffer, K, V, ends)


def _last(buffer: tuple[Tensor, Tensor], K: Tensor, V: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """What the buffer holds after the first ``ends`` (batch,) of the keys and values that come behind it."""
    places = ends.unsqueeze(1) + torch.arange(buffer[0].shape[1], device=K.device)
    rows = torch.arange(K.shape[0], device=K.device).unsqueeze(1)
    return K[rows, places].to(buffer[0].dtype), V[rows, places].to(buffer[1].dtype)


def two_sided_means(w: Tensor, K: Tensor, V: Tensor, back: int, windows: Windows, *, hard: bool = False) -> Tensor:
    """Compute the means of a bidirectional form.

    Args:
        w: Bias within windows, see :func:`window_means`.
        K: Keys (batch, L, M).
        V: Values (batch, L, M, e).
        back: Keys of a window before its first query. Its width is a multiple of its chunk.
        windows: The geometry.
        hard: See nothing outside of windows.

    Returns:
        (batch, L, M, e).
    """
    length, chunk = K.shape[1], windows.chunk
    chunks = count_chunks(length, chunk)
    total = (chunks - 1) * chunk + windows.width
    K, V = frame(K, back, total, LOG_ZERO), frame(V, back, total)
    past = None
    if not hard:
        pieces = summarise(*(window_tokens(x, chunks - 1 + windows.width // chunk, chunk, chunk) for x in (K, V)))
        nothing = Past(torch.full_like(pieces.log_weight[:, :1], LOG_ZERO), torch.zeros_like(pieces.mean[:, :1]))
        before = accumulate(Past(*(torch.cat(pair, 1) for pair in zip(nothing, pieces, strict=True))))
        behind = accumulate(Past(*(torch.cat([b, a], 1).flip(1) for a, b in zip(nothing, pieces, strict=True))))
        skip = windows.width // chunk
        past = join(
            Past(*(part[:, :chunks] for part in before)),
            Past(*(part.flip(1)[:, skip : skip + chunks] for part in behind)),
        )
    return cut(window_means(w, K, V, past, windows), length)


def step_window(
    w: Tensor, k: Tensor, v: Tensor, state: Any, *, hard: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Compute one token of a form with a window.

    Args:
        w: Bias of the last keys and the token's own, (batch or 1, window, M or 1).
        k: Key of the token, (batch, M).
        v: Its value, (batch, M e).
        state: State with ``log_weight`` (batch, M), ``mean`` (batch, M e), ``key`` (batch, window - 1, M), ``value``.
        hard: See nothing outside of the window.

    Returns:
        The mean (batch, M e) in float64; log-sum and mean of what is past the window; keys and values within.
    """
    wide, columns = state.mean.dtype, k.shape[-1]
    key = torch.cat([state.key, k.to(wide).unsqueeze(1)], 1)
    value = torch.cat([state.value, v.to(wide).unsqueeze(1)], 1)
    logits, values = key + w.to(wide), value
    if not hard:
        logits = torch.cat([state.log_weight.unsqueeze(1), logits], 1)
        values = torch.cat([state.mean.unsqueeze(1), values], 1)
    values = values.unflatten(-1, (columns, -1))
    mean = (logits.softmax(1).unsqueeze(-1) * values).sum(1).flatten(1)
    before = Past(state.log_weight, state.mean.unflatten(-1, (columns, -1)))
    log_weight, past = join(before, Past(key[:, 0], value[:, 0].unflatten(-1, (columns, -1))))
    return mean, (log_weight, past.flatten(1)), key[:, 1:], value[:, 1:]
