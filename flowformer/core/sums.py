"""Sums over tokens, accurate in float32 at any length: matrix products, and running sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.chunks import pad_to_chunks
from flowformer.core.precision import without_autocast
from flowformer.core.tracing import cut, is_traced, is_transformed

RUN = 128  # tokens summed by one matrix product
GROUP = 16  # runs that are added one after the other on a CPU
LARGE = 2**16  # numbers of a row of a batch from which on a row by itself is worth a call of PyTorch on a CPU
# Which axis of (batch, heads, tokens, channels) has neighbours in memory next to each other, and which comes then.
HEADS_FIRST, TOKENS_FIRST, CHANNELS_FIRST = "heads first", "tokens first", "channels first"


def sum_over_tokens(A: Tensor, B: Tensor) -> Tensor:
    """Return A^T B for A (..., tokens, a) and B (..., tokens, b), summed in runs of tokens that are then added.

    In float32 a matrix product over 300,000 like tokens may be wrong by 3e-3; torch.sum, which adds pairwise, is not.
    """
    if is_traced() or A.shape[-2] < RUN:
        return A.transpose(-1, -2) @ B
    return _SumOverTokens.apply(A, B) if A.shape[:-2] == B.shape[:-2] else _in_runs(A, B)


def times_sum(A: Tensor, M: Tensor, layout: str = HEADS_FIRST) -> Tensor:
    """Return A M for A (..., tokens, a) and M (..., a, b), whose gradient is summed over tokens in runs.

    Args:
        A: What is multiplied.
        M: The sum.
        layout: How the product lies in memory, a matter of speed alone: ``HEADS_FIRST``, or where (batch, heads,
            tokens, b) is transposed next ``TOKENS_FIRST`` for (batch, tokens, heads, b), or ``CHANNELS_FIRST`` for
            (batch, heads, b, tokens).
    """
    return A @ M if is_traced() else _TimesSum.apply(A, M, layout)


class _SumOverTokens(torch.autograd.Function):
    """A^T B as one node of the graph: its gradients are products that need no runs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, B: Tensor) -> Tensor:
        return _in_runs(A, B)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor, Tensor]:
        (A, B), (grad,) = ctx.saved_tensors, grads_out
        return times_sum(B, grad.mT, _layout(A)), times_sum(A, grad, _layout(B))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (A, B), (of_A, of_B) = ctx.saved_tensors, tangents
        return _in_runs(of_A, B) + _in_runs(A, of_B)


class _TimesSum(torch.autograd.Function):
    """A M as one node of the graph, for the sake of its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, M: Tensor, layout: str) -> Tensor:
        return _product(A, M, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        A, M, ctx.layout = inputs
        ctx.save_for_backward(A, M)
        ctx.save_for_forward(A, M)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor, Tensor, None]:
        (A, M), (grad,) = ctx.saved_tensors, grads_out
        return times_sum(grad, M.mT, _layout(A)), sum_over_tokens(A, grad), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (A, M), (of_A, of_M, _) = ctx.saved_tensors, tangents
        return of_A @ M + A @ of_M


def _layout(x: Tensor) -> str:
    """How x (..., tokens, channels) lies in memory."""
    if x.stride(-1) > x.stride(-2):
        return CHANNELS_FIRST
    return TOKENS_FIRST if x.ndim == 4 and x.stride(1) < x.stride(2) else HEADS_FIRST


def _product(A: Tensor, M: Tensor, layout: str) -> Tensor:
    """A M, laid out in memory as asked for where that is sooner."""
    if layout == CHANNELS_FIRST:
        return (M.mT @ A.mT).mT
    by_rows = layout == TOKENS_FIRST and _by_itself(A, M) and A[:1, ..., 0].numel() * M.shape[-1] >= LARGE
    if not by_rows:
        return A @ M
    out = A.new_empty(A.shape[0], A.shape[2], A.shape[1], M.shape[-1]).transpose(1, 2)
    for row in zip(A, M, out, strict=True):
        torch.bmm(row[0], row[1], out=row[2])
    return out


def _in_runs(A: Tensor, B: Tensor) -> Tensor:
    """A^T B, of runs of tokens that are then added."""
    if _by_itself(A, B) and A.shape[1:3] == B.shape[1:3]:
        return torch.stack([_of_groups(*row) for row in zip(A.unbind(), B.unbind(), strict=True)])
    rest = A.shape[-2] % RUN
    if rest:
        (A, last_A), (B, last_B) = (x.split([x.shape[-2] - rest, rest], -2) for x in (A, B))
        return _in_runs(A, B) + last_A.mT @ last_B
    A, B = (x.unflatten(-2, (-1, RUN)) for x in (A, B))
    return (A.mT @ B).sum(-3)


def _of_groups(A: Tensor, B: Tensor) -> Tensor:
    """A^T B of (heads, tokens, channels): some runs are added up one after the other, and these sums pairwise."""
    sums = []
    for run, (one, other) in enumerate(zip(A.split(RUN, 1), B.split(RUN, 1), strict=True)):
        if run % GROUP:
            sums[-1].baddbmm_(one.mT, other)
        else:
            sums.append(torch.bmm(one.mT, other))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _by_itself(A: Tensor, B: Tensor) -> bool:
    """Whether rows of a batch are taken one by one, on a CPU: as one batch of matrices they would have to be copied."""
    return A.device.type == "cpu" and A.ndim == B.ndim == 4 and len(A) == len(B) > 0 and not is_transformed()


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
