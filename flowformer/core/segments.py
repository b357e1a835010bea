"""Means of segments: the tokens of each sequence in so many parts of nearly equal length."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import without_autocast
from flowformer.core.tracing import is_traced, is_transformed


class Segments(NamedTuple):
    """What the tokens of each row of a batch are divided into.

    Attributes:
        start: The first token of each segment, (batch, segments).
        size: The number of its tokens, (batch, segments); 0 for the last ones where there are fewer tokens.
    """

    start: Tensor
    size: Tensor


def split_evenly(counts: Tensor, segments: int) -> Segments:
    """Divide the first n tokens of each row into ``segments`` parts, sizes of which differ by one at most.

    Segment s has the tokens from floor(s n / c) to floor((s + 1) n / c), where c is the smaller of n and ``segments``.

    Args:
        counts: n, (batch,).
        segments: The number of parts; where n is smaller, the last ones are empty.
    """
    n = counts.unsqueeze(1)
    place = torch.arange(segments + 1, device=counts.device)
    used = n.clamp(min=1, max=segments)
    bounds = torch.minimum(place.clamp(max=segments) * n // used, n)
    return Segments(bounds[:, :-1], bounds.diff(dim=1))


def segment_means(x: Tensor, segments: int, real: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the means of segments of tokens, in memory linear in length.

    Args:
        x: (batch, length, heads, channels), zeros at padding.
        segments: How many; at most ``length``.
        real: (batch, length), the real tokens, all of them before the padding; absent where all are real.

    Returns:
        Means (batch, segments, heads, channels), zeros where a segment is empty; and which ones have tokens, (batch,
        segments), ``None`` for all.
    """
    batch, length = x.shape[:2]
    if real is None and not is_traced() and length % segments == 0:
        return x.unflatten(1, (segments, -1)).mean(2), None
    counts = x.new_full((batch,), length, dtype=torch.int64) if real is None else real.sum(1)
    start, size = split_evenly(counts, segments)
    # Gathered and then summed: PyTorch's sum adds pairwise, index_add one by one.
    offset = torch.arange(-(-length // segments), device=x.device)
    places = (start.unsqueeze(-1) + offset).clamp(max=length - 1)
    places = places + length * torch.arange(batch, device=x.device).view(-1, 1, 1)
    tokens = x.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)
    outside = (offset >= size.unsqueeze(-1)).view(*places.shape, 1, 1)
    means = tokens.masked_fill(outside, 0).sum(2) / size.clamp(min=1).view(batch, segments, 1, 1)
    return means, None if real is None else size > 0


def with_means(x: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Return x (batch, length, ...), and the means of segments of equally many tokens (batch, segments, ...).

    Where x is used as it is returned, the gradients of both are added in one pass.
    """
    if is_traced() or is_transformed() or not x.requires_grad:
        return x, x.unflatten(1, (segments, -1)).mean(2)
    return _WithMeans.apply(x, segments)


class _WithMeans(torch.autograd.Function):
    """:func:`with_means` as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: int) -> tuple[Tensor, Tensor]:
        ctx.segments = segments
        return x.view_as(x), x.unflatten(1, (segments, -1)).mean(2)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        of_x, of_means = grads
        of_x = of_x.unflatten(1, (ctx.segments, -1))
        return (of_x + (of_means / of_x.shape[2]).unsqueeze(2)).flatten(1, 2), None
