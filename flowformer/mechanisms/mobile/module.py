"""Mobile-Attention module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.mobile.operation import (
    LAYOUT,
    init_mobile_state,
    mobile_attention,
    mobile_attention_step,
)
from flowformer.mechanisms.mobile.options import OPTIONS, mobile_options
from flowformer.mechanisms.mobile.weights import flows, weights
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.weights import flows_of, rows_of, truth_of


@register(
    "mobile",
    operation=mobile_attention,
    truth=truth_of(weights),
    rows=rows_of("mobile_attention", weights, LAYOUT),
    flows=flows_of("mobile_attention", flows, LAYOUT),
    step=mobile_attention_step,
    init_state=by_sizes(init_mobile_state),
    source="Yao et al., Mobile Attention, ICML 2024",
    cost="L K V",
    layout=LAYOUT,
)
class MobileAttention(Attention):
    """Mobile-Attention (Yao et al., ICML 2024): self-attention whose flow is conserved among the heads of a token.

    See :mod:`flowformer.ops.mobile`. As published, outputs grow in proportion to the number of tokens, and something
    after the module has to absorb it; ``normalize=True`` makes their scale independent of it.

    Args:
        dim: Channels of input and output.
        num_heads: Heads. Flow is conserved among them: with one head there is nothing to conserve.
        causal: Output t depends on positions up to t only.
        bias: Whether the four projections have biases.
        dropout: Applied after the output projection. The published module uses 0.05.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.
        conv: Width of a short convolution, as in :class:`flowformer.mechanisms.Attention`, like the two that follow.
        output_norm: Normalise the operation's output, head by head.
        output_gate: Gate it by the input.
        device: Of the parameters.
        dtype: Of the parameters.
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

    further_options = OPTIONS

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        head_dim: int | None = None,
        conv: int = 0,
        output_norm: bool = False,
        output_gate: bool = False,
        device: Any = None,
        dtype: Any = None,
        **overrides: Any,
    ) -> None:
        super().__init__(
            dim, num_heads, causal=causal, bias=bias, dropout=dropout, head_dim=head_dim, conv=conv,
            output_norm=output_norm, output_gate=output_gate, device=device, dtype=dtype,
        )  # fmt: skip
        self.overrides = overrides
        self.options = mobile_options(**overrides)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return self.overrides

    def extra_repr(self) -> str:
        """Sizes and options, for printing."""
        options = ", ".join(f"{f.name}={getattr(self.options, f.name)!r}" for f in fields(self.options))
        return f"{super().extra_repr()}, {options}"
