"""In which precision operations compute, and what keeps autocast out of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Stands for the logarithm of zero. Finite, because -inf minus -inf is NaN, in a gradient too.
LOG_ZERO = -1e30


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an operation computes in: float32 for half precision, else its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def state_dtype(device: torch.device) -> torch.dtype:
    """The dtype of running sums: float64, because a float32 sum of a million like terms is off by one percent.

    Adding 0.35 to a float32 sum of 300,000 rounds every addend to a multiple of 1/32. Devices without float64
    (Apple's GPUs) keep float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off: the operations choose the precision of their sums themselves."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward pass of an autograd function run without autocast, as its forward pass does."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads_out: Tensor) -> Any:
        with no_autocast(grads_out[0].device):
            return backward(ctx, *grads_out)

    return run
