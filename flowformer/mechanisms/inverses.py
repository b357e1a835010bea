"""Inverses of small matrices by products alone, as mechanisms with landmarks define them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pseudo_inverse(A: Tensor, used: Tensor | None, iterations: int, couple: bool) -> Tensor:
    """Return the iterate for matrices A (batch, heads, m, m), of which ``used`` (batch, m) rows and columns matter.

    The others are those of the identity, which the iterations do not mix with the rest.
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    columns = A.sum(-2)
    if used is not None:
        both = used[:, None, :, None] & used[:, None, None, :]
        A = torch.where(both, A, eye)
        columns = (A * used[:, None, :, None]).sum(-2)
    largest = columns.max() if couple and len(A) else columns.amax(-1, keepdim=True).unsqueeze(-1)
    Z = A.mT / largest.clamp(min=torch.finfo(A.dtype).tiny)
    for _ in range(iterations):
        AZ = A @ Z
        Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
    return Z


def scale_of_batch(A: Tensor) -> Tensor:
    """2 / (largest row sum of all)^2, halved up to ten times while a column of I - scale A A sums up to over 1.01."""
    if not len(A):
        return A.new_ones(())
    scale, eye = 2 / A.sum(-1).max().square(), torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for _ in range(10):
        far = (eye - scale * A @ A).detach().abs().sum(-2).max() > 1.01
        scale = torch.where(far, scale / 2, scale)
    return scale


def newton(A: Tensor, scale: Tensor, iterations: int) -> Tensor:
    """Newton's iterations towards the inverse of A, from ``scale`` A."""
    X = scale * A
    for _ in range(iterations):
        X = 2 * X - X @ A @ X
    return X


class _NewtonByLimit(torch.autograd.Function):
    """:func:`newton` as one node of the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, scale: Tensor, iterations: int) -> Tensor:
        return newton(A, scale, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (X,), (grad,) = ctx.saved_tensors, grads
        return -X.mT @ grad @ X.mT, None, None


def newton_by_limit(A: Tensor, scale: Tensor, iterations: int) -> Tensor:
    """Return what :func:`newton` does, with the gradient that its limit has, -X^T g X^T, and none of ``scale``."""
    return _NewtonByLimit.apply(A, scale, iterations)
