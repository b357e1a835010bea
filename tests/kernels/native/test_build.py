"""The C++ kernels are found, built and loaded; with sources of a few lines in place of the real ones."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch

from flowformer.kernels.native import build

REPOSITORY = Path(__file__).parents[3]
COMPILER = build.find_compiler()
DAY_S = 24 * 60 * 60

pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler for the kernels")

HEADER = """
#define EXPORT extern "C" __attribute__((visibility("default")))
#define JOIN_(name, level) name##_##level
#define JOIN(name, level) JOIN_(name, level)
#define TEXT_(level) #level
#define TEXT(level) TEXT_(level)
"""
KERNELS = """
#include "names.h"
inline __attribute__((noinline)) const char *merged_by_the_linker() { return TEXT(FLOWFORMER_LEVEL); }
EXPORT const char *JOIN(flowformer_inline, FLOWFORMER_LEVEL)() { return merged_by_the_linker(); }
EXPORT const char *JOIN(flowformer_level, FLOWFORMER_LEVEL)() { return TEXT(FLOWFORMER_LEVEL); }
EXPORT int JOIN(flowformer_version, FLOWFORMER_LEVEL)() { return 1; }
"""
LIBRARY = """
#include "names.h"
#include <string.h>
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel parallel = nullptr;
EXPORT void flowformer_set_parallel(void *gomp_parallel) { parallel = (Parallel)gomp_parallel; }
static void count(void *seen) { __atomic_fetch_add((int *)seen, 1, __ATOMIC_SEQ_CST); }
EXPORT int count_threads(int wanted) {
    int seen = 0;
    if (parallel) parallel(count, &seen, wanted, 0);
    else count(&seen);
    return seen;
}
EXPORT int flowformer_cpu_supports(const char *level) {
#ifdef __x86_64__
    if (!strcmp(level, "avx512")) return !!__builtin_cpu_supports("avx512f");
    if (!strcmp(level, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(level, "portable");
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, text in {"names.h": HEADER, "kernels.cpp": KERNELS, "library.cpp": LIBRARY}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and none of the user's settings but the compiler."""
    for name in (build.SWITCH, build.LEVEL_VARIABLE, "FLOWFORMER_PURE_WHEEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """In place of the package's folder: where a wheel would ship a library."""
    folder = tmp_path / "beside"
    folder.mkdir()
    return folder


@pytest.fixture
def fresh(source: Path, beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has not loaded anything yet, and its package holds the small sources."""
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "FOLDER", beside)


@pytest.fixture
def wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes its calls in a file, and is slow while a file `slow` lies beside it."""
    script = tmp_path / "wrapped"
    slow = (
        f'if [ -e "{tmp_path}/slow" ]; then case "$1" in --version) ;; *) sleep "$(cat "{tmp_path}/slow")";; esac; fi'
    )
    script.write_text(f'#!/bin/sh\necho "$*" >> "{script}.calls"\n{slow}\nexec {COMPILER} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


def compilations(wrapper: Path) -> int:
    calls = wrapper.with_name(f"{wrapper.name}.calls")
    return sum(" -c " in line for line in calls.read_text().splitlines()) if calls.exists() else 0


def text(library: build.Library, name: str) -> str:
    function = getattr(library.handle, name)
    function.restype = ctypes.c_char_p
    return function().decode()


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run code in a new process that imports build.py by itself: that starts faster than torch."""
    head = f"import sys; sys.path.insert(0, {str(build.FOLDER)!r}); from pathlib import Path; import build\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def output(process: subprocess.Popen[str]) -> str:
    try:
        printed, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors
    return printed.strip()


# -- building and loading ---------------------------------------------------------------------------------------------


def test_builds_and_loads_every_level_of_this_machine(source: Path, beside: Path, cache: Path) -> None:
    library = build.open_library(source, beside)
    assert library.path.parent == cache
    assert library.how == f"built by {COMPILER} in {cache}"
    for name in build.LEVEL_FLAGS:
        assert text(library, f"flowformer_level_{name}") == name
    assert not list(cache.glob("building-*"))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="asks Linux on x86-64")
def test_offers_the_levels_that_the_cpu_has(source: Path, beside: Path) -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    has = {"avx512": "avx512f" in flags, "avx2": "avx2" in flags, "portable": True}
    assert build.open_library(source, beside).levels == tuple(name for name, there in has.items() if there)


def test_functions_merged_by_the_linker_run_on_every_cpu(source: Path, beside: Path) -> None:
    library = build.open_library(source, beside)
    assert {text(library, f"flowformer_inline_{name}") for name in build.LEVEL_FLAGS} == {"portable"}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_needs_no_library_but_those_of_c(source: Path, tmp_path: Path) -> None:
    # As some compilers link unless told otherwise: with all libraries, needed or not.
    build.compile_library(tmp_path / "kernels.so", source, f"{COMPILER} -Wl,--no-as-needed")
    dynamic = subprocess.run(["readelf", "-dW", tmp_path / "kernels.so"], capture_output=True, text=True, check=True)
    needed = {line.split("[")[1].split(".")[0] for line in dynamic.stdout.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libc", "libm"}


def test_best_level_unless_another_is_asked_for(source: Path, beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.open_library(source, beside)
    assert build.level(library) == library.levels[0]
    monkeypatch.setenv(build.LEVEL_VARIABLE, "portable")
    assert build.level(library) == "portable"


def test_level_that_is_not_there_is_refused(source: Path, beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.open_library(source, beside)
    monkeypatch.setenv(build.LEVEL_VARIABLE, "sse9")
    with pytest.raises(ValueError, match=f"sse9: available on this machine: {', '.join(library.levels)}"):
        build.level(library)


def test_imports_the_standard_library_only() -> None:
    code = f"import sys; sys.path.insert(0, {str(build.FOLDER)!r}); import build; print(build.SUFFIX)"
    command = [sys.executable, "-I", "-S", "-c", code]  # -S: without site-packages
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == build.SUFFIX


@pytest.mark.usefixtures("fresh")
def test_loads_once_per_process_and_says_that_it_builds(wrapper: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = build.load()
    assert library is not None
    assert build.load() is library
    assert build.why_not() == ""
    assert compilations(wrapper) == len(build.LEVEL_FLAGS) + 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"with {wrapper} in {library.path.parent}" in caplog.text


# -- the cache --------------------------------------------------------------------------------------------------------


def test_found_again_without_compiling(source: Path, beside: Path, wrapper: Path) -> None:
    first = build.open_library(source, beside).path
    before = compilations(wrapper)
    first.with_suffix(".lock").unlink()
    assert build.open_library(source, beside).path == first
    assert compilations(wrapper) == before
    assert not first.with_suffix(".lock").exists()  # nothing is written: the folder may be read-only


@pytest.mark.parametrize("name", ["kernels.cpp", "names.h"])
def test_built_again_when_a_source_changes(name: str, source: Path, beside: Path) -> None:
    first = build.open_library(source, beside)
    path = source / name
    path.write_text(path.read_text().replace("return 1", "return 2") + "\n")
    second = build.open_library(source, beside)
    assert second.path != first.path
    assert second.handle.flowformer_version_portable() == (2 if name == "kernels.cpp" else 1)


def test_built_again_when_the_compiler_changes(
    source: Path, beside: Path, wrapper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.open_library(source, beside).path
    script = wrapper.read_text()
    wrapper.write_text(script.replace("exec", '[ "$1" = --version ] && echo 99\nexec'))  # the same path, updated
    second = build.open_library(source, beside).path
    monkeypatch.setenv("CXX", f"{wrapper} -DOTHER")
    third = build.open_library(source, beside).path
    shutil.copy(wrapper, wrapper.with_name("elsewhere"))
    monkeypatch.setenv("CXX", str(wrapper.with_name("elsewhere")))
    assert len({first, second, third, build.open_library(source, beside).path}) == 4


def test_processes_that_start_at_once_compile_once(source: Path, beside: Path, wrapper: Path, tmp_path: Path) -> None:
    (tmp_path / "slow").write_text("0.5")
    code = "print(build.open_library(Path(sys.argv[1]), Path(sys.argv[2])).handle.count_threads(1))"
    assert [output(process) for process in [python(code, source, beside) for _ in range(3)]] == ["1"] * 3
    assert compilations(wrapper) == len(build.LEVEL_FLAGS) + 1


def test_killed_build_leaves_a_usable_cache(source: Path, beside: Path, wrapper: Path, cache: Path) -> None:
    slow = wrapper.with_name("slow")
    slow.write_text("100")
    process = python("build.open_library(Path(sys.argv[1]), Path(sys.argv[2]))", source, beside)
    deadline = time.monotonic() + 30
    while not compilations(wrapper) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (left,) = cache.glob("building-*")
    slow.unlink()
    assert build.open_library(source, beside).path.parent == cache
    assert left.exists()  # it might be another's that still runs


def test_a_build_removes_what_is_old(source: Path, cache: Path) -> None:
    ages = {"building-dead": 2, "building-alive": 0, "kernels-old.so": 31, "kernels-used.so": 29, "another": 99}
    for name, days in ages.items():
        (cache / name).mkdir(parents=True) if name.startswith("building") else (cache / name).touch()
        os.utime(cache / name, (time.time() - days * DAY_S,) * 2)
    built = build.cached_library(source, str(COMPILER))
    left = {path.name for path in cache.iterdir()} - {built.name, built.with_suffix(".lock").name}
    assert left == {"building-alive", "kernels-used.so", "another"}


def test_use_counts_as_age(source: Path) -> None:
    built = build.cached_library(source, str(COMPILER))
    os.utime(built, (0, 0))
    assert build.cached_library(source, str(COMPILER)).stat().st_mtime > time.time() - DAY_S


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the names of Linux")
def test_cache_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(build.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "flowformer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "flowformer"


# -- why it does not run ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_failed_compilation_gives_the_reason_and_leaves_nothing(source: Path, cache: Path) -> None:
    (source / "kernels.cpp").write_text(KERNELS + "this is no C++;\n")
    assert build.load() is None
    assert build.why_not().startswith("the compiler failed")
    for part in (str(COMPILER), "-DFLOWFORMER_LEVEL=", "error:", "this is no C++"):
        assert part in build.why_not()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_compiler_that_hangs_is_given_up(
    source: Path, wrapper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow").write_text("2")
    monkeypatch.setattr(build, "_COMPILE_LIMIT_S", 0.3)
    with pytest.raises(build.BuildError, match="timed out"):
        build.compile_library(tmp_path / "kernels.so", source)


@pytest.mark.usefixtures("fresh")
def test_no_compiler_gives_the_reason_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.load() is build.load() is None
    assert build.why_not() == "no C++ compiler found: install g++ or clang++, or set CXX"
    assert [record.getMessage() for record in caplog.records] == [
        f"flowformer runs in plain PyTorch, without its C++ kernels: {build.why_not()}"
    ]


@pytest.mark.parametrize("asked", ["/there/is/none", "g++ 'open", "cl", " "])
def test_compiler_that_cannot_serve_is_not_replaced_in_silence(
    asked: str, source: Path, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cl").touch(0o755)  # found, but takes other options
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", asked)
    assert build.find_compiler() is None
    with pytest.raises(build.BuildError, match=re.escape(f"CXX={asked} cannot be run")):
        build.open_library(source, beside)


def test_compilers_arguments_are_passed_on(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (source / "kernels.cpp").write_text(KERNELS.replace("return 1", "return GIVEN"))
    monkeypatch.setenv("CXX", f"{COMPILER} '-DGIVEN=40 + 2'")
    build.compile_library(tmp_path / "kernels.so", source)
    assert ctypes.CDLL(str(tmp_path / "kernels.so")).flowformer_version_portable() == 42


@pytest.mark.usefixtures("fresh")
def test_switched_off(monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.load() is None
    assert build.why_not() == "switched off by FLOWFORMER_NATIVE=0"
    assert not caplog.records
    assert not cache.exists()
    monkeypatch.setenv(build.SWITCH, "1")
    assert build.load() is not None


def test_cache_that_cannot_be_written(source: Path, beside: Path, cache: Path) -> None:
    cache.touch()  # a file in the folder's place, which stops even root
    with pytest.raises(build.BuildError, match=f"the cache folder {cache} is not writable .*: set FLOWFORMER_CACHE"):
        build.open_library(source, beside)


@pytest.mark.usefixtures("fresh")
def test_library_that_cannot_be_loaded(source: Path) -> None:
    build.cached_library(source, str(COMPILER)).write_bytes(b"")
    assert build.load() is None
    assert "cannot be loaded" in build.why_not()


@pytest.mark.usefixtures("fresh")
def test_library_without_code_for_this_cpu(source: Path) -> None:
    (source / "library.cpp").write_text(LIBRARY.replace("return ", "return 0 && "))
    assert build.load() is None
    assert "no code for this CPU" in build.why_not()


# -- threads ----------------------------------------------------------------------------------------------------------

# What the process has mapped, and how many threads a forked child gets.
THREADS = """
import os, torch
library = build.open_library(Path(sys.argv[1]), Path(sys.argv[2]))
torch.set_num_threads(2)
torch.ones(1000, 1000).sum()
print(library.threads, library.handle.count_threads(2))
print(*{os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if "omp." in line or "omp5" in line})
child = os.fork()
if not child:
    os._exit(library.handle.count_threads(2))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), library.handle.count_threads(2))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is loaded")
def test_runs_in_torchs_openmp_runtime_and_in_one_thread_after_a_fork(source: Path, beside: Path) -> None:
    threads, mapped, after_fork = output(python(THREADS, source, beside)).splitlines()
    (runtime,) = mapped.split()
    assert threads == f"{Path(runtime).name} 2"
    assert Path(torch.__file__).resolve().parent.parent in Path(runtime).parents
    assert after_fork == "1 2"


def test_one_thread_where_no_runtime_is_loaded(source: Path, beside: Path) -> None:
    code = "x = build.open_library(Path(sys.argv[1]), Path(sys.argv[2])); print(x.handle.count_threads(2), x.threads)"
    assert output(python(code, source, beside)) == "1 one thread: this process has loaded no OpenMP runtime"


def test_no_runtime_is_loaded_by_a_wrong_guess(
    source: Path, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "library.cpp").write_text(LIBRARY + "EXPORT void GOMP_parallel() {}\n")
    guess = tmp_path / "libgomp.so.1"
    build.compile_library(guess, source)
    monkeypatch.setattr(build, "_openmp_runtimes", lambda: [guess])
    library = build.open_library(source, beside)
    assert library.threads.startswith(f"one thread: the OpenMP runtime {guess}")
    assert library.handle.count_threads(2) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is loaded")
def test_torchs_runtime_comes_before_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        "/a/libgomp.so.1",
        f"{Path(torch.__file__).parent}/lib/libgomp.so.1",
        "/b/with space/libomp.so",
        "/libx.so",
    ]
    lines = [f"7f-80 r-xp 0000 00:1f 12   {path}\n" for path in paths]
    (tmp_path / "maps").write_text("".join(["7f-80 rw-p 0000 00:00 0\n", *lines, *lines]))
    monkeypatch.setattr(build, "Path", lambda path: Path(tmp_path / "maps" if path == "/proc/self/maps" else path))
    assert [str(path) for path in build._openmp_runtimes()] == [paths[1], paths[0], paths[2]]


# -- wheels -----------------------------------------------------------------------------------------------------------


def test_shipped_library_comes_before_any_compiler(
    source: Path, beside: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    build.ship(beside, source)
    monkeypatch.setenv("CXX", "/there/is/none")
    library = build.open_library(source, beside)
    assert library.path == beside / build.SHIPPED_LIBRARY
    assert library.how == "shipped with the package"
    assert not cache.exists()


@pytest.mark.parametrize("record", [None, "", "[]", "{}", '{"sources": 1}'])
def test_shipped_library_without_a_true_record_is_not_used(record: str | None, source: Path, beside: Path) -> None:
    (beside / build.SHIPPED_LIBRARY).touch()
    if record is not None:
        (beside / build.SHIPPED_RECORD).write_text(record)
    assert build.shipped_library(source, beside) is None


def test_shipped_library_of_other_sources_is_not_used(source: Path, beside: Path, cache: Path) -> None:
    build.ship(beside, source)
    (source / "kernels.cpp").write_text(KERNELS.replace("return 1", "return 2"))
    library = build.open_library(source, beside)
    assert library.path.parent == cache
    assert library.handle.flowformer_version_portable() == 2


@pytest.fixture
def project(source: Path, tmp_path: Path) -> Path:
    """What the hook reads of the repository, with the small sources."""
    root = tmp_path / "project"
    shutil.copytree(source, root / "flowformer/kernels/native/source")
    shutil.copy(build.FOLDER / "build.py", root / "flowformer/kernels/native")
    return root


class Hook:
    """The hook as hatchling would run it; hatchling itself is not needed here."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        interface = types.ModuleType("hatchling.builders.hooks.plugin.interface")
        interface.BuildHookInterface = object
        monkeypatch.setitem(sys.modules, interface.__name__, interface)
        monkeypatch.setitem(sys.modules, "flowformer_native_build", None)  # removed again with the test
        spec = importlib.util.spec_from_file_location("hatch_build", REPOSITORY / "hatch_build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.said: list[str] = []
        self.data = {"force_include": {}, "pure_python": True}
        self.hook = module.NativeKernels()
        self.hook.root, self.hook.app = str(root), types.SimpleNamespace(display_warning=self.said.append)

    def run(self, version: str = "standard") -> None:
        self.hook.initialize(version, self.data)

    @property
    def pure(self) -> bool:
        return self.data == {"force_include": {}, "pure_python": True}


def test_wheel_holds_the_library_and_is_for_this_platform(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Hook(project, monkeypatch)
    hook.run()
    names = {name: Path(path) for path, name in hook.data["force_include"].items()}
    assert set(names) == {f"flowformer/kernels/native/{name}" for name in (build.SHIPPED_LIBRARY, build.SHIPPED_RECORD)}
    library = names[f"flowformer/kernels/native/{build.SHIPPED_LIBRARY}"]
    native = project / "flowformer/kernels/native"
    assert build.shipped_library(native / "source", library.parent) == library
    assert hook.data["pure_python"] is False
    assert hook.data["tag"].startswith("py3-none-")
    assert platform.machine() in hook.data["tag"]
    assert {path.name for path in native.iterdir()} <= {"source", "build.py", "__pycache__"}
    hook.hook.finalize("standard", hook.data, "")
    assert not library.exists()


def test_editable_install_compiles_nothing(project: Path, wrapper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Hook(project, monkeypatch)
    hook.run("editable")
    assert hook.pure
    assert not hook.said
    assert compilations(wrapper) == 0


def test_pure_wheel_where_asked_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWFORMER_PURE_WHEEL", "1")
    hook = Hook(project, monkeypatch)
    hook.run()
    assert hook.pure
    assert not hook.said


def test_pure_wheel_without_a_compiler(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/there/is/none")
    hook = Hook(project, monkeypatch)
    hook.run()
    assert hook.pure
    assert "no C++ compiler" in hook.said[0]


def test_pure_wheel_where_the_compiler_fails(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "flowformer/kernels/native/source/kernels.cpp").write_text("this is no C++;")
    hook = Hook(project, monkeypatch)
    hook.run()
    assert hook.pure
    assert "the compiler failed" in hook.said[0]


@pytest.mark.slow
def test_what_make_wheel_builds(source: Path, tmp_path: Path) -> None:
    root, built = tmp_path / "repository", tmp_path / "dist"
    shutil.copytree(
        REPOSITORY, root, ignore=lambda folder, names: {".git", ".venv", "runs", "dist", "build"} & {*names}
    )
    shutil.rmtree(root / "flowformer/kernels/native/source", ignore_errors=True)
    shutil.copytree(source, root / "flowformer/kernels/native/source")
    command = [sys.executable, "-m", "build", "--outdir", str(built), str(root)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (archive,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {"hatch_build.py", "flowformer/kernels/native/source/names.h"} <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    native = tmp_path / "installed/flowformer/kernels/native"
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert json.loads((native / build.SHIPPED_RECORD).read_text())
    assert build.open_library(native / "source", native).how == "shipped with the package"
