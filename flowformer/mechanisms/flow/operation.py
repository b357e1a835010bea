r"""Flow-Attention: attention in linear time by conservation of flow.

Source: Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows", ICML 2022, and the published code
(thuml/Flowformer), whose variants disagree and are named here by presets.

Values flow from S sources (keys) to L sinks (queries) through capacities phi(q_i) . phi(k_j). With Q = phi(q),
K = phi(k) and a small e added to every element of both factors of each product below:

    incoming flow of a sink      I_i  = Q_i . sum_j K_j
    outgoing flow of a source    O_j  = K_j . sum_i Q_i
    conserved incoming           I^_i = Q_i . sum_j K_j / O_j        each source gives out one unit
    conserved outgoing           O^_j = K_j . sum_i Q_i / I_i        each sink takes in one unit
    competition                  C_j  = S softmax_j(O^_j)            O^ clamped to [-c, c] first
    allocation                   A_i  = sigmoid(I^_i L / S)
    output                       R_i  = A_i (Q_i / I_i) . sum_j K_j^T C_j v_j

Every sum runs over one axis only, so the cost is (L + S) K V. The mean of I^ is S / L and that of O^ is L / S whatever
the inputs and the feature map, up to e: what each side gives, the other takes.

The causal form replaces each sum by the sum up to t, and rescales by the count of tokens n_t so that later sums do not
depend on length:

    I_t = Q_t . sum_{j<=t} K_j                  O_t = K_t . sum_{i<=t} Q_i
    I^_t = Q_t . sum_{j<=t} K_j (n_j / O_j) / n_t     O^_t = K_t . sum_{i<=t} Q_i (n_i / I_i) / n_t
    C_t = n_t exp(O^_t) / sum_{j<=t} exp(O^_j)  A_t = sigmoid(I^_t)
    R_t = A_t (Q_t / I_t) . sum_{j<=t} K_j^T C_j v_j

It is computed in chunks. Within a chunk, Q K^T gives everything: the row sums of its lower triangle are I, the column
sums of its upper triangle O, the products of the two with n/O and n/I are I^ and O^, and the lower triangle times C v
is the output. Five sums and the K x V matrix carry the past. exp(O^) is summed as a logarithm, since without a clamp O^
has no bound in the causal form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.backends import choose, implementation
from flowformer.core.checks import check_fresh_state, check_state, check_step
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Given, run, scanned
from flowformer.core.scan import CHUNK, carry, causal_product, join_chunks, pad_to_chunks, split_chunks
from flowformer.core.sums import sum_over_tokens, times_sum
from flowformer.core.tracing import log_add, log_cumsum
from flowformer.mechanisms.flow.options import RELU_FLOOR, FlowOptions, flow_options

# --------------------------------------------------------------------------------------------------------------- state


class FlowState(NamedTuple):
    """State of causal Flow-Attention. Sums are in float64: see ``core.precision.state_dtype``.

    Attributes:
        length: Tokens so far, (batch,), int64.
        sums: sum K, sum Q, sum K n / O and sum Q n / I, (batch, heads, 4, K).
        log_normaliser: log sum exp(O^), (batch, heads).
        memory: sum K^T C v, (batch, heads, K, V).
    """

    length: Tensor
    sums: Tensor
    log_normaliser: Tensor
    memory: Tensor


def init_flow_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> FlowState:
    """Return the state before the first token, with sums in float64 for inputs of any ``dtype``."""
    check_fresh_state(
        "init_flow_state", batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels
    )
    device = torch.device("cpu") if device is None else torch.device(device)
    like = torch.zeros(batch, heads, dtype=state_dtype(device), device=device)
    return FlowState(
        torch.zeros(batch, dtype=torch.int64, device=device),
        like.new_zeros(batch, heads, 4, key_channels),
        torch.full_like(like, LOG_ZERO),
        like.new_zeros(batch, heads, key_channels, value_channels),
    )


# ------------------------------------------------------------------------------------------------------ the operations


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    preset: str = "core",
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: FlowState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    **overrides: Any,
) -> Tensor | tuple[Tensor, FlowState]:
    """Flow-Attention: bidirectional, cross (L != S) or causal, in linear time. The module docstring has the equations.

    A padded token takes part in no flow, no competition and no count. Queries are part of the flow, so a padded query
    must be masked too.

    Args:
        q: Queries before the feature map, (batch, L, heads, K).
        k: Keys before the feature map, (batch, S, heads, K).
        v: Values, (batch, S, heads, V).
        causal: Output t depends on positions up to t only. Requires L == S.
        preset: ``"core"``, ``"vision"``, ``"timeseries"``, ``"lra"``, ``"wikitext"`` or ``"decision"``: the variant of
            the published code to follow.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or the name of a backend that has this operation, ``"native"`` (C++ kernels: float32 and
            bfloat16 on the CPU) or ``"torch"``. See :func:`flowformer.ops.explain`.
        **overrides: Options of :class:`FlowOptions` that depart from the preset.

    Returns:
        Output (batch, L, heads, V) in the dtype of q, zeros at padded queries; with ``return_state`` also the state.
        Half precision is summed in float32.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    options = flow_options(preset, **overrides)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    dense = scanned(
        lambda tokens, state: _causal_block(tokens, state, options, CHUNK),
        lambda q, k, v, key, query: _bidirectional(q, k, v, key, query, options),
        causal,
    )
    return run(
        "flow_attention", given, dense, options=(options,),
        init_state=lambda batch: init_flow_state(batch, k.shape[2], k.shape[3], v.shape[3], device=q.device),
    )  # fmt: skip


