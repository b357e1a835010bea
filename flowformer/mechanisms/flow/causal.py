"""The causal form of Flow-Attention in plain PyTorch, a block of tokens at a time; see ``operation.py`` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowformer.core.chunks import join_chunks, pad_to_chunks, split_chunks
from flowformer.core.decay import Decay, block_decay, log_sum_decayed
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, no_autocast
from flowformer.core.scan import carry, causal_product
from flowformer.core.tracing import log_add, log_cumsum
from flowformer.mechanisms.flow.equations import Learned, allocate, contend, open_flow, query_and_key
from flowformer.mechanisms.flow.options import FlowOptions
from flowformer.mechanisms.flow.state import FlowState


def causal_block(
    tokens: Sequence[Any], state: FlowState, learned: Learned, options: FlowOptions, chunk: int
) -> tuple[Tensor, FlowState]:
    """Outputs of one block of tokens, and the state after it. Intermediates are (batch, heads, chunks, chunk, ...)."""
    q, k, v, mask = tokens
    length = q.shape[1]
    with no_autocast(q.device):
        (q, k, v), mask = pad_to_chunks((q, k, v), mask, chunk)
        Q, K = (split_chunks(x, chunk) for x in query_and_key(q, k, mask, mask, learned, options))
        V = split_chunks(fill(v, mask).to(Q.dtype), chunk)
        chunked = None if mask is None else mask.view(mask.shape[0], *Q.shape[2:4])
        decay = None
        if learned.log_decay is not None:
            decay = block_decay(learned.log_decay, mask, length, Q.shape[2:4], Q.dtype, state.memory.dtype)
        n, count = count_tokens(state.tokens, mask, Q.shape[:4], decay, Q.dtype)
        capacity = Q @ K.transpose(-1, -2)
        # A sink sees earlier sources, a source earlier sinks.
        lower, upper = (capacity.tril(), capacity.triu()) if decay is None else decay.halves(capacity)

        sums = state.sums.unbind(2)
        incoming, key_sum = running_flow(Q, K, lower.sum(-1), sums[0], decay, options)
        outgoing, query_sum = running_flow(K, Q, upper.sum(-2), sums[1], decay, options)
        incoming, outgoing = open_flow(incoming, chunked), open_flow(outgoing, chunked)
        out_weight, in_weight = n / outgoing, n / incoming
        within = (lower @ out_weight.unsqueeze(-1)).squeeze(-1)
        conserved_in, scaled_key_sum = running_flow(Q, K, within, sums[2], decay, options, out_weight, n)
        within = (in_weight.unsqueeze(-2) @ upper).squeeze(-2)
        conserved_out, scaled_query_sum = running_flow(K, Q, within, sums[3], decay, options, in_weight, n)

        logits = contend(conserved_out, learned.temperatures, options)
        weight, log_normaliser = compete(logits, n, mask, state.log_normaliser, decay, options)
        if weight is not None:
            V = V * weight.unsqueeze(-1)
        out, memory = causal_product(lower, Q, K, V, state.memory, decay)
        gate = allocate(conserved_in, learned.temperatures) / incoming if options.allocation else 1 / incoming
        out = join_chunks(out * gate.unsqueeze(-1), length).to(v.dtype)
        after = torch.stack([key_sum, query_sum, scaled_key_sum, scaled_query_sum], 2)
    return out, FlowState(count, after, log_normaliser, memory)


def count_tokens(
    count: Tensor, mask: Tensor | None, shape: Sequence[int], decay: Decay | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Count the real tokens up to each place of a block, decayed.

    Args:
        count: Before the block, (batch, heads).
        mask: (batch, chunks * chunk).
        shape: Of the result, (batch, heads, chunks, chunk).
        decay: The factors gamma; 1 if absent.
        dtype: Of the result.

    Returns:
        The counts, at least 1; and the count after the block, (batch, heads), in its dtype.
    """
    batch, heads, chunks, chunk = shape
    if decay is not None:
        ones = torch.ones_like(decay.leaving) if mask is None else mask.view(batch, 1, chunks, chunk).to(dtype)
        before, after = carry((ones * decay.leaving).sum(-1).expand(batch, heads, chunks), count, decay)
        n = (decay.within @ ones.unsqueeze(-1)).squeeze(-1) + decay.arriving * before.unsqueeze(-1)
        n = n.to(dtype)
        return n if mask is None else n.masked_fill(~mask.view(batch, 1, chunks, chunk), 1), after
    if mask is None:
        steps = torch.arange(1, chunks * chunk + 1, device=count.device).expand(batch, -1)
    else:
        steps = mask.cumsum(-1)
    n = count.detach().unsqueeze(-1) + steps.unsqueeze(1)  # a count is no function of any input
    return n.clamp(min=1).to(dtype).view(shape), n[..., -1]


