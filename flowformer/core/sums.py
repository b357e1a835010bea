"""Sums over tokens, accurate in float32 at any length: matrix products, and running sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.chunks import pad_to_chunks
from flowformer.core.precision import without_autocast
from flowformer.core.tracing import cut, is_traced

RUN = 128  # tokens summed by one matrix product


def sum_over_tokens(A: Tensor, B: Tensor) -> Tensor:
    """Return A^T B for A (..., tokens, a) and B (..., tokens, b), summed in runs of tokens that are then added.

    In float32 a matrix product over 300,000 like tokens may be wrong by 3e-3; torch.sum, which adds pairwise, is not.
    """
    if is_traced() or A.shape[-2] < RUN:
        return A.transpose(-1, -2) @ B
    rest = A.shape[-2] % RUN
    if not rest:
        return _sum_runs(A, B)
    (A, last_A), (B, last_B) = (x.split([x.shape[-2] - rest, rest], -2) for x in (A, B))
    return _sum_runs(A, B) + last_A.transpose(-1, -2) @ last_B


def _sum_runs(A: Tensor, B: Tensor) -> Tensor:
    A, B = (x.unflatten(-2, (-1, RUN)) for x in (A, B))
    return (A.transpose(-1, -2) @ B).sum(-3)


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
    """Return A M for A (..., tokens, a) and M (..., a, b), whose gradient is summed over tokens in runs."""
    return A @ M if is_traced() else _TimesSum.apply(A, M)


STRETCH = 32  # tokens added up by one matrix product


def running_sums(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over the tokens up to each, and over all of them; those of the past are in both.

    By products with a triangle of ones, which are several times as fast as torch.cumsum along this axis on a CPU.

    Args:
        x: (batch, tokens, ...).
        past: Sums of the tokens before, (batch, ...), in the dtype of states.

    Returns:
        The sums, shape and dtype of ``x``, and the last, shape and dtype of ``past``.
    """
    length = x.shape[1]
    (padded,), _ = pad_to_chunks((x.flatten(2),), None, STRETCH)
    ones = padded.new_ones(STRETCH, STRETCH).tril()
    within = ones @ padded.unflatten(1, (-1, STRETCH))  # (batch, stretches, STRETCH, channels)
    ends = torch.cat([past.flatten(1).unsqueeze(1), within[:, :, -1].to(past.dtype)], 1).cumsum(1)
    sums = (within + ends[:, :-1].to(x.dtype).unsqueeze(2)).flatten(1, 2)
    return cut(sums, length).unflatten(2, x.shape[2:]), ends[:, -1].unflatten(1, past.shape[1:])
