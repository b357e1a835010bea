"""What the tests of Triton kernels in the interpreter share: outputs and gradients, compared in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

FORMS = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def run(function: Any, tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The output, and the gradients of a combination of its elements. Log-decays are float32 at least."""
    half = dtype not in (torch.float32, torch.float64)
    leaves = [t.to(torch.float32 if half and t.ndim < tensors[0].ndim else dtype) for t in tensors]
    leaves = [t.clone().requires_grad_() for t in leaves]
    out = function(*leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype))]


def spoilt(tensors: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The same with NaN at padding."""
    if mask is None:
        return tensors
    return [
        t if t.ndim < 3 else t.masked_fill(~mask.view(*mask.shape, *(1,) * (t.ndim - 2)), torch.nan) for t in tensors
    ]


def both(operation: Any, tensors: list[Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Compare with plain PyTorch in float64, which is held to the reference elsewhere; NaN at padding or not."""
    rounded = [t.to(dtype).double() if t.ndim == tensors[0].ndim else t for t in tensors]
    want = run(operation, rounded, torch.float64, backend="torch", **options)
    q, *others = rounded
    mask = options.get("mask")
    filled = [*spoilt([q], mask), *spoilt(others, options.get("context_mask", mask))]
    got = run(operation, filled, dtype, backend="triton", **options)
    close(got, want, TOLERANCE[dtype])


def close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        error, size = (one.double() - other).abs().max(), other.abs().max()
        assert error <= tolerance * size, f"off by {error / size:.2g} of the largest"


def resumed(operation: Any, tensors: list[Tensor], at: int, **options: Any) -> None:
    """Compare a sequence cut in two, the second part resumed from the state after the first; gradients of all too."""
    results = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        leaves = [t.to(dtype).clone().requires_grad_() for t in tensors]
        given = {"causal": True, "return_state": True, "backend": backend, **options}
        cut = [(t[:, :at], t[:, at:]) if t.ndim > 2 else (t, t) for t in leaves]
        first, state = operation(*(one for one, _ in cut), **given)
        second, after = operation(*(other for _, other in cut), initial_state=state, **given)
        found = [torch.cat([first, second], 1), *(x for x in after if x.is_floating_point())]
        random = torch.Generator().manual_seed(0)
        loss = sum((x * torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype)).sum() for x in found)
        results.append([*(x.detach() for x in found), *torch.autograd.grad(loss, leaves)])
    close(results[1], results[0], TOLERANCE[torch.float32])
