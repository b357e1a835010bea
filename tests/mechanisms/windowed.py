"""Shared by the tests of mechanisms with windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowformer.mechanisms import find_attention


def inputs(length: int, *, heads: int = 3, batch: int = 2, count: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(length)
    return [torch.randn(batch, length, heads, 4, generator=random, dtype=torch.float64) for _ in range(count)]


def with_gradients(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, leaves, weights, materialize_grads=True)]


def equals_truth(name: str, tensors: list[Tensor], *others: Any, **options: Any) -> None:
    """The operation and its gradients are those of the reference."""
    row = find_attention(name)
    got = with_gradients(lambda *given: row.operation(*given, *others, **options), tensors)
    want = with_gradients(lambda *given: row.truth(*given, *others, **options), tensors)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
