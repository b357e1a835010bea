"""Routing attention module, and its row of the registry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import check_flag, check_number, check_sizes
from flowformer.mechanisms.draws import DrawnAttention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.routing.clusters import distortion, move_centroids, unit
from flowformer.mechanisms.routing.operation import routing_attention
from flowformer.mechanisms.routing.scores import WINDOW, check_options
from flowformer.mechanisms.routing.state import RoutingState, init_routing_state, routing_attention_step
from flowformer.mechanisms.routing.weights import routing_weights
from flowformer.mechanisms.weights import rows_of, truth_of

COMMITMENT = 1e-4  # of the loss, of routing-transformer
DECAY = 0.999  # of the moving average of centroids, likewise


def _state_of(
    batch: int, heads: int, key: int, value: int, centroids: Tensor, *, window: int = WINDOW,
    dtype: torch.dtype = torch.float32, device: Any = None, **options: Any,
) -> RoutingState:  # fmt: skip
    return init_routing_state(batch, heads, key, value, centroids.shape[1], dtype=dtype, device=device, window=window)


@register(
    "routing",
    operation=routing_attention,
    truth=truth_of(routing_weights),
    rows=rows_of("routing_attention", routing_weights),
    step=routing_attention_step,
    init_state=_state_of,
    source="Roy et al., Efficient content-based sparse attention with Routing Transformers, TACL 2021",
    cost="clusters (L K + w^2 (K + V)); causal L (clusters K + 2 w (K + V))",
    cannot={"smooth": "which tokens are in a cluster is a step of queries and keys, whose gradients take it as given"},
)
class RoutingAttention(DrawnAttention):
    """Attention within clusters of the Routing Transformer (Roy et al., 2021).

    Centroids are a buffer, random directions at first. Neither the forward nor the backward pass changes them:
    training calls :meth:`update_centroids`, best after each step of the optimizer.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        num_clusters: Clusters of each head; about L / window, so that each token is in one.
        window: As in :func:`routing_attention`.
        shared_qk: Queries are keys: there is no ``k_proj``. Without cross-attention.
        sees_future: As in :func:`routing_attention`.
        **options: As :class:`flowformer.mechanisms.draws.DrawnAttention` takes them.

    Raises:
        TypeError, ValueError: for options of another type or out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_clusters: int = 8,
        window: int = WINDOW,
        shared_qk: bool = False,
        sees_future: bool = False,
        **options: Any,
    ) -> None:
        check_flag("shared_qk", shared_qk)
        self.shared_qk = shared_qk  # the base class asks for it
        super().__init__(dim, num_heads, **options)
        check_sizes(num_clusters=num_clusters)
        check_options("routing attention", window, shared_qk, sees_future, self.causal)
        self.num_clusters, self.window, self.sees_future = num_clusters, window, sees_future
        self.register_drawn()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random directions as centroids."""
        return {"centroids": unit(torch.randn(self.num_heads, self.num_clusters, self.head_dim, generator=generator))}

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Return the centroids."""
        return (self.centroids,)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"window": self.window, "shared_qk": self.shared_qk, "sees_future": self.sees_future}

    @property
    def projections(self) -> tuple[str, ...]:
        """Queries have one, and keys unless they are the queries."""
        return ("q",) if self.shared_qk else ("q", "k")

    def resolve(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """As of the base class; refuses a context where queries are keys."""
        if self.shared_qk and context is not None and (context is not x or context_mask is not None):
            raise ValueError(f"{type(self).__name__}: context is not supported with shared_qk, since queries are keys")
        return super().resolve(x, context, mask, context_mask)

    def commitment_loss(self, x: Tensor, *, mask: Tensor | None = None, weight: float = COMMITMENT) -> Tensor:
        """Return the loss that draws queries and keys of self-attention to the centroids of their clusters.

        It is ``weight`` times the mean square of x / |x| - mu_c over all tokens and channels of queries and keys, with
        the most similar centroid of each, as in routing-transformer. It is to be added to the loss of a model.

        Args:
            x: (batch, L, dim), the module's input.
            mask: (batch, L) boolean, True = real token.
            weight: Of the loss.
        """
        check_number("weight", weight, at_least=0)
        tokens, real = self._routed(x, mask)
        return weight * distortion(tokens, self.get_buffer("centroids"), real)

    @torch.no_grad()
    def update_centroids(self, x: Tensor, *, mask: Tensor | None = None, decay: float = DECAY) -> None:
        """Move the centroids, in place, towards the mean directions of the queries and keys that are nearest to them.

        One step of online k-means over a batch of self-attention, as routing-transformer takes one in each backward
        pass: mu_c becomes decay mu_c + (1 - decay) m_c, with m_c the direction of the sum of the directions of the
        tokens for which it is the most similar centroid. One without a token stays. ``decay=0`` gives k-means itself,
        of which some steps over a batch are a better start than random directions.

        Args:
            x: (batch, L, dim), the module's input.
            mask: (batch, L) boolean, True = real token.
            decay: Of the moving average, 0 to 1.
        """
        check_number("decay", decay, at_least=0, at_most=1)
        tokens, real = self._routed(x, mask)
        centroids = self.get_buffer("centroids")
        centroids.copy_(move_centroids(tokens, centroids, real, decay))

    def _routed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Queries and keys (batch, heads, tokens, K), and which of them are real."""
        x, source, masks = self.resolve(x, None, mask, None)
        q, k, *_ = self.project(x, source, masks)
        if self.shared_qk:
            return q.transpose(1, 2), mask
        return torch.cat([q, k], 1).transpose(1, 2), None if mask is None else torch.cat([mask, mask], 1)
