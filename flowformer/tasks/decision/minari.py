"""Data sets of Minari: folders, and ids in its local store."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from flowformer.common.errors import DataError
from flowformer.common.errors import describe as describe_error
from flowformer.common.files import read_json
from flowformer.tasks.decision.arrays import (
    Space,
    check_name,
    check_observations,
    describe,
    describe_absent,
    read_actions,
    read_end,
    read_floats,
    read_rewards,
)  # fmt: skip
from flowformer.tasks.decision.d4rl import get_array, open_hdf5
from flowformer.tasks.decision.episodes import Episodes

if TYPE_CHECKING:
    import h5py

MAIN_FILE = "main_data.hdf5"
_METADATA = "metadata.json"
_KEYS = ("observations", "actions", "rewards", "terminations")
_EPISODE = re.compile(r"episode_(\d{1,18})")
_ID = re.compile(r"(?:[-\w]+/)*[-\w]+-v\d+")  # of a data set: minari.dataset.minari_dataset.DATASET_ID_RE


def store() -> Path:
    """Return the folder of Minari's local store: ``MINARI_DATASETS_PATH``, else ``~/.minari/datasets``."""
    given = os.environ.get("MINARI_DATASETS_PATH")
    return Path(given) if given else Path.home() / ".minari" / "datasets"


def is_id(name: str) -> bool:
    """Return whether a name has the form of an id: ``mujoco/hopper/medium-v0``."""
    return _ID.fullmatch(name) is not None


def find_folder(folder: Path) -> Path | None:
    """Return the folder of the data: the folder itself, or the folder ``data`` in it; ``None`` if it is neither."""
    return next((one for one in (folder, folder / "data") if _is_data(one)), None)


def _is_data(folder: Path) -> bool:
    return (folder / MAIN_FILE).is_file() or (folder / _METADATA).is_file()


def read_minari(folder: Path) -> Episodes:
    """Read a data set of Minari: ``main_data.hdf5`` and ``metadata.json`` in a folder, or in the folder ``data`` of it.

    Observations are a ``Box`` with one axis; actions are such a ``Box``, or ``Discrete``, whose first becomes 0. The
    observation after the last step of an episode is left out. An episode that was not terminated counts as cut. Neither
    Minari nor Gymnasium is needed, and no environment is made.

    Raises:
        DataError: for data sets that are damaged, incomplete, or of other spaces or formats, naming the place.
        ModuleNotFoundError: without h5py.
    """
    found = find_folder(folder)
    if found is None:
        raise DataError(f"{folder}: no {MAIN_FILE} and {_METADATA}, neither here nor in the folder data")
    metadata = _read_metadata(found / _METADATA) if (found / _METADATA).is_file() else {}
    form = metadata.get("data_format", "hdf5")
    if form != "hdf5" or not (found / MAIN_FILE).is_file():
        raise DataError(
            f"{found}: data in the format {form!r}, and {MAIN_FILE} is not there; expected the format 'hdf5'"
        )
    return read_main(found / MAIN_FILE, metadata, source=str(folder))


def read_main(path: Path, metadata: Mapping[str, Any] | None = None, source: str = "") -> Episodes:
    """Read the file ``main_data.hdf5`` of a data set, given its metadata; errors as :func:`read_minari`."""
    metadata = metadata or {}
    space, first = _read_spaces(metadata, str(path))
    with open_hdf5(path) as file:
        parts = list(_find_episodes(file, metadata.get("total_episodes"), str(path)))
        return _read(parts, space, first, source or str(path))


class _Part(NamedTuple):
    """An episode in a file, unread."""

    origin: str
    observations: Any
    actions: Any
    rewards: Any
    terminations: Any


