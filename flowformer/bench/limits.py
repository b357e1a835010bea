"""What the machine, or its GPU, can do at all, measured among the contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowformer.bench.device import Device
from flowformer.bench.timing import LEAST_ROUNDS, estimate

SGEMM = "sgemm"
PRODUCTS = {torch.float32: SGEMM, torch.bfloat16: "bf16 gemm", torch.float16: "fp16 gemm"}
SMALLEST = 256  # rows


@dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes:
        name: The name it is reported under.
        run: What is timed.
        work: Units of work of one call, in 1e9.
        unit: Of work per second.
        size: Rows of the square matrices, or bytes copied.
    """

    name: str
    run: Callable[[], Any]
    work: float
    unit: str
    size: int


def make_limits(size: int, seconds: float, device: Device) -> list[Limit]:
    """Square products of float32 and of bfloat16, and a copy of as many bytes as 8 float32 matrices of ``size``.

    On a GPU also a product of float16, and all of a size that is multiplied by the device's factor.

    A copy counts what it reads and what it writes. Products are of ``size``, or of the largest of its halves that takes
    less than ``seconds`` for three calls: without instructions for it, bfloat16 is slow.
    """
    size *= device.limit_factor
    source = torch.ones(8 * size * size, device=device.place)
    target = torch.zeros_like(source)
    copied = 4 * source.numel()
    copy = Limit("copy", lambda: target.copy_(source), 2 * copied / 1e9, "GB/s", copied)
    dtypes = [dtype for dtype in PRODUCTS if dtype != torch.float16 or device.name != "cpu"]
    return [*(_product(dtype, size, seconds, device) for dtype in dtypes), copy]


def _product(dtype: torch.dtype, size: int, seconds: float, device: Device) -> Limit:
    smallest = size
    while smallest > SMALLEST:
        smallest //= 2
    fitting = smallest
    while fitting < size and LEAST_ROUNDS * 8 * _seconds(fitting, dtype, seconds, device) < seconds:
        fitting *= 2
    fitting = min(fitting, size)
    return Limit(PRODUCTS[dtype], _multiply(fitting, dtype, device), 2 * fitting**3 / 1e9, "GFLOP/s", fitting)


def _seconds(size: int, dtype: torch.dtype, seconds: float, device: Device) -> float:
    return estimate(_multiply(size, dtype, device), seconds, device.cost)


def _multiply(size: int, dtype: torch.dtype, device: Device) -> Callable[[], Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    a, b = (device.put(torch.randn(size, size, generator=one).to(dtype)) for one in generators)
    product = torch.empty_like(a)
    # The second factor transposed, as in a linear layer: where bfloat16 has no instructions, that is the faster way.
    return lambda: torch.mm(a, b.T, out=product)
