"""Build the C++ kernels with the compiler of this machine, and load them.

The order in which a library is looked for: the one that a platform wheel ships beside this file, the one that an
earlier process built into the cache folder, and then a new one is built there.

Only the standard library is imported: ``hatch_build.py`` runs this file by its path, where there is no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "source"
SWITCH = "FLOWFORMER_NATIVE"
LEVEL_VARIABLE = "FLOWFORMER_NATIVE_LEVEL"
CACHE_VARIABLE = "FLOWFORMER_CACHE"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
SHIPPED_LIBRARY = f"_kernels{SUFFIX}"
SHIPPED_RECORD = "_kernels.json"

# The sources of every level, best level first, and what the compiler may assume of the CPU for each.
LEVEL_FLAGS: dict[str, tuple[str, ...]] = {"portable": ()}
if platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32:
    LEVEL_FLAGS = {
        "avx512": (
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2", "-mf16c"),
            "-mprefer-vector-width=512",
        ),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "portable": (),
    }

# No -march=native: one cache folder may serve several machines. No -fopenmp: a second OpenMP runtime beside torch's
# would fight it for the cores, or hang; see _connect_threads.
COMPILE_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"),
)
# The compiler driver names libstdc++ by itself; as-needed drops what nothing is taken from. macOS has no such options.
LINK_FLAGS = ("-shared", "-static-libgcc", "-Wl,--as-needed") if sys.platform.startswith("linux") else ("-shared",)

_BUILDING = "building-"  # first part of the names of the temporary folders
_BUILT = "kernels-"
_DAY_S = 24 * 60 * 60
_COMPILE_LIMIT_S = 600  # a compiler that takes longer hangs
_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")

_log = logging.getLogger("flowformer")


class BuildError(RuntimeError):
    """The library cannot be found, built or loaded; the message states the reason."""


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
    if path := shipped_library(source, beside):
        return _open(path, "shipped with the package")
    compiler = _compiler_or_reason()
    path = cached_library(source, compiler)
    return _open(path, f"built by {compiler} in {path.parent}")


def _open(path: Path, how: str) -> Library:
    try:
        handle = ctypes.CDLL(str(path))
        handle.flowformer_cpu_supports.argtypes = (ctypes.c_char_p,)
        handle.flowformer_set_parallel.argtypes = (ctypes.c_void_p,)
        handle.flowformer_set_parallel.restype = None
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    levels = tuple(name for name in LEVEL_FLAGS if handle.flowformer_cpu_supports(name.encode()))
    if not levels:
        raise BuildError(f"{path} has no code for this CPU")
    return Library(handle, path, levels, how, _connect_threads(handle))


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


# -- finding ----------------------------------------------------------------------------------------------------------


def shipped_library(source: Path = SOURCE, beside: Path = FOLDER) -> Path | None:
    """Return the library in an installed wheel, if it was built from these sources for this kind of machine."""
    library = beside / SHIPPED_LIBRARY
    try:
        record = json.loads((beside / SHIPPED_RECORD).read_text(encoding="utf-8"))
        fits = record["sources"] == _hash_sources(source).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):  # none is shipped, or its record is not one
        return None
    return library if fits and library.exists() else None


def cached_library(source: Path, compiler: str) -> Path:
    """Return the library in the cache folder for this compiler and these sources, building it if absent.

    Raises:
        BuildError: if the compiler fails or the folder cannot be written.
    """
    folder = cache_folder()
    target = folder / f"{_BUILT}{fingerprint(source, compiler)}{SUFFIX}"
    try:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                if not target.exists():  # else another process has just built it
                    _log.warning(
                        "building flowformer's C++ kernels with %s in %s, once: up to a minute", compiler, folder
                    )
                    _sweep(folder)
                    compile_library(target, source, compiler)
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} is not writable ({error}): set {CACHE_VARIABLE} to one that is"
        ) from error
    with contextlib.suppress(OSError):  # a cache that others made may be read-only
        os.utime(target)  # so that its age is the time since it was last used
    return target


def cache_folder() -> Path:
    """Return the folder for built libraries: ``FLOWFORMER_CACHE``, else ``flowformer`` in the user's cache folder.

    Raises:
        BuildError: if the user has no home folder.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    variable, usual = {
        "darwin": ("", "Library/Caches"),
        "win32": ("LOCALAPPDATA", "AppData/Local"),
    }.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    try:
        return Path(os.environ.get(variable) or Path.home() / usual) / "flowformer"
    except RuntimeError as error:
        raise BuildError(f"no home folder found for the build: set {CACHE_VARIABLE} to a folder") from error


