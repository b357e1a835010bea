"""Options of Mobile-Attention."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flowformer.common.names import nearest
from flowformer.core.checks import check_flag
from flowformer.mechanisms.flow.options import FlowOptions


@dataclass(frozen=True)
class MobileOptions:
    """Options of Mobile-Attention. The defaults are the published form.

    Attributes:
        feature_map: ``"sigmoid"``, or ``"relu"`` for relu(x) + 1e-6.
        clamp: Bound c of the conserved outgoing flow before competition; ``None`` for no bound.
        eps: Added to every element of both factors of each flow.
        competition: The axis along which tokens' weights compete, mean 1: ``"sequence"``, ``"heads"`` (the heads of
            one token), or ``None`` for no competition.
        allocation: Whether outputs are gated by the conserved incoming flow.
        normalize: Divide by the number of tokens (of those so far, in the causal form), so that the scale of outputs
            does not depend on it. As published (``False``) outputs grow in proportion to it.
    """

    feature_map: str = "sigmoid"
    clamp: float | None = 1.0
    eps: float = 1e-6
    competition: str | None = "sequence"
    allocation: bool = True
    normalize: bool = False

    def __post_init__(self) -> None:
        """Raise for invalid values."""
        if self.feature_map not in ("sigmoid", "relu"):
            raise ValueError(f"feature_map must be 'sigmoid' or 'relu', got {self.feature_map!r}")
        # What Flow-Attention has as well is refused in its words.
        FlowOptions(self.feature_map, self.clamp, self.eps, competition=self.competition, allocation=self.allocation)
        check_flag("normalize", self.normalize)


OPTIONS = tuple(field.name for field in fields(MobileOptions))


def mobile_options(**overrides: Any) -> MobileOptions:
    """Return the published options, with some of them overridden.

    Raises:
        ValueError: for a value out of range.
        TypeError: for an option that does not exist.
    """
    for name in overrides:
        if name not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise TypeError(f"Mobile-Attention has no option {name!r}; available: {known}{nearest(name, OPTIONS)}")
    return MobileOptions(**overrides)
