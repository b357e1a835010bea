r"""Routing attention: attention within clusters of queries and keys (Roy et al., Routing Transformer, TACL 2021).

Each cluster c has a centroid mu_c and takes the w queries and the w keys with the largest products of their directions
with it, mu_c . x / |x|. A query attends to the keys of its clusters, by one softmax in each, and its output is the mean
of those:

    out_i = 1 / (n_i + 1e-5) sum_c [i in c] sum_{j in c} softmax_j(q_i . k_j / sqrt(K)) v_j

where n_i is the number of clusters that it is in and sees a key of. A token in no cluster has an output of zeros; one
cluster with w >= L is softmax attention. With ``shared_qk``, queries are keys: clusters are those of the queries, keys
are of unit length, and a token attends to itself, with a score of -5e4, only where it sees nothing else. This is
routing-transformer (1.6.1, PyPI), without its learned keys and values of clusters.

The w most similar tokens of a sequence are not causal: later tokens push earlier ones out of a cluster, and a mask of
scores does not change that. In the causal form here each token chooses by itself: it is in the cluster c(i) whose
centroid is most similar to its query, its key too, so that it always sees itself. It attends to the last w tokens of
its cluster:

    out_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j    over the last w of j <= i with c(j) = c(i)

Clusters are of any size then, and what limits time is the number of keys that a query sees. ``sees_future=True`` is the
published form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, sum_dtype
from flowformer.core.run import Given, check_inputs, run
from flowformer.core.tracing import is_traced, is_transformed
from flowformer.mechanisms.buckets import Cut, cut_apart, pick
from flowformer.mechanisms.routing.clusters import check_centroids, nearest, similarity
from flowformer.mechanisms.routing.scores import WINDOW, check_causal_options, check_options, keys_as, weigh
from flowformer.mechanisms.routing.state import RoutingState, init_routing_state

EPS = 1e-5  # of the mean over clusters, of routing-transformer


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: RoutingState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    window: int = WINDOW,
    shared_qk: bool = False,
    sees_future: bool = False,
) -> Tensor | tuple[Tensor, RoutingState]:
    """Attention within clusters of the Routing Transformer (Roy et al., 2021).

    Time and memory are linear in length for a given number of clusters, of which clusters * window tokens can be in
    one. With sqrt(L) clusters of sqrt(L) tokens, as the paper has them, time is of order L^1.5. Gradients take clusters
    as given, and there is none of the centroids: see :class:`RoutingAttention`.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K); S = L in self-attention.
        v: Values (batch, S, heads, V).
        centroids: (heads, clusters, K), of length 1 or less.
        causal: Output t sees positions up to t only: each token chooses its cluster by itself.
        mask: (batch, L) boolean, True = real token; of the queries in cross-attention.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only, without ``sees_future``); batch N for a packed batch.
        return_state: Return the state after the last token as well (likewise).
        backend: ``"auto"`` or ``"torch"``.
        window: w, queries and keys of a cluster; in the causal form keys that a query sees.
        shared_qk: Queries are keys, in self-attention: ``k`` is ``q``.
        sees_future: In place of the causal form the published one, in which later tokens change the clusters.

    Returns:
        Output (batch, L, heads, V), zeros at padding and of tokens in no cluster; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "routing_attention"
    has_state = initial_state is not None or return_state is True
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    check_inputs(op, given)
    check_options(op, window, shared_qk, sees_future, causal)
    check_centroids(op, centroids, q)
    if shared_qk and (q.shape[1] != k.shape[1] or context_mask is not None):
        raise ValueError(
            f"{op}: shared_qk must be False in cross-attention, got {q.shape[1]} queries and {k.shape[1]} keys"
            f"{'' if context_mask is None else ', and a context_mask'}"
        )
    if causal and has_state:
        check_causal_options(op, window, shared_qk, sees_future)
    options = Options(window, shared_qk, causal)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        q, k, v = (fill(x, of).transpose(1, 2) for x, of in ((q, query), (k, key), (v, key)))
        with no_autocast(q.device):
            if causal and not sees_future:
                out, after = _each_by_itself(q, k, v, key, centroids, state, options)
            else:
                out, after = _most_similar(q, k, v, query, key, centroids, options), None
        return fill(out.transpose(1, 2).to(q.dtype), query), after

    def init_state(batch: int) -> RoutingState:
        heads, channels, clusters = q.shape[2], q.shape[3], centroids.shape[1]
        return init_routing_state(batch, heads, channels, v.shape[-1], clusters, device=q.device, window=window)

    # Without the state of as many tokens as clusters have where there is no need of it.
    return run(op, given, dense, init_state=init_state if has_state else None)


class Options(NamedTuple):
    """Checked options."""

    window: int
    shared_qk: bool
    causal: bool


# ------------------------------------------------------------------------------------------------ the published form


def _most_similar(
    q: Tensor, k: Tensor, v: Tensor, query: Tensor | None, key: Tensor | None, centroids: Tensor, options: Options
) -> Tensor:
    """Outputs where each cluster takes the most similar queries and keys."""
    compute = sum_dtype(q.dtype)
    own, real_queries = _members(q, query, centroids, options.window)
    context, real_keys = (own, real_queries) if options.shared_qk else _members(k, key, centroids, options.window)
    mine, others = own.unsqueeze(-1), context.unsqueeze(-2)
    hidden = ~real_keys.unsqueeze(-2) | (others > mine) if options.causal else ~real_keys.unsqueeze(-2)
    itself = mine == others if options.shared_qk else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weigh(pick(q, own) @ pick(k, context).mT, hidden, itself) @ pick(v, context)

    outs = _recomputed(attend, q.to(compute), keys_as(k.to(compute), options.shared_qk), v.to(compute))
    seen = (~hidden).any(-1) & real_queries
    return _add_up(outs, seen, own, q.shape[2]) / (_add_up(seen.unsqueeze(-1).to(compute), seen, own, q.shape[2]) + EPS)


