"""What distinguishes the variants of Flow-Attention: options, and the presets of the published code."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flowformer.common.names import nearest

RELU_FLOOR = 1e-6  # published with the relu feature map: keeps every capacity positive


@dataclass(frozen=True)
class FlowOptions:
    """What distinguishes one variant of Flow-Attention from another.

    Attributes:
        feature_map: ``"sigmoid"``, or ``"relu"`` for relu(x) + 1e-6.
        clamp: Bound c of the conserved outgoing flow before competition; ``None`` for no bound.
        eps: Added to every element of both factors of each flow.
        flow_eps: Added to each of the four flows besides.
        competition: Axis over which sources compete: ``"sequence"``, ``"heads"`` (the heads of one token), or ``None``
            for no competition.
        allocation: Whether sinks are gated by their conserved incoming flow.
        rescale: Multiply the conserved outgoing flow by S / L before the clamp, so that its mean is 1 for any pair of
            lengths. As published (``False``) its mean is L / S: with a clamp of 1 and L > S every source is clipped to
            1 and competition is uniform. No difference where L == S.
    """

    feature_map: str = "sigmoid"
    clamp: float | None = 1.0
    eps: float = 1e-6
    flow_eps: float = 0.0
    competition: str | None = "sequence"
    allocation: bool = True
    rescale: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.feature_map not in ("sigmoid", "relu"):
            raise ValueError(f"feature_map must be 'sigmoid' or 'relu', got {self.feature_map!r}")
        if self.competition not in ("sequence", "heads", None):
            raise ValueError(f"competition must be 'sequence', 'heads' or None, got {self.competition!r}")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive or None, got {self.clamp!r}")
        for name in ("eps", "flow_eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("allocation", "rescale"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def values(self) -> tuple[Any, ...]:
        """The options in the order of their declaration, as the native operators take them."""
        return (
            *(self.feature_map, self.clamp, self.eps, self.flow_eps),
            *(self.competition, self.allocation, self.rescale),
        )


OPTIONS = tuple(field.name for field in fields(FlowOptions))

# Each preset reproduces one file of thuml/Flowformer.
PRESETS: dict[str, FlowOptions] = {
    "core": FlowOptions(),  # Flow_Attention.py; also the GPT-style module
    "vision": FlowOptions(flow_eps=1e-6),  # Flowformer_CV/flowformer.py
    "timeseries": FlowOptions(clamp=None),  # Flowformer_TimeSeries/models/Flow_Attention.py
    "lra": FlowOptions(feature_map="relu", clamp=None, competition="heads"),  # Flowformer_LRA, flow_attention.py
    "wikitext": FlowOptions(clamp=5.0),  # Flowformer_NLP/flow_attention.py, causal
    "decision": FlowOptions(clamp=10.0),  # Flowformer_RL, flowformer_attention.py, causal
}


def flow_options(preset: str = "core", **overrides: Any) -> FlowOptions:
    """The options of a preset, with some of them overridden.

    Raises:
        ValueError: for an unknown preset or a value out of range.
        TypeError: for an option that does not exist.
    """
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there is {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
    if not overrides:
        return PRESETS[preset]
    for name in overrides:
        if name not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise TypeError(f"Flow-Attention has no option {name!r}; it has {known}{nearest(name, OPTIONS)}")
    return FlowOptions(**{name: overrides.get(name, getattr(PRESETS[preset], name)) for name in OPTIONS})
