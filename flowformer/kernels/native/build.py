"""The C++ kernels of this process: found or built, loaded, and connected to PyTorch's threads.

The order in which a library is looked for: the one that a platform wheel ships beside this file, the one that an
earlier process built into the cache folder, and then a new one is built there.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from flowformer.kernels.native import cache
from flowformer.kernels.native.compiler import (
    FOLDER,
    LEVEL_FLAGS,
    SOURCE,
    BuildError,
    compiler_or_reason,
    printable,
    shipped_library,
)

SWITCH = "FLOWFORMER_NATIVE"
LEVEL_VARIABLE = "FLOWFORMER_NATIVE_LEVEL"
_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")

_log = logging.getLogger("flowformer")


@dataclass(frozen=True)
class Library:
    """A loaded shared library.

    Attributes:
        handle: Its functions.
        path: The file.
        levels: Instruction-set levels that it holds and this CPU has, best first.
        how: Where it comes from, in words.
        threads: Name of the OpenMP runtime that runs its threads, or why it computes with one thread.
    """

    handle: ctypes.CDLL
    path: Path
    levels: tuple[str, ...]
    how: str
    threads: str


# -- the process's library --------------------------------------------------------------------------------------------

_lock = threading.Lock()
_outcome: Library | str | None = None  # the library or the reason why there is none; None before the first load


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a child has none of the threads, one of which may have held the lock
    os.register_at_fork(after_in_child=_new_lock)


def load() -> Library | None:
    """Return the library of this process, which the first call finds or builds.

    Logs to "flowformer", once each, that it builds the kernels or why they are not available.

    Returns:
        The library, or ``None``; :func:`why_not` says why.
    """
    global _outcome
    if _switched_off():
        return None
    with _lock:
        if _outcome is None:
            try:
                _outcome = open_library(SOURCE, FOLDER)
            except (BuildError, OSError) as error:  # OSError: sources that cannot be read
                _outcome = str(error)
                _log.warning("flowformer runs in plain PyTorch, without its C++ kernels: %s", error)
        return _outcome if isinstance(_outcome, Library) else None


def why_not() -> str:
    """Return why :func:`load` returns no library; empty if it returns one."""
    if _switched_off():
        return f"switched off by {SWITCH}={os.environ[SWITCH]}"
    load()
    return _outcome if isinstance(_outcome, str) else ""


def _switched_off() -> bool:
    return os.environ.get(SWITCH, "").lower() in ("0", "off", "false", "no")


def level(library: Library) -> str:
    """Return the instruction set to use: the best available, or the requested one.

    Raises:
        ValueError: if the environment variable ``FLOWFORMER_NATIVE_LEVEL`` names a level that is not there.
    """
    asked = os.environ.get(LEVEL_VARIABLE)
    if not asked:
        return library.levels[0]
    if asked not in library.levels:
        raise ValueError(f"{LEVEL_VARIABLE}={asked}: available on this machine: {', '.join(library.levels)}")
    return asked


def open_library(source: Path = SOURCE, beside: Path = FOLDER) -> Library:
    """Find or build the library, and load it; :func:`load` does so once per process.

    Args:
        source: Folder of the C++ sources.
        beside: Folder in which a wheel ships a library.

    Raises:
        BuildError: where it can be neither found nor built nor loaded.
    """
    if sys.platform == "win32":
        raise BuildError("the C++ kernels support Linux and macOS, not Windows")
    if shipped := shipped_library(source, beside):
        return _open(*shipped, "shipped with the package")
    compiler = compiler_or_reason()
    found = cache.cached_library(source, compiler)
    try:
        return _open(*found, f"built by {compiler} in {found.path.parent}")
    except BuildError:
        with contextlib.suppress(OSError):
            found.path.unlink()  # so that the next process builds it again
        raise


def _open(path: Path, content: bytes, how: str) -> Library:
    try:
        handle = _load_copy(path, content)
        handle.flowformer_cpu_supports.argtypes = (ctypes.c_char_p,)
        handle.flowformer_set_parallel.argtypes = (ctypes.c_void_p,)
        handle.flowformer_set_parallel.restype = None
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    levels = tuple(name for name in LEVEL_FLAGS if handle.flowformer_cpu_supports(name.encode()))
    if not levels:
        raise BuildError(f"{path} has no code for this CPU")
    return Library(handle, path, levels, printable(how), _connect_threads(handle))


def _load_copy(path: Path, content: bytes) -> ctypes.CDLL:
    """Load a library from a copy in memory: a file that is truncated while it is mapped ends the process (SIGBUS)."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return ctypes.CDLL(str(path))
    try:
        descriptor = os.memfd_create(path.name[:200])
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        # The descriptor stays open: dlopen would take another library of the same name, this number, for this one.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:  # there is no /proc, or the system does not allow it
        return ctypes.CDLL(str(path))


# -- threads ----------------------------------------------------------------------------------------------------------


def _connect_threads(handle: ctypes.CDLL) -> str:
    """Let the library run its threads in the OpenMP runtime that is loaded already; say which, or why none."""
    reason = "one thread: this process has loaded no OpenMP runtime"
    for path in _openmp_runtimes():
        try:
            # Without NOLOAD, a wrong guess would load a second runtime.
            start = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError) as error:
            reason = f"one thread: the OpenMP runtime {path} gives no GOMP_parallel ({error})"
            continue
        handle.flowformer_set_parallel(ctypes.cast(start, ctypes.c_void_p))
        # A forked child has none of the runtime's threads, and waits for them for ever if it asks for them.
        os.register_at_fork(after_in_child=lambda: handle.flowformer_set_parallel(None))
        return path.name
    return reason


def _openmp_runtimes() -> list[Path]:
    """OpenMP runtimes that may be loaded, torch's own first."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return []
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    own = Path(torch).resolve().parent if torch else None
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        # address, permissions, offset, device, inode, path
        files = {Path(words[5]): None for line in lines if len(words := line.split(maxsplit=5)) == 6}
    else:
        files = dict.fromkeys(sorted((own / "lib").glob("lib*omp*")) if own else ())
    found = [path for path in files if path.name.startswith(_OPENMP_NAMES)]
    homes = (own, own.with_name("torch.libs")) if own else ()
    return sorted(found, key=lambda path: not any(home in path.resolve().parents for home in homes))
