"""Record episodes of a policy: in memory, as a data set of Minari, or as HDF5 in the layout of D4RL."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flowformer._version import __version__
from flowformer.common.errors import DataError, RunError
from flowformer.common.files import replacing, staged_folder
from flowformer.tasks.decision.episodes import Episodes
from flowformer.tasks.decision.minari import store
from flowformer.tasks.decision.policies import Blend, Policy
from flowformer.tasks.decision.rollout import Episode, open_environment, run_episodes
from flowformer.tasks.decision.simulators.environments import Spaces, make_environment
from flowformer.tasks.decision.simulators.hosts import Moment

AT_ONCE = 100  # episodes that run beside each other, and are in memory
HDF5 = (".hdf5", ".h5")  # of files in the layout of D4RL; everything else is a folder of Minari
_NAME = re.compile(r"[^-\w]+")  # what an id of Minari does not have


@dataclass
class Recording:
    """One episode of T steps.

    Attributes:
        seed: Of the environment.
        observations: T + 1 vectors: before each action, and at the end.
        actions: T of them, as they were executed.
        rewards: T numbers.
        terminated: Whether the episode ended in a terminal state; otherwise it was cut.
    """

    observations: list[np.ndarray]
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    seed: int = 0


class Recorder:
    """Keeps all steps of episodes; those that fail are dropped.

    Attributes:
        done: Episodes that are over, by number.
    """

    def __init__(self, advance: Callable[[int], None] | None = None) -> None:
        self.done: dict[int, Recording] = {}
        self._running: dict[int, Recording] = {}
        self._advance = advance

    def begin(self, number: int, observation: np.ndarray) -> None:
        """See :class:`flowformer.tasks.decision.rollout.Record`."""
        self._running[number] = Recording([observation])

    def add(self, number: int, action: np.ndarray, moment: Moment) -> None:
        """See :class:`flowformer.tasks.decision.rollout.Record`."""
        episode = self._running[number]
        episode.observations.append(moment.observation)
        episode.actions.append(action.copy())
        episode.rewards.append(moment.reward)
        episode.terminated = moment.terminated

    def end(self, number: int, episode: Episode) -> None:
        """See :class:`flowformer.tasks.decision.rollout.Record`."""
        found = self._running.pop(number, None)
        if found is not None and not episode.failed:
            found.seed = episode.seed
            self.done[number] = found
        if self._advance is not None:
            self._advance(1)


def record_episodes(
    policy: Policy,
    environment: str,
    seeds: Sequence[int] | np.ndarray,
    *,
    targets: Sequence[float] | np.ndarray | None = None,
    max_steps: int | None = None,
    workers: int = 0,
) -> Episodes:
    """Record episodes in memory.

    Args:
        policy: What chooses the actions.
        environment: As in :func:`flowformer.tasks.decision.rollout.run_episodes`.
        seeds: One for each episode.
        targets: The returns to ask for; 0 if absent.
        max_steps: Most steps of an episode.
        workers: Processes in which the environments run.

    Raises:
        DataError: as :func:`flowformer.tasks.decision.rollout.run_episodes`.
        RunError: if every episode failed.
    """
    recorder = Recorder()
    wanted = np.zeros(len(seeds)) if targets is None else targets
    found = run_episodes(policy, environment, wanted, seeds, max_steps=max_steps, workers=workers, record=recorder)
    _check_some(found)
    return to_episodes([recorder.done[number] for number in sorted(recorder.done)], environment)


def to_episodes(recordings: Sequence[Recording], environment: str) -> Episodes:
    """Return recordings as a data set of episodes."""
    spaces = open_environment(environment)[1]
    bounds: dict[str, Any] = {"num_actions": spaces.num_actions}
    if spaces.num_actions is None:
        bounds = {"action_low": tuple(spaces.low.tolist()), "action_high": tuple(spaces.high.tolist())}
    return Episodes(
        np.concatenate([one.observations[:-1] for one in recordings]),
        np.concatenate([one.actions for one in recordings]),
        np.concatenate([np.asarray(one.rewards, np.float32) for one in recordings]),
        np.cumsum([0, *(len(one.rewards) for one in recordings)]),
        np.array([one.terminated for one in recordings]),
        environment, f"episodes recorded in {environment}", **bounds,
    )  # fmt: skip


def _check_some(episodes: Sequence[Episode]) -> None:
    if episodes and all(episode.failed for episode in episodes):
        raise RunError(f"every episode failed, and nothing is recorded; the first: {episodes[0].failed}")


# ------------------------------------------------------------------------------------------------------------- files


def collect(
    policy: Policy,
    environment: str,
    out: Sequence[Path],
    *,
    episodes: int,
    seed: int = 0,
    target: float = 0.0,
    shares: tuple[float, float] = (0.0, 0.0),
    max_steps: int | None = None,
    workers: int = 0,
    algorithm: str = "",
    advance: Callable[[int], None] | None = None,
) -> list[Episode]:
    """Record a data set in files, each written whole or not at all.

    Args:
        policy: What chooses the actions.
        environment: As in :func:`flowformer.tasks.decision.rollout.run_episodes`.
        out: Files in the layout of D4RL, whose suffix is ``.hdf5`` or ``.h5``, and folders for Minari.
        episodes: How many; those that fail are left out.
        seed: Of the first episode; the next has the next one.
        target: The return to ask for.
        shares: Probability that an action is replaced by a random one, in the first and in the last episode; it changes
            evenly from one to the other.
        max_steps: Most steps of an episode.
        workers: Processes in which the environments run.
        algorithm: Name of the policy, for the description of the data.
        advance: Is called with the number of episodes that are done.

    Returns:
        What came of all episodes.

    Raises:
        DataError: for an environment that cannot be used.
        RunError: if every episode failed.
        OSError: if a file cannot be written, or a folder is there already.
    """
    spec, spaces = open_environment(environment)
    probabilities = np.linspace(*shares, episodes)
    found: list[Episode] = []
    with ExitStack() as files:
        writers = [files.enter_context(_open(path, spec, spaces, algorithm)) for path in out]
        for first in range(0, episodes, AT_ONCE):
            part = probabilities[first : first + AT_ONCE]
            blended = Blend(policy, spaces, part) if part.any() else policy
            seeds, recorder = seed + first + np.arange(len(part)), Recorder(advance)
            found += run_episodes(
                blended, environment, np.full(len(part), target), seeds, max_steps=max_steps, workers=workers,
                record=recorder,
            )  # fmt: skip
            for number in sorted(recorder.done):
                for writer in writers:
                    writer.add(recorder.done[number])
        _check_some(found)
    return found


class _Writer(Protocol):
    def add(self, recording: Recording) -> None:
        """Write an episode."""
        ...


def _open(path: Path, spec: Any, spaces: Spaces, algorithm: str) -> Any:
    if path.suffix.lower() in HDF5:
        return _write_d4rl(path, spec.id, spaces)
    if callable(spec.entry_point):
        raise DataError(
            f"{path}: Minari stores how an environment is made, and {spec.id} is registered with a class or function: "
            'register it as "module:Class", or record to a file .hdf5'
        )
    return _write_minari(path, spec, spaces, algorithm)


@contextmanager
def _write_d4rl(path: Path, environment: str, spaces: Spaces) -> Iterator[_Writer]:
    import h5py

    with replacing(path) as staged, h5py.File(staged, "w") as file:
        file.attrs["environment"] = environment  # without a module: who reads the file is not to import one
        if spaces.num_actions is None:
            file.attrs["action_low"], file.attrs["action_high"] = spaces.low, spaces.high
        else:
            file.attrs["num_actions"] = spaces.num_actions
        yield _D4rl(file)


class _D4rl:
    """The layout of D4RL: steps of all episodes, one after the other."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def add(self, recording: Recording) -> None:
        steps = len(recording.rewards)
        end = np.arange(steps) == steps - 1
        seen = np.stack(recording.observations)
        columns = {
            "observations": seen[:-1], "actions": np.stack(recording.actions), "next_observations": seen[1:],
            "rewards": np.array(recording.rewards, np.float32),
            "terminals": end & recording.terminated, "timeouts": end & (not recording.terminated),
        }  # fmt: skip
        for name, values in columns.items():
            if name not in self._file:
                self._file.create_dataset(name, data=values, chunks=True, maxshape=(None, *values.shape[1:]))
                continue
            array = self._file[name]
            array.resize(len(array) + steps, axis=0)
            array[-steps:] = values


