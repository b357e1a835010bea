"""Cache of compiled kernels: a folder that nobody else can read or write, and libraries that are checked before use.

A library's name ends with the SHA-256 of its content. It is written under another name and renamed, so that a process
that has it mapped keeps what it has, and a file under such a name is whole; one that was damaged later is rebuilt.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flowformer.common.folders import cache_folder, make_private
from flowformer.kernels.native.compiler import (
    BUILDING,
    SUFFIX,
    BuildError,
    compiled,
    content_hash,
    fingerprint,
    printable,
)

try:
    import fcntl
except ImportError:  # Windows, which has no kernels
    fcntl = None

CACHE_VARIABLE = "FLOWFORMER_CACHE"
_BUILT = "kernels-"
_DAY_S = 24 * 60 * 60
_WAIT_S = 60  # for another process that builds the same
_POLL_S = 0.1

_log = logging.getLogger("flowformer")


class Cached(NamedTuple):
    """A library in the cache: its file, and the content that was checked."""

    path: Path
    content: bytes


def cached_library(source: Path, compiler: str) -> Cached:
    """Return the library in the cache for this compiler and these sources, building it if absent or damaged.

    Raises:
        BuildError: if the compiler fails, the folder is not the user's own, or cannot be written.
    """
    folder, name = kernel_folder(), f"{_BUILT}{fingerprint(source, compiler)}"
    try:
        _check_parent(folder.parent)
        make_private(folder)
        if found := _find(folder, name):
            return found
        with _locked(folder / f"{name}.lock"):
            return _find(folder, name) or _build(folder, name, source, compiler)
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be written ({error}): set {CACHE_VARIABLE} to a folder that can"
        ) from error


def kernel_folder() -> Path:
    """Return the folder for built libraries: ``FLOWFORMER_CACHE``, else ``kernels`` in the cache folder.

    Raises:
        BuildError: if the user has no home folder.
    """
    try:
        if folder := os.environ.get(CACHE_VARIABLE):
            return Path(folder).expanduser().absolute()
        return cache_folder() / "kernels"
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who does not exist
        raise BuildError(f"no folder found for the kernels ({error}): set {CACHE_VARIABLE} to a folder") from error


# -- whose it is ------------------------------------------------------------------------------------------------------


def _check_parent(folder: Path) -> None:
    """Raise BuildError if others could exchange what is in this folder; one that is absent is created by us."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = folder.lstat()
        if not os.environ.get(CACHE_VARIABLE):  # a folder of our own, too
            _check_owner(folder, found)
        # In a sticky folder, such as /tmp, nobody renames what others own.
        if folder.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            raise _refusal(folder, "can be written by every user", f"chmod o-w {shlex.quote(str(folder))}")


def _check_owner(folder: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise _refusal(folder, "is a symbolic link")
    if not stat.S_ISDIR(found.st_mode):
        raise _refusal(folder, "is not a folder")
    if found.st_uid != os.geteuid():
        raise _refusal(folder, f"belongs to user {found.st_uid}, not to user {os.geteuid()}, who runs this")


def _refusal(folder: Path, reason: str, remedy: str = "") -> BuildError:
    return BuildError(
        f"the cache folder {folder} {reason}, so its libraries are not trusted: "
        f"{f'{remedy} if nobody else uses it, or ' if remedy else ''}set {CACHE_VARIABLE} to a folder of your own"
    )


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Open the folder, and check it; what is read through the descriptor comes from the folder that was checked."""
    _check_owner(folder, folder.lstat())
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        _check_owner(folder, found)
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o077:
            ours = all(name.startswith((_BUILT, BUILDING)) for name in os.listdir(descriptor))  # noqa: PTH208
            remedy = f"chmod 700 {shlex.quote(str(folder))}" if ours else ""  # never of /tmp
            raise _refusal(folder, f"is open to other users (mode {mode:04o})", remedy)
        yield descriptor
    finally:
        os.close(descriptor)


# -- finding and building ---------------------------------------------------------------------------------------------


def _find(folder: Path, name: str) -> Cached | None:
    """The undamaged library of this name, if there is one."""
    with _opened(folder) as descriptor:
        for file in sorted(os.listdir(descriptor)):  # noqa: PTH208 - pathlib takes no descriptor
            if file.startswith(f"{name}-") and file.endswith(SUFFIX):
                content = _read(descriptor, file)
                if content is not None and file == f"{name}-{content_hash(content)}{SUFFIX}":
                    with contextlib.suppress(OSError):  # the folder may be on a read-only file system
                        os.utime(folder / file)  # so that its age is the time since it was last used
                    return Cached(folder / file, content)
                _log.warning("%s is damaged, or not what flowformer has built: it is built again", folder / file)
    return None


def _read(folder: int, file: str) -> bytes | None:
    """The content of a regular file of our own."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:  # a link, or gone
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return None
        with open(descriptor, "rb", closefd=False) as opened:
            return opened.read()
    finally:
        os.close(descriptor)


def _build(folder: Path, name: str, source: Path, compiler: str) -> Cached:
    _log.warning(
        "building flowformer's C++ kernels with %s in %s, once: up to a minute", compiler, printable(str(folder))
    )
    _sweep(folder)
    with compiled(folder, source, compiler) as library:
        library.chmod(0o700)
        content = library.read_bytes()
        path = folder / f"{name}-{content_hash(content)}{SUFFIX}"
        for other in folder.glob(f"{name}-*{SUFFIX}"):  # damaged ones
            _remove(other)
        library.replace(path)
    return Cached(path, content)


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left, and libraries unused for a month."""
    for pattern, limit_s in ((f"{BUILDING}*", _DAY_S), (f"{_BUILT}*", 30 * _DAY_S)):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # another process may be sweeping too
                if time.time() - path.lstat().st_mtime >= limit_s:
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- one process at a time --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when this process ends, in whatever way.

    A process that holds it for longer than a minute, stopped or with a compiler that hangs, is no longer waited for:
    the lock's file is replaced, and whoever waits next waits for this process.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if _is_named(path, descriptor):
            path.unlink()
        # Closing alone would leave it to a process that was forked meanwhile.
        _unlock(descriptor)


def _acquire(path: Path) -> int:
    holder, since = None, 0.0
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if _try_lock(descriptor):
            if _is_named(path, descriptor):
                with contextlib.suppress(OSError):  # on a full disk
                    os.pwrite(descriptor, f"{os.getpid():<20}".encode(), 0)  # for the messages of those that wait
                return descriptor
            _unlock(descriptor)  # its holder is done and has removed it, or was replaced
            continue
        seen = (os.fstat(descriptor).st_ino, os.pread(descriptor, 20, 0).decode(errors="replace").strip())
        os.close(descriptor)
        if seen != holder:
            holder, since = seen, time.monotonic()
            if seen[1]:  # else it is about to write its number
                _log.warning(
                    "waiting for process %s, which builds flowformer's C++ kernels in %s",
                    seen[1],
                    printable(str(path.parent)),
                )
        elif time.monotonic() - since > _WAIT_S:
            _log.warning("process %s is not done after %g s: building the kernels in this one", seen[1], _WAIT_S)
            path.unlink(missing_ok=True)
            continue
        time.sleep(_POLL_S)


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network folder without locks: two processes may then build the same, each in its own folder
        pass
    return True


def _unlock(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that is open."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False
