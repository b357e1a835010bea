"""One token of causal Flow-Attention by one Triton kernel; ``step.py`` above has the equations.

A program has some channels of values of one head; what is a vector or a number of the head, every program of it finds
for itself. All of it is in float64, as the state is: one token is little work, and its time is that of reading the
state.
"""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flowformer.kernels.triton import launch
from flowformer.kernels.triton.device import load_tokens
from flowformer.mechanisms.flow.equations import FEATURE_MAPS, Learned
from flowformer.mechanisms.flow.options import KernelOptions
from flowformer.mechanisms.flow.state import FlowState

COMPETITIONS = {None: 0, "sequence": 1, "heads": 2}
LARGEST = 2_048  # elements of a matrix to a program: 128 bytes a thread in float64


@triton.jit
def _features(x, d, inside, MAP: tl.constexpr):
    """Return the features of one token, (channels,)."""
    one = tl.arange(0, 1)
    return tl.sum(load_tokens(x, one.to(tl.int64), one == 0, 0, d, inside, MAP), 0).to(tl.float64)


@triton.jit
def _flow(a, total, inside, eps):
    """Return (a + eps) . (total + eps)."""
    return tl.sum(tl.where(inside, (a + eps) * (total + eps), 0.0), 0)


@triton.jit
def _decay_of(log_decay, row, decay_rows, DECAY: tl.constexpr):
    """Return the log-decay of a row, at most 0."""
    if DECAY:
        given = tl.load(log_decay + row % decay_rows).to(tl.float64)
        return tl.where(given > 0, 0.0, given)
    return tl.full([], 0.0, tl.float64)


