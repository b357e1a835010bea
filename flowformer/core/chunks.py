"""Chunks: tokens of a sequence that meet directly, in a chunk x chunk product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowformer.core.tracing import count_chunks, cut, frame, is_exporting

CHUNK = 64  # tokens; 64 is fastest in PyTorch on a CPU


def split_chunks(x: Tensor, chunk: int) -> Tensor:
    """Split (batch, length, heads, channels) into (batch, heads, chunks, chunk, channels); chunk divides length."""
    batch, length, heads, channels = x.shape
    return x.view(batch, length // chunk, chunk, heads, channels).permute(0, 3, 1, 2, 4).contiguous()


def join_chunks(x: Tensor, length: int) -> Tensor:
    """Join (batch, heads, chunks, chunk, channels) to (batch, length, heads, channels), cut to ``length``."""
    batch, heads, chunks, chunk, channels = x.shape
    return cut(x.permute(0, 2, 3, 1, 4).reshape(batch, chunks * chunk, heads, channels), length)


def pad_to_chunks(tokens: Sequence[Tensor], mask: Tensor | None, chunk: int) -> tuple[list[Tensor], Tensor | None]:
    """Pad (batch, length, ...) tensors with masked tokens to a multiple of ``chunk``."""
    batch, length = tokens[0].shape[:2]
    total = count_chunks(length, chunk) * chunk
    if not is_exporting() and total == length:
        return list(tokens), mask
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=tokens[0].device)
    return [frame(t, 0, total) for t in tokens], frame(mask, 0, total)
