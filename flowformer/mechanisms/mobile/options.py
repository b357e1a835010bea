"""What distinguishes the variants of Mobile-Attention."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flowformer.common.names import nearest
from flowformer.mechanisms.flow.options import FlowOptions


@dataclass(frozen=True)
class MobileOptions:
    """What distinguishes one variant of Mobile-Attention from another. The defaults are the published form.

    Attributes:
        feature_map: ``"sigmoid"``, or ``"relu"`` for relu(x) + 1e-6.
        clamp: Bound c of the conserved outgoing flow before competition; ``None`` for no bound.
        eps: Added to every element of both factors of each flow.
        competition: Among whom tokens' weights are shared, with mean 1: ``"sequence"``, ``"heads"`` (the heads of one
            token), or ``None`` for no competition.
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
        """Refuse values out of range."""
        # What Flow-Attention has as well is refused in its words.
        FlowOptions(self.feature_map, self.clamp, self.eps, competition=self.competition, allocation=self.allocation)
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize must be True or False, got {self.normalize!r}")


_NAMES = tuple(field.name for field in fields(MobileOptions))


def mobile_options(**overrides: Any) -> MobileOptions:
    """The published options, with some of them overridden.

    Raises:
        ValueError: for a value out of range.
        TypeError: for an option that does not exist.
    """
    for name in overrides:
        if name not in _NAMES:
            known = ", ".join(_NAMES)
            raise TypeError(f"Mobile-Attention has no option {name!r}; it has {known}{nearest(name, _NAMES)}")
    return MobileOptions(**overrides)
