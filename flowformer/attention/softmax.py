"""Softmax attention as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer import ops
from flowformer.attention.base import Attention, cast_state


class SoftmaxAttention(Attention):
    """The Transformer's attention (Vaswani et al., 2017), by PyTorch's fused implementation.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        causal: Output t depends on positions up to t only.
        bias: Whether the four projections have biases.
        dropout: Applied after the output projection; the attention weights themselves are not dropped.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        """Call the operation on (batch, length, heads, channels)."""
        if arguments.get("initial_state") is not None:
            arguments["initial_state"] = cast_state(arguments["initial_state"], ops.SoftmaxState, q.dtype)
        return ops.softmax_attention(q, k, v, causal=self.causal, **arguments)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, ops.SoftmaxState]:
        """Call the operation's step on (batch, heads, channels)."""
        return ops.softmax_attention_step(q, k, v, cast_state(state, ops.SoftmaxState, q.dtype))

    def fresh_state(self, *sizes: int, dtype: torch.dtype, device: torch.device) -> ops.SoftmaxState:
        """The state before the first token."""
        return ops.init_softmax_state(*sizes, dtype=dtype, device=device)
