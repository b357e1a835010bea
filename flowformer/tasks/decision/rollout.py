"""Episodes of a policy in a simulator, many at once, each with a seed of its own.

The policy computes for all episodes that still run; those that have ended cost nothing. A simulator that raises, or
whose process is killed, ends its episode, which is reported with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flowformer.common.errors import RunError
from flowformer.tasks.decision.policies import Policy
from flowformer.tasks.decision.scores import normalise
from flowformer.tasks.decision.simulators.environments import (
    Spaces,
    check_spaces,
    find_environment,
    make_environment,
    read_spaces,
)
from flowformer.tasks.decision.simulators.hosts import Here, Host, InWorkers, Moment
from flowformer.tasks.protocols import Track

MOST_STEPS = 1000  # of an environment without a time limit


@dataclass(frozen=True)
class Episode:
    """What came of one episode.

    Attributes:
        target: The return that was asked for.
        seed: Of the environment.
        return_: Sum of the rewards; until then, if it failed.
        length: Steps.
        failed: Why the simulator failed; empty if it did not.
    """

    target: float
    seed: int
    return_: float
    length: int
    failed: str = ""


class Record(Protocol):
    """Is told of every step of an episode."""

    def begin(self, number: int, observation: np.ndarray) -> None:
        """Episode ``number`` begins with an observation."""
        ...

    def add(self, number: int, action: np.ndarray, moment: Moment) -> None:
        """An action was executed, within the bounds of the environment, and what came of it."""
        ...

    def end(self, number: int, episode: Episode) -> None:
        """Episode ``number`` is over, or failed."""
        ...


def open_environment(name: str) -> tuple[Any, Spaces]:
    """Return an environment's ``EnvSpec`` and spaces.

    Raises:
        DataError: for one that does not exist, cannot be made, or has observations or actions that no model of ours
            takes.
    """
    spec = find_environment(name)
    environment = make_environment(spec)
    try:
        return spec, read_spaces(environment, name)
    finally:
        environment.close()


def run_episodes(
    policy: Policy,
    environment: str,
    targets: Sequence[float] | np.ndarray,
    seeds: Sequence[int] | np.ndarray,
    *,
    max_steps: int | None = None,
    workers: int = 0,
    track: Track | None = None,
    record: Record | None = None,
    host: Host | None = None,
) -> list[Episode]:
    """Run one episode for each target and seed.

    What happens in an episode depends on its target and seed, and not on the others, as far as products of matrices
    round each row alike: see :data:`flowformer.tasks.decision.policies.LEAST_ROWS`.

    Args:
        policy: What chooses the actions.
        environment: An identifier of Gymnasium, or ``"module:Name-v0"``.
        targets: The return to ask for in each episode, unscaled.
        seeds: The seed of each episode's environment, from 0.
        max_steps: Most steps of an episode; the environment's own time limit holds too. 1,000 if neither is given.
        workers: Processes in which the environments run; 0 for this one.
        track: Shows progress over episodes.
        record: Is told of every step.
        host: Where the environments run, instead of ``workers``; it is closed at the end.

    Returns:
        The episodes, in the order given; failed ones are among them.

    Raises:
        DataError: for an environment that cannot be used, or is not the one that the policy was made for.
        RunError: if the policy chooses an action that is not finite.
    """
    targets, seeds = np.asarray(targets, np.float64), np.asarray(seeds, np.int64)
    if targets.shape != seeds.shape or targets.ndim != 1:
        raise ValueError(f"targets and seeds must be two lists of one length, got {targets.shape} and {seeds.shape}")
    if (seeds < 0).any():
        raise ValueError(f"seeds must be at least 0, got {seeds.min()}")
    spec, spaces = open_environment(environment)
    if (form := getattr(policy, "form", None)) is not None:
        check_spaces(spaces, form, environment)
    limit = max_steps or (MOST_STEPS if spec.max_episode_steps is None else None)
    if host is None:
        host = InWorkers(spec, workers) if workers else Here(spec)
    try:
        done = _Batch(host, spaces, targets, seeds, limit, record).run(policy)
        found = dict(track(done, len(seeds), "episodes") if track else done)
    finally:
        host.close()
    return [found[number] for number in range(len(seeds))]


class _Batch:
    """Episodes that run beside each other."""

    def __init__(
        self,
        host: Host,
        spaces: Spaces,
        targets: np.ndarray,
        seeds: np.ndarray,
        limit: int | None,
        record: Record | None,
    ) -> None:
        self.host, self.spaces, self.record = host, spaces, record
        self.targets, self.seeds, self.limit = targets, seeds, limit
        count = len(seeds)
        self.running, self.returns, self.lengths = np.ones(count, bool), np.zeros(count), np.zeros(count, np.int64)
        self.observations = np.zeros((count, spaces.observation_dim), np.float32)

    def run(self, policy: Policy) -> Iterator[tuple[int, Episode]]:
        """Yield each episode when it is over."""
        policy.reset(self.targets, self.seeds)
        for number, moment in self.host.reset(dict(enumerate(self.seeds.tolist()))).items():
            if moment.failed:
                yield number, self._end(number, moment.failed)
                continue
            if failed := self._misfit(moment):
                yield number, self._end(number, failed)
                continue
            self.observations[number] = moment.observation
            if self.record is not None:
                self.record.begin(number, moment.observation)
        while self.running.any():
            actions = self._choose(policy)
            moments = self.host.step(self._executable(actions))
            yield from self._take(moments, actions)
            rewards = np.zeros(len(self.seeds))
            for number, moment in moments.items():
                rewards[number] = moment.reward
            policy.observe(actions, rewards)

    def _choose(self, policy: Policy) -> np.ndarray:
        actions = policy.act(self.observations, self.running.copy())
        if not np.isfinite(actions[self.running]).all():
            raise RunError("an action is not finite: weights of the policy may be NaN, or the target too large")
        return self.spaces.clip(actions)

    def _executable(self, actions: np.ndarray) -> Mapping[int, Any]:
        """The actions of episodes that run, as the environment takes them."""
        numbers = np.flatnonzero(self.running).tolist()
        if self.spaces.num_actions is None:
            return {number: actions[number] for number in numbers}
        return {number: int(actions[number]) + self.spaces.start for number in numbers}

    def _take(self, moments: Mapping[int, Moment], actions: np.ndarray) -> Iterator[tuple[int, Episode]]:
        for number, moment in moments.items():
            if moment.failed:
                yield number, self._end(number, moment.failed)
                continue
            if failed := self._misfit(moment):
                yield number, self._end(number, failed)
                continue
            self.observations[number] = moment.observation
            self.returns[number] += moment.reward
            self.lengths[number] += 1
            truncated = moment.truncated or self.lengths[number] == self.limit
            if self.record is not None:
                self.record.add(number, actions[number], moment)
            if moment.terminated or truncated:
                yield number, self._end(number, "")

    def _misfit(self, moment: Moment) -> str:
        """What is wrong with the shape of an observation; empty if nothing."""
        wanted, got = self.observations.shape[1:], moment.observation.shape
        return "" if got == wanted else f"the simulator returned an observation of shape {got}; expected {wanted}"

    def _end(self, number: int, failed: str) -> Episode:
        self.running[number] = False
        episode = Episode(
            float(self.targets[number]), int(self.seeds[number]), float(self.returns[number]),
            int(self.lengths[number]), failed,
        )  # fmt: skip
        if self.record is not None:
            self.record.end(number, episode)
        return episode


@dataclass(frozen=True)
class Summary:
    """Episodes with the same target.

    Attributes:
        target: The return that was asked for.
        episodes: All of them.
    """

    target: float
    episodes: tuple[Episode, ...]

    @property
    def failed(self) -> list[Episode]:
        """Those whose simulator failed; they count with what they gained until then, as in training."""
        return [episode for episode in self.episodes if episode.failed]

    @property
    def returns(self) -> np.ndarray:
        """Returns, (n,) float64."""
        return np.array([episode.return_ for episode in self.episodes], np.float64)

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of steps, (n,) float64."""
        return np.array([episode.length for episode in self.episodes], np.float64)


def describe_episode(episode: Episode, environment: str) -> dict[str, Any]:
    """Return an episode as JSON values, with its score where D4RL has references for the environment."""
    score = normalise(episode.return_, environment)
    return {
        "target": episode.target, "seed": episode.seed, "return": episode.return_,
        **({} if score is None else {"score": score}), "length": episode.length, "failed": episode.failed,
    }  # fmt: skip


def summarise(episodes: Sequence[Episode]) -> list[Summary]:
    """Return the episodes by target, in the order in which targets first appear."""
    targets = dict.fromkeys(episode.target for episode in episodes)
    return [Summary(target, tuple(episode for episode in episodes if episode.target == target)) for target in targets]
