"""Position embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.precision import state_dtype
from flowformer.core.tracing import may_look


class LearnedPositions(nn.Embedding):
    """Learned position embedding, up to ``max_length`` positions.

    Args:
        max_length: Positions.
        dim: Channels.
        device: Of the table.
        dtype: Of the table.
    """

    def __init__(self, max_length: int, dim: int, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(max_length, dim, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The vectors (..., dim) of positions (...), the first of which is 0.

        Raises:
            ValueError: for a position beyond the table. On a GPU, which would have to be waited for, and while a graph
                is traced, the embedding has its own error.
        """
        if may_look(input) and input.numel():
            self.check(int(input.max()) + 1)
        return super().forward(input)

    def check(self, length: int) -> None:
        """Raise ValueError for more positions than the table has."""
        if length > self.num_embeddings:
            raise ValueError(
                f"position {length} is too large: the learned positions of this model end at max_length ="
                f" {self.num_embeddings}; sinusoidal positions have no limit"
            )


class SinusoidalPositions(nn.Module):
    """Sinusoidal position embedding: sines and cosines of frequencies down to 1 / 10,000; any length.

    The angles are found in float64: a float32 one is off by 0.06 after a million tokens.

    Args:
        dim: Channels.
        first: The number of the first position. fairseq begins at 2, after the number of its padding symbol.
        interleaved: A sine and a cosine of each frequency side by side, and frequencies 10,000^(-2 i / dim), as in
            Vaswani et al., 2017, and Long Range Arena. Otherwise all sines before all cosines, and the last frequency
            is 1 / 10,000, as in fairseq.

    Source: fairseq, modules/sinusoidal_positional_embedding.py; google-research/long-range-arena, common_layers.py.
    """

    def __init__(self, dim: int, first: int = 2, *, interleaved: bool = False) -> None:
        super().__init__()
        self.dim, self.first, self.interleaved = dim, first, interleaved

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors (..., dim) of positions (...), counted from 0."""
        half = (self.dim + 1) // 2 if self.interleaved else self.dim // 2
        numbers = torch.arange(half, dtype=state_dtype(positions.device), device=positions.device)
        frequencies = torch.exp(
            numbers * (-math.log(10_000) / (self.dim / 2 if self.interleaved else max(half - 1, 1)))
        )
        angles = (positions + self.first).unsqueeze(-1) * frequencies
        if self.interleaved:
            return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., : self.dim].float()
        waves = torch.cat((angles.sin(), angles.cos()), -1).float()
        return nn.functional.pad(waves, (0, self.dim % 2))


def knows_distance(attention_options: Mapping[str, Any]) -> bool:
    """Return whether attention with these options knows how far apart tokens are, and so does without positions."""
    options = attention_options
    return options.get("preset") == "distance" or options.get("decay") is not None or bool(options.get("rotary"))


def create_positions(
    kind: str | None,
    dim: int,
    max_length: int | None,
    *,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """Create a position embedding: ``"learned"``, ``"sinusoidal"`` (without parameters), or None.

    Raises:
        ValueError: for another kind, or learned positions without ``max_length``.
    """
    if kind is None:
        return None
    if kind == "sinusoidal":
        return SinusoidalPositions(dim)
    if kind != "learned":
        raise ValueError(f'positions must be "learned", "sinusoidal" or None, got {kind!r}')
    if max_length is None:
        raise ValueError('positions="learned" requires max_length; positions="sinusoidal" takes any length')
    return LearnedPositions(max_length, dim, device=device, dtype=dtype)


def count_positions(tokens: Tensor, mask: Tensor | None, before: Tensor | None) -> Tensor:
    """Count the real tokens before each token.

    Args:
        tokens: (batch, length).
        mask: (batch, length) boolean, True = a real token.
        before: Real tokens of earlier calls, (batch,).

    Returns:
        (batch, length) or (1, length), int64; 0 at padding, which may lie beyond a table of positions that is full.
    """
    if mask is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    else:
        positions = mask.cumsum(-1) - 1
    if before is not None:
        positions = positions + before.unsqueeze(1)
    return positions if mask is None else positions.masked_fill(~mask, 0)
