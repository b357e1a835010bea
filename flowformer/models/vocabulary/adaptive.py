"""Adaptive embeddings and softmax, of models that were trained with them.

Words are numbered by frequency and cut into bands; rarer bands have narrower vectors. Sources: Grave et al., "Efficient
softmax approximation for GPUs", ICML 2017; Baevski and Auli, "Adaptive input representations", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.types import Device


class AdaptiveEmbedding(nn.Module):
    """Embedding of words in bands, each with a table and a projection to the channels of the model.

    Args:
        sizes: Words of each band, most frequent first.
        widths: Channels of each table.
        dim: Channels of the model.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        widths: Sequence[int],
        dim: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = sum(sizes), dim
        self.tables = nn.ModuleList(
            nn.Embedding(size, width, device=device, dtype=dtype)
            for size, width in zip(sizes, widths, strict=True)
        )  # fmt: skip
        self.projections = nn.ModuleList(
            nn.Linear(width, dim, bias=False, device=device, dtype=dtype) for width in widths
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the vectors (..., dim) of tokens (...)."""
        start, out = 0, None
        for table, projection in zip(self.tables, self.projections, strict=True):
            size = cast("nn.Embedding", table).num_embeddings
            vectors = projection(table((tokens - start).clamp(0, size - 1)))
            out = vectors if out is None else torch.where((tokens < start).unsqueeze(-1), out, vectors)
            start += size
        assert out is not None  # there is a band
        return out


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities of words in bands: those of the first and of each later band as a whole, times those within it.

    Args:
        sizes: Words of each band, most frequent first.
        widths: Channels of each band's vectors; of the first, too, they may be others than ``dim``.
        dim: Channels of the model.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        widths: Sequence[int],
        dim: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features = sum(sizes)

        def layer(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.projections = nn.ModuleList(
            layer(dim, width) if number or width != dim else nn.Identity() for number, width in enumerate(widths)
        )
        self.tables = nn.ModuleList(layer(width, size) for size, width in zip(sizes, widths, strict=True))
        self.classes = layer(dim, len(sizes) - 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities (..., words) of hidden states (..., dim)."""
        scores = [table(projection(hidden)) for table, projection in zip(self.tables, self.projections, strict=True)]
        first, classes = torch.cat((scores[0], self.classes(hidden)), -1).log_softmax(-1).split(
            (scores[0].shape[-1], len(scores) - 1), -1
        )  # fmt: skip
        rest = [of_band.log_softmax(-1) + classes[..., i, None] for i, of_band in enumerate(scores[1:])]
        return torch.cat((first, *rest), -1)
