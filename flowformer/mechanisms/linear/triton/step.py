"""One token of causal linear attention by one Triton kernel: :mod:`flowformer.kernels.triton.step`."""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flowformer.kernels.triton.step import decay_of_one, emit, features_of_one, remember, run_by_head

ELU = 2  # of kernels/triton/device.py


@triton.jit(do_not_specialize=["decay_rows"])
def linear_step(
    q, k, v, log_decay, key_sum, memory, out, key_sum_after, memory_after, decay_rows, eps,
    D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MAP: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Compute one token of a head."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, m = tl.arange(0, BD), block * BM + tl.arange(0, BM)
    inside, there = d < D, m < M
    gamma = tl.exp(decay_of_one(log_decay, row, decay_rows, DECAY))
    Q, K = features_of_one(q + row * D, d, inside, MAP), features_of_one(k + row * D, d, inside, MAP)
    keys = tl.load(key_sum + row * D + d, inside, 0.0) * gamma + K
    if block == 0:
        tl.store(key_sum_after + row * D + d, keys, inside)
    matrix = remember(v, memory, memory_after, row, K, 1.0, gamma, d, m, inside, there, D, M)
    emit(out, row, Q, matrix, 1.0 / (tl.sum(Q * keys, 0) + eps), m, there, M)


def run_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, key_sum: Tensor, memory: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (batch, heads, M) of one token, and the sums after it."""
    out, *after = (x.new_empty(x.shape) for x in (v, key_sum, memory))
    run_by_head(
        linear_step, q, v, *(x.contiguous() for x in (q, k, v)), q if log_decay is None else log_decay.contiguous(),
        key_sum.contiguous(), memory.contiguous(), out, *after, 1 if log_decay is None else log_decay.numel(), eps,
        MAP=ELU, DECAY=log_decay is not None,
    )  # fmt: skip
    return out, after[0], after[1]
