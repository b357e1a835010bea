"""Policies: what chooses the actions in a simulator, for many episodes at once.

All episodes of a batch begin together and are at the same step. A policy is told which of them still run, and computes
for those only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.common.errors import RunError
from flowformer.tasks.decision.simulators.environments import Spaces

if TYPE_CHECKING:
    from flowformer.tasks.decision.format import DecisionFormat


Evaluation = Literal["window", "recurrent"]
# Matrix products of fewer rows take other kernels of MKL, which round otherwise; with so many, what is computed of a
# row does not depend on the others. Simulators are chaotic: one rounding changes the return of an episode.
LEAST_ROWS = 16


class Policy(Protocol):
    """Chooses actions in n episodes, those of which that still run."""

    def reset(self, targets: np.ndarray, seeds: np.ndarray) -> None:
        """Begin n episodes.

        Args:
            targets: The returns asked for, (n,) float64, unscaled.
            seeds: (n,) int64, of the policy's own random numbers.
        """
        ...

    def act(self, observations: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Choose actions.

        Args:
            observations: As the environment gives them, (n, observation_dim) float32.
            running: Which episodes still run, (n,) bool. One that has ended does not run again.

        Returns:
            Actions (n, action_dim) float32, or (n,) int64 where they are numbers; 0 in episodes that have ended.
        """
        ...

    def observe(self, actions: np.ndarray, rewards: np.ndarray) -> None:
        """Learn what came of it.

        Args:
            actions: As they were executed, within the bounds of the environment; shape as in :meth:`act`.
            rewards: (n,) float64; whatever in episodes that have ended.
        """
        ...


class RandomPolicy:
    """Actions with equal probability within their bounds; normally distributed where they have none.

    Each episode has random numbers of its own, by its seed.

    Args:
        spaces: Of the environment.
    """

    def __init__(self, spaces: Spaces) -> None:
        self.spaces = spaces
        self._generators: list[np.random.Generator] = []

    def reset(self, targets: np.ndarray, seeds: np.ndarray) -> None:  # noqa: D102 - see Policy
        self._generators = [np.random.default_rng([int(seed), 0]) for seed in seeds]

    def act(self, observations: np.ndarray, running: np.ndarray) -> np.ndarray:  # noqa: D102
        actions = empty_actions(len(running), self.spaces.action_dim)
        for row in np.flatnonzero(running):
            actions[row] = self._draw(self._generators[row])
        return actions

    def observe(self, actions: np.ndarray, rewards: np.ndarray) -> None:  # noqa: D102
        pass

    def _draw(self, generator: np.random.Generator) -> Any:
        if self.spaces.num_actions is not None:
            return generator.integers(self.spaces.num_actions)
        low, high = self.spaces.low, self.spaces.high
        bounded = np.isfinite(low) & np.isfinite(high)
        even = generator.uniform(np.where(bounded, low, 0), np.where(bounded, high, 1))
        return np.where(bounded, even, np.clip(generator.standard_normal(len(low)), low, high))


class FunctionPolicy:
    """A function of the observation.

    Args:
        function: Takes an observation (observation_dim,) float32, and returns an action as the environment takes it:
            (action_dim,), or one of its numbers.
        spaces: Of the environment.
    """

    def __init__(self, function: Callable[[np.ndarray], Any], spaces: Spaces) -> None:
        self.function, self.spaces = function, spaces

    def reset(self, targets: np.ndarray, seeds: np.ndarray) -> None:  # noqa: D102 - see Policy
        pass

    def act(self, observations: np.ndarray, running: np.ndarray) -> np.ndarray:  # noqa: D102
        actions = empty_actions(len(running), self.spaces.action_dim)
        for row in np.flatnonzero(running):
            actions[row] = self._call(observations[row])
        return actions

    def _call(self, observation: np.ndarray) -> Any:
        try:
            found = np.asarray(self.function(observation))
        except Exception as error:  # whatever a user's function does
            raise RunError(f"the policy function failed: {type(error).__name__}: {error}") from error
        count, size = self.spaces.num_actions, self.spaces.action_dim
        if count is not None:
            first = self.spaces.start
            if found.ndim or found.dtype.kind not in "biu" or not first <= found < first + count:
                wanted = f"a whole number from {first} to {first + count - 1}"
                raise RunError(f"the policy function must return {wanted}, got {found!r:.80}")
            return int(found) - first
        if found.size != size or found.dtype.kind not in "biuf":
            raise RunError(f"the policy function must return ({size},) numbers, got {found!r:.80}")
        return found.reshape(-1)

    def observe(self, actions: np.ndarray, rewards: np.ndarray) -> None:  # noqa: D102
        pass


