"""Cache of tokens as files, safe with several processes.

What is made from one source is a folder in the folder ``tokens`` of the cache. Its name tells what it was made of, down
to sizes and times of the source's files: a source that changes makes another folder, and the former one goes. Data that
a program generates have no source: their options alone, the seed among them, say what they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.downloads import BLOCK_BYTES, data_folder, locked, make_folder, sync, writing
from flowformer.tasks.stored import StoredTokens

# Part of every folder's name: raise it when what is made of a source, or generated, changes.
VERSION = 2
MANIFEST = "manifest.json"


def keep(
    name: str,
    origin: Path | None,
    sources: Sequence[Path],
    build: Callable[[Path], None],
    *,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Return the folder that ``build`` made, building it if it is absent or incomplete.

    Other processes that need the same folder wait for the first one and use its result.

    Args:
        name: How the folder's name begins.
        origin: The source: a file or a folder. ``None`` for data that are generated.
        sources: The source's files. When they are others, or their sizes or times change, it is made again.
        build: Writes files into the empty folder that it gets. If it raises, nothing is kept.
        options: How it is made, as JSON has it. What is made otherwise is kept beside it.

    Returns:
        The folder; its files are as ``build`` left them, and are not to be written to.

    Raises:
        DataError: where the cache's folder cannot be made or written to, or its disk is full.
    """
    folder = data_folder("tokens")
    # The slot is what stays when the source changes.
    place_of_origin = None if origin is None else str(origin.resolve())
    slot = f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)[:60]}-{_digest([place_of_origin, dict(options or {})])}"
    place = folder / f"{slot}-{_digest([VERSION, _states(sources)])}"
    if _is_whole(place):
        return place
    make_folder(folder)
    with writing(folder), locked(folder / f".{slot}.lock"):
        if not _is_whole(place):  # it may have come while this process waited
            _make(place, folder / f".{slot}.part", build)
            for former in folder.glob(f"{slot}-*"):
                if former != place:
                    shutil.rmtree(former, ignore_errors=True)  # on Windows not while it is open: the next one's task
    return place


def _make(place: Path, beside: Path, build: Callable[[Path], None]) -> None:
    for leftover in (beside, place):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        leftover.unlink(missing_ok=True)
    beside.mkdir()
    try:
        build(beside)
        contents = {path.name: _content(path) for path in beside.iterdir()}
        (beside / MANIFEST).write_text(json.dumps(contents), encoding="utf-8")
        for path in beside.iterdir():
            sync(path)
        beside.replace(place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _is_whole(place: Path) -> bool:
    try:
        contents = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        return all(
            (place / name).stat().st_size == content[0] and _content(place / name) == content
            for name, content in contents.items()
        )
    except (OSError, ValueError, AttributeError, TypeError, LookupError):  # not there, or damaged
        return False


def _content(path: Path) -> list[int]:
    """Size and CRC-32 of a file: of a damaged one other than of the whole."""
    check = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            check = zlib.crc32(block, check)
        return [file.tell(), check]


def _states(paths: Sequence[Path]) -> list[list[Any]]:
    # Folders are resolved once: it takes longer than all else, and a source may be of many thousand files.
    folders = {folder: folder.resolve() for folder in {path.parent for path in paths}}
    states = []
    for path in paths:
        stat = path.stat()
        place = path.resolve() if path.is_symlink() else folders[path.parent] / path.name
        states.append([str(place), stat.st_size, stat.st_mtime_ns])
    return states


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_tokens(path: Path, pieces: Iterable[np.ndarray], dtype: np.dtype) -> int:
    """Write a token array piece by piece to a ``.npy`` file; returns the number of tokens."""
    count = 0
    with path.open("wb") as file:
        _write_header(file, dtype, 0)
        start = file.tell()
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)
            count += len(piece)
        file.seek(0)
        _write_header(file, dtype, count)
        # NumPy leaves room in the header for the first axis to grow.
        if file.tell() != start:
            raise RuntimeError(f"the header of {path} grew from {start} to {file.tell()} bytes")
    return count


def _write_header(file: Any, dtype: np.dtype, count: int) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, described)


def open_tokens(path: Path) -> StoredTokens:
    """Open a ``.npy`` file of one axis.

    Raises:
        DataError: for a file that is none, or shorter than it says.
        OSError: for a file that cannot be opened.
    """
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
    except ValueError as error:
        raise DataError(f"{path}: not a .npy file: {error}") from error
    if len(shape) != 1 or dtype.hasobject:
        raise DataError(f"{path}: expected an array of tokens with one axis, got {dtype} {shape}")
    return StoredTokens(path, dtype, start, shape[0])


def open_bytes(path: Path, start: int = 0, stop: int | None = None) -> StoredTokens:
    """Open a file's bytes from ``start`` to ``stop``, (stop - start,) uint8."""
    return StoredTokens(path, np.uint8, start, (path.stat().st_size if stop is None else stop) - start)
