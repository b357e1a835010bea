"""Downloads, from a server on this machine: whole or not at all, and no byte twice."""

import errno
import gzip
import hashlib
import io
import os
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flowformer.common.errors import DataError
from flowformer.tasks import downloads
from flowformer.tasks.downloads import (
    DATASETS,
    Dataset,
    checksum,
    data_folder,
    fetch,
    find_dataset,
    is_here,
    make_folder,
)
from flowformer.tasks.text import enwik8, wikitext

pytestmark = pytest.mark.usefixtures("cache")

TEXT = np.random.default_rng(0).bytes(3_000_000)  # packs to no less, and comes in several blocks


def pack(text):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("inside/text", text)
        zipped.writestr("readme", "not wanted")
    return packed.getvalue()


class Server:
    """A server of `content`; `requests` are the first bytes that were asked for.

    Attributes:
        content: What is served at ``path``; anything else is not found.
        path: At first /own.zip.
        ranges: Whether it can go on in the middle.
        stops_at: Byte at which it closes the connection, though it promised more.
    """

    def __init__(self, content):
        self.content, self.ranges, self.stops_at, self.requests = content, True, None, []
        self.path = "/own.zip"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *words):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                pass  # a client that goes away is what some tests are about

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/own.zip"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, request):
        first = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.requests.append(first)
        if request.path != self.path:
            request.send_error(404)
        elif self.ranges and first >= len(self.content):
            request.send_error(416)
        else:
            first = first if self.ranges else 0
            request.send_response(206 if self.ranges else 200)
            request.send_header("Content-Length", str(len(self.content) - first))
            request.end_headers()
            request.wfile.write(self.content[first : self.stops_at])

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(pack(TEXT))
    yield server
    server.close()