@triton.jit
def _find(
    q, k, temperatures, tokens, sums, row, heads, decay, eps, flow_eps, clamp, d, inside,
    D: tl.constexpr, MAP: tl.constexpr, CLAMPED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Return features, count, the four sums after the token, the incoming flow, and what gate and weight are of."""
    gamma = tl.exp(decay)
    Q, K = _features(q + row * D, d, inside, MAP), _features(k + row * D, d, inside, MAP)
    n = tl.load(tokens + row) * gamma + 1.0
    p = sums + row * 4 * D + d
    keys = tl.load(p, inside, 0.0) * gamma + K
    queries = tl.load(p + D, inside, 0.0) * gamma + Q
    incoming = _flow(Q, keys, inside, eps) + flow_eps
    outgoing = _flow(K, queries, inside, eps) + flow_eps
    scaled_keys = tl.load(p + 2 * D, inside, 0.0) * gamma + K * (n / outgoing)
    scaled_queries = tl.load(p + 3 * D, inside, 0.0) * gamma + Q * (n / incoming)
    conserved_in = _flow(Q, scaled_keys, inside, eps) / n + flow_eps
    logit = _flow(K, scaled_queries, inside, eps) / n + flow_eps
    if TEMPERED:
        logit = tl.load(temperatures + row % heads).to(tl.float64) * (logit - 1.0)
        conserved_in = tl.load(temperatures + heads + row % heads).to(tl.float64) * (conserved_in - 1.0)
        conserved_in += tl.load(temperatures + 2 * heads + row % heads).to(tl.float64)
    if CLAMPED:
        logit = tl.minimum(tl.maximum(logit, -clamp), clamp)
    return Q, K, n, keys, queries, scaled_keys, scaled_queries, incoming, conserved_in, logit


@triton.jit(do_not_specialize=["heads", "decay_rows"])
def step(
    q, k, v, log_decay, temperatures, tokens, sums, log_normaliser, memory,
    out, tokens_after, sums_after, log_normaliser_after, memory_after,
    heads, decay_rows, eps, flow_eps, clamp,
    D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MAP: tl.constexpr, DECAY: tl.constexpr,
    CLAMPED: tl.constexpr, COMPETITION: tl.constexpr, ALLOCATION: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Compute one token of a head: q, k (rows, D), v (rows, M), and a state of rows, which are heads of sequences."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, m = tl.arange(0, BD), block * BM + tl.arange(0, BM)
    inside, there = d < D, m < M
    decay = _decay_of(log_decay, row, decay_rows, DECAY)
    Q, K, n, keys, queries, scaled_keys, scaled_queries, incoming, conserved_in, logit = _find(
        q, k, temperatures, tokens, sums, row, heads, decay, eps, flow_eps, clamp, d, inside, D, MAP, CLAMPED, TEMPERED
    )
    normaliser = tl.load(log_normaliser + row)
    weight = n * 0.0 + 1.0
    if COMPETITION == 1:
        past = normaliser + decay
        most = tl.maximum(logit, past)
        normaliser = most + tl.log(tl.exp(logit - most) + tl.exp(past - most))
        weight = n * tl.exp(logit - normaliser)
    if COMPETITION == 2:
        most, total = logit, logit * 0.0
        for other in range(heads):
            beside = row - row % heads + other
            its = _decay_of(log_decay, beside, decay_rows, DECAY)
            _, _, _, _, _, _, _, _, _, theirs = _find(
                q, k, temperatures, tokens, sums, beside, heads, its, eps, flow_eps, clamp, d, inside, D, MAP, CLAMPED,
                TEMPERED,
            )  # fmt: skip
            larger = tl.maximum(most, theirs)
            total = total * tl.exp(most - larger) + tl.exp(theirs - larger)
            most = larger
        weight = n * tl.exp(logit - most) / total
    gate = 1.0 / incoming
    if ALLOCATION:
        gate = gate / (1.0 + tl.exp(-conserved_in))
    if block == 0:
        tl.store(tokens_after + row, n)
        tl.store(log_normaliser_after + row, normaliser)
        p = sums_after + row * 4 * D + d
        tl.store(p, keys, inside)
        tl.store(p + D, queries, inside)
        tl.store(p + 2 * D, scaled_keys, inside)
        tl.store(p + 3 * D, scaled_queries, inside)
    value = tl.load(v + row * M + m, there, 0.0).to(tl.float64) * weight
    at, ok = row * D * M + d[:, None] * M + m[None, :], inside[:, None] & there[None, :]
    matrix = tl.load(memory + at, ok, 0.0) * tl.exp(decay) + K[:, None] * value[None, :]
    tl.store(memory_after + at, matrix, ok)
    tl.store(out + row * M + m, (tl.sum(Q[:, None] * matrix, 0) * gate).to(out.dtype.element_ty), there)


def run_step(
    q: Tensor, k: Tensor, v: Tensor, learned: Learned, state: FlowState, options: KernelOptions
) -> tuple[Tensor, FlowState]:
    """Return the output (batch, heads, M) of one token, and the state after it."""
    batch, heads, D = q.shape
    M, rows = v.shape[-1], batch * heads
    out, after = v.new_empty(v.shape), FlowState(*(part.new_empty(part.shape) for part in state))
    width = launch.padded(D)
    block = min(launch.padded(M), max(16, LARGEST // width))
    clamp, log_decay, temperatures = options.clamp, learned.log_decay, learned.temperatures
    launch.run(
        step, (rows, triton.cdiv(M, block)),
        *(x.contiguous() for x in (q, k, v)), *(q if x is None else x.contiguous() for x in learned[:2]),
        *(part.contiguous() for part in state), out, *after, heads, 1 if log_decay is None else log_decay.numel(),
        options.eps, options.flow_eps, 0.0 if clamp is None else clamp, D=D, M=M, BD=width, BM=block,
        MAP=FEATURE_MAPS[options.feature_map], DECAY=log_decay is not None, CLAMPED=clamp is not None,
        COMPETITION=COMPETITIONS[options.competition], ALLOCATION=options.allocation,
        TEMPERED=temperatures is not None, num_warps=4,
    )  # fmt: skip
    return out, after
