"""The bidirectional form of Flow-Attention with decay, in linear time; see ``operation.py`` beside it.

gamma(i, j) joins i and j in either order, so each sum over tokens is one over those up to i and one over those from i
on, less the token itself, which both contain: two scans, of which the second runs over the tokens in reverse. There,
token i is reached from i + 1, by the decay of the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.decay import Decay
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, no_autocast, state_dtype
from flowformer.core.scan import CHUNK, causal_product, join_chunks, pad_to_chunks, scan, split_chunks
from flowformer.mechanisms.flow.causal import block_decay, count_tokens, log_normalise, running_flow
from flowformer.mechanisms.flow.equations import Learned, allocate, contend, query_and_key
from flowformer.mechanisms.flow.options import FlowOptions


class _Sums(NamedTuple):
    """The past of flows: sums of keys and queries, (batch, heads, K)."""

    keys: Tensor
    queries: Tensor


class _Reach(NamedTuple):
    """The past of competition: the count and log sum exp(O^), (batch, heads)."""

    count: Tensor
    log_normaliser: Tensor


class _Memory(NamedTuple):
    """The past of outputs: sum K^T C v, (batch, heads, K, V)."""

    memory: Tensor


Block = Callable[..., tuple[Tensor, Any]]
Both = Callable[..., tuple[Tensor, Tensor]]


def bidirectional_decayed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: Tensor | None, learned: Learned, options: FlowOptions
) -> Tensor:
    """The bidirectional form with decay, on a padded batch of self-attention, whose masks are one."""
    with no_autocast(q.device):
        both = _both_ways(mask, learned, options)
        batch, _, heads, channels = q.shape
        like = torch.zeros(batch, heads, dtype=state_dtype(q.device), device=q.device)
        wide = options.feature_channels(channels)
        sums = _Sums(*like.new_zeros(2, batch, heads, wide).unbind())
        incoming, outgoing = fill(sum(both(_flows, (q, k), sums)), mask, 1.0).unbind(-1)
        conserved = sum(both(_flows, (q, k, 1 / outgoing, 1 / incoming), sums))
        conserved_in, conserved_out = conserved.transpose(1, 2).unbind(-1)
        logits = contend(conserved_out, learned.temperatures, options)
        start = _Reach(like, torch.full_like(like, LOG_ZERO))
        weight = _compete(fill(logits.transpose(1, 2), mask, LOG_ZERO), both, start, options)
        memory = _Memory(like.new_zeros(batch, heads, wide, v.shape[-1]))
        out = sum(both(_outputs, (q, k, v, weight), memory))
        gate = allocate(conserved_in, learned.temperatures).transpose(1, 2) if options.allocation else 1.0
        return fill(out * (gate / incoming).unsqueeze(-1), mask).to(q.dtype)


def _both_ways(mask: Tensor | None, learned: Learned, options: FlowOptions) -> Both:
    """Return a function that scans tokens in their order, and in reverse.

    It takes a block function, tensors (batch, length, ...) and the state before the first token, and returns both
    outputs in the order of the tokens; that of the second scan is to be without the token itself (``strict``).
    """
    forwards, backwards, constant = _directions(learned.log_decay, mask)

    def both(block: Block, tensors: Sequence[Tensor], state: Any) -> tuple[Tensor, Tensor]:
        given = (constant, learned.feature_weights)
        there, _ = scan(partial(block, options, False), (mask, forwards, *tensors), state, given)
        back = [None if mask is None else mask.flip(1), backwards, *(t.flip(1) for t in tensors)]
        and_back, _ = scan(partial(block, options, True), back, state, given)
        return there, and_back.flip(1)

    return both


def _directions(log_decay: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Log-decays by token in order and in reverse, (batch, length, heads); or those of heads, for both."""
    if log_decay.ndim == 1 and mask is None:
        return None, None, log_decay
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(*mask.shape, -1)
    forwards = fill(log_decay, mask)
    return forwards, torch.cat([forwards[:, 1:], torch.zeros_like(forwards[:, :1])], 1).flip(1), None