def fingerprint(source: Path, compiler: str) -> str:
    """Return a hash of sources, flags, compiler and machine, which names a built library.

    Raises:
        BuildError: if the compiler cannot be run.
    """
    found = _hash_sources(source)
    # What which finds, since the same word may mean another compiler in another environment.
    words = shlex.split(compiler)
    found.update(f"{shutil.which(words[0])} {words[1:]}\n{_run([*words, '--version'])}".encode())
    return found.hexdigest()[:32]


def _hash_sources(source: Path) -> hashlib._Hash:
    found = hashlib.sha256(repr((LEVEL_FLAGS, COMPILE_FLAGS, LINK_FLAGS, sys.platform, platform.machine())).encode())
    for path in sorted([*source.glob("[!.]*.h"), *source.glob("[!.]*.cpp")]):  # an editor's own files start with a dot
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when this process ends, in whatever way."""
    if fcntl is None:  # two processes then build the same; the last one's library stays
        yield
        return
    path.touch()  # its age counts from the last build
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that builds flowformer's C++ kernels in %s", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a network folder without locks: as without fcntl
            pass
        yield


def _sweep(folder: Path) -> None:
    """Remove files of killed builds, and libraries unused for a month."""
    for pattern, limit_s in ((f"{_BUILDING}*", _DAY_S), (f"{_BUILT}*", 30 * _DAY_S)):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # another process may be sweeping too
                if time.time() - path.stat().st_mtime < limit_s:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


# -- compiling --------------------------------------------------------------------------------------------------------


def find_compiler() -> str | None:
    """Return the C++ compiler: ``CXX``, which may include arguments, else c++, g++ or clang++ on the PATH.

    Returns:
        The command as a shell would write it, or ``None`` if there is none that takes the options of g++.
    """
    if asked := os.environ.get("CXX"):
        return asked if _usable(asked) else None
    return next((shlex.quote(path) for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _usable(compiler: str) -> bool:
    try:
        words = shlex.split(compiler)
    except ValueError:  # a quotation mark that is never closed
        return False
    msvc = bool(words) and Path(words[0]).stem.lower() in ("cl", "clang-cl")  # other options than g++'s
    return bool(words) and not msvc and shutil.which(words[0]) is not None


def _compiler_or_reason() -> str:
    if compiler := find_compiler():
        return compiler
    if asked := os.environ.get("CXX"):
        raise BuildError(f"no C++ compiler found: CXX={asked} cannot be run, or does not accept the options of g++")
    raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")


def compile_library(target: Path, source: Path = SOURCE, compiler: str | None = None) -> None:
    """Compile the kernels, once per instruction set, into a library that is written atomically.

    Args:
        target: The library's file; its folder is made.
        source: Folder of the C++ sources.
        compiler: The compiler's command; :func:`find_compiler` chooses one if none is given.

    Raises:
        BuildError: if there is no compiler, or with the command that failed and the last it said.
        OSError: if the folder of ``target`` cannot be written.
    """
    words = shlex.split(compiler or _compiler_or_reason())
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's folder, because a file can be moved whole only within a file system.
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=target.parent) as folder:
        objects = {f"{folder}/library.o": [str(source / "library.cpp")]}
        # The linker keeps the first of several definitions of an inline function: the weakest level comes first, so
        # that a CPU without AVX never runs the AVX form.
        for name, flags in reversed(LEVEL_FLAGS.items()):
            objects[f"{folder}/{name}.o"] = [*flags, f"-DFLOWFORMER_LEVEL={name}", str(source / "kernels.cpp")]
        with ThreadPoolExecutor(len(objects)) as pool:
            commands = ([*words, *COMPILE_FLAGS, *own, "-c", "-o", path] for path, own in objects.items())
            list(pool.map(_run, commands))  # list: raises what they raised
        linked = Path(folder) / target.name
        _run([*words, *LINK_FLAGS, "-o", str(linked), *objects])
        with linked.open("rb") as file:
            os.fsync(file)  # else a power cut may leave an empty file under the final name
        linked.replace(target)


def ship(folder: Path, source: Path = SOURCE, compiler: str | None = None) -> tuple[Path, Path]:
    """Build the files of a platform wheel: the library, and a record of the sources it was built from.

    Returns:
        The two files.

    Raises:
        BuildError, OSError: as :func:`compile_library`.
    """
    library, record = folder / SHIPPED_LIBRARY, folder / SHIPPED_RECORD
    compile_library(library, source, compiler)
    record.write_text(json.dumps({"sources": _hash_sources(source).hexdigest()}) + "\n", encoding="utf-8")
    return library, record


def _run(command: list[str]) -> str:
    """Run a compiler; return what it printed."""
    english = {**os.environ, "LC_ALL": "C"}  # the fingerprint must not depend on the user's language
    try:
        done = subprocess.run(
            command,
            env=english,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_COMPILE_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler failed: {shlex.join(command)}: {error}") from error
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-20:])
        raise BuildError(f"the compiler failed with {done.returncode}: {shlex.join(command)}\n{last}")
    return done.stdout
