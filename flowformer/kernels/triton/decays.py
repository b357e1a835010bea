"""Log-decays as kernels take them, and their gradients from numbers of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from flowformer.core.decay import clip_log_decay
from flowformer.core.masks import fill
from flowformer.kernels.triton.launch import Sequences

LOWEST = -64.0  # log-decay of a token: exp(-64) = 2e-28 is nothing beside the token's own part


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
    found = starts[:, :-1, None] - (parts.cumsum(-1) - parts)
    # What rounding has left over at the end of a segment, where the gradient is known, it has gathered on the way.
    place = torch.arange(of.segments * size, device=parts.device).view(of.segments, size)
    width = (place[:, -1:].clamp(max=of.length - 1) + 1 - place[:, :1]).double()
    left = starts[:, 1:] - (found[..., -1] - parts[..., -1])
    found = found + left.unsqueeze(-1) * (place - place[:, :1]) / width
    found = found.flatten(1)[:, : of.length].view(of.batch, of.per_sequence, of.length).transpose(1, 2)
    return fill(found, of.mask)
