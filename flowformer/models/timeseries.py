"""Models of multivariate time series.

Source: thuml/Flowformer, Flowformer_TimeSeries (the UEA experiments of Wu et al., ICML 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import (
    apply,
    check_flag,
    check_mask,
    check_probability,
    check_sizes,
    check_tokens_of,
)
from flowformer.core.masks import fill
from flowformer.mechanisms.dropout import Dropout
from flowformer.models.encoder import Encoder, EncoderBlock
from flowformer.models.registry import register_model


class SeriesClassifier(nn.Module):
    """The published classifier: embed each time step, encode, and classify the flattened sequence.

    Args:
        in_chans: Channels of a series.
        num_classes: Number of classes.
        max_length: Longest series; sets the position table and the classifier's width.
        dim: Channels of the encoder.
        num_heads: Heads of each attention.
        num_layers: Blocks.
        ffn_dim: Channels inside the feed-forward networks.
        dropout: Probability, throughout.
        attention: Name of the mechanism: :func:`flowformer.list_attentions`.
        attention_options: Options of the mechanism; for ``"flow"`` the preset ``"timeseries"`` unless one is given.
        mask_padding: Whether padding is invisible. ``False`` is the published behaviour: padding takes part in
            attention, so that an answer depends on how far its batch is padded, and only the features are zeroed.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError, TypeError: for sizes or options that do not fit.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        max_length: int,
        *,
        dim: int = 512,
        num_heads: int = 8,
        num_layers: int = 2,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        mask_padding: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_chans=in_chans, num_classes=num_classes, max_length=max_length)
        check_sizes(dim=dim, num_layers=num_layers, ffn_dim=ffn_dim)
        check_probability("dropout", dropout)
        check_flag("mask_padding", mask_padding)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = dict(attention_options or {})
        if attention == "flow":
            options.setdefault("preset", "timeseries")
        self.in_chans, self.num_classes, self.max_length = in_chans, num_classes, max_length
        self.mask_padding, self.scale = mask_padding, math.sqrt(dim)
        self.embed = nn.Linear(in_chans, dim, **factory)
        self.position = nn.Parameter(torch.empty(max_length, dim, **factory))
        self.reset_parameters()
        self.encoder = Encoder(
            [
                EncoderBlock(
                    dim, num_heads, ffn_dim, dropout=dropout, attention=attention, attention_options=options,
                    max_length=max_length, **factory,
                )
                for _ in range(num_layers)
            ],
            dim, **factory,
        )  # fmt: skip
        self.dropout = Dropout(dropout)
        self.activation = nn.GELU()
        self.head = nn.Linear(max_length * dim, num_classes, **factory)

    def reset_parameters(self) -> None:
        """Re-initialize positions, uniform in +-0.02; submodules are reset separately."""
        nn.init.uniform_(self.position, -0.02, 0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return class logits of a batch of series.

        Args:
            x: (batch, length, in_chans) with length at most ``max_length``; padding on the right.
            mask: (batch, length) boolean, True = real time step.

        Returns:
            Logits (batch, num_classes).

        Raises:
            TypeError, ValueError: for another shape or dtype, or a series longer than the position table.
        """
        self._check(x, mask)
        if self.mask_padding:
            x = fill(x, mask)
        length = x.shape[1]
        h = self.dropout(apply("x", self.embed, x) * self.scale + self.position[:length])
        h = self.encoder(h, mask if self.mask_padding else None)
        h = self.dropout(self.activation(h))
        h = fill(h, mask)
        # Steps that are not there are zeros.
        return self.head(nn.functional.pad(h, (0, 0, 0, self.max_length - length)).flatten(1))

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        check_tokens_of("x", x, "batch, length", self.in_chans)
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"x has {x.shape[1]} steps, but this model supports at most max_length = {self.max_length}"
            )
        if mask is not None:
            check_mask("mask", mask, x.shape[:2], x.device)


@register_model
def flowformer_timeseries(in_chans: int, num_classes: int, max_length: int, **options: Any) -> SeriesClassifier:
    """The classifier of the published UEA experiments: 2 layers, 512 channels, 8 heads, 2,048 inside.

    Args:
        in_chans: Channels of a series.
        num_classes: Number of classes.
        max_length: Longest series.
        **options: As in :class:`SeriesClassifier`.
    """
    return SeriesClassifier(in_chans, num_classes, max_length, **options)
