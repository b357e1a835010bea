"""Compile the C++ kernels with the compiler of this machine.

Only the standard library is imported: ``hatch_build.py`` runs this file by its path, where there is no torch.
"""

from __future__ import annotations

import contextlib
import functools
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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "source"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
SHIPPED_LIBRARY = f"_kernels{SUFFIX}"
SHIPPED_RECORD = "_kernels.json"
BUILDING = "building-"  # first part of the names of the temporary folders

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
# would fight it for the cores, or hang; see build.py.
COMPILE_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"),
)
# The compiler driver names libstdc++ by itself; as-needed drops what nothing is taken from. macOS has no such options.
LINK_FLAGS = ("-shared", "-static-libgcc", "-Wl,--as-needed") if sys.platform.startswith("linux") else ("-shared",)

_COMPILE_LIMIT_S = 600  # a compiler that takes longer hangs
_VERSION_LIMIT_S = 60

_log = logging.getLogger("flowformer")


class BuildError(RuntimeError):
    """The library cannot be found, built or loaded; the message states the reason in one line of printable text."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(message: str) -> str:
    """Return a text in one line, with escapes for what cannot be printed, such as bytes of no encoding in a path."""
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in " ".join(message.splitlines()))


# -- the compiler -----------------------------------------------------------------------------------------------------


def find_compiler() -> str | None:
    """Return the C++ compiler: ``CXX``, which may include arguments, else c++, g++ or clang++ on the PATH.

    Returns:
        The command as a shell would write it, or ``None`` if there is none that takes the options of g++.
    """
    if asked := os.environ.get("CXX"):
        if shutil.which(asked):  # a path, which may contain spaces
            asked = shlex.quote(asked)
        return asked if _usable(asked) else None
    return next((shlex.quote(path) for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _usable(compiler: str) -> bool:
    try:
        words = shlex.split(compiler)
    except ValueError:  # a quotation mark that is never closed
        return False
    msvc = bool(words) and Path(words[0]).stem.lower() in ("cl", "clang-cl")  # other options than g++'s
    return bool(words) and not msvc and shutil.which(words[0]) is not None


def compiler_or_reason() -> str:
    """Return the compiler as :func:`find_compiler` does.

    Raises:
        BuildError: where there is none.
    """
    if compiler := find_compiler():
        return compiler
    if asked := os.environ.get("CXX"):
        raise BuildError(f"no C++ compiler found: CXX={asked} cannot be run, or does not accept the options of g++")
    raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")


def fingerprint(source: Path, compiler: str) -> str:
    """Return a hash of sources, flags, compiler and machine, which names a built library.

    Raises:
        BuildError: if the compiler cannot be run.
    """
    found = _hash_sources(source)
    # What which finds, since the same word may mean another compiler in another environment.
    words = shlex.split(compiler)
    with _Commands() as commands:
        version = commands.run([*words, "--version"], _VERSION_LIMIT_S)
    found.update(os.fsencode(f"{shutil.which(words[0])} {words[1:]}\n{version}"))
    return found.hexdigest()[:32]


def _hash_sources(source: Path) -> hashlib._Hash:
    found = hashlib.sha256(repr((LEVEL_FLAGS, COMPILE_FLAGS, LINK_FLAGS, sys.platform, platform.machine())).encode())
    for path in sorted([*source.glob("[!.]*.h"), *source.glob("[!.]*.cpp")]):  # an editor's own files start with a dot
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found


# -- compiling --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def compiled(beside: Path, source: Path = SOURCE, compiler: str | None = None) -> Iterator[Path]:
    """Compile the kernels, once per instruction set, into a library in a temporary folder.

    Args:
        beside: The folder that the temporary folder is in, so that the library can be moved to it atomically. It is
            created if absent.
        source: Folder of the C++ sources.
        compiler: The compiler's command; :func:`find_compiler` chooses one if none is given.

    Yields:
        The library, written to the disk. The temporary folder is removed at the end, also if this process is killed.

    Raises:
        BuildError: if there is no compiler, or with the command that failed and what it said.
        OSError: if the folder cannot be written.
    """
    words = shlex.split(compiler or compiler_or_reason())
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=BUILDING, dir=beside))
    try:
        linked = folder / f"linked{SUFFIX}"
        _compile(words, source, linked)
        if not linked.is_file():
            raise BuildError(f"the compiler wrote no library, and reported no error: {shlex.join(words)}")
        with linked.open("rb") as file:
            os.fsync(file)  # else a power cut may leave an empty file under the final name
        yield linked
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(words: list[str], source: Path, linked: Path) -> None:
    folder = linked.parent
    objects = {f"{folder}/library.o": [str(source / "library.cpp")]}
    # The linker keeps the first of several definitions of an inline function: the weakest level comes first, so that a
    # CPU without AVX never runs the AVX form.
    for name, flags in reversed(LEVEL_FLAGS.items()):
        objects[f"{folder}/{name}.o"] = [*flags, f"-DFLOWFORMER_LEVEL={name}", str(source / "kernels.cpp")]
    # The pool waits for its threads when it is left, so the commands are ended before.
    with ThreadPoolExecutor(len(objects)) as pool, _Commands(folder) as commands:
        each = ([*words, *COMPILE_FLAGS, *own, "-c", "-o", path] for path, own in objects.items())
        list(pool.map(commands.run, each))  # list: raises what they raised
        commands.run([*words, *LINK_FLAGS, "-o", str(linked), *objects])


def compile_library(target: Path, source: Path = SOURCE, compiler: str | None = None) -> None:
    """Compile the kernels into a file that is written atomically; arguments and errors as in :func:`compiled`."""
    with compiled(target.parent, source, compiler) as library:
        library.replace(target)


def ship(folder: Path, source: Path = SOURCE, compiler: str | None = None) -> tuple[Path, Path]:
    """Build the files of a platform wheel: the library, and a record of its content and of the sources it was built of.

    Returns:
        The two files.

    Raises:
        BuildError, OSError: as :func:`compiled`.
    """
    library, record = folder / SHIPPED_LIBRARY, folder / SHIPPED_RECORD
    compile_library(library, source, compiler)
    written = {"sources": _hash_sources(source).hexdigest(), "library": content_hash(library.read_bytes())}
    record.write_text(json.dumps(written) + "\n", encoding="utf-8")
    return library, record


def shipped_library(source: Path = SOURCE, beside: Path = FOLDER) -> tuple[Path, bytes] | None:
    """Return the library in an installed wheel and its content, if it was built from these sources and is undamaged."""
    library = beside / SHIPPED_LIBRARY
    try:
        record = json.loads((beside / SHIPPED_RECORD).read_text(encoding="utf-8"))
        if record["sources"] != _hash_sources(source).hexdigest():
            return None
        content = library.read_bytes()
        return (library, content) if record["library"] == content_hash(content) else None
    except (OSError, ValueError, KeyError, TypeError):  # none is shipped, or its record is not one
        return None


def content_hash(content: bytes) -> str:
    """Return the SHA-256 of a library, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# -- commands that end with this process ------------------------------------------------------------------------------