def features(x: Tensor, mask: Tensor | None, feature_map: str) -> Tensor:
    """Return phi(x) for x (batch, length, heads, K); zero at padding, which excludes it from all flows."""
    # Padding is filled twice: before, since the derivative of sigmoid at NaN is NaN, and after, since phi(0) > 0.
    x = fill(x, mask).to(sum_dtype(x.dtype))
    return fill(x.sigmoid() if feature_map == "sigmoid" else x.relu() + RELU_FLOOR, mask)


def _times(A: Tensor, b: Tensor, eps: float) -> Tensor:
    """(A + eps) b for A (..., n, channels) and a vector b (..., channels): (..., n), without forming A + eps."""
    return times_sum(A, b.unsqueeze(-1)).squeeze(-1) + eps * b.sum(-1, keepdim=True)


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, options: FlowOptions
) -> Tensor:
    eps = options.eps
    with no_autocast(q.device):
        Q = features(q, query_mask, options.feature_map).transpose(1, 2)
        K = features(k, key_mask, options.feature_map).transpose(1, 2)
        V = fill(v, key_mask).to(Q.dtype).transpose(1, 2)
        sinks, sources = _count(query_mask, Q), _count(key_mask, K)
        incoming = _open(_times(Q, K.sum(-2) + eps, eps) + options.flow_eps, query_mask, key_mask)
        outgoing = _open(_times(K, Q.sum(-2) + eps, eps) + options.flow_eps, key_mask, query_mask)
        weight = _competition(K, (Q / incoming.unsqueeze(-1)).sum(-2), sinks, sources, key_mask, options)
        scaled = Q / incoming.unsqueeze(-1)
        if options.allocation:
            conserved = _times(Q, (K / outgoing.unsqueeze(-1)).sum(-2) + eps, eps) + options.flow_eps
            scaled = scaled * (conserved * (sinks / sources)).sigmoid().unsqueeze(-1)
        if weight is not None:
            V = V * weight.unsqueeze(-1)
        out = times_sum(scaled, sum_over_tokens(K, V))
        return out.transpose(1, 2).to(q.dtype).contiguous()


