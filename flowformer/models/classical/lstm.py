"""A recurrent classifier of time series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import check_mask, check_probability, check_sizes, check_tokens_of
from flowformer.core.masks import fill
from flowformer.mechanisms.dropout import Dropout
from flowformer.models.registry import register_model


class LSTMClassifier(nn.Module):
    """LSTM (Hochreiter and Schmidhuber, 1997) over the time steps; its output at the last real step is classified.

    Padding on the right is invisible: no real step comes after it.

    Args:
        in_chans: Channels of a series.
        num_classes: Number of classes.
        dim: Channels of the state.
        num_layers: Layers.
        dropout: Probability, between layers and before the classifier.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError, TypeError: for sizes that do not fit.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        *,
        dim: int = 128,
        num_layers: int = 1,
        dropout: float = 0.1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_chans=in_chans, num_classes=num_classes, dim=dim, num_layers=num_layers)
        check_probability("dropout", dropout)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        between = dropout if num_layers > 1 else 0.0  # torch warns about one that has no effect
        self.lstm = nn.LSTM(in_chans, dim, num_layers, batch_first=True, dropout=between, **factory)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(dim, num_classes, **factory)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return class logits of a batch of series.

        Args:
            x: (batch, length, in_chans); padding on the right.
            mask: (batch, length) boolean, True = real time step.

        Returns:
            Logits (batch, num_classes).

        Raises:
            TypeError, ValueError: for another shape or dtype.
        """
        check_tokens_of("x", x, "batch, length", self.in_chans)
        if mask is not None:
            check_mask("mask", mask, x.shape[:2], x.device)
        h, _ = self.lstm(fill(x, mask))
        if mask is None:
            last = h[:, -1]
        else:
            steps = (mask.sum(1) - 1).clamp(min=0)
            last = h.gather(1, steps[:, None, None].expand(-1, 1, h.shape[2]))[:, 0]
        return self.head(self.dropout(last))


@register_model
def lstm_timeseries(in_chans: int, num_classes: int, **options: Any) -> LSTMClassifier:
    """An LSTM of 128 channels that classifies time series.

    Args:
        in_chans: Channels of a series.
        num_classes: Number of classes.
        **options: As in :class:`LSTMClassifier`.
    """
    return LSTMClassifier(in_chans, num_classes, **options)
