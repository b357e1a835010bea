"""Building blocks of image models: patches, attention blocks, stochastic depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import apply, check_number, check_probability, check_sizes, check_tokens_of
from flowformer.mechanisms import create_attention
from flowformer.mechanisms.dropout import Dropout

NORM_EPS = 1e-6  # of every LayerNorm: Flowformer_CV and DeiT alike

Grid = tuple[int, int]  # rows and columns of patches


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drops the residual branch of a block per image in training.

    Args:
        probability: Of dropping. What stays is scaled up, so that the mean does not change.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Drop rows of (batch, ...)."""
        if not self.training or not self.probability:
            return x
        kept = 1 - self.probability
        mask = torch.empty(x.shape[0], *(1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(kept)
        return x * (mask / kept)

    def extra_repr(self) -> str:
        """Return the probability, for printing."""
        return f"probability={self.probability}"


class VisionBlock(nn.Module):
    """A pre-norm block: attention and a feed-forward network with LayerScale and residual connections.

    Source: the block of Flowformer_CV/flowformer.py, which scales the feed-forward network only; without
    ``layer_scale`` it is DeiT's.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        ffn_dim: Channels inside the feed-forward network.
        attention: Name of the mechanism.
        attention_options: Options of the mechanism.
        max_length: Longest sequence, for mechanisms that need to know.
        layer_scale: Initial factor of the feed-forward network's channels; ``None`` for no factors.
        drop_path: Probability of dropping each of the two branches, in training.
        dropout: Probability, on the attention's output and after both layers of the feed-forward network.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, ffn_dim=ffn_dim)
        for name, value in (("drop_path", drop_path), ("dropout", dropout)):
            check_probability(name, value)
        if layer_scale is not None:
            check_number("layer_scale", layer_scale, 0, 1_000)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {"dropout": dropout, **(attention_options or {})}
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.attention = create_attention(attention, dim, num_heads, max_length=max_length, **options, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.linear1 = nn.Linear(dim, ffn_dim, **factory)
        self.activation = nn.GELU()
        self.linear2 = nn.Linear(ffn_dim, dim, **factory)
        self.layer_scale = layer_scale
        self.gamma = None if layer_scale is None else nn.Parameter(torch.empty(dim, **factory))
        self.drop_path, self.dropout = DropPath(drop_path), Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the factors of LayerScale; submodules are reset separately."""
        if self.gamma is not None and self.layer_scale is not None:
            nn.init.constant_(self.gamma, self.layer_scale)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Transform (batch, tokens, dim): patches of ``grid``, optionally after a class token."""
        check_tokens_of("VisionBlock: x", x, "batch, tokens", self.attention.dim)
        x = x + self.drop_path(self._attend(self.norm1(x), grid))
        out = self.dropout(self.linear2(self.dropout(self.activation(self.linear1(self.norm2(x))))))
        return x + self.drop_path(out if self.gamma is None else out * self.gamma)

    def _attend(self, x: Tensor, grid: Grid) -> Tensor:
        if self.attention.axes != "batch, height, width":
            return self.attention(x)
        return self.attention(x.unflatten(1, grid)).flatten(1, 2)


class VisionStage(nn.Module):
    """A stage: patch embedding of an image, or of the previous stage's map, followed by blocks.

    Args:
        in_chans: Channels of the input.
        dim: Channels of the stage.
        patch_size: Side of a patch.
        blocks: The blocks.
        device: Of the convolution.
        dtype: Of the convolution.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        blocks: Sequence[VisionBlock],
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(blocks)

    def patches(self, x: Tensor) -> Tensor:
        """Embed (batch, channels, height, width), zero-padded to whole patches: (batch, dim, rows, columns)."""
        height, width = x.shape[-2:]
        missing = (-width % self.patch_size, -height % self.patch_size)
        x = nn.functional.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x
        return apply("images", self.embed, x)
