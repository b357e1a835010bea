"""Matrix products that are sums over tokens, taken so that float32 keeps its digits at any length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.precision import without_autocast

RUN = 128  # tokens summed by one matrix product


def sum_over_tokens(A: Tensor, B: Tensor) -> Tensor:
    """A^T B for A (..., tokens, a) and B (..., tokens, b), a sum over tokens in runs, which are then added up.

    In float32 a matrix product over 300,000 like tokens may be wrong by 3e-3; torch.sum, which adds pairwise, is not.
    """
    whole = A.shape[-2] - A.shape[-2] % RUN
    if whole == 0 or torch.compiler.is_compiling():
        return A.transpose(-1, -2) @ B
    (A, last_A), (B, last_B) = (x.split([whole, x.shape[-2] - whole], -2) for x in (A, B))
    A, B = (x.unflatten(-2, (-1, RUN)) for x in (A, B))
    return (A.transpose(-1, -2) @ B).sum(-3) + last_A.transpose(-1, -2) @ last_B


class _TimesSum(torch.autograd.Function):
    """A M as one node of the graph, for the sake of its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, M: Tensor) -> Tensor:
        return A @ M

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor, Tensor]:
        (A, M), (grad,) = ctx.saved_tensors, grads_out
        return grad @ M.transpose(-1, -2), sum_over_tokens(A, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (A, M), (of_A, of_M) = ctx.saved_tensors, tangents
        return of_A @ M + A @ of_M


def times_sum(A: Tensor, M: Tensor) -> Tensor:
    """A M for A (..., tokens, a) and M (..., a, b), a sum over tokens, as is its gradient: taken in runs too."""
    return A @ M if torch.compiler.is_compiling() else _TimesSum.apply(A, M)
