"""Inverses of small matrices by products alone, as mechanisms with landmarks define them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.precision import without_autocast
from flowformer.core.tracing import is_traced, is_transformed


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
    A, Z, shape = A.flatten(0, 1), Z.flatten(0, 1), A.shape
    one_node = A.requires_grad and not (is_traced() or is_transformed())
    return (_Iterated.apply(A, Z, iterations) if one_node else _iterates(A, Z, iterations)[-1]).view(shape)


def _factors(A: Tensor, Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P = A Z, W = P (7 I - P) and U = P (W - 15 I), of matrices (n, m, m)."""
    P = A @ Z
    W = torch.baddbmm(P, P, P, beta=7, alpha=-1)
    return P, W, torch.baddbmm(P, P, W, beta=-15)


def _iterates(A: Tensor, Z: Tensor, iterations: int) -> list[Tensor]:
    """Z (13 I + U) / 4, and that of it, and so on, after Z itself."""
    found = [Z]
    for _ in range(iterations):
        *_, U = _factors(A, found[-1])
        found.append(torch.baddbmm(found[-1], found[-1], U, beta=13 / 4, alpha=1 / 4))
    return found


class _Iterated(torch.autograd.Function):
    """The last iterate as one node of the graph, which keeps the iterates alone and adds up within products."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, Z: Tensor, iterations: int) -> Tensor:
        *kept, out = _iterates(A, Z, iterations)
        ctx.save_for_backward(A, *kept)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (A, *kept), (of_Z,) = ctx.saved_tensors, grads
        if torch.is_grad_enabled():  # with what they are computed from
            kept = _iterates(A, kept[0], len(kept) - 1)
        of_A = None
        for Z in reversed(kept):
            P, W, U = _factors(A, Z)
            of_U = Z.mT @ of_Z / 4
            of_W = P.mT @ of_U
            of_P = 7 * of_W - 15 * of_U
            of_P.baddbmm_(of_U, W.mT).baddbmm_(of_W, P.mT, alpha=-1).baddbmm_(P.mT, of_W, alpha=-1)
            of_A = of_P @ Z.mT if of_A is None else of_A.baddbmm_(of_P, Z.mT)
            of_Z = torch.baddbmm(of_Z, of_Z, U.mT, beta=13 / 4, alpha=1 / 4).baddbmm_(A.mT, of_P)
        return of_A, of_Z, None


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
