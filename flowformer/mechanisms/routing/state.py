"""State of causal routing attention: the last tokens of each cluster."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import check_fresh_state, check_sizes, check_state, check_step
from flowformer.core.precision import no_autocast, state_dtype
from flowformer.mechanisms.routing.clusters import check_centroids, nearest
from flowformer.mechanisms.routing.scores import WINDOW, check_causal_options, keys_as, weigh


class RoutingState(NamedTuple):
    """State of causal routing attention; keys and values are float64.

    Attributes:
        tokens: How many tokens of each cluster there are in the state, (batch, heads, clusters), int64.
        key: The last ``window`` keys of each cluster, (batch, heads, clusters, window, K), zeros before the first.
        value: Their values, (batch, heads, clusters, window, V).
    """

    tokens: Tensor
    key: Tensor
    value: Tensor


def init_routing_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    num_clusters: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    window: int = WINDOW,
) -> RoutingState:
    """Return the state before the first token, in float64 for inputs of any ``dtype``."""
    op = "init_routing_state"
    sizes = {"heads": heads, "key_channels": key_channels, "value_channels": value_channels}
    check_fresh_state(op, batch, dtype, **sizes, num_clusters=num_clusters)
    check_sizes(**{f"{op}: window": window})
    device = torch.device("cpu") if device is None else torch.device(device)
    shape = (batch, heads, num_clusters, window)
    key = torch.zeros(*shape, key_channels, dtype=state_dtype(device), device=device)
    return RoutingState(key.new_zeros(shape[:3], dtype=torch.int64), key, key.new_zeros(*shape, value_channels))


def routing_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RoutingState,
    centroids: Tensor,
    *,
    window: int = WINDOW,
    shared_qk: bool = False,
    sees_future: bool = False,
) -> tuple[Tensor, RoutingState]:
    """Compute one token of causal routing attention, in time and memory that do not grow with the tokens before it.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        centroids: (heads, clusters, K).
        window: As in :func:`flowformer.ops.routing_attention`, like all that follow.
        shared_qk: Likewise.
        sees_future: Likewise; it must be False.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "routing_attention_step"
    check_causal_options(op, window, shared_qk, sees_future)
    check_step(op, q, k, v, state, RoutingState)
    check_centroids(op, centroids, q)
    batch, heads, channels, clusters = *q.shape, centroids.shape[1]
    fresh = init_routing_state(batch, heads, channels, v.shape[-1], clusters, device=q.device, window=window)
    check_state(op, state, fresh)
    with no_autocast(q.device):
        cluster = nearest(q.unsqueeze(2), centroids)
        joins = cluster == torch.arange(centroids.shape[1], device=q.device)
        tokens = (state.tokens + joins).clamp(max=window)
        key, value = (
            torch.where(joins[..., None, None], torch.cat([old[..., 1:, :], _row(new, old)], -2), old)
            for old, new in ((state.key, k), (state.value, v))
        )
        at = cluster[..., None, None]
        seen = torch.arange(window, device=q.device) >= window - tokens.gather(-1, cluster).unsqueeze(-1)
        itself = torch.arange(window, device=q.device) == window - 1 if shared_qk else None
        of_cluster, values = (x.take_along_dim(at, 2).squeeze(2) for x in (key, value))
        query = q.to(key.dtype).unsqueeze(2)
        weights = weigh(query @ keys_as(of_cluster, shared_qk).mT, ~seen, itself)
        return (weights @ values).squeeze(2).to(v.dtype), RoutingState(tokens, key, value)


def _row(x: Tensor, like: Tensor) -> Tensor:
    """One token (batch, heads, channels) for each cluster of (batch, heads, clusters, window, channels)."""
    return x.to(like.dtype)[:, :, None, None].expand(-1, -1, like.shape[2], -1, -1)