def _competition(
    K: Tensor, scaled_query_sum: Tensor, sinks: Tensor, sources: Tensor, mask: Tensor | None, options: FlowOptions
) -> Tensor | None:
    """Weight of each source, (batch, heads, S), mean 1 where sources compete along the sequence."""
    if options.competition is None:
        return None
    conserved = _times(K, scaled_query_sum + options.eps, options.eps) + options.flow_eps
    if options.rescale:
        conserved = conserved * (sources / sinks)
    if options.clamp is not None:
        conserved = conserved.clamp(-options.clamp, options.clamp)
    if options.competition == "heads":
        return sources * conserved.softmax(1)
    if mask is not None:
        conserved = conserved.masked_fill(~mask.unsqueeze(1), LOG_ZERO)
    return sources * conserved.softmax(-1)


def _count(mask: Tensor | None, like: Tensor) -> Tensor:
    """Real tokens of each row, at least 1, shaped to scale (batch, heads, length) flows."""
    if mask is None:
        return like.new_full((1, 1, 1), like.shape[-2])
    return mask.sum(-1).clamp(min=1).to(like.dtype).view(-1, 1, 1)


def _open(flow: Tensor, mask: Tensor | None, others: Tensor | None = None) -> Tensor:
    """Set the flow of padding, next to nothing, to 1: it is divided by, and nothing may come of that.

    The same where ``others``, the mask of the other side, has no token: without eps, such a flow is nothing at all.
    """
    if mask is not None:
        shape = (mask.shape[0], 1, *flow.shape[2:])  # (batch, heads, length) or (batch, heads, chunks, chunk)
        flow = flow.masked_fill(~mask.view(shape), 1.0)
    return flow if others is None else flow.masked_fill(~others.any(-1).view(-1, 1, 1), 1.0)


def _causal_block(
    tokens: Sequence[Any], state: FlowState, options: FlowOptions, chunk: int
) -> tuple[Tensor, FlowState]:
    """Outputs of one block of tokens, and the state after it. Intermediates are (batch, heads, chunks, chunk, ...)."""
    q, k, v, mask = tokens
    length = q.shape[1]
    with no_autocast(q.device):
        (q, k, v), mask = pad_to_chunks((q, k, v), mask, chunk)
        Q = split_chunks(features(q, mask, options.feature_map), chunk)
        K = split_chunks(features(k, mask, options.feature_map), chunk)
        V = split_chunks(fill(v, mask).to(Q.dtype), chunk)
        chunked = None if mask is None else mask.view(mask.shape[0], *Q.shape[2:4])
        n, count = _positions(state.length, chunked, Q)
        capacity = Q @ K.transpose(-1, -2)
        lower, upper = capacity.tril(), capacity.triu()  # a sink sees earlier sources, a source earlier sinks

        sums = state.sums.unbind(2)
        incoming, key_sum = _running_flow(Q, K, lower.sum(-1), sums[0], options)
        outgoing, query_sum = _running_flow(K, Q, upper.sum(-2), sums[1], options)
        incoming, outgoing = _open(incoming, chunked), _open(outgoing, chunked)
        out_weight, in_weight = n / outgoing, n / incoming
        within = (lower @ out_weight.unsqueeze(-1)).squeeze(-1)
        conserved_in, scaled_key_sum = _running_flow(Q, K, within, sums[2], options, out_weight, n)
        within = (in_weight.unsqueeze(-2) @ upper).squeeze(-2)
        conserved_out, scaled_query_sum = _running_flow(K, Q, within, sums[3], options, in_weight, n)

        weight, log_normaliser = _causal_competition(conserved_out, n, chunked, state.log_normaliser, options)
        if weight is not None:
            V = V * weight.unsqueeze(-1)
        out, memory = causal_product(lower, Q, K, V, state.memory)
        gate = conserved_in.sigmoid() / incoming if options.allocation else 1 / incoming
        out = join_chunks(out * gate.unsqueeze(-1), length).to(v.dtype)
        after = torch.stack([key_sum, query_sum, scaled_key_sum, scaled_query_sum], 2)
    return out, FlowState(count, after, log_normaliser, memory)


