"""Mobile-Attention as a module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flowformer import ops
from flowformer.attention.base import Attention


class MobileAttention(Attention):
    """Flow-Attention whose flow is conserved among the heads of a token (Yao et al., ICML 2024): self-attention.

    See :mod:`flowformer.ops.mobile`. As published, outputs grow in proportion to the number of tokens, and something
    after the module has to absorb it; ``normalize=True`` makes their scale independent of it.

    Args:
        dim: Channels of input and output.
        num_heads: Heads. Flow is conserved among them: with one head there is nothing to conserve.
        causal: Output t depends on positions up to t only.
        bias: Whether the four projections have biases.
        dropout: Applied after the output projection. The published module uses 0.05.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.
        **overrides: Options of :class:`flowformer.ops.MobileOptions` that depart from the published form.

    Raises:
        ValueError, TypeError: for sizes that do not fit, or an unknown option.

    Example:
        >>> import torch
        >>> from flowformer import MobileAttention
        >>> attention = MobileAttention(dim=64, num_heads=8, normalize=True)
        >>> attention(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])
    """

    self_only = "for queries and keys of a token meet in its flows"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        head_dim: int | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias, dropout=dropout, head_dim=head_dim)
        self.overrides = overrides
        self.options = ops.mobile_options(**overrides)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        """Call the operation on (batch, length, heads, channels)."""
        return ops.mobile_attention(q, k, v, causal=self.causal, **self.overrides, **arguments)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, ops.MobileState]:
        """Call the operation's step on (batch, heads, channels)."""
        return ops.mobile_attention_step(q, k, v, state, **self.overrides)

    def fresh_state(self, *sizes: int, dtype: torch.dtype, device: torch.device) -> ops.MobileState:
        """The state before the first token."""
        return ops.init_mobile_state(*sizes, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        """Sizes and options, for printing."""
        options = ", ".join(f"{f.name}={getattr(self.options, f.name)!r}" for f in fields(self.options))
        return f"{super().extra_repr()}, {options}"