def _members(x: Tensor, real: Tensor | None, centroids: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Places of the tokens that are most similar to each centroid, (batch, heads, clusters, w), and which are real."""
    similar = similarity(x, centroids)
    if real is not None:
        similar = similar.masked_fill(~real[:, None, None], -torch.inf)
    found = similar.topk(min(window, x.shape[2]), dim=-1)
    return found.indices, found.values > -torch.inf


# ----------------------------------------------------------------------------------------------------- the causal form


def _each_by_itself(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    centroids: Tensor,
    state: RoutingState | None,
    options: Options,
) -> tuple[Tensor, RoutingState | None]:
    """Outputs where each token is in the cluster of the most similar centroid, and the state after them."""
    compute, length = sum_dtype(q.dtype), q.shape[2]
    cluster = nearest(q, centroids)
    if mask is not None:
        cluster = cluster.masked_fill(~mask.unsqueeze(1), centroids.shape[1])
    k, v = k.to(compute), v.to(compute)
    if state is not None:
        cluster = torch.cat([_clusters_of(state), cluster], -1)
        k, v = (torch.cat([old.flatten(2, 3).to(compute), x], 2) for old, x in zip(state[1:], (k, v), strict=True))
    before = k.shape[2] - length
    cut = cut_apart(cluster, min(options.window, k.shape[2]), centroids.shape[1])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, cut, before, options.shared_qk)

    out = _recomputed(attend, q.to(compute), keys_as(k, options.shared_qk), v)
    out = pick(out.flatten(2, 3), cut.slots[..., before:])
    return out, None if state is None else _last(k, v, cut, state)


def _attend(q: Tensor, k: Tensor, v: Tensor, cut: Cut, before: int, shared_qk: bool) -> Tensor:
    """Outputs (batch, heads, chunks, w, V) of chunks of queries, which see the w keys up to each; any where none."""
    width = cut.places.shape[-1]
    Q = pick(q, (cut.places - before).clamp(min=0))
    K, V = (pick(x, cut.places) for x in (k, v))
    scores = torch.cat([Q @ _chunk_before(K).mT, Q @ K.mT], -1)
    later = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
    too_early = ~later | cut.starts[..., None, None]
    hidden = torch.cat([too_early, later.expand_as(too_early)], -1)
    itself = torch.arange(2 * width, device=q.device) == torch.arange(width, 2 * width, device=q.device).unsqueeze(-1)
    early, late = weigh(scores, hidden, itself if shared_qk else None).split(width, -1)
    return early @ _chunk_before(V) + late @ V


def _chunk_before(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x[:, :, :-1]], 2)


def _clusters_of(state: RoutingState) -> Tensor:
    """The cluster of each token of a state, (batch, heads, clusters * window); the number of clusters where none."""
    clusters, window = state.key.shape[2:4]
    cluster = torch.arange(clusters, device=state.key.device).unsqueeze(-1)
    empty = torch.arange(window, device=state.key.device) < window - state.tokens.unsqueeze(-1)
    return torch.where(empty, clusters, cluster).flatten(2)


def _last(k: Tensor, v: Tensor, cut: Cut, state: RoutingState) -> RoutingState:
    """The state after keys and values (batch, heads, tokens, channels)."""
    window = state.key.shape[3]  # of chunks as well, since a state has as many tokens
    tokens, back = cut.sizes.clamp(max=window), torch.arange(-window, 0, device=k.device)
    slot = (cut.first * window + cut.sizes).unsqueeze(-1) + back
    places = cut.places.flatten(2).gather(-1, slot.clamp(min=0).flatten(2)).view_as(slot)
    empty = (back < -tokens.unsqueeze(-1)).unsqueeze(-1)
    key, value = (pick(x, places).masked_fill(empty, 0).to(state.key.dtype) for x in (k, v))
    return RoutingState(tokens, key, value)


# ------------------------------------------------------------------------------------------------ what both forms share


def _recomputed(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outputs, whose products the backward pass computes anew."""
    if is_traced() or is_transformed() or not any(x.requires_grad for x in (q, k, v)):
        return attend(q, k, v)
    out = checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)  # as it returns
    return out


def _add_up(x: Tensor, some: Tensor, places: Tensor, length: int) -> Tensor:
    """Sums (batch, heads, length, channels) of x (batch, heads, ..., channels) by place, where there are ``some``."""
    batch, heads, channels = *x.shape[:2], x.shape[-1]
    row = torch.arange(batch * heads, device=x.device).view(batch, heads, *(1,) * (places.ndim - 2)) * length
    flat = (row + places.clamp(max=length - 1)).flatten()
    x = x.masked_fill(~some.unsqueeze(-1), 0).reshape(-1, channels)
    return x.new_zeros(batch * heads * length, channels).index_add(0, flat, x).unflatten(0, (batch, heads, length))
