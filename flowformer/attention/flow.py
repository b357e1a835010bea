"""Flow-Attention as a module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flowformer import ops
from flowformer.attention.base import Attention


class FlowAttention(Attention):
    """Attention in linear time by conservation of flow (Wu et al., ICML 2022): see :mod:`flowformer.ops.flow`.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        causal: Output t depends on positions up to t only.
        preset: The variant of the published code to follow; ``"core"`` unless you reproduce an experiment.
        bias: Whether the four projections have biases.
        dropout: Applied after the output projection. The published core module uses 0.05.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.
        **overrides: Options of :class:`flowformer.ops.FlowOptions` that depart from the preset, for example
            ``competition=None`` for the ablation without competition.

    Raises:
        ValueError, TypeError: for sizes that do not fit, an unknown preset or option.

    Example:
        >>> import torch
        >>> from flowformer import FlowAttention
        >>> attention = FlowAttention(dim=64, num_heads=4)
        >>> attention(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        preset: str = "core",
        bias: bool = True,
        dropout: float = 0.0,
        head_dim: int | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias, dropout=dropout, head_dim=head_dim)
        self.preset, self.overrides = preset, overrides
        self.options = ops.flow_options(preset, **overrides)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        """Call the operation on (batch, length, heads, channels)."""
        return ops.flow_attention(q, k, v, causal=self.causal, preset=self.preset, **self.overrides, **arguments)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, ops.FlowState]:
        """Call the operation's step on (batch, heads, channels)."""
        return ops.flow_attention_step(q, k, v, state, preset=self.preset, **self.overrides)

    def fresh_state(self, *sizes: int, dtype: torch.dtype, device: torch.device) -> ops.FlowState:
        """The state before the first token."""
        return ops.init_flow_state(*sizes, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        """Sizes and options, for printing."""
        options = ", ".join(f"{f.name}={getattr(self.options, f.name)!r}" for f in fields(self.options))
        return f"{super().extra_repr()}, preset={self.preset!r}, {options}"
