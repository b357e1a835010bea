"""Linear attention as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer import ops
from flowformer.attention.base import Attention


class LinearAttention(Attention):
    """Attention of the Linear Transformer (Katharopoulos et al., 2020): see :mod:`flowformer.ops.linear`.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        causal: Output t depends on positions up to t only.
        bias: Whether the four projections have biases.
        dropout: Applied after the output projection.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.
        eps: Added to the denominator.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        head_dim: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias, dropout=dropout, head_dim=head_dim)
        self.eps = eps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        """Call the operation on (batch, length, heads, channels)."""
        return ops.linear_attention(q, k, v, causal=self.causal, eps=self.eps, **arguments)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, ops.LinearState]:
        """Call the operation's step on (batch, heads, channels)."""
        return ops.linear_attention_step(q, k, v, state, eps=self.eps)

    def fresh_state(self, *sizes: int, dtype: torch.dtype, device: torch.device) -> ops.LinearState:
        """The state before the first token."""
        return ops.init_linear_state(*sizes, dtype=dtype, device=device)