@pytest.fixture
def own(server, monkeypatch):
    """A data set of one file, at an address that is wrong and at one that is right."""
    dataset = Dataset(
        name="own",
        title="Own",
        addresses=(server.address.replace("own.zip", "gone/own.zip"), server.address),
        size_bytes=len(server.content),
        sha256=hashlib.sha256(server.content).hexdigest(),
        folder="own-folder",
        files={"inside/text": "text"},
        licence="none",
    )
    monkeypatch.setattr(downloads, "DATASETS", {**DATASETS, "own": dataset})
    return dataset


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def names(folder):
    """What is in a folder but for the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("given", [True, False])
def test_is_fetched_once_and_unpacked(server, console, cache, tmp_path, given):
    folder = tmp_path / "mine [x]" if given else None
    place = fetch("own", folder, console=console)
    assert place == (folder or cache) / "own-folder"
    assert names(place) == ["text"]
    assert (place / "text").read_bytes() == TEXT
    assert f"Own is in {place}" in console.file.getvalue()
    assert server.requests == [0, 0]  # one of them at the address where nothing is
    assert fetch("own", folder, console=console) == place
    assert f"Own is already in {place}" in console.file.getvalue()
    assert server.requests == [0, 0]


@pytest.mark.usefixtures("own")
def test_a_zip_file_that_somebody_put_there_will_do(server, console, cache):
    place = cache / "own-folder"
    place.mkdir(parents=True)
    (place / "own.zip").write_bytes(server.content)
    fetch("own", console=console)
    assert not server.requests
    assert "already" in console.file.getvalue()
    (place / "own.zip").write_bytes(server.content[:-1])
    fetch("own", console=console)
    assert (place / "text").read_bytes() == TEXT


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("ranges", [True, False])
def test_what_was_cut_short_is_gone_on_with(server, console, cache, ranges):
    server.stops_at, server.ranges = 1_500_000, ranges
    with pytest.raises(
        DataError, match=r"Own could not be downloaded.*404.*got 1,500,000 of 3,\d+,\d+ bytes, which are kept"
    ):
        fetch("own", console=console)
    assert names(cache / "own-folder") == [".own.zip.part"]
    server.stops_at, server.requests = None, []
    fetch("own", console=console)
    assert server.requests == [1_500_000] * 2
    assert names(cache / "own-folder") == ["text"]
    assert (cache / "own-folder" / "text").read_bytes() == TEXT


@pytest.mark.usefixtures("own")
def test_an_interrupted_download_is_gone_on_with(server, console, cache, monkeypatch):
    def update(bar, task, *, completed=None, advance=None):
        if advance:  # a block has come: Ctrl-C
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rich.progress.Progress.update", update)
        with pytest.raises(KeyboardInterrupt):
            fetch("own", console=console)
    assert names(cache / "own-folder") == [".own.zip.part"]
    server.requests = []
    fetch("own", console=console)
    assert server.requests == [downloads.BLOCK_BYTES] * 2
    assert (cache / "own-folder" / "text").read_bytes() == TEXT


@pytest.mark.parametrize("found", ["other", "longer", "endless"])
def test_other_content_is_refused(own, server, console, cache, found):
    server.content = {
        "other": server.content[:-1] + b"x",
        "longer": server.content + b"x",
        "endless": server.content * 20,
    }[found]
    with pytest.raises(DataError) as caught:
        fetch("own", console=console)
    for part in (
        "got SHA-256" if found == "other" else "bytes instead of",
        own.sha256,
        server.address,
        "by other means",
    ):
        assert part in str(caught.value)
    assert (f"{len(server.content):,} bytes" in str(caught.value)) == (found != "endless")  # no more than shows it
    assert names(cache / "own-folder") == []


@pytest.mark.usefixtures("own")
def test_a_page_in_place_of_the_file_is_not_kept(server, console, cache):
    """A login page of a hotel, with status 200: what was received before stays, and is continued."""
    place = cache / "own-folder"
    place.mkdir(parents=True)
    (place / ".own.zip.part").write_bytes(server.content[:1_000_000])
    whole, server.content, server.ranges = server.content, b"<!doctype html><title>Log in</title>", False
    with pytest.raises(DataError, match=r"the server sent something else \(text/plain: b'<!doctype html><title>Log in"):
        fetch("own", console=console)
    assert (place / ".own.zip.part").read_bytes() == whole[:1_000_000]
    server.content, server.ranges, server.requests = whole, True, []
    fetch("own", console=console)
    assert server.requests == [1_000_000] * 2
    assert names(place) == ["text"]


@pytest.mark.usefixtures("own")
def test_a_full_disk_is_named_and_no_other_address_asked(server, console, cache, monkeypatch):
    def fail(*words):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads, "_receive", fail)
    with pytest.raises(DataError, match=rf"cannot write to {cache / 'own-folder'}: No space left on device; free some"):
        fetch("own", console=console)
    assert not server.requests


@pytest.mark.usefixtures("own")
def test_what_a_killed_process_left_goes(console, cache):
    left = cache / "own-folder" / ".unpack-abc"
    left.mkdir(parents=True)
    (left / "text").write_bytes(b"half")
    fetch("own", console=console)
    assert names(cache / "own-folder") == ["text"]


def test_the_next_address_begins_anew(own, server, console, cache, monkeypatch):
    other = Server(server.content[:-1] + b"x")
    try:
        monkeypatch.setattr(downloads, "DATASETS", {"own": replace(own, addresses=(other.address, server.address))})
        fetch("own", console=console)
    finally:
        other.close()
    assert (other.requests, server.requests) == ([0], [0])
    assert (cache / "own-folder" / "text").read_bytes() == TEXT


@pytest.mark.usefixtures("own")
def test_a_rest_of_something_else_goes(server, console, cache):
    place = cache / "own-folder"
    place.mkdir(parents=True)
    whole, server.content = server.content, b"short"
    (place / ".own.zip.part").write_bytes(b"another")
    with pytest.raises(DataError, match="416"):
        fetch("own", console=console)
    assert names(place) == []
    (place / ".own.zip.part").write_bytes(b"another")
    server.content = whole
    with pytest.raises(DataError, match="got SHA-256"):
        fetch("own", console=console)
    fetch("own", console=console)
    assert (place / "text").read_bytes() == TEXT


@pytest.mark.usefixtures("own")
def test_two_at_once_fetch_it_once(server, console, cache):
    threads = [threading.Thread(target=fetch, args=("own",), kwargs={"console": console}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == [0, 0]
    assert (cache / "own-folder" / "text").read_bytes() == TEXT


def test_no_network_says_what_to_do(own, server, console, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataError) as caught:
        fetch("own", console=console)
    for part in (
        *own.addresses,
        "no network in tests",
        f"{own.size_bytes:,} bytes",
        own.sha256,
        str(data_folder("own-folder")),
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("wikitxt", "did you mean 'wikitext'?"), ("enwik9", "did you mean 'enwik8'?"), ("x", "known are")],
)
def test_unknown_data_sets(name, hint, console):
    for call in (find_dataset, lambda name: fetch(name, console=console)):
        with pytest.raises(DataError) as caught:
            call(name)
        assert hint in str(caught.value)


@pytest.mark.parametrize(("name", "load"), [("enwik8", enwik8.load), ("wikitext", wikitext.load)])
def test_what_is_fetched_is_found(name, load, console, monkeypatch, tmp_path):
    """The folders and names of a download are those that the loaders look for."""
    place = tmp_path / "mine" / DATASETS[name].folder
    place.mkdir(parents=True)
    for file in DATASETS[name].files.values():
        (place / file).write_bytes(b"x")
    assert fetch(name, tmp_path / "mine", console=console) == place
    for folder in (tmp_path / "mine", place):
        with pytest.raises(DataError, match="incomplete"):  # found, and seen to be another
            load(folder)


@pytest.fixture
def kept(own, server, monkeypatch):
    """The same data set, of an archive that is kept as it is."""
    server.content = gzip.compress(TEXT)
    size, sha256 = len(server.content), hashlib.sha256(server.content).hexdigest()
    addresses = tuple(address.replace("own.zip", "own.tar.gz") for address in own.addresses)
    dataset = replace(own, addresses=addresses, size_bytes=size, sha256=sha256, files={})
    monkeypatch.setattr(downloads, "DATASETS", {"own": dataset})
    server.path = "/own.tar.gz"
    return dataset


def test_an_archive_that_is_kept_is_not_unpacked(kept, server, console, cache):
    assert not is_here(kept)
    place = fetch("own", console=console)
    assert names(place) == ["own.tar.gz"]
    assert (place / "own.tar.gz").read_bytes() == server.content
    assert is_here(kept)
    assert is_here(kept, cache)
    fetch("own", console=console)
    assert "already" in console.file.getvalue()
    assert server.requests == [0, 0]
    (place / "own.tar.gz").write_bytes(server.content[:-1])
    fetch("own", console=console)
    assert (place / "own.tar.gz").read_bytes() == server.content


@pytest.mark.usefixtures("kept")
def test_a_zip_file_in_place_of_a_gzip_file_is_not_kept(server, console, cache):
    server.content = pack(TEXT)
    with pytest.raises(DataError, match=r"the server sent something else \(text/plain: b'PK.*, not a .gz file"):
        fetch("own", console=console)
    assert names(cache / "own-folder") == []


def test_the_table_is_in_order():
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert len(bytes.fromhex(dataset.sha256)) == 32
        assert all(
            address.startswith("https://") and address.endswith(f"/{dataset.archive}") for address in dataset.addresses
        )
        assert dataset.licence


def test_checksum_of_files(tmp_path):
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    files = [tmp_path / "a", tmp_path / "b"]
    assert checksum(files) == hashlib.sha256(b"abc").hexdigest()
    assert checksum(files, "md5") == "900150983cd24fb0d6963f7d28e17f72"


def test_the_cache_is_in_the_home_folder_or_where_the_variable_says(monkeypatch, tmp_path, cache):
    assert data_folder("own") == cache / "own"
    monkeypatch.setenv("FLOWFORMER_DATA", "~/data")
    assert data_folder("own") == Path.home() / "data" / "own"
    monkeypatch.delenv("FLOWFORMER_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    assert data_folder("own") == tmp_path / ".cache" / "flowformer" / "own"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data_folder("own") == tmp_path / "xdg" / "flowformer" / "own"


def test_folders_in_the_users_cache_are_the_users_own_and_others_are_as_usual(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path / "shared"))
    before = os.umask(0o022)
    try:
        make_folder(data_folder("tokens"))
        monkeypatch.delenv("FLOWFORMER_DATA")
        make_folder(data_folder("tokens"))
        make_folder(tmp_path / "given")
    finally:
        os.umask(before)
    names = ("xdg", "xdg/flowformer/tokens", "shared", "given")
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in names}
    assert modes == {"xdg": 0o700, "xdg/flowformer/tokens": 0o700, "shared": 0o755, "given": 0o755}
