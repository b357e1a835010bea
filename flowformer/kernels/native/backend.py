"""The row of the C++ kernels among the backends."""

from __future__ import annotations

import torch

from flowformer.core.backends import Backend
from flowformer.kernels.native import build, kernels


def _refuses(device: str, dtype: torch.dtype) -> str:
    if device != "cpu":
        return f"the native kernels run on the CPU, and this is on {device}"
    if dtype not in kernels.DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the native kernels compute float32 and bfloat16, and this is {name}"
    return "" if kernels.kernels() else f"the native kernels do not run: {build.why_not()}"


def _describe() -> str:
    library, found = build.load(), kernels.kernels()
    assert library is not None  # it runs
    assert found is not None
    return f"C++ kernels for {found.level}, {library.how}, threads by {library.threads}"


BACKEND = Backend(
    "native", "C++ kernels: float32 and bfloat16 on the CPU", kernels.DTYPES, _refuses, _describe, rank=10
)
