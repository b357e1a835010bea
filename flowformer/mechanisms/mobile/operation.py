r"""Mobile-Attention: Flow-Attention whose flow is conserved among the heads of a token.

Source: Yao et al., "Mobile Attention: Mobile-Friendly Linear-Attention for Vision Transformers", ICML 2024, and the
published code (thuml/MobileAttention, Mobile_Attention.py). Where Flow-Attention sums over tokens, the four flows here
are sums over the heads h' of one and the same token i. With Q = phi(q), K = phi(k) and a small e added to every element
of both factors of each product in the first four lines:

    incoming flow           I_hi  = Q_hi . sum_h' K_h'i
    outgoing flow           O_hi  = K_hi . sum_h' Q_h'i
    conserved incoming      I^_hi = Q_hi . sum_h' K_h'i / O_h'i       allocation    A = sigmoid(I^)
    conserved outgoing      O^_hi = K_hi . sum_h' Q_h'i / I_h'i       competition   C = S softmax_i(O^), O^ clamped
    output                  R_hi  = A_hi (Q_hi / I_hi) . sum_j K_hj^T C_hj v_hj

Queries and keys of a token meet in its flows, so there are as many of one as of the other: it is self-attention. The
sums over heads of I^ and of O^ are the number of heads H, whatever the inputs, up to e.

Nothing divides by the number of tokens S, while the last sum grows with it: so do outputs, and a change of resolution
changes the scale of what follows. ``normalize`` divides by S.

The causal form is ours. The flows know of no other token; only the softmax, S and the last sum do. Take all three over
the tokens up to t:

    R_ht = A_ht (Q_ht / I_ht) . (n_t / Z_ht) sum_{j<=t} K_hj^T exp(O^_hj) v_hj     Z_ht = sum_{j<=t} exp(O^_hj)

Output t is then that of the bidirectional form on the sequence cut after t, exactly. (In causal Flow-Attention the
competition of a source is settled at its own time; here it is settled anew at each later one.)

Without a clamp O^ may be as large as H, and exp(128) is no float32. So no exponential stands by itself. Between a
source j and a sink t it is exp(O^_j - log Z_t), between two ends of chunks exp(log Z_a - log Z_b) with a before b. Both
are at most 1, and log Z_t depends on nothing after t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.backends import TORCH, choose, implementation
from flowformer.core.checks import HEADS, check_fresh_state, check_state, check_step
from flowformer.core.chunks import join_chunks, pad_to_chunks, split_chunks
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, no_autocast, state_dtype
from flowformer.core.run import Given, run, scanned
from flowformer.core.scan import causal_product
from flowformer.core.sums import sum_over_tokens, times_sum
from flowformer.core.tracing import cut, log_add, log_cumsum
from flowformer.mechanisms.flow.equations import features
from flowformer.mechanisms.mobile.options import MobileOptions, mobile_options

CHUNK = 32  # tokens that meet directly: fewer than elsewhere, since every pair of them has a weight of its own
LAYOUT = HEADS._replace(self_only="queries and keys of a token meet in its flows")


# -------------------------------------------------------------------------------------------------------------- state


class MobileState(NamedTuple):
    """State of causal Mobile-Attention. Sums are in float64: see ``core.precision.state_dtype``.

    Attributes:
        length: Tokens so far, (batch,), int64.
        log_normaliser: log Z, (batch, heads).
        memory: sum K^T exp(O^) v / Z, (batch, heads, K, V); sum K^T C v where tokens do not compete with each other.
    """

    length: Tensor
    log_normaliser: Tensor
    memory: Tensor


def init_mobile_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> MobileState:
    """Return the state before the first token, with sums in float64 for inputs of any ``dtype``."""
    check_fresh_state(
        "init_mobile_state", batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels
    )
    device = torch.device("cpu") if device is None else torch.device(device)
    like = torch.zeros(batch, heads, dtype=state_dtype(device), device=device)
    return MobileState(
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.full_like(like, LOG_ZERO),
        like.new_zeros(batch, heads, key_channels, value_channels),
    )


# ------------------------------------------------------------------------------------------------------ the operations


def mobile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: MobileState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    **overrides: Any,
) -> Tensor | tuple[Tensor, MobileState]:
    """Mobile-Attention, bidirectional or causal, in linear time. The module docstring has the equations.

    A padded token takes part in no competition and no count. Outputs grow with the number of tokens, as published,
    unless ``normalize=True``.

    Args:
        q: Queries before the feature map, (batch, L, heads, K).
        k: Keys before the feature map, (batch, L, heads, K).
        v: Values, (batch, L, heads, V).
        causal: Output t depends on positions up to t only, and equals that of the sequence cut after t.
        mask: (batch, L) boolean, True = real token.
        context_mask: Refused: this is self-attention only. Here so that mechanisms are exchangeable.
        cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"``, ``"torch"``, ``"native"`` on a CPU, or ``"triton"`` on a GPU.
        **overrides: Options of :class:`MobileOptions` that depart from the published form.

    Returns:
        Output (batch, L, heads, V) in the dtype of q, zeros at padding; with ``return_state`` also the state. Half
        precision is summed in float32.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    options = mobile_options(**overrides)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    dense = scanned(
        lambda tokens, state: _causal_block(tokens, state, options, CHUNK),
        lambda q, k, v, mask, _: _bidirectional(q, k, v, mask, options),
        causal,
    )
    return run(
        "mobile_attention", given, dense, layout=LAYOUT, options=(options,),
        init_state=lambda batch: init_mobile_state(batch, k.shape[2], k.shape[3], v.shape[3], device=q.device),
    )  # fmt: skip


