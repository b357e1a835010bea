r"""What a mechanism attends to: rows of a matrix that is never built, and the flows within.

Given queries and keys, every mechanism is linear in its values: out_i = sum_j W_ij v_j. Row i of W is what query i
takes from each source:

    flow, mobile    A_i (Q_i / I_i) . K_j C_j, see :mod:`flowformer.ops.flow` and :mod:`flowformer.ops.mobile`
    linear          phi(q_i) . phi(k_j) / (phi(q_i) . sum_j phi(k_j) + eps)
    softmax         softmax_j(q_i . k_j / sqrt(K))
    AFT             softmax_j(k_j + w_ij), channel by channel, where out_i = sigmoid(q_i) sum_j W_ij v_j

The gate of AFT is left out: it scales all of a row alike. Rows of softmax and AFT add up to 1, those of linear
attention nearly so. Those of Flow- and Mobile-Attention do not: allocation is part of them, and in Mobile-Attention the
number of tokens. AFT's rows are in :mod:`flowformer.ops.aft.rows`.

A function here takes what the operation takes, with places of queries instead of values. A few rows cost
rows x S x channels, in time and memory, besides what is linear in length; flows are linear in length. All of it is
computed in float64 (float32 on devices without it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.ops.flow import features
from flowformer.ops.flow_presets import FlowOptions, flow_options
from flowformer.ops.linear import elu_plus_one
from flowformer.ops.masking import HEADS, LOG_ZERO, Layout, Masks, check, fill, state_dtype
from flowformer.ops.mobile import LAYOUT as MOBILE_LAYOUT
from flowformer.ops.mobile import MobileOptions, mobile_options

Rows = Sequence[int] | Tensor  # places of queries, the same in every sequence of the batch


class FlowMaps(NamedTuple):
    """The flows of Flow- or Mobile-Attention, each (batch, heads, L) or (batch, heads, S); zeros at padding.

    Attributes:
        incoming: I, of each sink (query).
        outgoing: O, of each source (key).
        conserved_incoming: I^, of each sink. In the bidirectional form of Flow-Attention its mean is S / L.
        conserved_outgoing: O^, of each source, before any clamp. Likewise L / S.
        competition: C, the weight of each source; its mean over a sequence is 1 where sources compete along it. In
            causal Flow-Attention it is settled at the source's own time; in causal Mobile-Attention, where each later
            token settles it anew, this is what the last one sees.
        allocation: A, the gate of each sink.
    """

    incoming: Tensor
    outgoing: Tensor
    conserved_incoming: Tensor
    conserved_outgoing: Tensor
    competition: Tensor
    allocation: Tensor


# ---------------------------------------------------------------------------------------------- flow and mobile


def flow_maps(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    preset: str = "core",
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    **overrides: Any,
) -> FlowMaps:
    """The flows of :func:`flowformer.ops.flow_attention`, in memory linear in length.

    Args:
        q: Queries before the feature map, (batch, L, heads, K).
        k: Keys before the feature map, (batch, S, heads, K).
        causal: Which form.
        preset: As the operation takes it.
        key_padding_mask: (batch, S) boolean, True = real token. With L == S it says the queries' padding too.
        query_padding_mask: (batch, L) boolean, for cross-attention.
        **overrides: Options of :class:`flowformer.ops.FlowOptions` that depart from the preset.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    options = flow_options(preset, **overrides)
    masks = check_pair("flow_maps", q, k, causal, key_padding_mask, query_padding_mask)
    return _hide(_flows(q, k, masks, causal, options)[-1], masks)


