"""Recorded episodes of an environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.decision.scores import split_environment
from flowformer.tasks.fingerprint import hash_values

if TYPE_CHECKING:
    from flowformer.tasks.decision.simulators.environments import Spaces


@dataclass(frozen=True, eq=False)
class Episodes:
    """Recorded episodes of one environment, end to end in the same arrays.

    Attributes:
        observations: (N, S) float32, what the policy saw before each action.
        actions: (N, A) float32, or (N,) int64 where actions are discrete.
        rewards: (N,) float32, what followed each action.
        starts: (E + 1,) int64: episode e has the steps from ``starts[e]`` to ``starts[e + 1]``.
        terminated: (E,) bool: whether the episode ended in a terminal state; otherwise it was cut, by a limit of time
            for instance.
        environment: Name of the environment, such as ``Hopper-v5``; "" if it is not known.
        source: Where the episodes came from, for messages.
        action_low: Smallest action by dimension; ``None`` if it is not known, or actions are discrete.
        action_high: Largest action by dimension, likewise.
        num_actions: Number of discrete actions; ``None`` where actions are continuous.
        partial_steps: Steps of the source that are left out, since their episode has no end.

    Raises:
        DataError: for arrays of other shapes or types, and for episodes without steps.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    starts: np.ndarray
    terminated: np.ndarray
    environment: str = ""
    source: str = ""
    action_low: tuple[float, ...] | None = None
    action_high: tuple[float, ...] | None = None
    num_actions: int | None = None
    partial_steps: int = 0

    def __post_init__(self) -> None:
        """Check shapes and types."""
        steps = len(self.observations)
        checks = {
            "observations, (steps, size) float32": _is(self.observations, 2, np.float32),
            "actions, (steps, size) float32": self.num_actions is not None or _is(self.actions, 2, np.float32),
            "actions, (steps,) int64": self.num_actions is None or _is(self.actions, 1, np.int64),
            "rewards, (steps,) float32": _is(self.rewards, 1, np.float32),
            "starts, (episodes + 1,) int64": _is(self.starts, 1, np.int64),
            "terminated, (episodes,) bool": _is(self.terminated, 1, np.bool_),
        }
        for wanted, right in checks.items():
            if not right:
                name = wanted.partition(",")[0]
                came = getattr(self, name)
                self._fail(f"expected {wanted}; got {name} of shape {came.shape}, {came.dtype}")
        if not len(self.actions) == len(self.rewards) == steps:
            self._fail(f"{steps:,} observations, {len(self.actions):,} actions and {len(self.rewards):,} rewards")
        if len(self.starts) != len(self.terminated) + 1:
            self._fail(f"{len(self.starts):,} starts for {len(self.terminated):,} episodes, expected one more")
        self._check_starts(steps)

    def _check_starts(self, steps: int) -> None:
        if not len(self):
            self._fail("no episodes")
        if self.starts[0] != 0 or self.starts[-1] != steps:
            self._fail(f"episodes from step {self.starts[0]} to {self.starts[-1]}, expected 0 to {steps}")
        if len(empty := np.flatnonzero(np.diff(self.starts) < 1)):
            self._fail(f"episode {empty[0]} has no steps")

    def _fail(self, cause: str) -> None:
        raise DataError(f"{self.source}: {cause}" if self.source else cause)

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.terminated)

    @property
    def num_steps(self) -> int:
        """Steps of all episodes together."""
        return len(self.rewards)

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode: (E,) int64."""
        return np.diff(self.starts)

    @property
    def returns(self) -> np.ndarray:
        """Sum of the rewards of each episode: (E,) float64."""
        return np.add.reduceat(self.rewards, self.starts[:-1], dtype=np.float64)

    def returns_to_go(self) -> np.ndarray:
        """Return the sum of the rewards from each step to the end of its episode: (N,) float32, added in float64."""
        found = np.empty_like(self.rewards)
        for start, stop in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            found[start:stop] = np.cumsum(self.rewards[start:stop][::-1], dtype=np.float64)[::-1]
        return found

    def subset(self, indices: Sequence[int] | np.ndarray) -> Episodes:
        """Return the episodes at ``indices``, in that order; their steps are copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        rows = np.repeat(self.starts[:-1][chosen] - starts[:-1], lengths) + np.arange(starts[-1])
        return replace(
            self, observations=self.observations[rows], actions=self.actions[rows], rewards=self.rewards[rows],
            starts=starts, terminated=self.terminated[chosen],
        )  # fmt: skip

    @classmethod
    def join(cls, parts: Sequence[Episodes]) -> Episodes:
        """Return the episodes of several sets of the same environment as one set.

        A set of an unknown environment is taken to be of the one that the others are of. Bounds of actions are kept
        where all sets agree, and the widest otherwise.

        Raises:
            DataError: no sets, another environment or version, and other sizes of observations or actions.
        """
        if not parts:
            raise DataError("no sets of episodes to join")
        if len(parts) == 1:
            return parts[0]
        _check_alike(parts)
        offsets = np.cumsum([0, *(part.num_steps for part in parts[:-1])])
        starts = [part.starts[:-1] + offset for part, offset in zip(parts, offsets, strict=True)]
        low, high = _join_bounds(parts)
        counts = [part.num_actions for part in parts if part.num_actions is not None]
        return cls(
            np.concatenate([part.observations for part in parts]),
            np.concatenate([part.actions for part in parts]),
            np.concatenate([part.rewards for part in parts]),
            np.append(np.concatenate(starts), sum(part.num_steps for part in parts)),
            np.concatenate([part.terminated for part in parts]),
            next((part.environment for part in parts if part.environment), ""),
            ", ".join(part.source for part in parts if part.source),
            low, high, max(counts, default=None), sum(part.partial_steps for part in parts),
        )  # fmt: skip

    def match(self, spaces: Spaces, environment: str) -> Episodes:
        """Return the same episodes with the bounds, or the number, of the actions of an environment.

        Args:
            spaces: Of the environment.
            environment: Its name, for messages; that of the episodes stays.

        Raises:
            DataError: where observations or actions are not those of the environment.
        """
        size = self.observations.shape[1]
        if size != spaces.observation_dim:
            self._fail(f"observations of {size} numbers; {environment} has {spaces.observation_dim}")
        own = "discrete" if self.num_actions is not None else f"of {self.actions.shape[1]} numbers"
        other = "discrete" if spaces.num_actions is not None else f"of {spaces.action_dim} numbers"
        if own != other:
            self._fail(f"actions are {own}; in {environment} they are {other}")
        if spaces.num_actions is None:
            low, high = (tuple(np.asarray(one, dtype=np.float64).tolist()) for one in (spaces.low, spaces.high))
            return replace(self, action_low=low, action_high=high)
        if (most := int(self.actions.max())) >= spaces.num_actions:
            self._fail(f"action {most}; {environment} has 0 to {spaces.num_actions - 1}")
        return replace(self, num_actions=spaces.num_actions)

    def fingerprint(self) -> str:
        """Return a hash of all steps and of where episodes start and how they end."""
        return hash_values([self.observations, self.actions, self.rewards, self.starts, self.terminated])


