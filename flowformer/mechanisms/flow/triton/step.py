"""One token of causal Flow-Attention by one Triton kernel; ``step.py`` above has the equations.

:mod:`flowformer.kernels.triton.step` has what steps share.
"""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flowformer.kernels.triton.step import (
    decay_of_one,
    emit,
    features_of_one,
    log_add,
    remember,
    run_by_head,
)
from flowformer.mechanisms.flow.equations import FEATURE_MAPS, Learned
from flowformer.mechanisms.flow.options import KernelOptions
from flowformer.mechanisms.flow.state import FlowState

COMPETITIONS = {None: 0, "sequence": 1, "heads": 2}


@triton.jit
def _flow(a, total, inside, eps):
    """Return (a + eps) . (total + eps)."""
    return tl.sum(tl.where(inside, (a + eps) * (total + eps), 0.0), 0)


@triton.jit
def _find(
    q, k, temperatures, tokens, sums, row, heads, decay, eps, flow_eps, clamp, d, inside,
    D: tl.constexpr, MAP: tl.constexpr, CLAMPED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Return features, count, the four sums after the token, the incoming flow, and what gate and weight are of."""
    gamma = tl.exp(decay)
    Q, K = features_of_one(q + row * D, d, inside, MAP), features_of_one(k + row * D, d, inside, MAP)
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
    decay = decay_of_one(log_decay, row, decay_rows, DECAY)
    Q, K, n, keys, queries, scaled_keys, scaled_queries, incoming, conserved_in, logit = _find(
        q, k, temperatures, tokens, sums, row, heads, decay, eps, flow_eps, clamp, d, inside, D, MAP, CLAMPED, TEMPERED
    )
    normaliser = tl.load(log_normaliser + row)
    weight = n * 0.0 + 1.0
    if COMPETITION == 1:
        normaliser = log_add(logit, normaliser + decay)
        weight = n * tl.exp(logit - normaliser)
    if COMPETITION == 2:
        most, total = logit, logit * 0.0
        for other in range(heads):
            beside = row - row % heads + other
            its = decay_of_one(log_decay, beside, decay_rows, DECAY)
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
    matrix = remember(v, memory, memory_after, row, K, weight, tl.exp(decay), d, m, inside, there, D, M)
    emit(out, row, Q, matrix, gate, m, there, M)


def run_step(
    q: Tensor, k: Tensor, v: Tensor, learned: Learned, state: FlowState, options: KernelOptions
) -> tuple[Tensor, FlowState]:
    """Return the output (batch, heads, M) of one token, and the state after it."""
    out, after = v.new_empty(v.shape), FlowState(*(part.new_empty(part.shape) for part in state))
    clamp, log_decay, temperatures = options.clamp, learned.log_decay, learned.temperatures
    run_by_head(
        step, q, v, *(x.contiguous() for x in (q, k, v)), *(q if x is None else x.contiguous() for x in learned[:2]),
        *(part.contiguous() for part in state), out, *after, q.shape[1],
        1 if log_decay is None else log_decay.numel(), options.eps, options.flow_eps, 0.0 if clamp is None else clamp,
        MAP=FEATURE_MAPS[options.feature_map], DECAY=log_decay is not None, CLAMPED=clamp is not None,
        COMPETITION=COMPETITIONS[options.competition], ALLOCATION=options.allocation,
        TEMPERED=temperatures is not None,
    )  # fmt: skip
    return out, after
