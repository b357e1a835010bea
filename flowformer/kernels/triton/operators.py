"""Define operators of PyTorch that run Triton kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import adjacent
from flowformer.core.precision import no_autocast

MOST_CHANNELS = 256  # of keys and of values, behind the feature map


def operator(
    name: str, arguments: str, fake: Callable[..., tuple[Tensor, ...]], returns: int
) -> Callable[[Any], Any]:  # fmt: skip
    """Define an operator that returns so many tensors; the decorated function computes it, on GPUs and interpreted.

    Args:
        name: In the namespace ``flowformer``.
        arguments: Its schema; the first is a tensor (batch, ...).
        fake: Makes tensors of the shapes of its results: while a graph is traced, and where the batch is empty.
        returns: How many tensors it returns.
    """
    torch.library.define(f"flowformer::{name}", f"({arguments}) -> ({', '.join(['Tensor'] * returns)})")
    torch.library.register_fake(f"flowformer::{name}", fake)

    def register(function: Any) -> Any:
        def run(q: Tensor, *rest: Any) -> Any:
            if not q.shape[0]:
                return fake(q, *rest)
            on_device = torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
            with on_device, no_autocast(q.device):
                return function(q, *rest)

        for device in ("cuda", "cpu"):
            torch.library.impl(f"flowformer::{name}", device, run)
        return function

    return register


def check_channels(op: str, q: Tensor, v: Tensor) -> None:
    """Raise ValueError for more channels, of keys behind the feature map or of values, than kernels have."""
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MOST_CHANNELS:
        raise ValueError(f"{op}: the Triton kernels have {MOST_CHANNELS} channels at most, got {widest}")


def wants_gradients(*given: Tensor | None) -> bool:
    """Return whether gradients of any of them are wanted: an operator of one token has none, a sequence of one has."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)


def with_adjacent_channels(*tensors: Tensor) -> list[Tensor]:
    """Return tensors whose channels are adjacent, as kernels read them."""
    return [adjacent(t) for t in tensors]


def like_decays(grad: Tensor | None, log_decay: Tensor | None, q: Tensor) -> Tensor:
    """Return the gradient by token in the shape of log-decays; zeros where it is not wanted, nothing without any.

    Args:
        grad: (batch, length, heads).
        log_decay: (heads,) or (batch, length, heads).
        q: For the device.
    """
    if grad is None or log_decay is None:
        return q.new_zeros(0, dtype=torch.float32) if log_decay is None else torch.zeros_like(log_decay)
    return (grad if log_decay.ndim == 3 else grad.sum((0, 1))).to(log_decay.dtype).contiguous()
