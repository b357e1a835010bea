"""What the machine can do at all, measured among the contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowformer.bench.timing import LEAST_ROUNDS, estimate

SGEMM = "sgemm"
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


def make_limits(size: int, seconds: float) -> list[Limit]:
    """Square products of float32 and of bfloat16, and a copy of as many bytes as 8 float32 matrices of ``size``.

    A copy counts what it reads and what it writes. Products are of ``size``, or of the largest of its halves that takes
    less than ``seconds`` for three calls: without instructions for it, bfloat16 is slow.
    """
    source = torch.ones(8 * size * size)
    target = torch.zeros_like(source)
    copied = 4 * source.numel()
    copy = Limit("copy", lambda: target.copy_(source), 2 * copied / 1e9, "GB/s", copied)
    return [
        _product(SGEMM, size, torch.float32, seconds),
        _product("bf16 gemm", size, torch.bfloat16, seconds),
        copy,
    ]


def _product(name: str, size: int, dtype: torch.dtype, seconds: float) -> Limit:
    smallest = size
    while smallest > SMALLEST:
        smallest //= 2
    fitting = smallest
    while fitting < size and LEAST_ROUNDS * 8 * estimate(_multiply(fitting, dtype), seconds) < seconds:
        fitting *= 2
    fitting = min(fitting, size)
    return Limit(name, _multiply(fitting, dtype), 2 * fitting**3 / 1e9, "GFLOP/s", fitting)


def _multiply(size: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    product = torch.empty_like(a)
    # The second factor transposed, as in a linear layer: where bfloat16 has no instructions, that is the faster way.
    return lambda: torch.mm(a, b.T, out=product)