def _prepare(
    mask: Tensor | None, log_decay: Tensor | None, constant: Tensor | None, tensors: Sequence[Tensor], wide: torch.dtype
) -> tuple[list[Tensor], Tensor | None, Decay]:
    """Pad a block to whole chunks: tensors, mask and decay. Log-decays by token know of padding already."""
    length = tensors[0].shape[1]
    given = tensors if log_decay is None else [*tensors, log_decay]
    given, mask = pad_to_chunks(given, mask, CHUNK)
    padded = given[0].shape[1]
    chosen = constant if log_decay is None else given[-1]
    decay = block_decay(chosen, None, padded, (padded // CHUNK, CHUNK), tensors[0].dtype, wide)
    return given[: len(tensors)], mask, decay


def _flows(
    options: FlowOptions, strict: bool, tokens: Sequence[Any], state: _Sums, constant: Any, weights: Any
) -> tuple[Tensor, _Sums]:
    """Incoming and outgoing flows of a block, (batch, length, heads, 2); with weights of sources and sinks, conserved.

    In the scan that is ``strict``, only what a token's own side adds: (Q_t + eps) . sum_{j<t} gamma(t, j) w_j K_j.
    """
    mask, log_decay, q, k, *scales = tokens
    length = q.shape[1]
    (q, k, *scales), mask, decay = _prepare(mask, log_decay, constant, (q, k, *scales), state.keys.dtype)
    features = query_and_key(q, k, mask, mask, Learned(feature_weights=weights), options)
    Q, K = (split_chunks(x, CHUNK) for x in features)
    of_sources, of_sinks = (_chunked(fill(x, mask)) for x in scales) if scales else (None, None)
    capacity = Q @ K.transpose(-1, -2)
    lower, upper = capacity.tril() * decay.within, capacity.triu() * decay.within.transpose(-1, -2)
    nearby_in = lower.sum(-1) if of_sources is None else (lower @ of_sources.unsqueeze(-1)).squeeze(-1)
    nearby_out = upper.sum(-2) if of_sinks is None else (of_sinks.unsqueeze(-2) @ upper).squeeze(-2)
    incoming, keys = running_flow(Q, K, nearby_in, state.keys, decay, options, of_sources)
    outgoing, queries = running_flow(K, Q, nearby_out, state.queries, decay, options, of_sinks)
    if strict:
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
    (n, log_before), (n_after, log_after) = (x.unbind(-1) for x in both(_reach, (logits,), start))
    n = (n + n_after).to(logits.dtype)
    if options.competition == "heads":
        return n * logits.softmax(-1)
    own = logits.to(log_before.dtype)
    largest = torch.maximum(log_before, log_after).detach()
    total = (log_before - largest).exp() + (log_after - largest).exp() - (own - largest).exp()
    return n * (own - largest - total.log()).exp().to(logits.dtype)


def _reach(
    options: FlowOptions, strict: bool, tokens: Sequence[Any], state: _Reach, constant: Any, _: Any
) -> tuple[Tensor, _Reach]:
    """Count and log-normaliser of each token of a block, (batch, length, heads, 2), in the dtype of states.

    Where the scan is ``strict``, without the token in the count; the normaliser, a logarithm, is with it.
    """
    mask, log_decay, logits = tokens
    length = logits.shape[1]
    wide = state.count.dtype
    (logits,), mask, decay = _prepare(mask, log_decay, constant, (logits.to(wide),), wide)
    flat = logits.transpose(1, 2)
    n, count = count_tokens(state.count, mask, (*flat.shape[:2], -1, CHUNK), decay, wide)
    normaliser = log_normalise(flat, state.log_normaliser, decay)
    n = n.flatten(2) - 1 if strict else n.flatten(2)
    found = torch.stack([n, normaliser], -1).transpose(1, 2)
    return found[:, :length], _Reach(count, normaliser[..., -1])


def _outputs(
    options: FlowOptions, strict: bool, tokens: Sequence[Any], state: _Memory, constant: Any, weights: Any
) -> tuple[Tensor, _Memory]:
    """Outputs of a block before their gates, (batch, length, heads, V); strictly of the tokens before where wanted."""
    mask, log_decay, q, k, v, weight = tokens
    length = q.shape[1]
    (q, k, v, weight), mask, decay = _prepare(mask, log_decay, constant, (q, k, v, weight), state.memory.dtype)
    features = query_and_key(q, k, mask, mask, Learned(feature_weights=weights), options)
    Q, K = (split_chunks(x, CHUNK) for x in features)
    V = split_chunks(fill(v, mask).to(Q.dtype) * fill(weight, mask).unsqueeze(-1), CHUNK)
    scores = (Q @ K.transpose(-1, -2)).tril(-1 if strict else 0) * decay.within
    out, memory = causal_product(scores, Q, K, V, state.memory, decay)
    return join_chunks(out, length), _Memory(memory)
