"""The cache of compiled kernels: whose it is, what is believed, who waits for whom, and what is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_kernels import COMPILER, HEADER, KERNELS, LIBRARY, compilations, output, python

from flowformer import cli, ops
from flowformer.kernels.native import build, cache, compiler

DAY_S = 24 * 60 * 60
OPEN = "build.open_library(Path(sys.argv[1]), Path(sys.argv[2]))"

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler for the kernels"),
]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that is compiled once."""
    folder = tmp_path_factory.mktemp("ready")
    for name, text in {"names.h": HEADER, "kernels.cpp": KERNELS, "library.cpp": LIBRARY}.items():
        (folder / name).write_text(text)
    compiler.compile_library(folder / "ready.so", folder)
    return folder / "ready.so"


@pytest.fixture
def fake(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that copies the library. It first runs the script `before`, and notes when it compiles."""
    script = tmp_path / "a compiler"
    script.write_text(f"""#!/bin/sh
case "$*" in *--version) echo fake; exit;; esac
echo "$*" >> "{script}.calls"
while [ "$1" != -o ]; do shift; done
out="$2"
[ ! -e "{tmp_path}/before" ] || . "{tmp_path}/before"
cp "{ready}" "$out"
""")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


def before(fake: Path, code: str) -> None:
    """Let the compiler do something first."""
    fake.with_name("before").write_text(code)


def wait_for(what: Callable[[], object], limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def cached(source: Path) -> cache.Cached:
    return cache.cached_library(source, compiler.compiler_or_reason())


def refused(source: Path, says: str) -> None:
    with pytest.raises(compiler.BuildError, match=says) as caught:
        cached(source)
    assert "set FLOWFORMER_CACHE to" in str(caught.value)


# -- found again, or built again --------------------------------------------------------------------------------------


def test_found_again_without_compiling_or_writing(source: Path, beside: Path, fake: Path, folder: Path) -> None:
    first = build.open_library(source, beside).path
    calls, stat = compilations(fake), folder.stat()  # reading the folder is access, which its time of access shows
    assert build.open_library(source, beside).path == first
    assert compilations(fake) == calls == len(compiler.LEVEL_FLAGS) + 1
    after = folder.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (stat.st_mtime_ns, stat.st_ctime_ns)  # it may be read-only
    assert list(folder.iterdir()) == [first]


@pytest.mark.parametrize("name", ["kernels.cpp", "names.h"])
def test_built_again_when_a_source_changes(name: str, source: Path, beside: Path) -> None:
    first = build.open_library(source, beside)
    path = source / name
    path.write_text(path.read_text().replace("return 1", "return 2") + "\n")
    second = build.open_library(source, beside)
    assert second.path != first.path
    assert second.handle.flowformer_version_portable() == (2 if name == "kernels.cpp" else 1)


def test_built_again_when_the_compiler_changes(source: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [cached(source).path]
    fake.write_text(fake.read_text().replace("echo fake", "echo 99"))  # the same path, updated
    paths.append(cached(source).path)
    monkeypatch.setenv("CXX", f"'{fake}' -DOTHER")
    paths.append(cached(source).path)
    shutil.copy(fake, fake.with_name("elsewhere"))
    monkeypatch.setenv("CXX", str(fake.with_name("elsewhere")))
    assert len({*paths, cached(source).path}) == 4


def test_a_build_removes_what_is_old(source: Path, folder: Path, fake: Path) -> None:
    folder.mkdir(0o700)
    ages = {"building-dead": 2, "building-alive": 0, "kernels-old.so": 31, "kernels-used.so": 29, "another": 99}
    for name, days in ages.items():
        (folder / name).mkdir() if name.startswith("building") else (folder / name).touch()
        os.utime(folder / name, (time.time() - days * DAY_S,) * 2)
    built = cached(source).path
    left = {path.name for path in folder.iterdir()} - {built.name}
    assert left == {"building-alive", "kernels-used.so", "another"}


def test_use_counts_as_age(source: Path, fake: Path) -> None:
    built = cached(source).path
    os.utime(built, (0, 0))
    assert cached(source).path.stat().st_mtime > time.time() - DAY_S


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_a_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def replace_by_another_library(path: Path) -> None:
    library = path.parent / "other.so"
    source = path.parent.parent / "source"
    (source / "kernels.cpp").write_text(KERNELS.replace("return 1", "return 666"))
    compiler.compile_library(library, source, COMPILER)
    (source / "kernels.cpp").write_text(KERNELS)
    library.replace(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "truncated": truncate,
    "one byte": change_a_byte,
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "a link": replace_by_a_link,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "writable by others": lambda path: path.chmod(0o777),
    "another library": replace_by_another_library,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_library_that_is_not_what_was_built_is_built_again(
    damage: str, source: Path, beside: Path, folder: Path, fake: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = build.open_library(source, beside).path
    calls, content = compilations(fake), first.read_bytes()
    DAMAGE[damage](first)
    calls = compilations(fake)
    library = build.open_library(source, beside)
    assert "is damaged, or not what flowformer has built: it is built again" in caplog.text
    assert library.handle.flowformer_version_portable() == 1
    assert library.path.read_bytes() == content
    assert compilations(fake) == calls + len(compiler.LEVEL_FLAGS) + 1


TRUNCATED_WHILE_MAPPED = """
library = build.open_library(Path(sys.argv[1]), Path(sys.argv[2]))
open(library.path, "r+b").truncate(0)
print(library.handle.count_threads(1), library.handle.flowformer_version_portable())
"""


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="copies in memory are Linux's")
def test_truncating_a_library_harms_no_process_that_has_loaded_it(source: Path, beside: Path, fake: Path) -> None:
    assert output(python(TRUNCATED_WHILE_MAPPED, source, beside)) == "1 1"


def test_a_rebuilt_library_is_not_confused_with_the_one_loaded_before(source: Path, beside: Path) -> None:
    versions = []
    for version in (1, 2):
        (source / "kernels.cpp").write_text(KERNELS.replace("return 1", f"return {version}"))
        versions.append(build.open_library(source, beside).handle.flowformer_version_portable())
    assert versions == [1, 2]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="copies in memory are Linux's")
def test_loads_from_the_file_where_there_are_no_copies_in_memory(
    source: Path, beside: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError("not allowed")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    library = build.open_library(source, beside)
    assert library.handle._name == str(library.path)


# -- whose it is ------------------------------------------------------------------------------------------------------


def test_what_is_created_is_the_users_own(source: Path, fake: Path, tmp_path: Path, monkeypatch) -> None:
    deep = tmp_path / "one" / "two"
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(deep))
    before = os.umask(0)
    try:
        path = cached(source).path
    finally:
        os.umask(before)
    assert [f"{x.stat().st_mode & 0o777:o}" for x in (deep.parent, deep, path)] == ["700", "700", "700"]


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o750, 0o710, 0o701, 0o702])
def test_a_folder_open_to_others_is_refused(mode: int, source: Path, folder: Path, fake: Path) -> None:
    folder.mkdir()
    folder.chmod(mode)
    refused(source, rf"is open to other users \(mode {mode:04o}\).*: chmod 700 {folder} if nobody else")
    assert not list(folder.iterdir())
    folder.chmod(0o700)
    assert cached(source).path.parent == folder


def test_nobody_is_told_to_close_a_folder_that_holds_other_things(source: Path, folder: Path, fake: Path) -> None:
    (folder / "something").mkdir(parents=True)
    folder.chmod(0o1777)
    with pytest.raises(compiler.BuildError, match=r"is open to other users \(mode 1777\).*: set FLOWFORMER_CACHE to"):
        cached(source)


def test_a_link_is_refused(source: Path, folder: Path, fake: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    refused(source, f"the cache folder {folder} is a symbolic link")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_dangling_link_is_refused(source: Path, folder: Path, fake: Path, tmp_path: Path) -> None:
    folder.symlink_to(tmp_path / "elsewhere")
    refused(source, f"the cache folder {folder} ")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_in_the_folders_place_is_refused(source: Path, folder: Path, fake: Path) -> None:
    folder.touch()
    refused(source, f"the cache folder {folder} ")


def test_a_parent_that_everyone_can_write_is_refused(source: Path, folder: Path, fake: Path, tmp_path: Path) -> None:
    parent, before = folder.parent, folder.parent.stat().st_mode
    parent.chmod(0o777)
    try:
        refused(source, f"the cache folder {parent} can be written by every user")
        parent.chmod(0o1777)  # sticky, as /tmp
        assert cached(source).path.parent == folder
    finally:
        parent.chmod(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("inner", [False, True], ids=["the folder", "its parent"])
def test_another_users_folder_is_refused(
    inner: bool, source: Path, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    theirs = tmp_path / "flowformer" / "kernels"
    theirs.mkdir(0o700, parents=True)
    theirs = theirs.parent if inner else theirs
    os.chown(theirs, 12345, 12345)
    refused(source, f"the cache folder {theirs} belongs to user 12345, not to user 0")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_library_is_not_loaded(source: Path, fake: Path) -> None:
    path = cached(source).path
    os.chown(path, 12345, 12345)
    calls = compilations(fake)
    assert cached(source).path.stat().st_uid == 0
    assert compilations(fake) > calls


def test_a_link_among_our_own_folders_is_refused(source: Path, fake: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg").mkdir()
    (tmp_path / "xdg" / "flowformer").symlink_to(tmp_path)
    refused(source, "xdg/flowformer is a symbolic link")


def test_kernels_are_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.kernel_folder() == tmp_path / "flowformer" / "kernels"
    monkeypatch.setenv(cache.CACHE_VARIABLE, "~/own")
    assert cache.kernel_folder() == Path.home() / "own"
    monkeypatch.setenv(cache.CACHE_VARIABLE, "~nobody-of-this-name/own")
    with pytest.raises(compiler.BuildError, match=r"no folder found for the kernels \(.*set FLOWFORMER_CACHE"):
        cache.kernel_folder()


@pytest.mark.parametrize(
    "name",
    ["with space", "größe-日本", "a'b\"c", "new\nline", "-o", "x" * 200, b"\xff".decode("utf-8", "surrogateescape")],
)
def test_folders_of_any_name(name: str, source: Path, beside: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / name))
    library = build.open_library(source, beside)
    assert library.path.parent == tmp_path / name
    assert library.how.isprintable()
    assert library.handle.count_threads(1) == 1


# -- what cannot be written -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_reasons_are_shown_and_plain_pytorch_runs(
    folder: Path, fake: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLOWFORMER_BACKEND", raising=False)
    folder.mkdir()
    folder.chmod(0o755)
    x = torch.ones(1, 3, 1, 4)
    assert ops.flow_attention(x, x, x).shape == x.shape
    explained = ops.explain("flow_attention", x, x, x)
    assert explained.backend == "torch"
    assert "is open to other users (mode 0755)" in explained.why
    with pytest.raises(ValueError, match=r"backend 'native' .* cannot run here: .*is open to other users"):
        ops.flow_attention(x, x, x, backend="native")
    assert cli.main(["doctor"]) == 0
    assert "chmod 700" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount file systems")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(source: Path, fake: Path, small_disk: Path, monkeypatch) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(small_disk))
    before(fake, 'head -c 100000 /dev/zero > "$out" || exit 1')
    with pytest.raises(compiler.BuildError, match="No space left on device"):
        cached(source)
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_while_the_library_is_moved(
    source: Path, fake: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(source, rf"the cache folder {folder} cannot be written \(.*No space left on device")
    assert not list(folder.iterdir())


def test_a_read_only_folder_that_holds_the_library_is_used(
    source: Path, small_disk: Path, ready: Path, fake: Path, monkeypatch
) -> None:
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(small_disk))
    path = cached(source).path
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cached(source).path == path
    (source / "kernels.cpp").write_text(KERNELS + "\n")
    refused(source, "cannot be written .*Read-only file system")


# -- two at once, and builders that die -------------------------------------------------------------------------------


def test_processes_that_start_at_once_compile_once(source: Path, beside: Path, fake: Path, folder: Path) -> None:
    before(fake, "sleep 0.5")
    code = f"print({OPEN}.handle.count_threads(1))"
    assert [output(process) for process in [python(code, source, beside) for _ in range(3)]] == ["1"] * 3
    assert compilations(fake) == len(compiler.LEVEL_FLAGS) + 1
    assert [path.suffix for path in folder.iterdir()] == [compiler.SUFFIX]


def runs(marker: str) -> list[str]:
    """Processes whose command line holds a text; Linux's ps knows them all."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if marker in line and "ps -eo" not in line]


