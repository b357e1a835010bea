"""Log-decays as kernels take them, and their gradients from numbers of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from flowformer.core.decay import clip_log_decay
from flowformer.core.masks import fill
from flowformer.kernels.triton.launch import Sequences

LOWEST = -750.0  # log-decay of a token: exp(-750) is 0 in float64


def add_up(log_decay: Tensor, mask: Tensor | None, q: Tensor) -> Tensor:
    """Return log-decays up to and with each token, (batch or 1, heads, length), float64; padding does not decay.

    Args:
        log_decay: (heads,) or (batch, length, heads).
        mask: (batch, length).
        q: (batch, length, heads, channels).
    """
    batch, length, heads = q.shape[:3]
    log_decay = clip_log_decay(log_decay.double()).clamp(min=LOWEST)
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1 if mask is None else batch, length, heads)
    return fill(log_decay, mask).transpose(1, 2).cumsum(-1)


def between_segments(of: Sequences, before: Tensor, behind: Tensor, step: int) -> Tensor:
    """Return products of sums and their gradients at the ends of all segments but the last, (batch * heads, ...).

    Each is what the log-decay of the next segment's first token has for its gradient.

    Args:
        of: The sequences.
        before: Sums before segments or chunks, (batch * heads, ...).
        behind: Gradients of these sums, behind segments or chunks.
        step: How many of both a segment has.
    """
    products = before[:, step::step] * behind[:, step - 1 : -1 : step][:, : of.segments - 1]
    return products.flatten(2).sum(-1, dtype=torch.float64)


def by_tokens(of: Sequences, starts: Tensor, parts: Tensor) -> Tensor:
    """Return gradients of log-decays, (batch, length, heads).

    Args:
        of: The sequences.
        starts: The gradient at the first token of each segment, and 'behind' the last: (batch * heads, segments + 1).
        parts: How much it falls behind each token, (batch * heads, length).
    """
    size = of.per * of.chunk
    parts = torch.nn.functional.pad(parts, (0, of.segments * size - of.length)).view(of.heads, of.segments, size)
    # From the end of a segment: where nothing later has a gradient it is zero, not what rounding leaves over.
    found = starts[:, 1:, None] + _from_the_end(parts)
    # What that leaves over at the start, where the gradient is known too, has been gathered from parts by their size.
    gathered = _from_the_end(parts.abs())
    left = starts[:, :-1, None] - found[..., :1]
    found = found + left * (gathered / gathered[..., :1].clamp(min=torch.finfo(parts.dtype).tiny))
    found = found.flatten(1)[:, : of.length].view(of.batch, of.per_sequence, of.length).transpose(1, 2)
    return fill(found, of.mask)


def _from_the_end(x: Tensor) -> Tensor:
    """Sums of each element and all behind it, along the last axis."""
    return x.flip(-1).cumsum(-1).flip(-1)
