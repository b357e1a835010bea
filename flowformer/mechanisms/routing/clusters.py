"""Clusters of routing attention: which tokens are in them, and how their centroids are learned.

Similarities are products of directions x / |x| with centroids, in float64, so that vectors of any dtype are in the same
clusters as their exact copies. Gradients take clusters as given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import check_table
from flowformer.core.precision import state_dtype


def check_centroids(op: str, centroids: Any, q: Tensor) -> None:
    """Raise unless centroids are (heads, clusters, K) for queries (..., heads, K), on their device."""
    heads, channels = q.shape[-2:]
    check_table(f"{op}: centroids", centroids, "heads, clusters, K", (heads, None, channels), q.device)


def unit(x: Tensor) -> Tensor:
    """Return vectors of length 1; zeros, which have no direction, stay zeros."""
    return x / _size(x).unsqueeze(-1)


def _size(x: Tensor) -> Tensor:
    """What vectors are divided by: their length, infinity for zeros."""
    size = x.norm(dim=-1)
    return size.masked_fill(size == 0, torch.inf)


def similarity(x: Tensor, centroids: Tensor) -> Tensor:
    """Return products (batch, heads, clusters, tokens) of centroids with directions of x (batch, heads, tokens, K)."""
    wide = state_dtype(x.device)
    x = x.detach().to(wide)
    return (centroids.detach().to(wide) @ x.mT) / _size(x).unsqueeze(-2)  # clusters are fewer than channels


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the cluster of the most similar centroid, (batch, heads, tokens)."""
    return similarity(x, centroids).argmax(-2)


def distortion(x: Tensor, centroids: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean of (x / |x| - centroid)^2 over tokens, with the most similar centroid of each, and channels.

    Args:
        x: (batch, heads, tokens, K).
        centroids: (heads, clusters, K), which have no gradient here.
        real: Which tokens count, (batch, tokens); ``None`` for all.
    """
    head = torch.arange(x.shape[1], device=x.device).view(-1, 1)
    squares = (unit(x) - centroids.detach().to(x.dtype)[head, nearest(x, centroids)]).square()
    if real is None:
        return squares.mean()
    real = real[:, None, :, None].expand_as(squares)
    return squares.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)


@torch.no_grad()
def move_centroids(x: Tensor, centroids: Tensor, real: Tensor | None, decay: float) -> Tensor:
    """Return centroids after one step of online k-means.

    With m the direction of the sum of the directions of the tokens that are most similar to a centroid, it becomes
    decay * centroid + (1 - decay) * m; one without a token stays.

    Args:
        x: (batch, heads, tokens, K).
        centroids: (heads, clusters, K).
        real: Which tokens count, (batch, tokens); ``None`` for all.
        decay: Of the moving average.
    """
    heads, clusters, channels = centroids.shape
    cluster, directions = nearest(x, centroids), unit(x.to(state_dtype(x.device)))
    if real is not None:
        directions = directions.masked_fill(~real[:, None, :, None], 0)
    rows = (cluster + clusters * torch.arange(heads, device=x.device).view(-1, 1)).flatten()
    sums = directions.new_zeros(heads * clusters, channels).index_add(0, rows, directions.flatten(0, 2))
    means = unit(sums).unflatten(0, (heads, clusters)).to(centroids.dtype)
    found = means.square().sum(-1, keepdim=True) > 0
    return torch.where(found, decay * centroids + (1 - decay) * means, centroids)
