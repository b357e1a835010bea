"""The bidirectional form of Flow-Attention with decay, in linear time; see ``operation.py`` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.core.both_ways import Block, Both, both_ways
from flowformer.core.chunks import CHUNK, join_chunks, split_chunks
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, no_autocast, state_dtype, sum_dtype
from flowformer.core.scan import causal_product
from flowformer.mechanisms.flow.causal import count_tokens, log_normalise, running_flow
from flowformer.mechanisms.flow.equations import Learned, allocate, contend, query_and_key
from flowformer.mechanisms.flow.options import FlowOptions


class _Sums(NamedTuple):
    """The past of flows: sums of keys and queries, (batch, heads, K)."""

    keys: Tensor
    queries: Tensor


class _Reach(NamedTuple):
    """The past of competition: the count and log sum exp(O^), (batch, heads)."""

    tokens: Tensor
    log_normaliser: Tensor


class _Memory(NamedTuple):
    """The past of outputs: sum K^T C v, (batch, heads, K, V)."""

    memory: Tensor


def bidirectional_decayed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: Tensor | None, learned: Learned, options: FlowOptions
) -> Tensor:
    """The bidirectional form with decay, on a padded batch of self-attention, whose masks are one."""
    with no_autocast(q.device):
        assert learned.log_decay is not None
        dtype = q.dtype
        q, k, v = (x.to(sum_dtype(dtype)) for x in (q, k, v))  # the gradients of all scans are added in it
        both = both_ways(learned.log_decay.to(q.dtype), mask, (learned.feature_weights,))
        flows, reach, outputs = (partial(part, options) for part in (_flows, _reach, _outputs))
        batch, heads, channels = q.shape[0], *q.shape[2:]
        like = torch.zeros(batch, heads, dtype=state_dtype(q.device), device=q.device)
        wide = options.feature_channels(channels)
        sums = _Sums(*like.new_zeros(2, batch, heads, wide).unbind())
        incoming, outgoing = fill(torch.add(*both(flows, (q, k), sums)), mask, 1.0).unbind(-1)
        conserved = torch.add(*both(flows, (q, k, 1 / outgoing, 1 / incoming), sums))
        conserved_in, conserved_out = conserved.transpose(1, 2).unbind(-1)
        logits = contend(conserved_out, learned.temperatures, options)
        start = _Reach(like, torch.full_like(like, LOG_ZERO))
        weight = _compete(fill(logits.transpose(1, 2), mask, LOG_ZERO), partial(both, reach), start, options)
        memory = _Memory(like.new_zeros(batch, heads, wide, v.shape[-1]))
        out = torch.add(*both(outputs, (q, k, v, weight), memory))
        gate = allocate(conserved_in, learned.temperatures).transpose(1, 2) if options.allocation else 1.0
        return fill(out * (gate / incoming).unsqueeze(-1), mask).to(dtype)


def _flows(
    options: FlowOptions, block: Block, tensors: Sequence[Tensor], state: _Sums, weights: Tensor | None
) -> tuple[Tensor, _Sums]:
    """Incoming and outgoing flows of a block, (batch, length, heads, 2); with weights of sources and sinks, conserved.

    In reverse only (Q_t + eps) . sum_{j<t} gamma(t, j) w_j K_j.
    """
    q, k, *scales = tensors
    length = q.shape[1]
    (q, k, *scales), mask, decay = block.prepare((q, k, *scales), CHUNK, state.keys.dtype)
    features = query_and_key(q, k, mask, mask, Learned(feature_weights=weights), options)
    Q, K = (split_chunks(x, CHUNK) for x in features)
    of_sources, of_sinks = (_chunked(fill(x, mask)) for x in scales) if scales else (None, None)
    capacity = Q @ K.transpose(-1, -2)
    lower, upper = decay.halves(capacity)
    nearby_in = lower.sum(-1) if of_sources is None else (lower @ of_sources.unsqueeze(-1)).squeeze(-1)
    nearby_out = upper.sum(-2) if of_sinks is None else (of_sinks.unsqueeze(-2) @ upper).squeeze(-2)
    incoming, keys = running_flow(Q, K, nearby_in, state.keys, decay, options, of_sources)
    outgoing, queries = running_flow(K, Q, nearby_out, state.queries, decay, options, of_sinks)
    if block.reverse:
        incoming = incoming - _own(Q, K, of_sources, options)
        outgoing = outgoing - _own(K, Q, of_sinks, options)
    return join_chunks(torch.stack([incoming, outgoing], -1), length), _Sums(keys, queries)


def _own(A: Tensor, B: Tensor, weights: Tensor | None, options: FlowOptions) -> Tensor:
    """What the scan in order has counted too: the flow of a token to itself, and the constants."""
    own = B if weights is None else B * weights.unsqueeze(-1)
    return ((A + options.eps) * (own + options.eps)).sum(-1) + options.flow_eps


def _chunked(x: Tensor) -> Tensor:
    """(batch, length, heads) to (batch, heads, chunks, chunk)."""
    return split_chunks(x.unsqueeze(-1), CHUNK).squeeze(-1)


def _compete(logits: Tensor, both: Both, start: _Reach, options: FlowOptions) -> Tensor:
    """Weight of each source, (batch, length, heads): n_j exp(O^_j) / sum_i gamma(i, j) exp(O^_i)."""
    if options.competition is None:
        return torch.ones_like(logits)
    (n, log_before), (n_after, log_after) = (x.unbind(-1) for x in both((logits,), start))
    n = (n + n_after).to(logits.dtype)
    if options.competition == "heads":
        return n * logits.softmax(-1)
    own = logits.to(log_before.dtype)
    largest = torch.maximum(log_before, log_after).detach()
    total = (log_before - largest).exp() + (log_after - largest).exp() - (own - largest).exp()
    return n * (own - largest - total.log()).exp().to(logits.dtype)


def _reach(
    options: FlowOptions, block: Block, tensors: Sequence[Tensor], state: _Reach, weights: Tensor | None
) -> tuple[Tensor, _Reach]:
    """Count and log-normaliser of each token of a block, (batch, length, heads, 2), in the dtype of states.

    In reverse the count is without the token; the normaliser, a logarithm, is with it.
    """
    (logits,) = tensors
    length = logits.shape[1]
    wide = state.tokens.dtype
    (logits,), mask, decay = block.prepare((logits.to(wide),), CHUNK, wide)
    flat = logits.transpose(1, 2)
    shape = (*flat.shape[:2], flat.shape[2] // CHUNK, CHUNK)
    n, count = count_tokens(state.tokens, mask, shape, decay, wide)
    normaliser = log_normalise(flat, state.log_normaliser, decay)
    n = n.flatten(2) - 1 if block.reverse else n.flatten(2)
    found = torch.stack([n, normaliser], -1).transpose(1, 2)
    return found[:, :length], _Reach(count, normaliser[..., -1])


def _outputs(
    options: FlowOptions, block: Block, tensors: Sequence[Tensor], state: _Memory, weights: Tensor | None
) -> tuple[Tensor, _Memory]:
    """Outputs of a block before their gates, (batch, length, heads, V)."""
    q, k, v, weight = tensors
    length = q.shape[1]
    (q, k, v, weight), mask, decay = block.prepare((q, k, v, weight), CHUNK, state.memory.dtype)
    features = query_and_key(q, k, mask, mask, Learned(feature_weights=weights), options)
    Q, K = (split_chunks(x, CHUNK) for x in features)
    V = split_chunks(fill(v, mask).to(Q.dtype) * fill(weight, mask).unsqueeze(-1), CHUNK)
    scores = (Q @ K.transpose(-1, -2)) * decay.within
    scores = scores.tril(-1) if block.reverse else scores
    out, memory = causal_product(scores, Q, K, V, state.memory, decay)
    return join_chunks(out, length), _Memory(memory)