def flow_rows(
    q: Tensor,
    k: Tensor,
    rows: Rows,
    *,
    causal: bool = False,
    preset: str = "core",
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    **overrides: Any,
) -> Tensor:
    """Rows of Flow-Attention. Arguments as those of :func:`flow_maps`.

    Args:
        q: Queries.
        k: Keys.
        rows: Places of the queries in question.
        causal: Which form.
        preset: As the operation takes it.
        key_padding_mask: Padding of keys.
        query_padding_mask: Padding of queries.
        **overrides: Options that depart from the preset.

    Returns:
        Weights (batch, heads, rows, S); zeros from padded queries, and to padded keys.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    options = flow_options(preset, **overrides)
    masks = check_pair("flow_rows", q, k, causal, key_padding_mask, query_padding_mask)
    places = check_rows("flow_rows", rows, q)
    Q, K, maps = _flows(q, k, masks, causal, options)
    weights = _sinks(Q, maps, places) @ K.mT * maps.competition.unsqueeze(-2)
    return weights.masked_fill(~visible(places, K.shape[-2]), 0) if causal else weights


def _flows(q: Tensor, k: Tensor, masks: Masks, causal: bool, options: FlowOptions) -> tuple[Tensor, Tensor, FlowMaps]:
    """Q and K, (batch, heads, length, K), and the flows; those of padding mean nothing."""
    Q, K = (_features(x, mask, options) for x, mask in ((q, masks.query), (k, masks.key)))
    sinks, sources = _count(masks.query, Q), _count(masks.key, K)
    n = _count_so_far(masks.key, K) if causal else torch.ones_like(sources)

    def total(x: Tensor) -> Tensor:
        return x.cumsum(-2) if causal else x.sum(-2, keepdim=True)

    eps, more = options.eps, options.flow_eps
    incoming, outgoing = _meet(Q, total(K), eps) + more, _meet(K, total(Q), eps) + more
    conserved_in = _meet(Q, total(K * _over(n, outgoing)), eps) / n + more
    conserved_out = _meet(K, total(Q * _over(n, incoming)), eps) / n + more
    allocation = (conserved_in * sinks / sources).sigmoid() if options.allocation else torch.ones_like(incoming)
    logits = _clamp(conserved_out * sources / sinks if options.rescale else conserved_out, options.clamp)
    competition = torch.ones_like(outgoing)
    if options.competition == "heads":
        competition = (n if causal else sources) * logits.softmax(1)
    elif options.competition == "sequence":
        logits = _fill_heads(logits, masks.key, LOG_ZERO)
        competition = n * (logits - logits.logcumsumexp(-1)).exp() if causal else sources * logits.softmax(-1)
    return Q, K, FlowMaps(incoming, outgoing, conserved_in, conserved_out, competition, allocation)


def mobile_maps(
    q: Tensor, k: Tensor, *, causal: bool = False, key_padding_mask: Tensor | None = None, **overrides: Any
) -> FlowMaps:
    """The flows of :func:`flowformer.ops.mobile_attention`, among the heads of each token.

    Args:
        q: Queries before the feature map, (batch, L, heads, K).
        k: Keys before the feature map, likewise.
        causal: Which form; it matters to the competition alone.
        key_padding_mask: (batch, L) boolean, True = real token.
        **overrides: Options of :class:`flowformer.ops.MobileOptions`.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    options = mobile_options(**overrides)
    masks = check_pair("mobile_maps", q, k, causal, key_padding_mask, None, MOBILE_LAYOUT)
    *_, logits, maps = _mobile_flows(q, k, masks.key, options)
    last = torch.tensor([q.shape[1] - 1], device=q.device)
    competition = _mobile_competition(logits, last, masks.key, causal, options)
    return _hide(maps._replace(competition=competition.squeeze(-2).expand_as(logits)), masks)


