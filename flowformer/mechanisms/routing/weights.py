"""Rows of weights of routing attention, and its float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from flowformer.mechanisms.routing.operation import EPS
from flowformer.mechanisms.routing.scores import ITSELF, WINDOW
from flowformer.mechanisms.weights import Rows


def routing_weights(
    q: Tensor,
    k: Tensor,
    centroids: Tensor,
    *,
    causal: bool = False,
    window: int = WINDOW,
    shared_qk: bool = False,
    sees_future: bool = False,
) -> Rows:
    """Return rows of weights of one sequence: the mean over clusters of a softmax over the keys of each."""
    of_q = _similarities(q, centroids)
    of_k = of_q if shared_qk else _similarities(k, centroids)
    scaled = k / k.shape[-1] ** 0.5
    if shared_qk:
        size = k.norm(dim=-1, keepdim=True)
        scaled = scaled / torch.where(size > 0, size, torch.inf)
    place = torch.arange(len(k), device=k.device)

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", q[places], scaled)
        if shared_qk:
            scores = scores.masked_fill(places.unsqueeze(1) == place, ITSELF)
        past = place <= places.unsqueeze(1)
        if causal and not sees_future:
            cluster = of_q.argmax(1)
            seen = (cluster[:, places, None] == cluster[:, None]) & past
            since = seen.flip(-1).cumsum(-1).flip(-1)  # keys of the cluster from each on
            return _softmax(scores, seen & (since <= window))
        total, number = 0.0, scores.new_zeros(())
        for queries, keys in zip(_largest(of_q, window), _largest(of_k, window), strict=True):
            seen = queries[:, places, None] & keys[:, None] & (past if causal else True)
            total = total + _softmax(scores, seen)
            number = number + seen.any(-1, keepdim=True)
        return torch.as_tensor(total / (number + EPS))

    return rows


def _similarities(x: Tensor, centroids: Tensor) -> Tensor:
    """Products of directions with centroids, (heads, clusters, length)."""
    size = x.norm(dim=-1, keepdim=True)
    return torch.einsum("hck,ihk->hci", centroids, x / torch.where(size > 0, size, torch.inf)).detach()


def _largest(similar: Tensor, window: int) -> list[Tensor]:
    """Which tokens are among those of each cluster, (heads, length)."""
    found = similar.topk(min(window, similar.shape[-1]), -1).indices
    return list(torch.zeros_like(similar, dtype=torch.bool).scatter(-1, found, True).unbind(1))


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the keys that are seen; zeros where there are none."""
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0)
