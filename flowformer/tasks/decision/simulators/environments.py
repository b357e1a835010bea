"""Gymnasium environments by name, and what their observations and actions are."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowformer.common.errors import DataError
from flowformer.common.names import nearest

if TYPE_CHECKING:  # worker processes import this module: it does without torch
    from flowformer.tasks.decision.format import DecisionFormat


@dataclass(frozen=True)
class Spaces:
    """Observations and actions of an environment.

    Attributes:
        observation_dim: Length of an observation.
        action_dim: Length of an action; ``None`` where actions are numbers from 0.
        num_actions: How many actions there are, where they are numbers; else ``None``.
        low: Lower bounds, (action_dim,) float32; empty for numbers.
        high: Upper bounds, likewise.
        start: The number that the environment has for action 0.
    """

    observation_dim: int
    action_dim: int | None
    num_actions: int | None
    low: np.ndarray
    high: np.ndarray
    start: int = 0

    def clip(self, actions: np.ndarray) -> np.ndarray:
        """Return actions (..., action_dim) within the bounds; numbers as they are."""
        return actions if self.num_actions is not None else np.clip(actions, self.low, self.high)


def find_environment(name: str) -> Any:
    """Return the ``gymnasium.envs.registration.EnvSpec`` of an environment.

    Args:
        name: An identifier such as ``"Hopper-v5"``, or ``"module:Name-v0"`` for one that a module registers when it is
            imported.

    Raises:
        DataError: if there is none; the message suggests the nearest. Versions 2 and 3 of the MuJoCo environments,
            which need mujoco-py, are refused by name.
    """
    import gymnasium

    module, colon, rest = name.rpartition(":")
    if colon:
        import_module(module, f"environment {name}")
    found = gymnasium.registry.get(rest)
    if found is None:
        raise DataError(f"there is no environment {rest!r}{nearest(rest, gymnasium.registry)}{_newest(rest)}")
    if _needs_mujoco_py(found):
        family = rest.rpartition("-v")[0]
        newer = [known for known in (f"{family}-v5", f"{family}-v4") if known in gymnasium.registry]
        raise DataError(
            f"{rest} needs mujoco-py, which Gymnasium no longer supports; pass {' or '.join(newer)}, whose returns are "
            f"not those of {rest}"
        )
    return found


def _needs_mujoco_py(spec: Any) -> bool:
    return getattr(spec.entry_point, "__name__", "") == "_raise_mujoco_py_error"


def import_module(module: str, what: str) -> Any:
    """Import a user's module, also from the current folder.

    Args:
        module: Its name.
        what: What it is needed for, for the message.

    Raises:
        DataError: for whatever goes wrong in it.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: it hides no installed module
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a user's module does
        raise DataError(f"{what}: module {module} cannot be imported: {error}") from error


def _newest(name: str) -> str:
    """A hint for a name without its version."""
    import gymnasium

    found = [known for known in gymnasium.registry if known.rpartition("-v")[0] == name]
    found = [known for known in found if not _needs_mujoco_py(gymnasium.registry[known])]
    return f"; there is {', '.join(found)}" if found else "; one of your own is given as MODULE:NAME"


def make_environment(spec: Any, render_mode: str | None = None) -> Any:
    """Make an environment, which steps without the checks for authors of environments.

    Args:
        spec: From :func:`find_environment`.
        render_mode: As in ``gymnasium.make``.

    Raises:
        DataError: if it cannot be made.
        ModuleNotFoundError: for MuJoCo where it is not installed.
    """
    import gymnasium

    if "mujoco" in str(spec.entry_point):
        importlib.import_module("mujoco")  # before `quiet`, which can only silence what is there
    # Gymnasium passes on what is given, None too, and an environment need not take it.
    rendering: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        with quiet():
            return gymnasium.make(spec, disable_env_checker=True, **rendering)
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # whatever a user's environment does
        raise DataError(f"environment {spec.id} cannot be made: {type(error).__name__}: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the warnings of Gymnasium, as of a version that is out of date, and those that MuJoCo writes to a file."""
    mujoco: Any = sys.modules.get("mujoco")
    before = mujoco.get_mju_user_warning() if mujoco else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"gymnasium\.")
        if mujoco:
            mujoco.set_mju_user_warning(lambda message: None)
        try:
            yield
        finally:
            if mujoco:
                mujoco.set_mju_user_warning(before)


def read_spaces(environment: Any, name: str) -> Spaces:
    """Return the spaces of an environment.

    Raises:
        DataError: for observations that are not one vector, as pictures are, and for actions that are neither one
            vector nor one number.
    """
    from gymnasium.spaces import Box, Discrete

    observed, acted = environment.observation_space, environment.action_space
    if not isinstance(observed, Box) or len(observed.shape) != 1:
        hint = "" if isinstance(observed, Box) and len(observed.shape) == 3 else "; wrap it in FlattenObservation"
        what = f"pictures of shape {observed.shape}" if not hint else str(observed)
        raise DataError(f"{name}: observations must be one vector, got {what}{hint}")
    if isinstance(acted, Discrete):
        empty = np.zeros(0, np.float32)
        return Spaces(observed.shape[0], None, int(acted.n), empty, empty, int(acted.start))
    if not isinstance(acted, Box) or len(acted.shape) != 1 or acted.dtype.kind != "f":
        raise DataError(f"{name}: actions must be one vector of real numbers, or one number of a few; got {acted}")
    return Spaces(observed.shape[0], acted.shape[0], None, acted.low.astype(np.float32), acted.high.astype(np.float32))


def check_spaces(spaces: Spaces, form: DecisionFormat, name: str) -> None:
    """Raise if an environment is not one that a format describes.

    Args:
        spaces: Of the environment.
        form: The format.
        name: Of the environment, for the message.

    Raises:
        DataError: saying what differs.
    """
    wanted = (form.observation_dim, form.action_dim, form.num_actions)
    if (spaces.observation_dim, spaces.action_dim, spaces.num_actions) != wanted:
        raise DataError(
            f"{name} has {_describe(spaces.observation_dim, spaces.action_dim, spaces.num_actions)}; the model was"
            f" trained for {_describe(*wanted)}"
        )


def _describe(observed: int, acted: int | None, count: int | None) -> str:
    actions = f"{count} actions" if acted is None else f"actions of {acted} values"
    return f"observations of {observed} values and {actions}"
