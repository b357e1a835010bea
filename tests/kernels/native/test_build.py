"""The C++ kernels are found, built and loaded; with sources of a few lines in place of the real ones."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_kernels import COMPILER, KERNELS, LIBRARY, compilations, output, python, text

from flowformer.kernels.native import build, compiler

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler for the kernels"),
]


# -- building and loading ---------------------------------------------------------------------------------------------


def test_builds_and_loads_every_level_of_this_machine(source: Path, beside: Path, folder: Path) -> None:
    library = build.open_library(source, beside)
    assert library.path.parent == folder
    assert library.how == f"built by {COMPILER} in {folder}"
    for name in compiler.LEVEL_FLAGS:
        assert text(library, f"flowformer_level_{name}") == name
    assert not list(folder.glob("building-*"))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="asks Linux on x86-64")
def test_offers_the_levels_that_the_cpu_has(source: Path, beside: Path) -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    has = {"avx512": "avx512f" in flags, "avx2": "avx2" in flags, "portable": True}
    assert build.open_library(source, beside).levels == tuple(name for name, there in has.items() if there)


def test_functions_merged_by_the_linker_run_on_every_cpu(source: Path, beside: Path) -> None:
    library = build.open_library(source, beside)
    assert {text(library, f"flowformer_inline_{name}") for name in compiler.LEVEL_FLAGS} == {"portable"}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_needs_no_library_but_those_of_c(source: Path, tmp_path: Path) -> None:
    # As some compilers link unless told otherwise: with all libraries, needed or not.
    compiler.compile_library(tmp_path / "kernels.so", source, f"{COMPILER} -Wl,--no-as-needed")
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


def test_the_compiler_needs_the_standard_library_only() -> None:
    code = f"import sys; sys.path.insert(0, {str(compiler.FOLDER)!r}); import compiler; print(compiler.SUFFIX)"
    command = [sys.executable, "-I", "-S", "-c", code]  # -S: without site-packages
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == compiler.SUFFIX


@pytest.mark.usefixtures("fresh")
def test_loads_once_per_process_and_says_that_it_builds(wrapper: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = build.load()
    assert library is not None
    assert build.load() is library
    assert build.why_not() == ""
    assert compilations(wrapper) == len(compiler.LEVEL_FLAGS) + 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"with {wrapper} in {library.path.parent}" in caplog.text


# -- why it does not run ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_failed_compilation_gives_the_reason_and_leaves_nothing(source: Path, folder: Path) -> None:
    (source / "kernels.cpp").write_text(KERNELS + "this is no C++;\n")
    assert build.load() is None
    assert build.why_not().startswith("the compiler failed")
    for part in (str(COMPILER), "-DFLOWFORMER_LEVEL=", "error:", "this"):
        assert part in build.why_not()
    assert "\n" not in build.why_not()
    assert not list(folder.iterdir())


def test_compiler_that_hangs_is_given_up(
    source: Path, wrapper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow").write_text("2")
    monkeypatch.setattr(compiler, "_COMPILE_LIMIT_S", 0.3)
    with pytest.raises(compiler.BuildError, match="timed out"):
        compiler.compile_library(tmp_path / "kernels.so", source)


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
    assert compiler.find_compiler() is None
    with pytest.raises(compiler.BuildError, match=re.escape(f"CXX={asked} cannot be run")):
        build.open_library(source, beside)


def test_compilers_arguments_are_passed_on(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (source / "kernels.cpp").write_text(KERNELS.replace("return 1", "return GIVEN"))
    monkeypatch.setenv("CXX", f"{COMPILER} '-DGIVEN=40 + 2'")
    compiler.compile_library(tmp_path / "kernels.so", source)
    assert ctypes.CDLL(str(tmp_path / "kernels.so")).flowformer_version_portable() == 42


@pytest.mark.usefixtures("fresh")
def test_switched_off(monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.load() is None
    assert build.why_not() == "switched off by FLOWFORMER_NATIVE=0"
    assert not caplog.records
    assert not folder.exists()
    monkeypatch.setenv(build.SWITCH, "1")
    assert build.load() is not None


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("written", ["", "garbage"])
def test_compiler_that_writes_no_library(
    written: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fake"
    write = f'printf {written} > "$2"' if written else "exit 0"
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do [ $# = 0 ] && exit; shift; done\n{write}\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert build.load() is None
    assert ("cannot be loaded" if written else "wrote no library, and reported no error") in build.why_not()
    assert not list(folder.iterdir())  # so that the next process builds it again


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
    compiler.compile_library(guess, source)
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
