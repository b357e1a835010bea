"""What the kernels of one token share: features, decay, and the matrix of a head.

A program has some channels of values of one head of one sequence, a *row*: q, k (rows, D), v (rows, M), all contiguous.
What is a vector or a number of the head, every program of it finds for itself. All of it is in float64, as states are:
one token is little work, and its time is that of reading the state.
"""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flowformer.kernels.triton import launch
from flowformer.kernels.triton.device import load_tokens

LARGEST = 2_048  # elements of a matrix to a program: 128 bytes a thread in float64


@triton.jit
def features_of_one(x, d, inside, MAP: tl.constexpr):
    """Return the features of one token, (channels,)."""
    one = tl.arange(0, 1)
    return tl.sum(load_tokens(x, one.to(tl.int64), one == 0, 0, d, inside, MAP), 0).to(tl.float64)


@triton.jit
def decay_of_one(log_decay, row, decay_rows, DECAY: tl.constexpr):
    """Return the log-decay of a row, at most 0."""
    if DECAY:
        given = tl.load(log_decay + row % decay_rows).to(tl.float64)
        return tl.where(given > 0, 0.0, given)
    return tl.full([], 0.0, tl.float64)


@triton.jit
def log_add(a, b):
    """Return log(exp(a) + exp(b))."""
    most = tl.maximum(a, b)
    return most + tl.log(tl.exp(a - most) + tl.exp(b - most))


@triton.jit
def remember(v, memory, memory_after, row, K, weight, kept, d, m, inside, there, D: tl.constexpr, M: tl.constexpr):
    """Store kept * memory + K (weight v)^T, and return it, (channels of keys, channels of values)."""
    value = tl.load(v + row * M + m, there, 0.0).to(tl.float64) * weight
    at, ok = row * D * M + d[:, None] * M + m[None, :], inside[:, None] & there[None, :]
    matrix = tl.load(memory + at, ok, 0.0) * kept + K[:, None] * value[None, :]
    tl.store(memory_after + at, matrix, ok)
    return matrix


@triton.jit
def emit(out, row, Q, matrix, scale, m, there, M: tl.constexpr):
    """Write Q . matrix times a scale."""
    tl.store(out + row * M + m, (tl.sum(Q[:, None] * matrix, 0) * scale).to(out.dtype.element_ty), there)


def run_by_head(kernel: Any, q: Tensor, v: Tensor, *arguments: Any, warps: int = 4, **options: Any) -> None:
    """Launch a kernel of one token on q (batch, heads, D) and v (batch, heads, M), of which it takes the sizes."""
    batch, heads, D = q.shape
    M = v.shape[-1]
    width = launch.padded(D)
    block = min(launch.padded(M), max(16, LARGEST // width))
    grid = batch * heads, triton.cdiv(M, block)
    launch.run(kernel, grid, *arguments, **options, D=D, M=M, BD=width, BM=block, num_warps=warps)
