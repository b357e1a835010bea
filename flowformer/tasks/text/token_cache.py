"""Files made once from a source and kept: tokens as memory maps, safe under several processes at once.

What is made from one source is a folder in the folder ``tokens`` of the cache. Its name tells what it was made of, down
to sizes and times of the source's files: a source that changes makes another folder, and the former one goes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from flowformer.tasks.downloads import data_folder, make_folder

# Part of every folder's name: raise it when what is made of a source changes.
VERSION = 1
MANIFEST = "manifest.json"


def keep(
    name: str,
    origin: Path,
    sources: Sequence[Path],
    build: Callable[[Path], None],
    *,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Return the folder that ``build`` made from a source, and make it where it is not there, or not whole.

    Processes that want the same wait for the first, and take what it made.

    Args:
        name: How the folder's name begins.
        origin: The source: a file or a folder.
        sources: The source's files. When they are others, or their sizes or times change, it is made again.
        build: Writes files into the empty folder that it gets. If it raises, nothing is kept.
        options: How it is made, as JSON has it. What is made otherwise is kept beside it.

    Returns:
        The folder; its files are as ``build`` left them, and are not to be written to.

    Raises:
        DataError: where the cache's folder cannot be made.
    """
    folder = data_folder("tokens")
    # The slot is what stays when the source changes.
    slot = f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)[:60]}-{_digest([str(origin.resolve()), dict(options or {})])}"
    place = folder / f"{slot}-{_digest([VERSION, [_state(path) for path in sources]])}"
    if _is_whole(place):
        return place
    make_folder(folder)
    with FileLock(folder / f".{slot}.lock"):
        if not _is_whole(place):  # it may have come while this process waited
            _make(place, folder / f".{slot}.part", build)
            for former in folder.glob(f"{slot}-*"):
                if former != place:
                    shutil.rmtree(former, ignore_errors=True)  # on Windows not while it is open: the next one's task
    return place


def _make(place: Path, beside: Path, build: Callable[[Path], None]) -> None:
    for leftover in (beside, place):
        if leftover.exists():
            shutil.rmtree(leftover)
    beside.mkdir()
    try:
        build(beside)
        sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
        (beside / MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")
        beside.replace(place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _is_whole(place: Path) -> bool:
    try:
        sizes = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # not there, or damaged
        return False


def _state(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_tokens(path: Path, pieces: Iterable[np.ndarray], dtype: np.dtype) -> int:
    """Write pieces of a token array to one ``.npy`` file, without ever holding it; returns how many tokens."""
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


def open_tokens(path: Path) -> np.ndarray:
    """Open a ``.npy`` file as a read-only memory map."""
    return np.load(path, mmap_mode="r")


def open_bytes(path: Path, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Open a file's bytes from ``start`` to ``stop`` as a read-only memory map, (stop - start,) uint8."""
    stop = path.stat().st_size if stop is None else stop
    return np.memmap(path, np.uint8, mode="r", offset=start, shape=(stop - start,))
