"""Functions of the C++ library, and helpers to call them with tensors."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.kernels.native import build

DTYPES = (torch.float32, torch.bfloat16)


class Kernels(NamedTuple):
    """The functions for one instruction set."""

    level: str
    causal_forward: Any
    causal_backward: Any
    bidirectional_forward: Any
    bidirectional_backward: Any
    step: Any
    attend_causal_forward: Any
    attend_causal_backward: Any
    attend_forward: Any
    attend_backward: Any
    attend_step: Any
    aft_causal_forward: Any
    aft_causal_backward: Any
    aft_bidirectional_forward: Any
    aft_bidirectional_backward: Any


_ARGUMENTS = {"step": 14, "attend_step": 12}  # addresses; of all others the call's alone


def kernels() -> Kernels | None:
    """Return the kernels of this process, or ``None``; :func:`flowformer.kernels.native.build.why_not` has the reason.

    Raises:
        ValueError: if the level that the environment asks for is not there.
    """
    library = build.load()
    return None if library is None else _kernels(library, build.level(library))


@functools.cache
def _kernels(library: build.Library, level: str) -> Kernels:
    functions = []
    for name in Kernels._fields[1:]:
        function = getattr(library.handle, f"flowformer_{name}_{level}")
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_void_p] * _ARGUMENTS.get(name, 1)
        functions.append(function)
    return Kernels(level, *functions)


def run(name: str, call: ctypes.Structure, *pointers: int | None) -> None:
    """Run a kernel.

    Raises:
        RuntimeError: if the kernels no longer run, since the environment has changed since the backend was chosen.
        MemoryError: if the kernel found no memory for its working space.
    """
    found = kernels()
    if found is None:
        raise RuntimeError(f"the native kernels are no longer available: {build.why_not()}")
    if getattr(found, name)(ctypes.addressof(call), *pointers):
        raise MemoryError(f"the native kernel {name} could not allocate its workspace")


# ------------------------------------------------------------------------------------------- from tensors to the calls


class View(ctypes.Structure):
    """A tensor: struct ``View`` of source/call.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


def view(x: Tensor) -> View:
    """Return the view of a tensor (batch, length, heads, channels) or (batch, length, channels), by its address."""
    return View(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2) if x.ndim == 4 else 0)


_LARGE_BYTES = 1 << 24  # memory of this size comes fresh from the system, which fills it in page by page


def empty_like(x: Tensor, zero: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a tensor like x, in the layout of x if its channels are adjacent."""
    made = torch.empty_like(x, dtype=dtype)
    if made.shape[-1] > 1 and made.stride(-1) != 1:
        made = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if type(made) is Tensor and made.nbytes >= _LARGE_BYTES and (library := build.load()):
        library.handle.flowformer_want_large_pages(ctypes.c_void_p(made.data_ptr()), ctypes.c_int64(made.nbytes))
    return made.zero_() if zero else made


def contiguous(*parts: Tensor | None) -> list[Tensor | None]:
    """Return each part as a contiguous tensor, ``None`` for ``None``."""
    return [None if part is None else part.contiguous() for part in parts]


def address(part: Tensor | None) -> int | None:
    """Return the address of a tensor, which must live until the kernel has run; null for ``None``."""
    return None if part is None else part.data_ptr()
