"""Precision of operations: dtypes of sums and states, and autocast switched off."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Stands for the logarithm of zero. Finite, because -inf minus -inf is NaN, in a gradient too.
LOG_ZERO = -1e30


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which an operation computes: float32 for half precision, else its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def state_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of running sums: float64, since a float32 sum of a million like terms is off by one percent.

    Adding 0.35 to a float32 sum of 300,000 rounds every addend to a multiple of 1/32. Devices without float64
    (Apple's GPUs) keep float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def dtype_and_device(module: nn.Module) -> dict[str, Any]:
    """Return ``dtype`` and ``device`` of a module's first floating-point tensor, for tensors that go with its own.

    Layers need not have a ``weight``: quantized layers have none, and layers around others may hold it elsewhere. What
    is not known is the default dtype, and the CPU.
    """
    device, dtype = torch.device("cpu"), None
    for tensor in (*module.parameters(), *module.buffers()):
        device = tensor.device
        if tensor.dtype in FLOAT_DTYPES:
            dtype = tensor.dtype
            break
    return {"dtype": dtype or torch.get_default_dtype(), "device": device}


# Kinds of device that have autocast. Asked once: PyTorch 2.11 breaks a graph where it is asked.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "ipu")
_AUTOCASTING = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


def is_autocasting(device: torch.device) -> bool:
    """Return whether autocast is switched on for a device."""
    return device.type in _AUTOCASTING and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off: operations choose the precision of their sums themselves."""
    if device.type not in _AUTOCASTING:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward pass of an autograd function run without autocast, as its forward pass does."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads_out: Tensor) -> Any:
        with no_autocast(grads_out[0].device):
            return backward(ctx, *grads_out)

    return run