def _flow(A: Tensor, total: Tensor, eps: float) -> Tensor:
    """(A + eps) . (total + eps) for A (..., heads, K) and a sum over heads (..., K): (..., heads)."""
    b = total + eps
    return (A @ b.unsqueeze(-1)).squeeze(-1) + eps * b.sum(-1, keepdim=True)


def gates_and_logits(Q: Tensor, K: Tensor, mask: Tensor | None, options: MobileOptions) -> tuple[Tensor, Tensor]:
    """Return A / I and O^, clamped, for each token, (..., heads)."""
    eps = options.eps
    # The flow of padding is next to nothing: it is divided by, and nothing may come of that.
    incoming = fill(_flow(Q, K.sum(-2), eps), mask, 1.0)
    conserved_out = _flow(K, (Q / incoming.unsqueeze(-1)).sum(-2), eps)
    if options.clamp is not None:
        conserved_out = conserved_out.clamp(-options.clamp, options.clamp)
    gate = 1 / incoming
    if options.allocation:
        outgoing = fill(_flow(K, Q.sum(-2), eps), mask, 1.0)
        gate = _flow(Q, (K / outgoing.unsqueeze(-1)).sum(-2), eps).sigmoid() / incoming
    return gate, conserved_out


def scale_of(n: Tensor, options: MobileOptions) -> Tensor:
    """What the sum over n tokens is multiplied by: weights add up to 1 where tokens compete, else their mean is 1."""
    if options.competition == "sequence":
        return torch.ones_like(n) if options.normalize else n
    return 1 / n if options.normalize else torch.ones_like(n)


def weights_of(conserved_out: Tensor, mask: Tensor | None, options: MobileOptions) -> Tensor:
    """Return the weights of sources in the sum over all tokens, (batch, length, heads), or alike for all of them."""
    n = conserved_out.new_full((1,), conserved_out.shape[1])
    n = n if mask is None else mask.sum(1).clamp(min=1).to(n.dtype)
    weight = scale_of(n, options).view(-1, 1, 1)
    if options.competition == "sequence":
        # Over the last axis: over another, float32 sums of 65,536 tokens are off by 4e-5.
        return weight * fill(conserved_out, mask, LOG_ZERO).mT.softmax(-1).mT
    return weight * conserved_out.shape[2] * conserved_out.softmax(2) if options.competition == "heads" else weight


def _bidirectional(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: MobileOptions) -> Tensor:
    with no_autocast(q.device):
        Q, K = features(q, mask, options.feature_map), features(k, mask, options.feature_map)
        V = fill(v, mask).to(Q.dtype)
        gate, conserved_out = gates_and_logits(Q, K, mask, options)
        weight = weights_of(conserved_out, mask, options)
        scaled, K, V = (x.transpose(1, 2) for x in (Q * gate.unsqueeze(-1), K, V * weight.unsqueeze(-1)))
        return times_sum(scaled, sum_over_tokens(K, V)).transpose(1, 2).to(q.dtype).contiguous()


def _causal_block(
    tokens: Sequence[Any], state: MobileState, options: MobileOptions, chunk: int
) -> tuple[Tensor, MobileState]:
    """Outputs of one block of tokens, and the state after it."""
    q, k, v, mask = tokens
    length = q.shape[1]
    with no_autocast(q.device):
        (q, k, v), mask = pad_to_chunks((q, k, v), mask, chunk)
        Q, K = features(q, mask, options.feature_map), features(k, mask, options.feature_map)
        V = fill(v, mask).to(Q.dtype)
        gate, conserved_out = gates_and_logits(Q, K, mask, options)
        if options.competition == "heads":
            V = V * (q.shape[2] * conserved_out.softmax(2)).unsqueeze(-1)
        Q, K, V = (split_chunks(x, chunk) for x in (Q * gate.unsqueeze(-1), K, V))
        if options.competition == "sequence":
            logits = split_chunks(fill(conserved_out, mask, LOG_ZERO).unsqueeze(-1), chunk).squeeze(-1)
            out, normaliser, memory = _competing_product(Q, K, V, logits, state)
        else:
            out, memory = causal_product((Q @ K.transpose(-1, -2)).tril(), Q, K, V, state.memory)
            normaliser = state.log_normaliser.clone()
        n, count = positions(state.length, mask, q)
        out = join_chunks(out, length) * cut(scale_of(n, options), length)[:, :, None, None].to(out.dtype)
        return out.to(v.dtype), MobileState(count, normaliser, memory)