def _positions(count: Tensor, mask: Tensor | None, Q: Tensor) -> tuple[Tensor, Tensor]:
    """1-based count of real tokens at each place, shaped like flows, at least 1; and the count after the last."""
    chunks, chunk = Q.shape[2:4]
    if mask is None:
        steps = torch.arange(1, chunks * chunk + 1, device=Q.device).expand(count.shape[0], -1)
    else:
        steps = mask.flatten(1).cumsum(-1)
    n = count.unsqueeze(-1) + steps
    return n.clamp(min=1).to(Q.dtype).view(-1, 1, chunks, chunk), n[:, -1]


def _running_flow(
    A: Tensor,
    B: Tensor,
    within: Tensor,
    past: Tensor,
    options: FlowOptions,
    weights: Tensor | None = None,
    n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """((A_t + eps) . (sum_{j<=t} w_j B_j + eps)) / n_t + flow_eps.

    Args:
        A: (batch, heads, chunks, chunk, K).
        B: (batch, heads, chunks, chunk, K).
        within: sum of w_j (A_t . B_j) over the j <= t of t's chunk, (batch, heads, chunks, chunk).
        past: sum of w_j B_j over the tokens before the block, (batch, heads, K).
        options: For eps and flow_eps.
        weights: w, shaped like ``within``; 1 if absent.
        n: Count of tokens, to divide by; 1 if absent.

    Returns:
        The flow, shaped like ``within``, and the past after the block.
    """
    eps, channels = options.eps, A.shape[-1]
    if weights is None:
        sums, each = B.sum(-2), B.sum(-1)
    else:
        sums, each = (weights.unsqueeze(-2) @ B).squeeze(-2), B.sum(-1) * weights
    before, past = carry(sums, past)
    small = A.sum(-1) + each.cumsum(-1) + before.sum(-1, keepdim=True) + channels * eps
    flow = within + (A @ before.unsqueeze(-1)).squeeze(-1) + eps * small
    return (flow if n is None else flow / n) + options.flow_eps, past


def _causal_competition(
    conserved: Tensor, n: Tensor, mask: Tensor | None, past: Tensor, options: FlowOptions
) -> tuple[Tensor | None, Tensor]:
    """Weight of each source, normalised over the sources up to its own time, and the log-normaliser after the block."""
    if options.clamp is not None:
        conserved = conserved.clamp(-options.clamp, options.clamp)
    if options.competition is None:
        return None, past.clone()
    if options.competition == "heads":
        return n * conserved.softmax(1), past.clone()
    flat = conserved.flatten(2).to(past.dtype)
    if mask is not None:
        flat = flat.masked_fill(~mask.flatten(1).unsqueeze(1), LOG_ZERO)
    normaliser = log_add(log_cumsum(flat), past.unsqueeze(-1))
    weight = n * (flat - normaliser).exp().to(conserved.dtype).view_as(conserved)
    return weight, normaliser[..., -1]


def flow_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FlowState,
    *,
    preset: str = "core",
    backend: str = "auto",
    **overrides: Any,
) -> tuple[Tensor, FlowState]:
    """Compute one token of causal Flow-Attention, in time and memory independent of the number of tokens before it.

    Args:
        q: Query before the feature map, (batch, heads, K).
        k: Key before the feature map, (batch, heads, K).
        v: Value, (batch, heads, V).
        state: State before the token, from :func:`init_flow_state`, a step, or ``flow_attention(..., causal=True,
            return_state=True)``; not changed.
        preset: As in :func:`flow_attention`.
        backend: As in :func:`flow_attention`.
        **overrides: As in :func:`flow_attention`.

    Returns:
        Output (batch, heads, V) in the dtype of v, and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "flow_attention_step"
    options = flow_options(preset, **overrides)
    fits = not torch.compiler.is_compiling() and _fits(q, k, v, state)
    if not fits:
        check_step(op, q, k, v, state, FlowState)
        batch, heads, channels = q.shape
        check_state(op, state, init_flow_state(batch, heads, channels, v.shape[-1], device=q.device))
    chosen = choose(op, backend, q)
    if chosen == "torch":
        return _step(q, k, v, state, options)
    out, *after = implementation(op, chosen)(q, k, v, state, options, plain=fits)
    return out, FlowState(*after)


def _fits(q: Any, k: Any, v: Any, state: Any) -> bool:
    """Whether a step is right beyond doubt: contiguous tensors of the right shapes and dtypes, without gradients.

    The checks with error messages take ten times as long as the step of a kernel.
    """
    if type(state) is not FlowState or not all(type(t) is Tensor and t.is_contiguous() for t in (q, k, v, *state)):
        return False
    length, sums, log_normaliser, memory = state
    shape, dtype = q.shape, q.dtype
    if len(shape) != 3 or k.shape != shape or v.ndim != 3 or v.shape[:2] != shape[:2] or 0 in shape or 0 in v.shape:
        return False
    if not dtype.is_floating_point or k.dtype != dtype or v.dtype != dtype:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, sums, log_normaliser, memory)):
        return False
    rows = shape[:2]
    return (
        length.shape == shape[:1]
        and sums.shape == (*rows, 4, shape[2])
        and log_normaliser.shape == rows
        and memory.shape == (*rows, shape[2], v.shape[2])
        and length.dtype == torch.int64
        and sums.dtype == log_normaliser.dtype == memory.dtype == torch.float64
        and all(t.is_cpu if q.is_cpu else t.device == q.device for t in (k, v, *state))
    )


def _step(q: Tensor, k: Tensor, v: Tensor, state: FlowState, options: FlowOptions) -> tuple[Tensor, FlowState]:
    """The step in plain PyTorch."""
    eps, flow_eps = options.eps, options.flow_eps
    with no_autocast(q.device):
        # One token is little work: do it in the dtype of the state.
        Q = features(q.unsqueeze(1), None, options.feature_map).squeeze(1).to(state.memory.dtype)
        K = features(k.unsqueeze(1), None, options.feature_map).squeeze(1).to(state.memory.dtype)

        def flow(a: Tensor, total: Tensor) -> Tensor:
            return ((a + eps) * (total + eps)).sum(-1)

        count = state.length + 1
        n = count.to(Q.dtype).unsqueeze(-1)
        key_sum, query_sum, scaled_key_sum, scaled_query_sum = state.sums.unbind(2)
        key_sum, query_sum = key_sum + K, query_sum + Q
        incoming = flow(Q, key_sum) + flow_eps
        outgoing = flow(K, query_sum) + flow_eps
        scaled_key_sum = scaled_key_sum + K * (n / outgoing).unsqueeze(-1)
        scaled_query_sum = scaled_query_sum + Q * (n / incoming).unsqueeze(-1)
        conserved_in = flow(Q, scaled_key_sum) / n + flow_eps
        conserved_out = flow(K, scaled_query_sum) / n + flow_eps
        weight, log_normaliser = _causal_competition(
            conserved_out.unsqueeze(-1), n.unsqueeze(-1), None, state.log_normaliser, options
        )
        V = v.to(Q.dtype) if weight is None else v.to(Q.dtype) * weight
        memory = state.memory + K.unsqueeze(-1) * V.unsqueeze(-2)
        gate = conserved_in.sigmoid() / incoming if options.allocation else 1 / incoming
        out = (Q.unsqueeze(-2) @ memory).squeeze(-2) * gate.unsqueeze(-1)
    sums = torch.stack([key_sum, query_sum, scaled_key_sum, scaled_query_sum], 2)
    return out.to(v.dtype), FlowState(count, sums, log_normaliser, memory)
