"""Rows of weights of Reformer attention, and its float64 reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowformer.mechanisms.reformer.operation import FORMS, ITSELF, RMS_EPS
from flowformer.mechanisms.weights import Rows


def reformer_weights(
    q: Tensor,
    k: Tensor,
    rotations: Tensor,
    *,
    causal: bool = False,
    form: str = "paper",
    chunk_length: int = 64,
    chunks_after: int = 0,
    sees_future: bool = False,
) -> Rows:
    """Return rows C_ij exp(s_ij) / sum_j C_ij exp(s_ij) of one sequence."""
    kind = FORMS[form]
    if form == "lra":
        raise ValueError("reformer: form 'lra' mixes heads and positions: it has no rows of weights")
    size = k.norm(dim=-1, keepdim=True)
    size = torch.where(size > 0, size, torch.inf)
    if kind.keys == "rms":
        size = (k.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()
    buckets = []
    for index in range(rotations.shape[-3]):
        rotated = torch.einsum("ihk,hkb->hib", q.detach(), rotations[..., index, :, :].expand(q.shape[1], -1, -1))
        buckets.append(torch.cat([rotated, -rotated], -1).argmax(-1))
    chunks = [_chunks(bucket, chunk_length, causal and not sees_future) for bucket in buckets]

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", q[places], k / size) / k.shape[-1] ** 0.5
        place = torch.arange(len(k), device=k.device)
        scores = scores.masked_fill(places.unsqueeze(1) == place, ITSELF)
        if causal and not sees_future:
            seen = _seen_apart(buckets, chunks, places)
        else:
            seen = _seen_sorted(chunks, places, (len(k) - 1) // chunk_length, chunks_after)
        if causal:
            seen = seen.masked_fill(place > places.unsqueeze(1), 0)
        return (scores + seen.log()).softmax(-1)

    return rows


def _chunks(bucket: Tensor, size: int, apart: bool) -> Tensor:
    """Which chunk each token is in, (heads, length): of all tokens in order, or of its bucket."""
    order = bucket.argsort(stable=True)
    ranks = order.argsort(-1)
    if apart:
        firsts = torch.stack([(bucket < one).sum(-1) for one in range(int(bucket.max()) + 1)], -1)
        ranks = ranks - firsts.gather(-1, bucket)
    return ranks // size


def _seen_apart(buckets: Sequence[Tensor], chunks: Sequence[Tensor], places: Tensor) -> Tensor:
    """C of the causal form, (heads, rows, length), but for the order of time."""
    seen = 0.0
    for bucket, chunk in zip(buckets, chunks, strict=True):
        behind = chunk[:, places, None] - chunk[:, None, :]
        same = bucket[:, places, None] == bucket[:, None, :]
        seen = seen + (same & (behind >= 0) & (behind <= 1)).double()
    return torch.as_tensor(seen)


def _seen_sorted(chunks: Sequence[Tensor], places: Tensor, last: int, after: int) -> Tensor:
    """C of chunks of all tokens in order, (heads, rows, length)."""
    seen = 0.0
    for index, chunk in enumerate(chunks):
        for by in range(-1, after + 1):
            goal = chunk[:, places, None] + by
            found = chunk[:, None, :] == goal
            found = torch.where(goal < 0, chunks[index - 1][:, None, :] == last, found)
            found = torch.where(goal > last, chunks[(index + 1) % len(chunks)][:, None, :] == 0, found)
            seen = seen + found.double()
    return torch.as_tensor(seen)
