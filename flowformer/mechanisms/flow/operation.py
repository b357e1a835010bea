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

With a decay, capacity is Q_i . K_j gamma(i, j), where gamma(i, j) = gamma^|i-j| for one gamma <= 1 of a head, or the
product of the decays of the tokens between i and j: :mod:`flowformer.core.decay`. The identities hold for any capacity
that is not negative, and so for this one: in self-attention the means of I^ and O^ are 1. Every sum over tokens, of K,
Q, K / O, Q / I, exp(O^) and K C v, becomes a decayed one, as does the count n_i = sum_j gamma(i, j), and in both forms
sources compete with those in their reach:

    C_j = n_j exp(O^_j) / sum_i gamma(i, j) exp(O^_i)

The causal form decays the five sums, the count and the matrix at each token; the bidirectional one is two scans less
the diagonal: :mod:`flowformer.mechanisms.flow.decayed`.

The causal form is computed in chunks. Within a chunk, Q K^T gives everything: the row sums of its lower triangle are I,
the column sums of its upper triangle O, the products of the two with n/O and n/I are I^ and O^, and the lower triangle
times C v is the output. Five sums and the K x V matrix carry the past. exp(O^) is summed as a logarithm, since without
a clamp O^ has no bound in the causal form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flowformer.core.checks import HEADS
from flowformer.core.chunks import CHUNK
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, no_autocast
from flowformer.core.run import Dense, Given, check_inputs, run, scanned
from flowformer.core.sums import sum_over_tokens, times_sum
from flowformer.mechanisms.decay import DECAYING
from flowformer.mechanisms.flow.causal import causal_block
from flowformer.mechanisms.flow.decayed import bidirectional_decayed
from flowformer.mechanisms.flow.equations import (
    Learned,
    allocate,
    contend,
    open_flow,
    query_and_key,
    refusals,
    resolve,
)
from flowformer.mechanisms.flow.options import FlowOptions, flow_options
from flowformer.mechanisms.flow.state import FlowState, init_flow_state


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    temperatures: Tensor | None = None,
    feature_weights: Tensor | None = None,
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
        log_decay: Logarithm of gamma, the factor by which capacity shrinks at each token of distance: (heads,), or
            (batch, L, heads) where it depends on the token. Values above 0 count as 0, and padding does not decay.
            Absent for no decay; with ``decay="fixed"`` for :func:`flowformer.core.decay.default_log_decay`. Not in
            cross-attention.
        temperatures: With ``temperature=True``: temperatures of competition and of allocation, and the offset of
            allocation, (3, heads); ones are the published gates, but for the clamp, which is around the mean of 1.
        feature_weights: With ``feature_map="learned"``: W of queries and of keys, (2, heads, K, K).
        causal: Output t depends on positions up to t only. Requires L == S.
        preset: ``"core"``, ``"vision"``, ``"timeseries"``, ``"lra"``, ``"wikitext"`` or ``"decision"``: the variant of
            the published code to follow; or ``"distance"``, which is ours.
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
    op = "flow_attention"
    options = flow_options(preset, **overrides)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    learned = Learned(log_decay, temperatures, feature_weights)
    decays = log_decay is not None or options.decay is not None
    layout = DECAYING if decays else HEADS
    if options.learns or any(part is not None for part in learned):
        check_inputs(op, given, layout)
        learned = resolve(op, learned, q, options)
    log_decay = learned.log_decay
    of_tokens = (log_decay,) if log_decay is not None and log_decay.ndim == 3 else ()
    return run(
        op, given, _dense(causal, learned, options, bool(of_tokens)), options=(learned, options), layout=layout,
        init_state=lambda batch: init_flow_state(
            batch, k.shape[2], k.shape[3], v.shape[3], device=q.device, feature_map=options.feature_map
        ),
        of_tokens=of_tokens,
        refusals=refusals(learned),
    )  # fmt: skip


def _dense(causal: bool, learned: Learned, options: FlowOptions, by_token: bool) -> Dense:
    """Both forms in plain PyTorch."""
    constant = (None, *learned[1:]) if by_token else tuple(learned)

    def block(tokens: Sequence[Any], state: FlowState, *constant: Any) -> tuple[Tensor, FlowState]:
        *tokens, log_decay = tokens if by_token else (*tokens, constant[0])
        return causal_block(tokens, state, Learned(log_decay, *constant[1:]), options, CHUNK)

    def whole(q: Tensor, k: Tensor, v: Tensor, key: Any, query: Any, *log_decay: Tensor) -> Tensor:
        given = learned._replace(log_decay=log_decay[0]) if by_token else learned
        form = bidirectional if given.log_decay is None else bidirectional_decayed
        return form(q, k, v, key, query, given, options)

    return scanned(block, whole, causal, constant)


def _times(A: Tensor, b: Tensor, eps: float) -> Tensor:
    """(A + eps) b for A (..., n, channels) and a vector b (..., channels): (..., n), without forming A + eps."""
    return times_sum(A, b.unsqueeze(-1)).squeeze(-1) + eps * b.sum(-1, keepdim=True)


def bidirectional(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, learned: Learned,
    options: FlowOptions,
) -> Tensor:  # fmt: skip
    """The bidirectional form without decay, on a padded batch."""
    eps = options.eps
    with no_autocast(q.device):
        Q, K = (x.transpose(1, 2) for x in query_and_key(q, k, query_mask, key_mask, learned, options))
        V = fill(v, key_mask).to(Q.dtype).transpose(1, 2)
        sinks, sources = _count(query_mask, Q), _count(key_mask, K)
        incoming = open_flow(_times(Q, K.sum(-2) + eps, eps) + options.flow_eps, query_mask, key_mask)
        outgoing = open_flow(_times(K, Q.sum(-2) + eps, eps) + options.flow_eps, key_mask, query_mask)
        weight = _competition(K, (Q / incoming.unsqueeze(-1)).sum(-2), sinks, sources, key_mask, learned, options)
        scaled = Q / incoming.unsqueeze(-1)
        if options.allocation:
            conserved = _times(Q, (K / outgoing.unsqueeze(-1)).sum(-2) + eps, eps) + options.flow_eps
            scaled = scaled * allocate(conserved * (sinks / sources), learned.temperatures).unsqueeze(-1)
        if weight is not None:
            V = V * weight.unsqueeze(-1)
        out = times_sum(scaled, sum_over_tokens(K, V))
        return out.transpose(1, 2).to(q.dtype).contiguous()


def _competition(
    K: Tensor, scaled_query_sum: Tensor, sinks: Tensor, sources: Tensor, mask: Tensor | None, learned: Learned,
    options: FlowOptions,
) -> Tensor | None:  # fmt: skip
    """Weight of each source, (batch, heads, S), mean 1 where sources compete along the sequence."""
    if options.competition is None:
        return None
    conserved = _times(K, scaled_query_sum + options.eps, options.eps) + options.flow_eps
    if options.rescale:
        conserved = conserved * (sources / sinks)
    conserved = contend(conserved, learned.temperatures, options)
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
