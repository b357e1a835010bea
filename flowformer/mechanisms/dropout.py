"""Dropout that costs little on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowformer.core.tracing import is_traced, is_transformed

_LEVELS = 1 << 16  # of a random number of 16 bits


class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout`, several times as fast on a CPU, where it takes a quarter of a training step.

    PyTorch draws one random number per element there. Here a random number of 64 bits decides on four: an element is
    dropped where its 16 bits are below ``p * 65536``, rounded. The probability is off by at most 8e-6, and what is kept
    is divided by the probability in use, so that the expected value is the input. The backward pass stores one byte per
    element instead of four.

    On other devices, in graphs that are traced and under torch.func it is :class:`torch.nn.Dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with elements dropped, of any shape, in training mode."""
        dropped = round(self.p * _LEVELS)  # of the levels
        applies = self.training and 0 < dropped < _LEVELS and input.device.type == "cpu" and not self.inplace
        if not applies or is_traced() or is_transformed():
            return functional.dropout(input, self.p, self.training, self.inplace)
        kept = _levels(input) >= dropped - _LEVELS // 2
        return (input * kept).mul_(_LEVELS / (_LEVELS - dropped))


def _levels(like: Tensor) -> Tensor:
    """Random int16 of the shape of a tensor, all values alike probable."""
    count = like.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    return words.view(torch.int16)[:count].view(like.shape)
