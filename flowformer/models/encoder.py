"""Blocks that encoders share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.attention import create_attention


class EncoderBlock(nn.Module):
    """Attention and a feed-forward network, each added to its input and then normalised (post-norm).

    Source: the encoder layer of thuml/Flowformer, Flowformer_TimeSeries; its 1 x 1 convolutions are linear layers.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        ffn_dim: Channels inside the feed-forward network.
        dropout: Probability, on the attention's output and after both layers of the feed-forward network.
        attention: Name of the mechanism.
        attention_options: Options of the mechanism.
        max_length: Longest sequence, for mechanisms that need to know.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        dropout: float = 0.0,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.attention = create_attention(
            attention, dim, num_heads, max_length=max_length, **dict(attention_options or {})
        )
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = nn.GELU()

    def forward(self, x: Tensor, **where: Tensor | None) -> Tensor:
        """Transform (batch, length, dim); ``where`` says what is real: ``key_padding_mask`` or ``cu_seqlens``."""
        x = self.norm1(x + self.dropout(self.attention(x, **where)))
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class Encoder(nn.Module):
    """A stack of blocks and a final norm, which spends nothing on padding.

    A padded batch is packed before the first block and unpacked after the last, so that projections, feed-forward
    networks and norms see real tokens only. While a graph is traced (compile, export), where shapes must not depend on
    data, padding is masked instead; the results are the same.

    Args:
        blocks: The blocks.
        dim: Channels.
    """

    def __init__(self, blocks: list[EncoderBlock], dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Encode (batch, length, dim); ``key_padding_mask`` (batch, length), True = real. Zeros at padding."""
        if key_padding_mask is None:
            return self._run(x)
        if torch.compiler.is_compiling():
            out = self._run(x, key_padding_mask=key_padding_mask)
            return out.masked_fill(~key_padding_mask.unsqueeze(-1), 0)
        if key_padding_mask.all():
            return self._run(x)
        lengths = key_padding_mask.sum(-1)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        real = key_padding_mask.flatten().nonzero().squeeze(-1)
        packed = self._run(x.flatten(0, 1).index_select(0, real).unsqueeze(0), cu_seqlens=cu_seqlens).squeeze(0)
        return packed.new_zeros(x.shape).flatten(0, 1).index_copy(0, real, packed).view(x.shape)

    def _run(self, x: Tensor, **where: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **where)
        return self.norm(x)
