"""Format of decisions: how observations, actions and returns are scaled for a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.common.values import read_integer, read_number, read_numbers
from flowformer.tasks.decision.episodes import Episodes
from flowformer.tasks.decision.playing import EvaluationOptions, PlayOptions, evaluate, play
from flowformer.tasks.decision.policies import Evaluation, Policy, make_policy
from flowformer.tasks.decision.trials import Trial
from flowformer.tasks.decision.windows import Padding
from flowformer.tasks.protocols import Track

STD_OFFSET = 1e-6  # added to standard deviations: kzl/decision-transformer, and thuml/Flowformer with it
_PIECE = 2**18  # steps that statistics are computed from at a time


@dataclass(frozen=True)
class DecisionFormat:
    """Decision format: everything needed to use a trained model in an environment.

    Attributes:
        environment: Name of the environment; "" if it is not known.
        mean: Mean of each number of an observation.
        std: Standard deviation of each, plus 1e-6.
        action_low: Smallest action by dimension; ``None`` where actions are discrete.
        action_high: Largest action by dimension, likewise.
        num_actions: Number of discrete actions; ``None`` where actions are continuous.
        context: Steps that a model sees.
        return_scale: What returns are divided by.
        targets: Returns that the policy is asked for.
        max_timestep: Numbers of steps in an episode that a model tells apart; later steps count as the last of them.
        padding: Where shorter windows are padded: "right" as published, "left" in the original Decision Transformer.
    """

    kind: ClassVar[str] = "decisions"
    evaluate_options: ClassVar[type] = EvaluationOptions
    play_options: ClassVar[type] = PlayOptions

    environment: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    action_low: tuple[float, ...] | None = None
    action_high: tuple[float, ...] | None = None
    num_actions: int | None = None
    context: int = 20
    return_scale: float = 1000.0
    targets: tuple[float, ...] = ()
    max_timestep: int = 1000
    padding: Padding = "right"

    def __post_init__(self) -> None:
        """Check that the values fit each other.

        Raises:
            ValueError: if they do not.
        """
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations of observations")
        if self.padding not in get_args(Padding):
            raise ValueError(f"padding must be one of {', '.join(get_args(Padding))}, got {self.padding!r}")
        if self.num_actions is not None:
            if (self.action_low, self.action_high) != (None, None):
                raise ValueError("discrete actions have no bounds")
        elif self.action_low is None or self.action_high is None or len(self.action_low) != len(self.action_high):
            raise ValueError("expected num_actions, or as many bounds action_low as action_high")
        elif not all(low < high for low, high in zip(self.action_low, self.action_high, strict=True)):
            raise ValueError(f"bounds of actions from {self.action_low} to {self.action_high}: low must be below high")

    @classmethod
    def fit(cls, episodes: Episodes, *, environment: str | None = None, **options: Any) -> DecisionFormat:
        """Compute the statistics of recorded episodes.

        Bounds of continuous actions that the episodes do not tell, or that are infinite, are -1 and 1, or where actions
        exceed these, their smallest and largest values.

        Args:
            episodes: The training set.
            environment: Where the model is to act; ``None`` for that of the episodes.
            **options: Other attributes: ``context``, ``return_scale``, ``targets``, ``max_timestep``, ``padding``.
        """
        mean, std = _measure(episodes.observations)
        low, high = (None, None) if episodes.num_actions is not None else _bounds(episodes)
        name = episodes.environment if environment is None else environment
        return cls(name, mean, std, low, high, episodes.num_actions, **options)

    @property
    def observation_dim(self) -> int:
        """Numbers of an observation."""
        return len(self.mean)

    @property
    def action_dim(self) -> int | None:
        """Numbers of an action; ``None`` where actions are discrete."""
        return None if self.action_low is None else len(self.action_low)

    def standardise(self, observations: np.ndarray) -> np.ndarray:
        """Return observations (..., S) minus their mean, divided by their deviation: float32."""
        mean, std = np.array(self.mean, dtype=np.float32), np.array(self.std, dtype=np.float32)
        return (np.asarray(observations, dtype=np.float32) - mean) / std

    def scale_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return actions as a model gives them: their bounds become -1 and 1; (..., A) float32, or discrete ones.

        Nothing changes where the bounds are -1 and 1, as in Hopper, HalfCheetah and Walker2d.
        """
        middle, half = self._range()
        return actions if half is None else ((actions - middle) / half).astype(np.float32)

    def unscale_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return actions of a model as the environment takes them: the inverse of :meth:`scale_actions`."""
        middle, half = self._range()
        return actions if half is None else (actions * half + middle).astype(np.float32)

    def _range(self) -> tuple[np.ndarray | float, np.ndarray | None]:
        """Middle and half the width of the bounds of actions; 0 and ``None`` where nothing is scaled."""
        if self.action_low is None or self.action_high is None:
            return 0.0, None
        low, high = np.array(self.action_low), np.array(self.action_high)
        if (low == -1).all() and (high == 1).all():
            return 0.0, None
        return (low + high) / 2, (high - low) / 2

    def collate(
        self, items: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray] | Trial]
    ) -> dict[str, Tensor]:
        """Make a batch of windows, or of trials.

        Args:
            items: Windows, as :class:`flowformer.tasks.decision.windows.Windows` gives them one by one or all at once;
                or trials.

        Returns:
            Of windows "observations": (batch, K, S) float32, standardised; "actions": (batch, K, A) float32, their
            bounds -1 and 1, or (batch, K) int64; "returns_to_go": (batch, K) float32, divided by the scale;
            "timesteps": (batch, K) int64; "mask": (batch, K) bool, True for steps.
            Of trials "targets": (batch,) float64, not scaled; "seeds": (batch,) int64.

        Raises:
            ValueError: no items.
        """
        if not len(items):
            raise ValueError("a batch must contain at least one window or trial, got none")
        if not isinstance(items, Mapping):
            if isinstance(items[0], tuple):
                return _collate_trials(cast("Sequence[Trial]", items))
            windows = cast("Sequence[Mapping[str, np.ndarray]]", items)
            items = {name: np.stack([one[name] for one in windows]) for name in windows[0]}
        batch = {
            "observations": self.standardise(items["observations"]),
            "actions": self.scale_actions(items["actions"]),
            "returns_to_go": (items["returns_to_go"] / self.return_scale).astype(np.float32),
            "timesteps": np.minimum(items["timesteps"], self.max_timestep - 1),
            "mask": items["mask"],
        }
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def policy(self, model: nn.Module, evaluation: Evaluation | None = None) -> Policy:
        """Return what chooses the actions of a model: see :func:`flowformer.tasks.decision.policies.make_policy`."""
        return make_policy(model, self, evaluation)

    def evaluate(self, model: nn.Module, options: EvaluationOptions, *, track: Track) -> Iterator[str]:
        """Run episodes: see :func:`flowformer.tasks.decision.playing.evaluate`."""
        return evaluate(model, self, options, track)

    def play(self, model: nn.Module, options: PlayOptions, *, track: Track) -> Iterator[str]:
        """Film an episode: see :func:`flowformer.tasks.decision.playing.play`."""
        return play(model, self, options, track)

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        return {
            "environment": self.environment, "mean": list(self.mean), "std": list(self.std),
            "action_low": self.action_low and list(self.action_low),
            "action_high": self.action_high and list(self.action_high),
            "num_actions": self.num_actions, "context": self.context, "return_scale": self.return_scale,
            "targets": list(self.targets), "max_timestep": self.max_timestep, "padding": self.padding,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DecisionFormat:
        """Read a format that ``to_json`` wrote.

        Raises:
            ValueError: for values of another kind, or that do not fit each other.
        """
        discrete = values.get("num_actions") is not None
        low, high = (None if discrete else read_numbers(values, name) for name in ("action_low", "action_high"))
        environment = values.get("environment")
        if not isinstance(environment, str):
            raise ValueError(f"environment must be a text, got {environment!r:.80}")
        return cls(
            environment, read_numbers(values, "mean"), read_numbers(values, "std", above=0), low, high,
            read_integer(values, "num_actions") if discrete else None,
            read_integer(values, "context"), read_number(values, "return_scale", above=0),
            read_numbers(values, "targets") if values.get("targets") else (),
            read_integer(values, "max_timestep"), cast("Padding", values.get("padding")),
        )  # fmt: skip


def _collate_trials(trials: Sequence[Trial]) -> dict[str, Tensor]:
    targets, seeds = zip(*trials, strict=True)
    return {"targets": torch.tensor(targets, dtype=torch.float64), "seeds": torch.tensor(seeds, dtype=torch.int64)}


def _measure(observations: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (which divides by the number of steps, as NumPy's) by piece, added in float64."""
    pieces = [observations[start : start + _PIECE] for start in range(0, len(observations), _PIECE)]
    mean = sum(piece.sum(axis=0, dtype=np.float64) for piece in pieces) / len(observations)
    squares = sum(np.square(piece - mean).sum(axis=0) for piece in pieces)
    std = np.sqrt(squares / len(observations)) + STD_OFFSET
    return tuple(np.asarray(mean).tolist()), tuple(std.tolist())


def _bounds(episodes: Episodes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    low, high = episodes.action_low, episodes.action_high
    if low is not None and high is not None and np.isfinite([low, high]).all():
        return low, high
    seen = np.minimum(episodes.actions.min(axis=0), -1), np.maximum(episodes.actions.max(axis=0), 1)
    return tuple(seen[0].tolist()), tuple(seen[1].tolist())