def mobile_rows(
    q: Tensor, k: Tensor, rows: Rows, *, causal: bool = False, key_padding_mask: Tensor | None = None, **overrides: Any
) -> Tensor:
    """Rows of Mobile-Attention. Arguments as those of :func:`mobile_maps`.

    Args:
        q: Queries.
        k: Keys.
        rows: Places of the queries in question.
        causal: Which form.
        key_padding_mask: Padding.
        **overrides: Options of the mechanism.

    Returns:
        Weights (batch, heads, rows, L); zeros from and to padding.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    options = mobile_options(**overrides)
    mask = check_pair("mobile_rows", q, k, causal, key_padding_mask, None, MOBILE_LAYOUT).key
    places = check_rows("mobile_rows", rows, q)
    Q, K, logits, maps = _mobile_flows(q, k, mask, options)
    weights = _sinks(Q, maps, places) @ K.mT * _mobile_competition(logits, places, mask, causal, options)
    if options.normalize:
        weights = weights / _seen_count(K, places, mask, causal)
    return weights.masked_fill(~visible(places, K.shape[-2]), 0) if causal else weights


def _mobile_flows(
    q: Tensor, k: Tensor, mask: Tensor | None, options: MobileOptions
) -> tuple[Tensor, Tensor, Tensor, FlowMaps]:
    """Q and K, (batch, heads, L, K), what sources compete by, and the flows, without competition."""
    Q, K = _features(q, mask, options), _features(k, mask, options)

    def total(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)

    one, eps = torch.ones_like(Q[:1, :1, :1, 0]), options.eps
    incoming, outgoing = _meet(Q, total(K), eps), _meet(K, total(Q), eps)
    conserved_in = _meet(Q, total(K * _over(one, outgoing)), eps)
    conserved_out = _meet(K, total(Q * _over(one, incoming)), eps)
    allocation = conserved_in.sigmoid() if options.allocation else torch.ones_like(incoming)
    maps = FlowMaps(incoming, outgoing, conserved_in, conserved_out, torch.ones_like(outgoing), allocation)
    return Q, K, _clamp(conserved_out, options.clamp), maps


def _mobile_competition(
    logits: Tensor, places: Tensor, mask: Tensor | None, causal: bool, options: MobileOptions
) -> Tensor:
    """Weight of each source for the queries at ``places``, (batch, heads, rows or 1, L)."""
    if options.competition == "heads":
        return logits.shape[1] * logits.softmax(1).unsqueeze(-2)
    if options.competition is None:
        return torch.ones_like(logits).unsqueeze(-2)
    seen = _fill_heads(logits, mask, LOG_ZERO).unsqueeze(-2)
    if causal:
        seen = seen.masked_fill(~visible(places, logits.shape[-1]), LOG_ZERO)
    return _seen_count(logits.unsqueeze(-1), places, mask, causal) * seen.softmax(-1)


# --------------------------------------------------------------------------------------------- linear and softmax


def linear_rows(
    q: Tensor,
    k: Tensor,
    rows: Rows,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rows of :func:`flowformer.ops.linear_attention`. Arguments and result as those of :func:`flow_rows`.

    Args:
        q: Queries.
        k: Keys.
        rows: Places of the queries in question.
        causal: Which form.
        key_padding_mask: Padding of keys.
        query_padding_mask: Padding of queries.
        eps: Added to the denominator.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    masks = check_pair("linear_rows", q, k, causal, key_padding_mask, query_padding_mask)
    places = check_rows("linear_rows", rows, q)
    Q, K = (elu_plus_one(wide(fill(x, mask))).transpose(1, 2) for x, mask in ((q, masks.query), (k, masks.key)))
    weights = (Q[:, :, places] @ K.mT).masked_fill(~seen_keys(places, k.shape[1], masks, causal).unsqueeze(1), 0)
    return weights / (weights.sum(-1, keepdim=True) + eps)


def softmax_rows(
    q: Tensor,
    k: Tensor,
    rows: Rows,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """Rows of :func:`flowformer.ops.softmax_attention`. Arguments and result as those of :func:`flow_rows`.

    Args:
        q: Queries.
        k: Keys.
        rows: Places of the queries in question.
        causal: Which form.
        key_padding_mask: Padding of keys.
        query_padding_mask: Padding of queries.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    masks = check_pair("softmax_rows", q, k, causal, key_padding_mask, query_padding_mask)
    places = check_rows("softmax_rows", rows, q)
    Q, K = (wide(fill(x, mask)).transpose(1, 2) for x, mask in ((q, masks.query), (k, masks.key)))
    scores = Q[:, :, places] @ K.mT / q.shape[-1] ** 0.5
    return softmax_over(scores, seen_keys(places, k.shape[1], masks, causal).unsqueeze(1))


# -------------------------------------------------------------------------------------------------- what all share


def check_pair(
    op: str,
    q: Tensor,
    k: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    layout: Layout = HEADS,
) -> Masks:
    """Check queries and keys as the operation would; values are of no concern, and others stand in for them."""
    v = q if layout.heads else k
    return check(
        op, q, k, v, layout=layout, causal=causal, key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
    )  # fmt: skip