def _is(array: np.ndarray, axes: int, dtype: type) -> bool:
    return array.ndim == axes and array.dtype == dtype


def _check_alike(parts: Sequence[Episodes]) -> None:
    """Raise for sets that are not of one environment, naming the first two that differ."""
    first = next((part for part in parts if part.environment), parts[0])
    for part in parts:
        if part.environment and part.environment != first.environment:
            families = [split_environment(one.environment)[0] for one in (first, part)]
            why = (
                "another environment" if len(set(families)) == 2 else "another version, with other dynamics or rewards"
            )
            raise DataError(
                f"cannot join {first.source}, of {first.environment}, and {part.source}, of {part.environment}: {why}"
            )
        for what, own, other in (
            ("observations", first.observations.shape[1:], part.observations.shape[1:]),
            ("actions", first.actions.shape[1:], part.actions.shape[1:]),
        ):
            if own != other:
                raise DataError(
                    f"cannot join {first.source} and {part.source}: {what} of {_size(own)} and of {_size(other)}"
                )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} numbers" if shape else "one integer"


def _join_bounds(parts: Sequence[Episodes]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    lows = [part.action_low for part in parts if part.action_low is not None]
    highs = [part.action_high for part in parts if part.action_high is not None]
    if not len(lows) == len(highs) == len(parts):
        return None, None
    return tuple(np.min(lows, axis=0).tolist()), tuple(np.max(highs, axis=0).tolist())
