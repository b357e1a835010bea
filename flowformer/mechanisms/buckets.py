"""Tokens put together by bucket, and each bucket cut into chunks of equal size, in the order of positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.core.tracing import is_traced


class Cut(NamedTuple):
    """Chunks of buckets, one bucket after the other.

    Attributes:
        places: Which token each slot holds, (batch, heads, chunks, width); the length of the sequence where none.
        slots: Where each token is among the slots of all chunks, (batch, heads, length); any for tokens in no bucket.
        sizes: Tokens of each bucket, (batch, heads, buckets).
        first: The first chunk of each bucket, (batch, heads, buckets), or the one where it would begin.
        starts: Which chunks are the first of a bucket, (batch, heads, chunks).
    """

    places: Tensor
    slots: Tensor
    sizes: Tensor
    first: Tensor
    starts: Tensor


def cut_apart(bucket: Tensor, width: int, count: int) -> Cut:
    """Cut each of ``count`` buckets into chunks from its own first token.

    The slot of a token among those of its bucket depends on the tokens before it only.

    Args:
        bucket: The bucket of each token, (batch, heads, length); ``count`` for a token in none.
        width: Tokens of a chunk; the last one of a bucket may have fewer.
        count: Buckets.
    """
    length = bucket.shape[-1]
    chunks = (length + min(count, length) * (width - 1)) // width  # the most that there can be
    order = bucket.sort(stable=True).indices
    in_order = bucket.gather(-1, order)
    sizes = bucket.new_zeros(*bucket.shape[:2], count + 1).scatter_add(-1, bucket, torch.ones_like(bucket))
    of_bucket = (sizes + width - 1) // width
    first = of_bucket.cumsum(-1) - of_bucket
    rank = torch.arange(length, device=bucket.device) - (sizes.cumsum(-1) - sizes).gather(-1, in_order)
    slot = first.gather(-1, in_order) * width + rank
    slot = slot.masked_fill(in_order == count, chunks * width)  # it has none
    nowhere = bucket.new_full((*bucket.shape[:2], chunks * width + 1), length)
    places = nowhere.scatter(-1, slot, order)[..., :-1].unflatten(-1, (chunks, width))
    slots = torch.zeros_like(order).scatter(-1, order, slot.clamp(max=chunks * width - 1))
    sizes, first = sizes[..., :count], first[..., :count]
    starts = torch.zeros_like(places[..., 0]).scatter_add(-1, first.clamp(max=chunks - 1), (sizes > 0).long()) > 0
    return Cut(places, slots, sizes, first, starts)


def pick(x: Tensor, places: Tensor) -> Tensor:
    """Tokens of x (batch, heads, length, channels) at places (batch, heads, ...); any one where there is none."""
    batch, heads, length, channels = x.shape
    row, head = (torch.arange(n, device=x.device) for n in (batch, heads))
    row, head = (n.view(-1, *(1,) * more) for n, more in ((row, places.ndim - 1), (head, places.ndim - 2)))
    places = places.clamp(max=length - 1)
    if not is_traced() and x.stride(1) < x.stride(2):  # heads lie next to each other: nothing is to be copied
        x, flat = x.transpose(1, 2), (row * length + places) * heads + head
    else:
        flat = (row * heads + head) * length + places
    # index_select, not indexing: its gradient is added in one pass.
    return x.reshape(-1, channels).index_select(0, flat.flatten()).unflatten(0, places.shape)