def check_rows(op: str, rows: Rows, q: Tensor) -> Tensor:
    """Places of queries as a tensor (rows,), if they are places of q (batch, L, ...)."""
    places = torch.as_tensor(rows, device=q.device)
    if places.ndim != 1 or not len(places) or places.is_floating_point() or places.dtype == torch.bool:
        raise ValueError(f"{op}: rows must be one or more places of queries, whole numbers, got {rows}")
    if int(places.min()) < 0 or int(places.max()) >= q.shape[1]:
        raise ValueError(f"{op}: rows must be from 0 to {q.shape[1] - 1}, got {rows}")
    return places.long()


def wide(x: Tensor) -> Tensor:
    """A tensor in the dtype that maps are computed in."""
    return x.to(state_dtype(x.device))


def _features(x: Tensor, mask: Tensor | None, options: FlowOptions | MobileOptions) -> Tensor:
    """phi(x) as (batch, heads, length, K); zero at padding."""
    return features(wide(x), mask, options.feature_map).transpose(1, 2)


def _meet(A: Tensor, b: Tensor, eps: float) -> Tensor:
    """(A + eps) . (b + eps), channel by channel added up."""
    return ((A + eps) * (b + eps)).sum(-1)


def _over(n: Tensor, flow: Tensor) -> Tensor:
    """The factor n / flow for each channel to come; without eps, the flow of padding may be nothing at all."""
    return (n / flow.masked_fill(flow == 0, 1)).unsqueeze(-1)


def _sinks(Q: Tensor, maps: FlowMaps, places: Tensor) -> Tensor:
    """A Q / I of the queries at ``places``, (batch, heads, rows, K)."""
    return (Q * _over(maps.allocation, maps.incoming))[:, :, places]


def _clamp(flow: Tensor, bound: float | None) -> Tensor:
    return flow if bound is None else flow.clamp(-bound, bound)


def _count(mask: Tensor | None, like: Tensor) -> Tensor:
    """Real tokens, at least 1, to scale flows (batch, heads, length) of ``like`` (batch, heads, length, K)."""
    if mask is None:
        return like.new_full((1, 1, 1), like.shape[-2])
    return mask.sum(-1).clamp(min=1).to(like.dtype).view(-1, 1, 1)


def _count_so_far(mask: Tensor | None, like: Tensor) -> Tensor:
    """The same up to each token, (batch or 1, 1, length)."""
    if mask is None:
        return torch.arange(1, like.shape[-2] + 1, dtype=like.dtype, device=like.device).view(1, 1, -1)
    return mask.cumsum(-1).clamp(min=1).to(like.dtype).unsqueeze(1)


def _seen_count(like: Tensor, places: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Real tokens that the queries at ``places`` see, (batch or 1, 1, rows or 1, 1)."""
    count = _count_so_far(mask, like)[:, :, places] if causal else _count(mask, like)
    return count.unsqueeze(-1)


def visible(places: Tensor, sources: int) -> Tensor:
    """Which keys are no later than the queries at ``places``, (rows, S)."""
    return torch.arange(sources, device=places.device) <= places.unsqueeze(1)


def seen_keys(places: Tensor, sources: int, masks: Masks, causal: bool) -> Tensor:
    """Which keys count for the queries at ``places``, (batch or 1, rows, S); none for a padded query."""
    seen = torch.ones(1, len(places), sources, dtype=torch.bool, device=places.device)
    if causal:
        seen = seen & visible(places, sources)
    if masks.key is not None:
        seen = seen & masks.key.unsqueeze(1)
    return seen if masks.query is None else seen & masks.query[:, places].unsqueeze(2)


def softmax_over(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen, along the last axis; zeros elsewhere, and where nothing is."""
    return logits.masked_fill(~seen, LOG_ZERO).softmax(-1).masked_fill(~seen, 0)


def _fill_heads(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """Put ``value`` at padding of x (batch, heads, length)."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), value)


def _hide(maps: FlowMaps, masks: Masks) -> FlowMaps:
    """Zeros at padding, for sinks and sources."""
    key = {"outgoing", "conserved_outgoing", "competition"}
    return FlowMaps(
        *(
            _fill_heads(x, masks.key if name in key else masks.query, 0.0)
            for name, x in zip(maps._fields, maps, strict=True)
        )
    )