class Blend:
    """A policy whose actions are replaced by random ones with a probability that each episode has of its own.

    Args:
        policy: The policy.
        spaces: Of the environment.
        shares: Probability of a random action by episode, in the order of :meth:`reset`.
    """

    def __init__(self, policy: Policy, spaces: Spaces, shares: Sequence[float] | np.ndarray) -> None:
        self.policy, self.random, self.shares = policy, RandomPolicy(spaces), np.asarray(shares, np.float64)
        self._generators: list[np.random.Generator] = []

    def reset(self, targets: np.ndarray, seeds: np.ndarray) -> None:  # noqa: D102 - see Policy
        self.policy.reset(targets, seeds)
        self.random.reset(targets, seeds)
        self._generators = [np.random.default_rng([int(seed), 1]) for seed in seeds]

    def act(self, observations: np.ndarray, running: np.ndarray) -> np.ndarray:  # noqa: D102
        chosen = self.policy.act(observations, running)
        drawn = np.array([generator.random() for generator in self._generators]) < self.shares
        random = self.random.act(observations, running)
        return np.where(drawn if chosen.ndim == 1 else drawn[:, None], random, chosen)

    def observe(self, actions: np.ndarray, rewards: np.ndarray) -> None:  # noqa: D102
        self.policy.observe(actions, rewards)


