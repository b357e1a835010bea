"""Modules of Long Range Arena: projections by kernels (in, heads, channels), back by one of (heads, channels, out)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PROJECTIONS = ("x", "param.query.kernel", "param.key.kernel", "param.value.kernel", "param.out.kernel")


def project(x: Tensor, kernel: Tensor) -> Tensor:
    """Return queries, keys or values (batch, length, heads, channels)."""
    return torch.einsum("blc,chd->blhd", x, kernel)


def between_kernels(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return an operation between projections, as a function of what :data:`PROJECTIONS` names."""

    def run(x: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
        heads = attend(project(x, query), project(x, key), project(x, value))
        return torch.einsum("blhd,hdc->blc", heads, out)

    return run
