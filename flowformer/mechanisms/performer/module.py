"""The module of Performer attention, and its row of the registry."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from flowformer.core.checks import check_flag, check_optional_sizes
from flowformer.mechanisms.draws import DrawnAttention, orthogonal_gaussian
from flowformer.mechanisms.performer.operation import performer_attention, performer_attention_step, state_of
from flowformer.mechanisms.performer.options import OPTIONS, performer_options
from flowformer.mechanisms.performer.weights import performer_weights
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import rows_of, truth_of


@register(
    "performer",
    operation=performer_attention,
    truth=truth_of(performer_weights),
    rows=rows_of("performer_attention", performer_weights),
    step=performer_attention_step,
    init_state=state_of,
    source="Choromanski et al., Rethinking attention with Performers, ICLR 2021",
    cost="L m (K + V)",
)
class PerformerAttention(DrawnAttention):
    """Performer attention by random features, FAVOR+ (Choromanski et al., 2021), in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        num_features: m; int(K ln K) for K channels of a head if absent, as in performer-pytorch. Long Range Arena has
            256.
        orthogonal: Whether rows of W are orthogonal in blocks of K; otherwise all are drawn independently.
        row_norms: Norms of orthogonal rows: ``"gaussian"``, those of Gaussian vectors, or ``"constant"``, sqrt(K).
        **options: As :class:`flowformer.mechanisms.draws.DrawnAttention` takes them, and those of
            :class:`PerformerOptions`.

    Raises:
        TypeError, ValueError: for sizes or options that do not fit.
    """

    further_options = OPTIONS

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_features: int | None = None,
        orthogonal: bool = True,
        row_norms: Literal["gaussian", "constant"] = "gaussian",
        **options: Any,
    ) -> None:
        overrides = {name: options.pop(name) for name in self.further_options if name in options}
        super().__init__(dim, num_heads, **options)
        check_optional_sizes(num_features=num_features)
        check_flag("orthogonal", orthogonal)
        if row_norms not in ("gaussian", "constant"):
            raise ValueError(f"row_norms must be one of gaussian, constant, got {row_norms!r}")
        self.overrides, self.options = overrides, performer_options(**overrides)
        default = max(1, int(self.head_dim * math.log(self.head_dim)))
        self.num_features = default if num_features is None else num_features
        self.orthogonal, self.row_norms = orthogonal, row_norms
        self.register_drawn()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """W, as ``projection``."""
        if not self.options.projected:
            return {}
        if not self.orthogonal:
            return {"projection": torch.randn(self.num_features, self.head_dim, generator=generator)}
        scaled = self.row_norms == "gaussian"
        return {"projection": orthogonal_gaussian(self.num_features, self.head_dim, generator, scaled=scaled)}

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """W, where there is one."""
        return (self.get_buffer("projection"),) if self.options.projected else ()

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return dict(self.overrides)
