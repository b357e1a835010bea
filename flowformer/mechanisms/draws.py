"""Attention modules that own random tensors: projections, rotations, hashes."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import check_integer
from flowformer.mechanisms.base import Attention, set_values

LARGEST_SEED = 2**63 - 1  # PyTorch's generators are seeded with 64 bits


class DrawnAttention(Attention):
    """Base class of modules with random tensors that are not learned.

    They are drawn once, on the CPU and in float32, and kept as buffers: the same seed gives the same numbers on every
    device, they are part of the state dict, and only :meth:`redraw` and :meth:`reset_parameters` replace them. A
    subclass implements :meth:`draw`,
    and calls :meth:`register_drawn` at the end of its constructor; its :meth:`learned` passes them to the operation.

    Attributes:
        seed: Of the last draw by this module; a state dict that is loaded may have tensors of another.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        seed: Of the random tensors, 0 to 2^63 - 1. Absent for a seed from PyTorch's global generator, so that the
            layers of a model differ.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Raises:
        TypeError, ValueError: for sizes that do not fit, or a seed that is no such integer.
    """

    def __init__(self, dim: int, num_heads: int, *, seed: int | None = None, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self._given = seed
        # A module without memory is filled later, and takes no number from the generator.
        self.seed = _resolve(0 if seed is None and self.out_proj.weight.is_meta else seed)

    @abstractmethod
    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the random tensors by name, float32 or integers on the CPU, of the same shapes at every call."""

    def register_drawn(self) -> None:
        """Draw the random tensors, and register each as a buffer with the device and dtype of the parameters."""
        like = self.out_proj.weight
        for name, tensor in self._draw().items():
            dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
            self.register_buffer(name, tensor.to(like.device, dtype))

    def redraw(self, seed: int | None = None) -> None:
        """Replace the random tensors, in place, by those of a seed, or of one from PyTorch's global generator.

        Raises:
            TypeError, ValueError: for a seed that is no integer from 0 to 2^63 - 1.
        """
        self.seed = _resolve(seed)
        for name, tensor in self._draw().items():
            self.get_buffer(name).copy_(tensor)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters, and draw the random tensors as the constructor does."""
        super().reset_parameters()
        self.seed = _resolve(self._given)
        for name, tensor in self._draw().items():
            set_values(self.get_buffer(name), tensor)

    def _draw(self) -> dict[str, Tensor]:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):  # another default device may be set
                return self.draw(torch.Generator().manual_seed(self.seed))
        finally:
            torch.set_default_dtype(default)


def _resolve(seed: int | None) -> int:
    """Return the seed, or one from PyTorch's global generator."""
    if seed is None:
        return int(torch.randint(LARGEST_SEED, (), device="cpu"))
    check_integer("seed", seed)
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be from 0 to {LARGEST_SEED}, got {seed}")
    return int(seed)


def orthogonal_gaussian(features: int, channels: int, generator: torch.Generator, *, scaled: bool = True) -> Tensor:
    """Return (features, channels) whose rows are orthogonal in blocks of ``channels``, and each row Gaussian by itself.

    Args:
        features: Rows.
        channels: Columns.
        generator: Of random numbers.
        scaled: Give rows the norms of Gaussian vectors, drawn anew; otherwise sqrt(channels).
    """
    blocks = [
        torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q.T
        for _ in range(-(-features // channels))
    ]
    rows = torch.cat(blocks)[:features]
    if not scaled:
        return rows * math.sqrt(channels)
    return rows * torch.randn(features, channels, generator=generator).norm(dim=1, keepdim=True)
