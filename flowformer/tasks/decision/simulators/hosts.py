"""Where environments run: in this process, or in worker processes, one of which may die without the others."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from flowformer.common.errors import DataError
from flowformer.common.processes import Worker
from flowformer.tasks.decision.simulators.environments import make_environment, quiet


class Moment(NamedTuple):
    """What an environment answers.

    Attributes:
        observation: (observation_dim,) float32.
        reward: Of the action before it; 0 after a reset.
        terminated: Whether this state ends the episode.
        truncated: Whether the environment's time is over.
        failed: What is wrong with the simulator, one line; empty if nothing. The rest is then empty too.
    """

    observation: np.ndarray
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    failed: str = ""


class Host(Protocol):
    """Environments by number, all of one kind. One that fails is closed, and its moment says why."""

    def reset(self, seeds: Mapping[int, int]) -> dict[int, Moment]:
        """Make a new environment for each number, and begin an episode with its seed."""
        ...

    def step(self, actions: Mapping[int, Any]) -> dict[int, Moment]:
        """Act in some of them; those whose episode is over are closed."""
        ...

    def close(self) -> None:
        """Close those that are left."""
        ...


class Here:
    """Environments in this process.

    Args:
        spec: Of the environment.
    """

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self._running: dict[int, Any] = {}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, Moment]:  # noqa: D102 - see Host
        with quiet():
            return {number: self._try(number, self._begin, seed) for number, seed in seeds.items()}

    def step(self, actions: Mapping[int, Any]) -> dict[int, Moment]:  # noqa: D102
        with quiet():
            return {number: self._try(number, self._act, action) for number, action in actions.items()}

    def close(self) -> None:  # noqa: D102
        for number in list(self._running):
            self._close(number)

    def _try(self, number: int, function: Any, value: Any) -> Moment:
        try:
            found = function(number, value)
        except (Exception, SystemExit) as error:  # whatever a simulator does
            found = _failure(f"{type(error).__name__}: {error}")
        if found.terminated or found.truncated or found.failed:
            self._close(number)
        return found

    def _begin(self, number: int, seed: int) -> Moment:
        self._close(number)
        # A new one each time: what an earlier episode left in it cannot change this one.
        self._running[number] = environment = self._make()
        return _check(environment.reset(seed=seed)[0])

    def _make(self) -> Any:
        return make_environment(self.spec)

    def _act(self, number: int, action: Any) -> Moment:
        observation, reward, terminated, truncated, _ = self._running[number].step(action)
        return _check(observation, float(reward), bool(terminated), bool(truncated))

    def _close(self, number: int) -> None:
        environment = self._running.pop(number, None)
        try:
            if environment is not None:
                environment.close()
        except Exception:  # it is not used any more
            return


def _check(observation: Any, reward: float = 0.0, terminated: bool = False, truncated: bool = False) -> Moment:
    observation = np.array(observation, np.float32)  # a copy: the simulator may write into its own
    if not (np.isfinite(observation).all() and np.isfinite(reward)):
        return _failure("the simulator returned values that are not finite")
    return Moment(observation, reward, terminated, truncated)


def _failure(message: str) -> Moment:
    return Moment(np.zeros(0, np.float32), failed=" ".join(message.split()))


class InWorkers:
    """Environments in worker processes. If one is killed, the episodes in it fail and the others go on.

    Args:
        spec: Of the environment.
        workers: Number of processes.

    Raises:
        DataError: here, or in the first reset, for an environment that only this process has.
    """

    def __init__(self, spec: Any, workers: int) -> None:
        try:
            self._spec = pickle.dumps(spec)
        except Exception as error:  # as a lambda's
            raise _not_sent(spec.id, error) from error
        self._name, self.workers = spec.id, workers
        self._processes: dict[int, Worker] = {}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, Moment]:  # noqa: D102 - see Host
        return self._ask("reset", seeds)

    def step(self, actions: Mapping[int, Any]) -> dict[int, Moment]:  # noqa: D102
        return self._ask("step", actions)

    def close(self) -> None:  # noqa: D102
        for worker in list(self._processes):
            self._processes.pop(worker).end()

    def _ask(self, method: str, values: Mapping[int, Any]) -> dict[int, Moment]:
        """Send every worker its part, and then wait for all."""
        parts: dict[int, dict[int, Any]] = {}
        for number, value in values.items():
            parts.setdefault(number % self.workers, {})[number] = value
        lost = {worker: error for worker, part in parts.items() if (error := self._send(worker, method, part))}
        found: dict[int, Moment] = {}
        for worker, part in parts.items():
            answer = lost.get(worker) or self._receive(worker)
            if isinstance(answer, RuntimeError):
                answer = dict.fromkeys(part, _failure(str(answer)))
            found |= answer
        return found

    def _send(self, worker: int, method: str, part: Mapping[int, Any]) -> RuntimeError | None:
        """Ask a worker, started if there is none; the error if it was killed."""
        try:
            if worker not in self._processes:
                self._processes[worker] = Worker(_answer)
            self._processes[worker].send((self._spec, method, part))
        except RuntimeError as error:
            return self._lose(worker, error)
        return None

    def _receive(self, worker: int) -> dict[int, Moment] | RuntimeError:
        try:
            return self._processes[worker].receive()
        except RuntimeError as error:
            return self._lose(worker, error)
        except Exception as error:  # as of a class that the worker cannot import
            raise _not_sent(self._name, error) from error

    def _lose(self, worker: int, error: RuntimeError) -> RuntimeError:
        if worker in self._processes:
            self._processes.pop(worker).end()  # the next reset starts a new one
        return error


def _not_sent(name: str, error: Exception) -> DataError:
    return DataError(
        f"environment {name} cannot be made in a worker process: {error}; register it with an entry point "
        '"module:Class", or use 0 workers'
    )


_hosts: list[Here] = []  # in a worker process: its environments, once there are any


def _answer(item: tuple[bytes, str, Any]) -> Any:
    """What a worker process computes."""
    spec, method, value = item
    if not _hosts:
        _hosts.append(Here(pickle.loads(spec)))  # from the process that started this one
    return getattr(_hosts[0], method)(value)