@contextmanager
def _write_minari(path: Path, spec: Any, spaces: Spaces, algorithm: str) -> Iterator[_Writer]:
    from minari import __version__ as minari_version
    from minari.dataset.minari_storage import MinariStorage

    environment = make_environment(spec)
    observed, acted = environment.observation_space, environment.action_space
    environment.close()
    with staged_folder(path.absolute()) as staged:  # Minari joins a relative path to itself
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "env_spec is not serializable")  # of a class that has no module
            storage = MinariStorage.new(staged / "data", observed, acted, spec)
        storage.update_metadata({
            "dataset_id": name_dataset(path), "minari_version": minari_version, "author": {f"flowformer {__version__}"},
            "algorithm_name": algorithm, "description": f"recorded by flowformer collect in {spec.id}",
        })  # fmt: skip
        yield _Minari(storage, spaces.start)


class _Minari:
    """A data set of Minari, written by Minari."""

    def __init__(self, storage: Any, start: int) -> None:
        self._storage, self._start = storage, start

    def add(self, recording: Recording) -> None:
        from minari.data_collector import EpisodeBuffer

        end = np.arange(len(recording.rewards)) == len(recording.rewards) - 1
        actions = np.stack(recording.actions)
        self._storage.update_episodes([
            EpisodeBuffer(
                seed=recording.seed, observations=list(recording.observations),
                actions=list(actions + self._start if actions.ndim == 1 else actions),
                rewards=recording.rewards, terminations=list(end & recording.terminated),
                truncations=list(end & (not recording.terminated)), infos={},
            )
        ])  # fmt: skip


def name_dataset(folder: Path) -> str:
    """Return the id that Minari finds a folder by: its place in the local store, or its name; a version is added.

    Example:
        >>> from pathlib import Path
        >>> name_dataset(Path("hopper-mixed"))
        'hopper-mixed-v0'
    """
    full, root = folder.absolute(), store().absolute()
    parts = full.relative_to(root).parts if full.is_relative_to(root) else full.parts[-1:]
    name = "/".join(_NAME.sub("-", part) for part in parts)
    return name if re.search(r"-v\d+$", name) else f"{name}-v0"
