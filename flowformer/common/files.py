"""Files that are written whole or not at all, locks, and JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowformer.common.errors import DataError, RunError

_STAGED = ".staged-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all, for writers that take a path.

    The file is written beside its target, synchronised with the disk, and renamed. The old file stays until then, also
    if the process is killed or the disk is full.

    Args:
        path: The file. Its folder is created if necessary; an existing file is replaced. A device or a pipe, such as
            ``/dev/stdout``, is written to directly.

    Yields:
        A path to write to, with the same suffix. It becomes ``path`` at the end of the ``with`` block and is removed if
        the block raises.

    Raises:
        OSError: if the file cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file", str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{_STAGED}{os.getpid()}-{path.name}")
    try:
        yield staged
        synchronise(staged)
        staged.replace(path)
        synchronise(path.parent)
    except BaseException as error:
        staged.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(staged)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Write a folder whole or not at all.

    Args:
        path: The folder. It must not exist, or be empty.

    Yields:
        An empty folder beside it. It becomes ``path`` at the end of the ``with`` block and is removed if the block
        raises.

    Raises:
        FileExistsError: for a folder with something in it, or a file.
        OSError: if the folder cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists and is not an empty folder", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{_STAGED}{os.getpid()}-{path.name}")
    try:
        staged.mkdir()
        yield staged
        for part in (*staged.rglob("*"), staged):
            synchronise(part)
        staged.replace(path)
        synchronise(path.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def synchronise(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder, where the system can do that."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:  # a folder on Windows, a file without permission to read
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if path.is_file():
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(opened)


def remove_staged(folder: Path) -> None:
    """Remove what killed writers left in a folder and the folders in it. Nobody else may be writing there."""
    for left in list(folder.rglob(f"{_STAGED}*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text is written as UTF-8.

    Raises:
        TypeError: if the content is neither text nor bytes.
        OSError: if the file cannot be written.
    """
    with replacing(path) as staged:
        if isinstance(content, bytes):
            staged.write_bytes(content)
        else:
            staged.write_text(content, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def check_regular(path: Path) -> None:
    """Raise for a pipe or a device, which may never end.

    Raises:
        DataError: naming it.
        OSError: if it is not there, or a folder.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file", str(path))
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is a pipe or a device, expected a file")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: for a file that is not JSON; the message names it.
        OSError: for a file that cannot be read.
    """
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        what = "is empty" if not path.stat().st_size else f"is not JSON: {error or type(error).__name__}"
        raise DataError(f"{path} {what}") from error


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock for the time of a ``with`` block; the system frees it if the process is killed.

    Args:
        path: The lock's file. A file of the same name and the suffix ``.json`` tells who holds the lock.
        what: What is locked, for the message.

    Raises:
        RunError: if another process holds it; the message says which.
    """
    from filelock import FileLock, Timeout

    holder = path.with_name(f"{path.name}.json")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{what} is in use by {_describe(holder)}") from None
    try:
        write_json(holder, _this_process())
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _this_process() -> dict[str, Any]:
    import datetime
    import platform
    import sys

    now = datetime.datetime.now(tz=datetime.timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": now, "command": " ".join(sys.argv)}


def _describe(holder: Path) -> str:
    try:
        told = read_json(holder)
        return f"process {told['pid']} on {told['host']}, since {told['since']}: {told['command']}"
    except (OSError, DataError, KeyError, TypeError):  # it has only just begun, or ends
        return "another process"
