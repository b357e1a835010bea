"""HDF5 files in the layout of D4RL: steps of all episodes, with flags where episodes end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.decision.arrays import (
    Space,
    check_observations,
    describe_absent,
    pieces,
    read_actions,
    read_flags,
    read_floats,
    read_rewards,
)  # fmt: skip
from flowformer.tasks.decision.episodes import Episodes
from flowformer.tasks.decision.scores import reference_of
from flowformer.tasks.encodings import check_file

if TYPE_CHECKING:
    import h5py

logger = logging.getLogger(__name__)

KEYS = ("observations", "actions", "rewards", "terminals")
LIMIT = "max_episode_steps"  # an attribute of a file, in steps
_MUJOCO_LIMIT = 1000  # of D4RL's environments: kzl/decision-transformer, data/download_d4rl_datasets.py
_LARGE = 2**30  # bytes of an array; below, it may hold anything
_MOST_RATIO = 2000  # of an array's bytes to those in the file; deflate compresses zeros to a thousandth
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError)


def read_d4rl(path: Path, environment: str = "") -> Episodes:
    """Read a file in the layout of D4RL.

    Arrays ``observations`` (N, S), ``actions`` (N, A) floating-point numbers or (N,) integers, ``rewards`` (N,),
    ``terminals`` (N,) and ``timeouts`` (N,), the steps of all episodes in order. An episode ends with a step whose flag
    is true in ``terminals``, in a terminal state, or in ``timeouts``, cut.

    Steps after the last end belong to an episode whose return is not known: they are left out, as in the published
    code. So is, other than there, a last episode that is cut at the last step of the file, and is shorter than another
    one that was cut: it was the recording that ended. ``partial_steps`` counts these steps.

    In a file without ``timeouts``, the steps that episodes were cut after are derived, by the first of these that it
    allows:

    1. The attribute ``max_episode_steps`` of the file: an episode is cut after so many steps.
    2. ``next_observations`` (N, S): an episode was cut after step i if ``next_observations[i]`` is not
       ``observations[i + 1]``. The last step counts as a cut, too, if there are others. An array that is only
       ``observations`` from the second step on tells nothing, and is not used.
    3. The limit of the environment: 1,000 steps in Hopper, HalfCheetah and Walker2d, and of others the one that they
       are registered with in Gymnasium.

    Attributes ``environment``, ``action_low``, ``action_high`` and ``num_actions`` of the file are read where they are
    there. Arrays are read one after the other, in pieces, as float32.

    Args:
        path: The file.
        environment: Where the episodes were recorded, for files that do not tell it.

    Raises:
        DataError: for files that are damaged or lack an array, and for arrays of other shapes, types or values; the
            message names file, key, shape and what is wanted.
        ModuleNotFoundError: without h5py.
    """
    origin = str(path)
    with open_hdf5(path) as file:
        columns = {key: get_array(file, key, origin) for key in (*KEYS, "timeouts", "next_observations")}
        for key in KEYS:
            if columns[key] is None:
                raise DataError(describe_absent(origin, key, list(file), (*KEYS, "timeouts")))
        check_observations(columns["observations"], f"{origin}: observations")
        steps = columns["observations"].shape[0]
        space = Space.read(file.attrs, origin)
        terminals = read_flags(columns["terminals"], steps, f"{origin}: terminals")
        actions = read_actions(columns["actions"], steps, f"{origin}: actions")
        rewards = read_rewards(columns["rewards"], steps, f"{origin}: rewards")
        observations = read_floats(columns["observations"], f"{origin}: observations")
        if columns["timeouts"] is not None:
            cuts = read_flags(columns["timeouts"], steps, f"{origin}: timeouts")
        else:
            limit = _read_limit(file, origin)
            name = space.environment or environment
            cuts = _derive_cuts(terminals, observations, columns["next_observations"], limit, name, origin)
    starts = _find_starts(terminals, cuts)
    stop = int(starts[-1])
    if not stop:
        raise DataError(f"{origin}: none of the {steps:,} steps ends an episode, neither in terminals nor in timeouts")
    if stop < steps:
        logger.warning("%s: the last %d steps are left out: their episode has no end", origin, steps - stop)
    return Episodes(
        observations[:stop], actions[:stop], rewards[:stop], starts, terminals[starts[1:] - 1],
        source=origin, partial_steps=steps - stop, **space.options(actions, origin),
    )  # fmt: skip


def _find_starts(terminals: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Return (E + 1,) int64, where episodes start and the last one ends, without one that the recording cut short."""
    starts = np.concatenate([[0], np.flatnonzero(terminals | cuts) + 1])
    lengths, cut = np.diff(starts), ~terminals[starts[1:] - 1]
    if len(cut) and cut[-1] and starts[-1] == len(terminals) and lengths[-1] < lengths[cut].max():
        return starts[:-1]
    return starts