def running_flow(
    A: Tensor,
    B: Tensor,
    within: Tensor,
    past: Tensor,
    decay: Decay | None,
    options: FlowOptions,
    weights: Tensor | None = None,
    n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """((A_t + eps) . (sum_{j<=t} gamma(t, j) w_j B_j + eps)) / n_t + flow_eps.

    Args:
        A: (batch, heads, chunks, chunk, K).
        B: (batch, heads, chunks, chunk, K).
        within: sum of gamma(t, j) w_j (A_t . B_j) over the j <= t of t's chunk, (batch, heads, chunks, chunk).
        past: sum of w_j B_j over the tokens before the block, (batch, heads, K).
        decay: The factors gamma; 1 if absent.
        options: For eps and flow_eps.
        weights: w, shaped like ``within``; 1 if absent.
        n: Count of tokens, to divide by; 1 if absent.

    Returns:
        The flow, shaped like ``within``, and the past after the block.
    """
    eps, channels = options.eps, A.shape[-1]
    each = B.sum(-1) if weights is None else B.sum(-1) * weights
    if decay is not None:
        weights = decay.leaving.expand_as(within) if weights is None else weights * decay.leaving
    sums = B.sum(-2) if weights is None else (weights.unsqueeze(-2) @ B).squeeze(-2)
    before, past = carry(sums, past, decay)
    if decay is None:
        small = A.sum(-1) + each.cumsum(-1) + before.sum(-1, keepdim=True) + channels * eps
        earlier = (A @ before.unsqueeze(-1)).squeeze(-1)
    else:
        nearby = (decay.within @ each.unsqueeze(-1)).squeeze(-1)
        small = A.sum(-1) + nearby + decay.arriving * before.sum(-1, keepdim=True) + channels * eps
        earlier = (A @ before.unsqueeze(-1)).squeeze(-1) * decay.arriving
    flow = within + earlier + eps * small
    return (flow if n is None else flow / n) + options.flow_eps, past


def compete(
    logits: Tensor, n: Tensor, mask: Tensor | None, past: Tensor, decay: Decay | None, options: FlowOptions
) -> tuple[Tensor | None, Tensor]:
    """Weight of each source, normalised over the sources up to its own time, and the log-normaliser after the block."""
    if options.competition is None:
        return None, past.clone()
    if options.competition == "heads":
        return n * logits.softmax(1), past.clone()
    flat = logits.flatten(2).to(past.dtype)
    if mask is not None:
        flat = flat.masked_fill(~mask.unsqueeze(1), LOG_ZERO)
    normaliser = log_normalise(flat, past, decay)
    weight = n * (flat - normaliser).exp().to(logits.dtype).view_as(logits)
    return weight, normaliser[..., -1]


def log_normalise(logits: Tensor, past: Tensor, decay: Decay | None) -> Tensor:
    """Return log sum_{j<=t} gamma(t, j) exp(logit_j) of logits (batch, heads, tokens), in the dtype of the past."""
    if decay is None:
        return log_add(log_cumsum(logits), past.unsqueeze(-1))
    return log_sum_decayed(logits, past, decay)
