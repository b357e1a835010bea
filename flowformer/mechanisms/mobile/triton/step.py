"""One token of causal Mobile-Attention by one Triton kernel: :mod:`flowformer.kernels.triton.step`.

Every program of a token computes the flows among all its heads, which are small: each is a matrix of heads x channels.
"""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flowformer.kernels.triton.device import load_tokens
from flowformer.kernels.triton.step import emit, features_of_one, log_add, remember, run_by_head
from flowformer.mechanisms.flow.equations import FEATURE_MAPS
from flowformer.mechanisms.mobile.options import MobileOptions

COMPETITIONS = {None: 0, "sequence": 1, "heads": 2}


@triton.jit
def _flows(A, total, inside, eps):
    """Return (A + eps) . (total + eps) of each head, (heads,), for A (heads, channels)."""
    return tl.sum(tl.where(inside[None, :], (A + eps) * (total + eps)[None, :], 0.0), 1)


@triton.jit
def _gates_and_logits(q, k, heads, eps, clamp, d, inside, h, D: tl.constexpr, MAP: tl.constexpr, CLAMPED: tl.constexpr,
                      ALLOCATION: tl.constexpr):  # fmt: skip
    """Return A / I and O^, clamped, of all heads of a token: :func:`flowformer.mechanisms.mobile.gates_and_logits`."""
    there, at = h < heads, h.to(tl.int64)
    Q = load_tokens(q, at, there, D, d, inside, MAP).to(tl.float64)
    K = load_tokens(k, at, there, D, d, inside, MAP).to(tl.float64)
    incoming = tl.where(there, _flows(Q, tl.sum(K, 0), inside, eps), 1.0)
    logits = _flows(K, tl.sum(Q / incoming[:, None], 0), inside, eps)
    if CLAMPED:
        logits = tl.minimum(tl.maximum(logits, -clamp), clamp)
    gates = 1.0 / incoming
    if ALLOCATION:
        outgoing = tl.where(there, _flows(K, tl.sum(Q, 0), inside, eps), 1.0)
        gates = gates / (1.0 + tl.exp(-_flows(Q, tl.sum(K / outgoing[:, None], 0), inside, eps)))
    return gates, tl.where(there, logits, -float("inf"))


@triton.jit
def _pick(x, h, own):
    """Return the number of one head."""
    return tl.sum(tl.where(h == own, x, 0.0), 0)


@triton.jit(do_not_specialize=["heads"])
def mobile_step(
    q, k, v, length, log_normaliser, memory, out, length_after, log_normaliser_after, memory_after, heads, eps, clamp,
    D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, MAP: tl.constexpr,
    CLAMPED: tl.constexpr, COMPETITION: tl.constexpr, ALLOCATION: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Compute one token of a head."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, m, h = tl.arange(0, BD), block * BM + tl.arange(0, BM), tl.arange(0, BH)
    inside, there = d < D, m < M
    own = row % heads
    first = (row - own) * D
    gates, logits = _gates_and_logits(
        q + first, k + first, heads, eps, clamp, d, inside, h, D, MAP, CLAMPED, ALLOCATION
    )
    scale, logit = _pick(gates, h, own), _pick(logits, h, own)
    past = tl.load(log_normaliser + row)
    normaliser, kept, weight = past, past * 0.0 + 1.0, past * 0.0 + 1.0
    if COMPETITION == 1:
        normaliser = log_add(past, logit)
        kept, weight = tl.exp(past - normaliser), tl.exp(logit - normaliser)
    if COMPETITION == 2:
        most = tl.max(logits, 0)
        weight = heads * tl.exp(logit - most) / tl.sum(tl.exp(logits - most), 0)
    count = tl.load(length + row // heads) + 1
    if COMPETITION == 1:
        if not NORMALIZE:
            scale *= count.to(tl.float64)
    else:
        if NORMALIZE:
            scale /= count.to(tl.float64)
    if block == 0:
        tl.store(log_normaliser_after + row, normaliser)
        if own == 0:
            tl.store(length_after + row // heads, count)
    Q, K = features_of_one(q + row * D, d, inside, MAP), features_of_one(k + row * D, d, inside, MAP)
    matrix = remember(v, memory, memory_after, row, K, weight, kept, d, m, inside, there, D, M)
    emit(out, row, Q, matrix, scale, m, there, M)


def run_step(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, log_normaliser: Tensor, memory: Tensor, options: MobileOptions
) -> tuple[Tensor, ...]:
    """Return the output (batch, heads, M) of one token, and the parts of the state after it."""
    state = length, log_normaliser, memory
    all_heads = triton.next_power_of_2(q.shape[1])
    elements = all_heads * triton.next_power_of_2(q.shape[2])
    out, *after = (x.new_empty(x.shape) for x in (v, *state))
    run_by_head(
        mobile_step, q, v, *(x.contiguous() for x in (q, k, v, *state)), out, *after, q.shape[1], options.eps,
        0.0 if options.clamp is None else options.clamp, BH=all_heads, warps=min(16, max(4, elements // 512)),
        MAP=FEATURE_MAPS[options.feature_map], CLAMPED=options.clamp is not None,
        COMPETITION=COMPETITIONS[options.competition], ALLOCATION=options.allocation, NORMALIZE=options.normalize,
    )  # fmt: skip
    return out, *after
