"""One token of causal AFT-simple by one Triton kernel: a thread has a channel, in float64 as the state is."""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flowformer.kernels.triton import launch
from flowformer.kernels.triton.step import log_add

BLOCK = 128  # channels to a program


@triton.jit(do_not_specialize=["numbers"])
def aft_step(q, k, v, log_weight, mean, out, log_weight_after, mean_after, numbers, B: tl.constexpr):
    """Compute one token of some channels, which of all sequences are in one row."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    there = at < numbers
    key = tl.load(k + at, there, 0.0).to(tl.float64)
    weight, past = log_add(tl.load(log_weight + at, there, 0.0), key), tl.load(mean + at, there, 0.0)
    now = past + tl.exp(key - weight) * (tl.load(v + at, there, 0.0).to(tl.float64) - past)
    gate = 1.0 / (1.0 + tl.exp(-tl.load(q + at, there, 0.0).to(tl.float64)))
    tl.store(log_weight_after + at, weight, there)
    tl.store(mean_after + at, now, there)
    tl.store(out + at, (gate * now).to(out.dtype.element_ty), there)


def run_step(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (batch, channels) of one token, and the parts of the state after it."""
    given = [x.contiguous() for x in (q, k, v, log_weight, mean)]
    out, *after = (x.new_empty(x.shape) for x in (q, log_weight, mean))
    grid = (triton.cdiv(q.numel(), BLOCK),)
    launch.run(aft_step, grid, *given, out, *after, q.numel(), B=BLOCK, num_warps=4)
    return out, after[0], after[1]
