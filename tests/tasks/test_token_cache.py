"""What is made once and kept: by one process of several, again when the source changes, and whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from filelock import FileLock

from flowformer.common.errors import DataError
from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.token_cache import keep, open_bytes, open_tokens, write_tokens

pytestmark = pytest.mark.usefixtures("cache")

# A process that says in the file `log` when it begins to make something, and takes half a second for it.
MAKER = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from flowformer.tasks.token_cache import keep, open_tokens, write_tokens

source, log, die = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "die"

def build(folder):
    with log.open("a") as file:
        file.write("x")
    (folder / "half").write_text("half")
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    write_tokens(folder / "tokens.npy", [np.frombuffer(source.read_bytes(), np.uint8)], np.dtype(np.uint8))

print(open_tokens(keep("made", source, [source], build) / "tokens.npy")[:].tolist())
"""


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "source"
    file.write_bytes(b"abc")
    return file


def start(source, log, *, die=False):
    words = [sys.executable, "-c", MAKER, str(source), str(log), "die" if die else "live"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def counted(source):
    """A function that keeps the source's bytes, and the list of its builds."""
    calls = []

    def build(folder):
        calls.append(folder)
        write_tokens(folder / "tokens.npy", [np.frombuffer(source.read_bytes(), np.uint8)], np.dtype(np.uint8))

    def load(**options):
        return open_tokens(keep("made", source, [source], build, options=options) / "tokens.npy")

    return load, calls


def folders(cache):
    return sorted(path.name for path in (cache / "tokens").iterdir() if path.is_dir())


def test_is_made_once(source, cache):
    load, calls = counted(source)
    first, again = load(), load()
    assert bytes(first) == bytes(again) == b"abc"
    assert isinstance(again, StoredTokens)
    assert not again[:].flags.writeable
    assert len(calls) == 1
    assert len(folders(cache)) == 1


def test_two_processes_make_it_once(source, tmp_path, cache):
    processes = [start(source, tmp_path / "log") for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["[97, 98, 99]\n"] * 2
    assert (tmp_path / "log").read_text() == "x"
    assert len(folders(cache)) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_that_is_killed_leaves_nothing_that_counts(source, tmp_path, cache):
    process = start(source, tmp_path / "log", die=True)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert folders(cache)  # what was half made
    load, calls = counted(source)
    assert bytes(load()) == b"abc"
    assert len(calls) == 1
    (place,) = (cache / "tokens").glob("made-*")
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", "tokens.npy"]
    assert folders(cache) == [place.name]


def test_a_changed_source_is_made_again_and_the_former_goes(source, cache):
    load, calls = counted(source)
    former = load()
    source.write_bytes(b"abcd")
    assert bytes(load()) == b"abcd"
    assert bytes(former) == b"abc"  # whoever has it open keeps it
    assert len(folders(cache)) == 1
    later = source.stat().st_mtime_ns + 1
    source.write_bytes(b"efgh")  # of one size
    os.utime(source, ns=(later, later))
    assert bytes(load()) == b"efgh"
    assert len(calls) == 3
    assert len(folders(cache)) == 1


def test_other_options_are_kept_beside(source, cache):
    load, calls = counted(source)
    load(size=1), load(size=2), load(size=1)
    assert len(calls) == 2
    assert len(folders(cache)) == 2


def test_what_is_generated_has_no_source(cache):
    calls = []
    places = [keep("made", None, [], calls.append, options={"seed": seed}) for seed in (1, 2, 1)]
    assert places[0] == places[2] != places[1]
    assert len(calls) == 2
    assert len(folders(cache)) == 2


def test_other_sources_are_kept_beside(tmp_path, cache):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
        load, _ = counted(tmp_path / name)
        assert bytes(load()) == name.encode()
    assert len(folders(cache)) == 2


@pytest.mark.parametrize(
    "damage", ["cut", "gone", "changed", "no manifest", "empty manifest", "odd manifest", "older manifest"]
)
def test_what_is_damaged_is_made_again(source, cache, damage):
    load, calls = counted(source)
    load()
    (place,) = (cache / "tokens").glob("made-*")
    tokens, manifest = place / "tokens.npy", place / "manifest.json"
    if damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif damage == "gone":
        tokens.unlink()
    elif damage == "changed":  # of one size, and of one time
        times = tokens.stat()
        content = bytearray(tokens.read_bytes())
        content[-1] ^= 1
        tokens.write_bytes(content)
        os.utime(tokens, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text({"empty": "", "odd": "[]", "older": '{"tokens.npy": 131}'}[damage.split()[0]])
    assert bytes(load()) == b"abc"
    assert len(calls) == 2


def test_a_failure_leaves_nothing(source, cache):
    def fail(folder):
        (folder / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        keep("made", source, [source], fail)
    assert not folders(cache)
    load, calls = counted(source)
    assert bytes(load()) == b"abc"
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written_is_named(source, cache):
    cache.write_text("a file, where a folder is wanted")
    with pytest.raises(
        DataError, match=rf"cannot create the folder {cache / 'tokens'}: .*; set FLOWFORMER_DATA to another"
    ):
        counted(source)[0]()


def test_a_full_disk_is_named_and_leaves_nothing(source, cache):
    def build(folder):
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        DataError, match=rf"cannot write to {cache / 'tokens'}: No space left on device; free some space"
    ):
        keep("made", source, [source], build)
    assert not folders(cache)


def test_a_folder_that_is_read_only_is_named(source, cache, monkeypatch):
    monkeypatch.setattr("flowformer.tasks.downloads.FileLock.acquire", refuse)
    with pytest.raises(DataError, match=rf"cannot write to {cache / 'tokens'}: Read-only file system; free some space"):
        counted(source)[0]()


def refuse(*words, **options):
    raise OSError(errno.EROFS, "Read-only file system")


def test_what_is_whole_is_read_without_writing(source, monkeypatch):
    load, _ = counted(source)
    load()
    monkeypatch.setattr("flowformer.tasks.downloads.FileLock.acquire", refuse)
    assert bytes(load()) == b"abc"


def test_a_process_that_waits_for_another_says_so(source, cache, caplog):
    load, calls = counted(source)
    load()
    (place,) = (cache / "tokens").glob("made-*")
    (place / "tokens.npy").unlink()
    (lock,) = (cache / "tokens").glob(".made-*.lock")
    with ThreadPoolExecutor(1) as other:
        with FileLock(lock):
            waiting = other.submit(load)
            while "waiting for another process" not in caplog.text:
                assert not waiting.done()
                time.sleep(0.01)
        assert bytes(waiting.result()) == b"abc"
    assert len(calls) == 2


def test_odd_names_stay_in_the_cache(source, cache):
    load = keep("../a b/" + "c" * 300, source, [source], lambda folder: None)
    assert load.parent == cache / "tokens"


@pytest.mark.parametrize("count", [0, 1, 1_000_003])
def test_pieces_of_tokens_become_one_array(tmp_path, count):
    wanted = (np.arange(count) % 1000).astype(np.uint16)
    pieces = np.array_split(wanted.astype(np.int64), 7)  # another type, as a tokenizer may give
    assert write_tokens(tmp_path / "tokens.npy", pieces, np.dtype(np.uint16)) == count
    found = open_tokens(tmp_path / "tokens.npy")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), wanted)


def test_bytes_of_a_file(tmp_path):
    (tmp_path / "text").write_bytes(b"0123456789")
    assert bytes(open_bytes(tmp_path / "text")) == b"0123456789"
    assert bytes(open_bytes(tmp_path / "text", 3, 5)) == b"34"
    assert not open_bytes(tmp_path / "text")[:].flags.writeable


def test_a_source_by_way_of_links_is_the_same_source(tmp_path, cache):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "source").write_bytes(b"abc")
    (tmp_path / "file").symlink_to(tmp_path / "folder" / "source")
    (tmp_path / "other").symlink_to(tmp_path / "folder")
    paths = [tmp_path / "folder" / "source", tmp_path / "file", tmp_path / "other" / "source"]
    assert len({keep("own", path, [path], lambda folder: None) for path in paths}) == 1