def positions(count: Tensor, mask: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """1-based count of real tokens at each place (batch, length), at least 1, float64; and the count after the last."""
    if mask is None:
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand(count.shape[0], -1)
    else:
        steps = mask.cumsum(-1)
    n = count.unsqueeze(-1) + steps
    return n.clamp(min=1).to(state_dtype(tokens.device)), n[:, -1]


def _competing_product(
    Q: Tensor, K: Tensor, V: Tensor, logits: Tensor, state: MobileState
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_{j<=t} exp(o_j - log Z_t) (Q_t . K_j) V_j over chunks, without an exponential above 1.

    Args:
        Q: (batch, heads, chunks, chunk, K).
        K: (batch, heads, chunks, chunk, K).
        V: (batch, heads, chunks, chunk, V).
        logits: o, (batch, heads, chunks, chunk).
        state: log Z and the memory before the first of them.

    Returns:
        The products (batch, heads, chunks, chunk, V), and log Z and the memory after the last.
    """
    past = state.log_normaliser.unsqueeze(-1)
    Z = log_add(log_cumsum(logits.flatten(2).to(past.dtype)), past).view(logits.shape)
    bounds = torch.cat([past, Z[..., -1]], -1)  # log Z before each chunk, and after the last

    weights = _decay(logits, Z.to(logits.dtype), 1)
    out = (weights * (Q @ K.transpose(-1, -2))) @ V

    ends = (logits - bounds[..., 1:, None].to(logits.dtype)).exp()
    sums = (K * ends.unsqueeze(-1)).transpose(-1, -2) @ V
    carried = (_decay(bounds[..., 1:], bounds, 0).to(sums.dtype) @ sums.flatten(-2)).unflatten(-1, sums.shape[-2:])
    kept = (past - bounds).exp()[..., None, None] * state.memory.unsqueeze(2)
    before = carried[:, :, :-1] + kept[:, :, :-1].to(sums.dtype)
    faded = (bounds[..., :-1, None] - Z).exp().to(Q.dtype)
    out = out + (Q * faded.unsqueeze(-1)) @ before
    return out, bounds[..., -1], carried[:, :, -1].to(past.dtype) + kept[:, :, -1]


def _decay(sources: Tensor, sinks: Tensor, ahead: int) -> Tensor:
    """exp(source_j - sink_t) at (t, j) for j < t + ahead, else 0, for sources (..., m) and sinks (..., n)."""
    apart = sources.unsqueeze(-2) - sinks.unsqueeze(-1)
    seen = torch.ones(apart.shape[-2:], dtype=torch.bool, device=apart.device).tril(ahead - 1)
    return apart.masked_fill(~seen, LOG_ZERO).exp()


def mobile_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: MobileState, *, backend: str = "auto", **overrides: Any
) -> tuple[Tensor, MobileState]:
    """Compute one token of causal Mobile-Attention, in time and memory independent of the number of tokens before it.

    Args:
        q: Query before the feature map, (batch, heads, K).
        k: Key before the feature map, (batch, heads, K).
        v: Value, (batch, heads, V).
        state: State before the token, from :func:`init_mobile_state`, a step, or ``mobile_attention(..., causal=True,
            return_state=True)``; not changed.
        backend: ``"auto"``, ``"torch"``, or ``"triton"`` on a GPU; ``"native"`` is plain PyTorch too.
        **overrides: As in :func:`mobile_attention`.

    Returns:
        Output (batch, heads, V) in the dtype of v, and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "mobile_attention_step"
    options = mobile_options(**overrides)
    check_step(op, q, k, v, state, MobileState, LAYOUT)
    batch, heads, channels = q.shape
    check_state(op, state, init_mobile_state(batch, heads, channels, v.shape[-1], device=q.device))
    chosen = choose(op, backend, q, everywhere=True)
    compute = step_in_torch if chosen == TORCH.name else implementation(op, chosen)
    return compute(q, k, v, state, options)


def step_in_torch(
    q: Tensor, k: Tensor, v: Tensor, state: MobileState, options: MobileOptions
) -> tuple[Tensor, MobileState]:
    """:func:`mobile_attention_step` in plain PyTorch, on checked arguments."""
    heads = q.shape[1]
    with no_autocast(q.device):
        compute = state.memory.dtype  # one token is little work
        Q, K = features(q, None, options.feature_map).to(compute), features(k, None, options.feature_map).to(compute)
        gate, conserved_out = gates_and_logits(Q, K, None, options)
        normaliser, kept, weight = state.log_normaliser.clone(), 1.0, torch.ones_like(conserved_out)
        if options.competition == "sequence":
            normaliser = log_add(normaliser, conserved_out)
            weight = (conserved_out - normaliser).exp()
            kept = (state.log_normaliser - normaliser).exp()[..., None, None]
        elif options.competition == "heads":
            weight = heads * conserved_out.softmax(-1)
        memory = kept * state.memory + (K * weight.unsqueeze(-1)).unsqueeze(-1) * v.to(compute).unsqueeze(-2)
        count = state.length + 1
        out = ((Q * gate.unsqueeze(-1)).unsqueeze(-2) @ memory).squeeze(-2) * scale_of(count.to(compute), options).view(
            -1, 1, 1
        )
    return out.to(v.dtype), MobileState(count, normaliser, memory)