def _find_episodes(file: h5py.File, count: Any, origin: str) -> Iterator[_Part]:
    matches = filter(None, map(_EPISODE.fullmatch, file))
    names = [match[0] for match in sorted(matches, key=lambda match: int(match[1]))]
    if not names:
        raise DataError(f"{origin}: no episodes; expected groups episode_0, episode_1, ...")
    if count is not None and count != len(names):
        raise DataError(f"{origin}: {len(names):,} episodes, but {_METADATA} says {count}: incomplete?")
    for name in names:
        place = f"{origin}: {name}"
        group = _get_group(file, name, origin)
        arrays = {key: get_array(group, key, place) for key in _KEYS}
        if absent := [key for key, array in arrays.items() if array is None]:
            raise DataError(describe_absent(place, absent[0], list(group), (*_KEYS, "truncations")))
        steps = arrays["rewards"].shape[0] if arrays["rewards"].shape else 0
        if not steps:
            raise DataError(f"{place}: rewards: {describe(arrays['rewards'])}; expected at least one step")
        check_observations(arrays["observations"], f"{place}: observations", steps=steps + 1)
        yield _Part(place, **arrays)


def _get_group(file: h5py.File, name: str, origin: str) -> h5py.Group:
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Group):
        raise DataError(f"{origin}: {name} is no group of this file")
    return cast("h5py.Group", file[name])


def _read(parts: Sequence[_Part], space: Space, first: int, source: str) -> Episodes:
    starts = np.cumsum([0, *(part.rewards.shape[0] for part in parts)])
    observations = np.empty((starts[-1], parts[0].observations.shape[1]), dtype=np.float32)
    actions, rewards, ends = [], [], []
    for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True):
        steps = int(stop - start)
        _check_sizes(part, parts[0])
        read_floats(part.observations, f"{part.origin}: observations", observations[start:stop])
        actions.append(read_actions(part.actions, steps, f"{part.origin}: actions", first))
        rewards.append(read_rewards(part.rewards, steps, f"{part.origin}: rewards"))
        ends.append(read_end(part.terminations, steps, f"{part.origin}: terminations"))
    together = np.concatenate(actions)
    return Episodes(
        observations, together, np.concatenate(rewards), starts, np.concatenate(ends), source=source,
        **space.options(together, source),
    )  # fmt: skip


def _check_sizes(part: _Part, first: _Part) -> None:
    for key in ("observations", "actions"):
        own, wanted = getattr(part, key), getattr(first, key)
        if own.shape[1:] != wanted.shape[1:] or (own.dtype.kind == "f") != (wanted.dtype.kind == "f"):
            raise DataError(f"{part.origin}: {key}: {describe(own)}; the first episode has {describe(wanted)}")


# --------------------------------------------------------------------------------------------------------- metadata


def _read_metadata(path: Path) -> Mapping[str, Any]:
    try:
        found = read_json(path)
    except OSError as error:
        raise DataError(describe_error(error)) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected an object of JSON, got {found!r:.80}")
    return found


def _read_spaces(metadata: Mapping[str, Any], origin: str) -> tuple[Space, int]:
    """Read the environment and its spaces, those that are there, and the first of discrete actions."""
    observation, action, spec = (
        _read_inner(metadata, key, origin) for key in ("observation_space", "action_space", "env_spec")
    )
    name = check_name(str(spec.get("id", "")), origin)
    for what, space, kinds in (("observation", observation, ("Box",)), ("action", action, ("Box", "Discrete"))):
        kind = space.get("type", "Box")
        shape = space.get("shape", [1])
        if kind not in kinds or (kind == "Box" and (not isinstance(shape, list) or len(shape) != 1)):
            got = f"{kind} of shape {shape}" if kind == "Box" else kind
            wanted = "a Box with one axis" + " or Discrete" * ("Discrete" in kinds)
            raise DataError(f"{origin}: {what} space {got}; expected {wanted}")
    if action.get("type") == "Discrete":
        start = action.get("start", 0)
        if not isinstance(start, int):
            raise DataError(f"{origin}: action space Discrete from {start!r:.80}; expected from a whole number")
        return Space.read({"environment": name, "num_actions": action.get("n", 0)}, origin), start
    bounds = {f"action_{side}": action[side] for side in ("low", "high") if side in action}
    return Space.read({"environment": name, **bounds}, origin), 0


def _read_inner(metadata: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    """An object of JSON that is spelled as a text within the metadata."""
    text = metadata.get(key)
    if text is None:
        return {}
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: {key} in {_METADATA} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{origin}: {key} in {_METADATA}: expected an object of JSON, got {found!r:.80}")
    return found
