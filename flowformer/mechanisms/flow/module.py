"""Flow-Attention module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.mechanisms.base import Attention, set_values
from flowformer.mechanisms.decay import LogDecay, of_sequence
from flowformer.mechanisms.flow.operation import flow_attention
from flowformer.mechanisms.flow.options import MODULE_OPTIONS, OPTIONS, flow_options
from flowformer.mechanisms.flow.state import fresh_state
from flowformer.mechanisms.flow.step import flow_attention_step
from flowformer.mechanisms.flow.weights import flows, weights
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import flows_of, rows_of, truth_of


@register(
    "flow",
    operation=flow_attention,
    truth=truth_of(weights, of_sequence=of_sequence),
    rows=rows_of("flow_attention", weights, of_sequence=of_sequence),
    flows=flows_of("flow_attention", flows, of_sequence=of_sequence),
    step=flow_attention_step,
    init_state=fresh_state,
    source="Wu et al., Flowformer, ICML 2022",
    cost="L K V",
)
class FlowAttention(Attention):
    """Attention in linear time by conservation of flow (Wu et al., ICML 2022): see :mod:`flowformer.mechanisms.flow`.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        causal: Output t depends on positions up to t only.
        preset: The variant of the published code to follow; ``"core"`` unless you reproduce an experiment. Or
            ``"distance"``, which is ours: capacity decays with distance, by a factor of each token, and the module has
            a convolution, an output norm and a gate. For self-attention.
        bias: Whether the four projections have biases.
        dropout: Applied after the output projection. The published core module uses 0.05.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.
        conv: Width of a short convolution, as in :class:`flowformer.mechanisms.Attention`, like the two that follow;
            the preset's if ``None``, which is none but for ``"distance"``.
        output_norm: Normalise the operation's output, head by head; the preset's if ``None``.
        output_gate: Gate it by the input; the preset's if ``None``.
        device: Of the parameters.
        dtype: Of the parameters.
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

    further_options = OPTIONS

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
        conv: int | None = None,
        output_norm: bool | None = None,
        output_gate: bool | None = None,
        device: Any = None,
        dtype: Any = None,
        **overrides: Any,
    ) -> None:
        options = flow_options(preset, **overrides)
        given = {"conv": conv, "output_norm": output_norm, "output_gate": output_gate}
        of_preset = MODULE_OPTIONS.get(preset, {})
        super().__init__(
            dim, num_heads, causal=causal, bias=bias, dropout=dropout, head_dim=head_dim, device=device, dtype=dtype,
            **of_preset | {name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
        self.preset, self.overrides, self.options = preset, overrides, options
        factory = {"device": device, "dtype": dtype}
        if options.decay is not None:
            self.log_decay = LogDecay(options.decay, dim, num_heads, **factory)
        if options.temperature:
            self.temperatures = nn.Parameter(torch.ones(3, num_heads, **factory))
        if options.feature_map == "learned":
            shape = (2, num_heads, self.head_dim, self.head_dim)
            self.feature_weights = nn.Parameter(torch.empty(shape, **factory))
        self._reset_own()

    def reset_parameters(self) -> None:
        """Re-initialize all parameters: gates and features start as without what is learned of them."""
        super().reset_parameters()
        self._reset_own()
        if self.options.decay is not None:
            self.log_decay.reset_parameters()

    def _reset_own(self) -> None:
        if self.options.temperature:
            nn.init.ones_(self.temperatures)
        if self.options.feature_map == "learned":
            set_values(self.feature_weights, torch.eye(self.head_dim, device="cpu"))

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Log-decays, of the inputs x where they depend on the token; temperatures, and weights of the feature map."""
        options = self.options
        if not options.learns:
            return ()
        decays = options.decay is not None and not (options.decay == "token" and x is None)
        return (
            self.log_decay(x) if decays else None,
            self.temperatures if options.temperature else None,
            self.feature_weights if options.feature_map == "learned" else None,
        )

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"preset": self.preset, **self.overrides}

    def extra_repr(self) -> str:
        """Sizes and options, for printing."""
        options = ", ".join(f"{f.name}={getattr(self.options, f.name)!r}" for f in fields(self.options))
        return f"{super().extra_repr()}, preset={self.preset!r}, {options}"
