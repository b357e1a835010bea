"""Recorded episodes from files: HDF5 in the layout of D4RL, data sets of Minari, and ``.npz`` of a user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flowformer.common.errors import DataError
from flowformer.common.errors import describe as describe_error
from flowformer.tasks.decision.arrays import read_folder, read_npz
from flowformer.tasks.decision.d4rl import open_hdf5, read_d4rl
from flowformer.tasks.decision.episodes import Episodes
from flowformer.tasks.decision.minari import MAIN_FILE, find_folder, is_id, read_main, read_minari, store
from flowformer.tasks.decision.scores import split_environment
from flowformer.tasks.encodings import check_file

FORMS = "HDF5 in the layout of D4RL, a data set of Minari (a folder, or an id of its store), .npz, or a folder of .npz"
_HDF5, _ZIP, _PICKLE = b"\x89HDF\r\n\x1a\n", b"PK", b"\x80"


def read_episodes(path: str | Path, environment: str = "") -> Episodes:
    """Read recorded episodes; which form they have is told by their content, not by their names.

    Args:
        path: A file or a folder; or the id of a data set in Minari's local store, such as ``mujoco/hopper/medium-v0``;
            or several, separated by commas, which are joined: medium and expert, for instance.
        environment: Name of the environment in which they were recorded, for files that do not tell it.

    Raises:
        DataError: for what is not there or cannot be used, with file, key and shape; for files of another family than
            ``environment``; and for sets that cannot be joined.
        ModuleNotFoundError: for HDF5 without h5py.
    """
    text = str(path)
    if "," in text and not Path(text).exists():
        names = [name.strip() for name in text.split(",")]
        return Episodes.join([_read(name, environment) for name in names if name])
    return _read(text, environment)


def _read(name: str, environment: str) -> Episodes:
    try:
        found = _read_any(name, environment)
    except OSError as error:
        raise DataError(describe_error(error)) from error
    if not found.environment:
        return replace(found, environment=environment)
    families = [split_environment(one)[0].lower() for one in (found.environment, environment or found.environment)]
    if len(set(families)) == 2:
        raise DataError(f"{found.source}: episodes of {found.environment}; expected {environment}")
    return found


def _read_any(name: str, environment: str) -> Episodes:
    path = Path(name)
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return _read_file(path, environment)
    if not is_id(name):
        raise DataError(f"{name}: no such file or folder; expected {FORMS}")
    folder = store() / name
    if not folder.is_dir():
        raise DataError(
            f"{name}: no such file or folder, and no such data set in Minari's store {store()}: download it by "
            f"`minari download {name}`, or set MINARI_DATASETS_PATH"
        )
    return replace(read_minari(folder), source=name)


def _read_folder(folder: Path) -> Episodes:
    if find_folder(folder) is not None:
        return read_minari(folder)
    if any(folder.glob("[!.]*.npz")):
        return read_folder(folder)
    names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    some = f"it has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "it is empty"
    raise DataError(f"{folder}: a folder without {MAIN_FILE}, metadata.json and .npz files; {some}; expected {FORMS}")


def _read_file(path: Path, environment: str) -> Episodes:
    check_file(path)
    with path.open("rb") as file:
        start = file.read(len(_HDF5))
    if start.startswith(_ZIP):
        return read_npz(path)
    if start == _HDF5:
        with open_hdf5(path) as opened:
            is_minari = "episode_0" in opened
        if not is_minari:
            return read_d4rl(path, environment)
        return read_minari(path.parent) if path.name == MAIN_FILE else read_main(path)
    if not start:
        raise DataError(f"{path}: the file is empty; expected {FORMS}")
    if start.startswith(_PICKLE):
        raise DataError(f"{path}: a pickle, which could run code when it is read, and is not; expected {FORMS}")
    raise DataError(f"{path}: neither HDF5 nor .npz: it starts with {start!r}; expected {FORMS}")
