"""Means of segments: the tokens of each sequence in so many parts of nearly equal length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.core.tracing import is_traced


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