# SIGKILL last: the only one that the process itself cannot answer.
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_a_build_that_is_ended_leaves_no_compiler_and_no_file(
    sent: signal.Signals, source: Path, beside: Path, fake: Path, folder: Path, tmp_path: Path
) -> None:
    before(fake, f"(trap '' TERM; exec sleep 1234.5) & sleep 1234.5; : {tmp_path}")
    process = python(OPEN, source, beside)
    wait_for(lambda: compilations(fake) == len(compiler.LEVEL_FLAGS) + 1)
    assert runs("sleep 1234.5")
    os.kill(process.pid, sent)
    assert process.wait(timeout=30)
    wait_for(lambda: not runs("sleep 1234.5"))
    process.communicate()
    wait_for(lambda: not list(folder.glob("building-*")))
    fake.with_name("before").unlink()
    assert build.open_library(source, beside).path.parent == folder  # at once: the lock is free
    assert [path.suffix for path in folder.iterdir()] == [compiler.SUFFIX]


def test_a_stopped_builder_is_waited_for_no_longer_than_the_limit(
    source: Path, beside: Path, fake: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    gate = fake.with_name("gate")
    gate.touch()
    before(fake, f'while [ -e "{gate}" ]; do sleep 0.05; done')
    process = python(f"print({OPEN}.handle.count_threads(1))", source, beside)
    wait_for(lambda: compilations(fake))
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(cache, "_WAIT_S", 0.5)
    before(fake, "")
    path = build.open_library(source, beside).path
    assert f"waiting for process {process.pid}, which builds" in caplog.text
    assert f"process {process.pid} is not done after 0.5 s: building the kernels in this one" in caplog.text
    gate.unlink()
    os.kill(process.pid, signal.SIGCONT)
    assert output(process) == "1"
    assert list(folder.iterdir()) == [path]


def test_waits_for_at_most_a_minute() -> None:
    assert cache._WAIT_S <= 60


def test_the_lock_passes_to_whoever_comes_next(folder: Path) -> None:
    folder.mkdir()
    lock = folder / "lock"
    for _ in range(2):
        with cache._locked(lock):
            assert int(lock.read_text()) == os.getpid()
        assert not lock.exists()


def test_a_replaced_lock_is_not_removed_by_its_former_holder(folder: Path) -> None:
    folder.mkdir()
    lock = folder / "lock"
    with cache._locked(lock):
        lock.unlink()
        lock.write_text("another's")
    assert lock.read_text() == "another's"


# A child that is forked while another thread builds: it waits for no thread that it does not have, and the lock's
# file is freed although the child has inherited it.
FORKED = """
import os, threading, time
build.SOURCE, build.FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
thread = threading.Thread(target=build.load)
thread.start()
while not list(Path(sys.argv[3]).glob("building-*")):
    time.sleep(0.01)
child = os.fork()
if not child:
    os._exit(build.load().handle.count_threads(1))
thread.join()
print(build.load().handle.count_threads(1), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_forked_during_a_build_has_kernels_too(source: Path, beside: Path, fake: Path, folder: Path) -> None:
    before(fake, "sleep 1")
    assert output(python(FORKED, source, beside, folder)) == "1 1"
    assert compilations(fake) == len(compiler.LEVEL_FLAGS) + 1


# -- compilers --------------------------------------------------------------------------------------------------------


def test_a_compiler_whose_path_has_spaces(source: Path, fake: Path) -> None:
    assert " " in str(fake)
    assert cached(source).content


def test_no_command_is_started_after_the_others_are_ended() -> None:
    commands = compiler._Commands()
    with commands:
        assert commands.run(["echo", "one"]) == "one\n"
    with pytest.raises(compiler.BuildError, match="another command has failed or was interrupted before this one"):
        commands.run(["echo", "two"])


def test_process_groups_as_python_3_10_has_them(source: Path, fake: Path, folder: Path, monkeypatch) -> None:
    older = types.SimpleNamespace(version_info=(3, 10), platform=sys.platform)
    monkeypatch.setattr(compiler, "sys", older)
    before(fake, "sleep 1234.6")
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_COMPILE_LIMIT_S", 0.3)
        with pytest.raises(compiler.BuildError, match="timed out"):
            cached(source)
    wait_for(lambda: not runs("sleep 1234.6"))
    before(fake, "")
    assert [cached(source).path] == list(folder.iterdir())


def test_a_compiler_that_prints_bytes_of_no_encoding(source: Path, fake: Path) -> None:
    before(fake, r"printf 'error: \377\033[31m\n'; exit 3")
    with pytest.raises(compiler.BuildError, match=r"failed with 3: error: \ufffd\\x1b\[31m") as caught:
        cached(source)
    assert str(caught.value).isprintable()


def test_a_compiler_that_hangs_when_asked_for_its_version(source: Path, tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "hangs"
    script.write_text("#!/bin/sh\nexec sleep 100\n")
    script.chmod(0o755)
    monkeypatch.setattr(compiler, "_VERSION_LIMIT_S", 0.3)
    with pytest.raises(compiler.BuildError, match="timed out"):
        compiler.fingerprint(source, str(script))


@pytest.mark.parametrize("place", ["/there/is/none", "", "relative", "/dev/null"])
def test_no_folder_for_temporary_files(place: str, source: Path, beside: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", place)
    assert build.open_library(source, beside).handle.count_threads(1) == 1


def test_temporary_files_of_compilers_are_removed_too(source: Path, fake: Path, folder: Path) -> None:
    before(fake, ': > "$TMPDIR/left"; case "$TMPDIR" in *building-*) ;; *) exit 7;; esac')
    path = cached(source).path
    assert list(folder.iterdir()) == [path]
