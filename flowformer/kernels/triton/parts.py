"""Large inputs in parts: some sequences or some heads at a time, where working memory would be several tensors like q.

Bidirectional forms with decay add up both directions in float32, of twice the size of half precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 4  # parts
SMALLEST = 2**23  # elements of q in a part: 256 programs at 64 channels, which fill a GPU


class Part(NamedTuple):
    """Some sequences, and some of their heads."""

    batch: slice
    heads: slice

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return the part of a tensor (batch, length, heads, ...)."""
        return x[self.batch, :, self.heads]

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """Return the part of a mask (batch, length)."""
        return None if mask is None else mask[self.batch]

    def of_decays(self, log_decay: Tensor) -> Tensor:
        """Return the part of log-decays (heads,) or (batch, length, heads)."""
        return log_decay[self.heads] if log_decay.ndim == 1 else self.of_tokens(log_decay)

    def of_numbers(self, x: Tensor) -> Tensor:
        """Return the part of numbers (..., batch, heads, length)."""
        return x[..., self.batch, self.heads, :]


def parts_of(x: Tensor, *, heads_together: bool = False) -> list[Part]:
    """Return the parts to compute one after the other; one where x is small or float32.

    Args:
        x: Queries (batch, length, heads, channels).
        heads_together: Whether the heads of a token must be in the same part.
    """
    batch, _, heads = x.shape[:3]
    count = 1 if x.dtype == torch.float32 else min(MOST, max(1, x.numel() // SMALLEST))
    whole = slice(None)
    if heads_together or batch >= count:
        return [Part(rows, whole) for rows in _cut(batch, count)]
    return [Part(whole, some) for some in _cut(heads, count)]


def wide(goal: Tensor) -> Tensor:
    """Return memory to add up in float32 what a tensor is to have: the tensor itself if it is float32."""
    return goal if goal.dtype == torch.float32 else torch.empty(goal.shape, dtype=torch.float32, device=goal.device)


def settle(goal: Tensor, found: Tensor) -> None:
    """Write what was added up in :func:`wide` memory to its goal."""
    if found is not goal:
        goal.copy_(found)


def _cut(length: int, count: int) -> list[slice]:
    size = -(-length // count)
    return [slice(at, at + size) for at in range(0, length, size)]