# ------------------------------------------------------------------------------------------------------------- HDF5


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Raises:
        DataError: in the ``with`` block too, for a file that cannot be opened or is damaged.
        ModuleNotFoundError: without h5py.
    """
    import h5py

    check_file(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DataError:
        raise
    except _DAMAGE as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"not a readable HDF5 file: {error}"
        raise DataError(f"{path}: {what}") from error


def get_array(group: h5py.Group, key: str, origin: str) -> Any:
    """Return an array of a group, unread; ``None`` where there is none.

    Raises:
        DataError: for a group, for an array that is in another file, and for one whose size cannot be true.
    """
    import h5py

    link = group.get(key, getlink=True)
    if link is None:
        return None
    if isinstance(link, h5py.ExternalLink):
        raise DataError(f"{origin}: {key} is a link to another file, {link.filename}; expected an array")
    found = group[key]
    if not isinstance(found, h5py.Dataset):
        names = ", ".join(list(found)[:5]) if isinstance(found, h5py.Group) else ""
        raise DataError(f"{origin}: {key} is a group{' of ' + names if names else ''}; expected an array of numbers")
    if found.external or found.is_virtual:
        raise DataError(f"{origin}: {key} is stored in another file; expected an array")
    if found.shape is None:
        raise DataError(f"{origin}: {key} is empty; expected an array of numbers")
    if found.nbytes > max(_LARGE, _MOST_RATIO * found.id.get_storage_size()):
        stored = found.id.get_storage_size()
        raise DataError(f"{origin}: {key}: {found.nbytes:,} bytes of numbers, but {stored:,} in the file: incomplete?")
    return found


# ---------------------------------------------------------------------------------------- episodes without timeouts


def _derive_cuts(
    terminals: np.ndarray, observations: np.ndarray, following: Any, limit: int | None, environment: str, origin: str
) -> np.ndarray:
    """Return (N,) bool, the steps that episodes were cut after: see :func:`read_d4rl`."""
    known = limit or _find_limit(environment)
    if limit is None and following is not None:
        breaks = _find_breaks(observations, following, f"{origin}: next_observations")
        if breaks.any():
            return _cut_at_breaks(terminals, breaks, known)
    if known is None:
        where = f" {environment}" if environment else ""
        raise DataError(
            f"{origin}: no 'timeouts', and nothing else to tell where episodes were cut: expected 'next_observations' "
            f"that differ from the observations after the end of an episode, the attribute {LIMIT!r}, or an "
            f"environment with a limit of steps{where and ';' + where + ' has none known'}"
        )
    return _cut_after(terminals, known)


def _cut_after(terminals: np.ndarray, limit: int) -> np.ndarray:
    """Cut episodes after ``limit`` steps each."""
    place = np.arange(len(terminals))
    begins = np.zeros_like(place)
    begins[1:] = np.where(terminals[:-1], place[1:], 0)
    return (place - np.maximum.accumulate(begins) + 1) % limit == 0


def _find_breaks(observations: np.ndarray, following: Any, origin: str) -> np.ndarray:
    """Return (N,) bool, where an observation is not the one that followed the step before."""
    check_observations(following, origin, steps=len(observations))
    if following.shape != observations.shape:
        raise DataError(f"{origin}: shape {following.shape}; expected {observations.shape}")
    breaks = np.zeros(len(observations), dtype=np.bool_)
    for start, piece in pieces(following, origin):
        now = observations[start + 1 : start + 1 + len(piece)]
        breaks[start : start + len(now)] = (piece[: len(now)] != now).any(axis=1)
    return breaks


def _cut_at_breaks(terminals: np.ndarray, breaks: np.ndarray, limit: int | None) -> np.ndarray:
    """Cut episodes at breaks, and after the last step if the last episode can be compared with others."""
    cuts = breaks & ~terminals
    left = len(cuts) - 1 - np.flatnonzero(terminals | breaks)[-1]
    cuts[-1] = left > 0 and (left == limit or cuts.any())
    return cuts


def _read_limit(file: h5py.File, origin: str) -> int | None:
    """The attribute that says how many steps an episode has at most."""
    if LIMIT not in file.attrs:
        return None
    value = np.asarray(file.attrs[LIMIT])
    if value.size != 1 or value.dtype.kind not in "iu" or value.item() < 1:
        raise DataError(f"{origin}: attribute {LIMIT} must be a whole number of at least 1, got {value!r:.80}")
    return int(value.item())


def _find_limit(environment: str) -> int | None:
    """Steps that an episode of an environment has at most; ``None`` if that is not known."""
    if reference_of(environment) is not None:
        return _MUJOCO_LIMIT
    try:
        import gymnasium
    except ModuleNotFoundError:
        return None
    spec = gymnasium.registry.get(environment.rpartition(":")[2])
    return None if spec is None else spec.max_episode_steps