# Reads a line that says that all is done. Where it comes to the end of its input instead, since this process was killed
# or is interrupted, it ends what runs in its process group and removes the temporary folder. The signal TERM lets
# compilers remove their own temporary files.
_WATCH = """
trap : TERM INT HUP
PATH="$PATH:/bin:/usr/bin"
read -r done && exit
kill -TERM 0
[ -z "$1" ] || rm -rf -- "$1" || { sleep 1; rm -rf -- "$1"; }
kill -KILL 0
"""


class _Commands:
    """Runs commands that end, with all that they have started, when this is left or this process ends."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = str(folder or "")
        self._ended = False
        self._watch = _start(["/bin/sh", "-c", _WATCH, "sh", self._folder], 0, os.environ, stdin=subprocess.PIPE)

    def __enter__(self) -> _Commands:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with _starting:  # no thread starts another command
            self._ended = True
        pipe = self._watch.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):  # somebody has killed it
            if kind is None:
                pipe.write(b"done\n")
            pipe.close()
        self._watch.wait()

    def run(self, command: list[str], limit_s: float | None = None) -> str:
        """Run a command; return what it printed.

        Raises:
            BuildError: if it cannot be run, fails, or takes longer than the limit.
        """
        # The fingerprint must not depend on the user's language; temporary files go where they are removed with the
        # rest, and where there is room for the library too.
        environment = {**os.environ, "LC_ALL": "C", **({"TMPDIR": self._folder} if self._folder else {})}
        shown = shlex.join(command)
        with _starting:
            if self._ended:
                raise BuildError(f"another command has failed or was interrupted before this one: {shown}")
            process = _start(command, self._watch.pid, environment, stdout=subprocess.PIPE)
        with process:
            try:
                printed = process.communicate(timeout=limit_s or _COMPILE_LIMIT_S)[0].decode(errors="replace")
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"the compiler failed: {error}") from error
            finally:
                process.kill()  # nothing if it has ended
        if process.returncode:
            _log.info("%s\n%s", shown, printed)
            raise BuildError(f"the compiler failed with {process.returncode}: {_gist(printed)} ({shown})")
        return printed


# A child that is forked while a process is started would inherit ends of pipes, whose closing is waited for.
_starting = threading.RLock()  # with preexec_fn, starting a process is itself a fork
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


def _start(command: list[str], group: int, environment: Mapping[str, str], **pipes: int) -> subprocess.Popen[Any]:
    """Start a process in a process group; 0: in a new one.

    Raises:
        BuildError: if it cannot be run.
    """
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    options.update(pipes)
    if sys.version_info >= (3, 11):
        options["process_group"] = group
    else:
        options["preexec_fn"] = functools.partial(os.setpgid, 0, group)
    try:
        with _starting:
            return subprocess.Popen(command, env=environment, bufsize=0, **options)
    except OSError as error:
        raise BuildError(f"{shlex.join(command)} cannot be run: {error}") from error


def _gist(printed: str) -> str:
    """The first line that names an error, else the last line."""
    lines = [line for line in printed.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it printed nothing")[:500]