class _Conditioned:
    """What is common to policies that ask a model for a return.

    Args:
        model: A ``DecisionTransformer``, or a model with the same interface, in evaluation mode.
        form: Its format: how observations and actions are standardised, and returns scaled.
        least_rows: The model computes for so many rows at least, by repeating one; see :data:`LEAST_ROWS`.
    """

    def __init__(self, model: nn.Module, form: DecisionFormat, least_rows: int = LEAST_ROWS) -> None:
        self.model, self.form, self.least_rows = model, form, least_rows
        weight = next(model.parameters())
        self._kind = {"device": weight.device, "dtype": weight.dtype}
        self._rows = np.zeros(0, np.int64)  # the episode of each row of the model's batch; the first fills it up
        self._to_go, self._time = np.zeros(0), 0

    def reset(self, targets: np.ndarray, seeds: np.ndarray) -> None:
        """Begin n episodes; see :class:`Policy`."""
        if self.model.training:
            raise RunError("a model acts in evaluation mode: call model.eval() first")
        self._rows, self._to_go, self._time = np.arange(len(targets)), np.array(targets, np.float64), 0
        self._rows = self._fill_up(self._rows)
        self._begin(len(self._rows))

    @torch.inference_mode()
    def act(self, observations: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Choose actions; see :class:`Policy`."""
        actions = empty_actions(len(running), self.form.action_dim)
        self._drop(running)
        if len(self._rows):
            standard = torch.from_numpy(self.form.standardise(observations[self._rows])).to(**self._kind)
            to_go = torch.from_numpy(self._to_go[self._rows] / self.form.return_scale).to(**self._kind)
            now = min(self._time, self.form.max_timestep - 1)
            time = torch.full((len(self._rows),), now, dtype=torch.int64, device=self._kind["device"])
            predicted = self._predict(standard, to_go, time)
            if self.form.num_actions is not None:
                if not predicted.isfinite().all():
                    raise RunError("scores of actions are not finite: weights may be NaN, or the target too large")
                actions[self._rows] = predicted.argmax(-1).cpu().numpy()
            else:
                actions[self._rows] = self.form.unscale_actions(predicted.float().cpu().numpy())
        return actions

    @torch.inference_mode()
    def observe(self, actions: np.ndarray, rewards: np.ndarray) -> None:
        """Learn what came of it; see :class:`Policy`."""
        done = torch.from_numpy(self.form.scale_actions(actions[self._rows])).to(self._kind["device"])
        self._keep(done.to(self._kind["dtype"]) if done.is_floating_point() else done)
        self._to_go -= rewards
        self._time += 1

    def _drop(self, running: np.ndarray) -> None:
        """Drop the rows of episodes that have ended, and those that no longer have to fill the batch up."""
        episodes, places = np.unique(self._rows, return_index=True)
        kept = self._fill_up(places[running[episodes]])
        if len(kept) != len(self._rows) or not running[episodes].all():
            self._rows = self._rows[kept]
            self._select(torch.from_numpy(kept).to(self._kind["device"]))

    def _fill_up(self, rows: np.ndarray) -> np.ndarray:
        """Repeat the first row until there are enough; none stay none."""
        return np.concatenate([rows, np.repeat(rows[:1], max(0, self._least() - len(rows)))])

    def _least(self) -> int:
        """Return the least number of rows."""
        return self.least_rows

    def _begin(self, count: int) -> None:
        """Begin episodes."""
        raise NotImplementedError

    def _select(self, kept: Tensor) -> None:
        """Drop the episodes that have ended; positions of the others, (rows,)."""
        raise NotImplementedError

    def _predict(self, observation: Tensor, to_go: Tensor, time: Tensor) -> Tensor:
        """Predictions (rows, action_dim or num_actions) of observations (rows, observation_dim)."""
        raise NotImplementedError

    def _keep(self, actions: Tensor) -> None:
        """Remember the actions of this step."""
        raise NotImplementedError


class WindowPolicy(_Conditioned):
    """Asks a model with the last K steps of each episode, as published.

    The first steps of an episode are a shorter window: what is padded cannot be seen by the model.

    Args:
        model: A ``DecisionTransformer`` or ``BehaviourCloning``, in evaluation mode.
        form: Its format.
        context: K; that of the format if absent.
        least_rows: The model computes for so many steps at least: see :data:`LEAST_ROWS`.
    """

    def __init__(
        self, model: nn.Module, form: DecisionFormat, context: int | None = None, least_rows: int = LEAST_ROWS
    ) -> None:
        super().__init__(model, form, least_rows)
        self.context = form.context if context is None else context
        if self.context < 1:
            raise ValueError(f"the context must be at least 1 step, got {self.context}")

    def _begin(self, count: int) -> None:
        self._observations = torch.zeros(count, 0, self.form.observation_dim, **self._kind)
        self._returns = torch.zeros(count, 0, **self._kind)
        self._times = torch.zeros(count, 0, dtype=torch.int64, device=self._kind["device"])
        size = self.form.action_dim
        self._actions = self._times if size is None else self._returns.new_zeros(count, 0, size)

    def _least(self) -> int:
        return -(-self.least_rows // min(self._time + 1, self.context))  # each row has as many steps

    def _select(self, kept: Tensor) -> None:
        self._observations, self._actions = self._observations[kept], self._actions[kept]
        self._returns, self._times = self._returns[kept], self._times[kept]

    def _predict(self, observation: Tensor, to_go: Tensor, time: Tensor) -> Tensor:
        unknown = self._actions.new_zeros(len(time), 1, *self._actions.shape[2:])  # this step's: no input to it
        self._observations = self._slide(self._observations, observation.unsqueeze(1))
        self._actions = self._slide(self._actions, unknown)
        self._returns = self._slide(self._returns, to_go.unsqueeze(1))
        self._times = self._slide(self._times, time.unsqueeze(1))
        return self.model(self._observations, self._actions, self._returns, self._times)[:, -1]

    def _slide(self, window: Tensor, new: Tensor) -> Tensor:
        return torch.cat((window, new), 1)[:, -self.context :]

    def _keep(self, actions: Tensor) -> None:
        self._actions[:, -1] = actions


class RecurrentPolicy(_Conditioned):
    """Asks a model with its recurrent state over the whole episode: constant time a step where the state has one size.

    In the first K steps it chooses what :class:`WindowPolicy` does, and later it also knows of the steps before the
    window.

    Args:
        model: A ``DecisionTransformer`` whose attention has a step, in evaluation mode.
        form: Its format.
        least_rows: The model computes for so many rows at least: see :data:`LEAST_ROWS`.

    Raises:
        RunError: for a model without a step.
    """

    def __init__(self, model: nn.Module, form: DecisionFormat, least_rows: int = LEAST_ROWS) -> None:
        super().__init__(model, form, least_rows)
        if not hasattr(model, "init_state") or not hasattr(model, "step"):
            raise RunError(f"{type(model).__name__} has no recurrent state: evaluate it with the window")
        self._model: Any = model

    def _begin(self, count: int) -> None:
        with torch.inference_mode():
            self._state = self._model.init_state(count)
        self._before: Tensor | None = None

    def _select(self, kept: Tensor) -> None:
        self._state = select_rows(self._state, kept)
        self._before = select_rows(self._before, kept)

    def _predict(self, observation: Tensor, to_go: Tensor, time: Tensor) -> Tensor:
        predicted, self._state = self._model.step(observation, to_go, time, self._before, self._state)
        return predicted

    def _keep(self, actions: Tensor) -> None:
        self._before = actions


def make_policy(model: nn.Module, form: DecisionFormat, evaluation: Evaluation | None = None) -> Policy:
    """Return the policy of a model: by the window of its format, also if ``None``, or by its recurrent state.

    Raises:
        RunError: for a model that has no state.
    """
    return RecurrentPolicy(model, form) if evaluation == "recurrent" else WindowPolicy(model, form)


def select_rows(state: Any, rows: Tensor) -> Any:
    """Return a state with some of its rows: the first axis of every tensor in nested tuples."""
    if isinstance(state, Tensor):
        return state.index_select(0, rows) if state.ndim else state
    if isinstance(state, tuple):
        parts = [select_rows(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def empty_actions(count: int, action_dim: int | None) -> np.ndarray:
    """Return zeros for the actions of ``count`` episodes: vectors, or numbers if ``action_dim`` is ``None``."""
    return np.zeros(count, np.int64) if action_dim is None else np.zeros((count, action_dim), np.float32)
