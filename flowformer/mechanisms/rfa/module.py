"""The module of random feature attention, and its row of the registry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowformer.core.checks import check_flag, check_number, check_sizes
from flowformer.core.precision import sum_dtype
from flowformer.mechanisms.decay import of_sequence
from flowformer.mechanisms.draws import DrawnAttention, orthogonal_gaussian
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.rfa.operation import (
    Bound,
    Kind,
    rfa_attention,
    rfa_attention_step,
    rfa_options,
    rfa_weights,
    state_of,
)
from flowformer.mechanisms.weights import rows_of, truth_of


@register(
    "rfa",
    operation=rfa_attention,
    truth=truth_of(rfa_weights, of_sequence=of_sequence),
    rows=rows_of("rfa_attention", rfa_weights, of_sequence=of_sequence),
    step=rfa_attention_step,
    init_state=state_of,
    source="Peng et al., Random feature attention, ICLR 2021",
    cost="L D (K + V)",
)
class RFAAttention(DrawnAttention):
    """Random feature attention, RFA (Peng et al., 2021), in linear time.

    W is a random matrix of each head times ``scales``, learned for each of its channels, over the temperature. It is
    drawn once; the published code takes another of 500 stored ones at each step of training, for which :meth:`redraw`
    may be called.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        num_features: D, rows of W.
        gate: Forget by a gate g = sigmoid(w . x + b) for each head of each token; for causal modules.
        tau: Temperature.
        orthogonal: Whether rows of a random matrix are orthogonal in blocks of K.
        kind: As in :func:`rfa_attention`.
        feature_scale: Likewise.
        norm_eps: Likewise.
        bound: Likewise.
        least: Likewise.
        **options: As :class:`flowformer.mechanisms.draws.DrawnAttention` takes them.

    Raises:
        TypeError, ValueError: for sizes or options that do not fit.
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_features: int = 64,  # Peng et al., 2021, of their small language model
        gate: bool = False,
        tau: float = 1.0,
        orthogonal: bool = False,
        kind: Kind = "gaussian",
        feature_scale: float | None = 0.1,
        norm_eps: float = 1e-3,
        bound: Bound | None = None,
        least: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        check_sizes(num_features=num_features)
        check_flag("gate", gate)
        check_flag("orthogonal", orthogonal)
        check_number("tau", tau)
        if tau <= 0:
            raise ValueError(f"tau must be above 0, got {tau!r}")
        if gate and not self.causal:
            raise ValueError("gate=True requires causal=True, since a gate forgets what came before")
        self.options = rfa_options(
            "RFAAttention", kind=kind, feature_scale=feature_scale, norm_eps=norm_eps, bound=bound, least=least
        )
        self.num_features, self.gate, self.tau, self.orthogonal = num_features, gate, tau, orthogonal
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.scales = nn.Parameter(torch.ones(num_heads, self.head_dim, **factory))
        if gate:
            self.forget_proj = nn.Linear(dim, num_heads, **factory)
        self.register_drawn()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The random matrices, (heads, D, K), as ``projection``."""
        sizes = (self.num_features, self.head_dim)
        if self.orthogonal:
            matrices = [orthogonal_gaussian(*sizes, generator) for _ in range(self.num_heads)]
            return {"projection": torch.stack(matrices)}
        return {"projection": torch.randn(self.num_heads, *sizes, generator=generator)}

    def reset_parameters(self) -> None:
        """Re-initialize all parameters, and draw the random tensors as the constructor does."""
        super().reset_parameters()
        nn.init.ones_(self.scales)
        if self.gate:
            self.forget_proj.reset_parameters()

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """The logarithm of the gate, of inputs x, and W."""
        log_gate = None
        if self.gate and x is not None:
            logits = self.forget_proj(x)
            log_gate = nn.functional.logsigmoid(logits.to(sum_dtype(logits.dtype)))
        return log_gate, self.projection * self.scales.unsqueeze(1) / self.tau

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return self.options._asdict()
