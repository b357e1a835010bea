"""Options of Flow-Attention, and the presets of the published code."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from flowformer.common.names import nearest
from flowformer.core.checks import check_flag, check_number
from flowformer.core.decay import check_decay

RELU_FLOOR = 1e-6  # published with the relu feature map: keeps every capacity positive
FEATURE_MAPS = ("sigmoid", "relu", "elu", "softmax", "learned")


class KernelOptions(NamedTuple):
    """What operators take of :class:`FlowOptions`, in their order; ``feature_map`` may be "given": features already."""

    feature_map: str
    clamp: float | None
    eps: float
    flow_eps: float
    competition: str | None
    allocation: bool
    rescale: bool


@dataclass(frozen=True)
class FlowOptions:
    """Options of Flow-Attention.

    Attributes:
        feature_map: The published ``"sigmoid"``, or ``"relu"`` for relu(x) + 1e-6. Others: ``"elu"`` for elu(x) + 1;
            ``"softmax"`` for K [softmax(x), softmax(-x)] over channels (2 K of them), with which a query can point at a
            key that resembles it; ``"learned"`` for the same of x W with learned W, a matrix for each head.
        clamp: Bound c of the conserved outgoing flow before competition; ``None`` for no bound.
        eps: Added to every element of both factors of each flow.
        flow_eps: Added to each of the four flows besides.
        competition: Axis over which sources compete: ``"sequence"``, ``"heads"`` (the heads of one token), or ``None``
            for no competition.
        allocation: Whether sinks are gated by their conserved incoming flow.
        rescale: Multiply the conserved outgoing flow by S / L before the clamp, so that its mean is 1 for any pair of
            lengths. As published (``False``) its mean is L / S: with a clamp of 1 and L > S every source is clipped to
            1 and competition is uniform. No difference where L == S.
        decay: Whether capacity decays with the distance of source and sink: ``None``, or per head ``"fixed"`` (time
            constants of 4 to 64 tokens, and heads without), ``"learned"`` (from there) or ``"token"`` (learned, and
            dependent on the token). Not in cross-attention.
        temperature: Whether competition and allocation have learned temperatures and an offset for each head.
    """

    feature_map: str = "sigmoid"
    clamp: float | None = 1.0
    eps: float = 1e-6
    flow_eps: float = 0.0
    competition: str | None = "sequence"
    allocation: bool = True
    rescale: bool = False
    decay: str | None = None
    temperature: bool = False

    def __post_init__(self) -> None:
        """Raise for invalid values."""
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {self.feature_map!r}")
        check_decay(self.decay)
        if self.competition not in ("sequence", "heads", None):
            raise ValueError(f"competition must be 'sequence', 'heads' or None, got {self.competition!r}")
        for name in ("eps", "flow_eps", *(() if self.clamp is None else ("clamp",))):
            check_number(name, getattr(self, name), at_most=None if name == "clamp" else 1)
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive or None, got {self.clamp!r}")
        for name in ("eps", "flow_eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("allocation", "rescale", "temperature"):
            check_flag(name, getattr(self, name))

    @property
    def learns(self) -> bool:
        """Whether an operation needs learned tensors, or the default decay."""
        return self.decay is not None or self.temperature or self.feature_map == "learned"

    def feature_channels(self, channels: int) -> int:
        """Return the number of features of queries and keys with so many channels."""
        return 2 * channels if self.feature_map in ("softmax", "learned") else channels

    def values(self) -> KernelOptions:
        """Return those options that operators take, in their order."""
        return KernelOptions(*(getattr(self, name) for name in KernelOptions._fields))


OPTIONS = tuple(field.name for field in fields(FlowOptions))

# Each of the first six reproduces one file of thuml/Flowformer; the last is ours.
PRESETS: dict[str, FlowOptions] = {
    "core": FlowOptions(),  # Flow_Attention.py; also the GPT-style module
    "vision": FlowOptions(flow_eps=1e-6),  # Flowformer_CV/flowformer.py
    "timeseries": FlowOptions(clamp=None),  # Flowformer_TimeSeries/models/Flow_Attention.py
    "lra": FlowOptions(feature_map="relu", clamp=None, competition="heads"),  # Flowformer_LRA, flow_attention.py
    "wikitext": FlowOptions(clamp=5.0),  # Flowformer_NLP/flow_attention.py, causal
    "decision": FlowOptions(clamp=10.0),  # Flowformer_RL, flowformer_attention.py, causal
    "distance": FlowOptions(feature_map="elu", decay="token"),  # docs/distance.md has what each part of it is worth
}

# What modules have besides, where they are not told otherwise.
MODULE_OPTIONS: dict[str, dict[str, Any]] = {"distance": {"conv": 4, "output_norm": True, "output_gate": True}}


def flow_options(preset: str = "core", **overrides: Any) -> FlowOptions:
    """Return the options of a preset, with some of them overridden.

    Raises:
        ValueError: for an unknown preset or a value out of range.
        TypeError: for an option that does not exist.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; available: {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
    if not overrides:
        return PRESETS[preset]
    for name in overrides:
        if name not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise TypeError(f"Flow-Attention has no option {name!r}; available: {known}{nearest(name, OPTIONS)}")
    return FlowOptions(**{name: overrides.get(name, getattr(PRESETS[preset], name)) for name in OPTIONS})
