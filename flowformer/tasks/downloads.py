"""Downloadable data sets: addresses, sizes, checksums, and atomic downloads."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from flowformer.common.errors import DataError
from flowformer.common.folders import cache_folder, make_private
from flowformer.common.names import nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20
TIMEOUT_SECONDS = 60
# What a file begins with, by the end of its name.
_STARTS = {".zip": b"PK\x03\x04", ".gz": b"\x1f\x8b"}
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Dataset:
    """A data set distributed as one archive.

    Attributes:
        name: What it is called on the command line.
        title: What it is called in sentences.
        addresses: Where the archive is; each is tried in its turn.
        size_bytes: Of the archive.
        sha256: Of the archive.
        folder: The folder that its files go to.
        files: Files of a zip archive that are kept, by path there, with their names in the folder. If empty, the
            archive is kept as it is, zip or gz, and read by the loader.
        licence: What is known of the terms.
    """

    name: str
    title: str
    addresses: tuple[str, ...]
    size_bytes: int
    sha256: str
    folder: str
    files: Mapping[str, str]
    licence: str

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.addresses[0].rsplit("/", 1)[1]


# Sizes: the cards of Salesforce/wikitext (download_size, while it still read the zip file) and of enwik8 on the Hugging
# Face hub; the checksums of tensorflow_datasets for IMDB and CIFAR-10. SHA-256: public projects that pin these
# downloads, several alike for each. MD5: torchtext has 9ddaacaf6af0710eda8c456decff7832 for the zip file of
# WikiText-103 and 7c2ac02c03563afcf9b574c7e56c153a for IMDB; CIFAR-10's authors c58f30108f718f92721af3d95e74349a.
DATASETS: Mapping[str, Dataset] = {
    one.name: one
    for one in (
        Dataset(
            name="wikitext",
            title="WikiText-103",
            addresses=(
                "https://wikitext.smerity.com/wikitext-103-v1.zip",
                # The address in torchtext, fairseq and Transformer-XL, which no longer answers everywhere.
                "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
            ),
            size_bytes=190_229_076,
            sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            folder="wikitext-103",
            files={f"wikitext-103/wiki.{part}.tokens": f"wiki.{part}.tokens" for part in ("train", "valid", "test")},
            licence=(
                "WikiText-103 (Merity, Xiong, Bradbury, Socher 2016, arXiv:1609.07843): text of Wikipedia, Creative "
                "Commons Attribution-ShareAlike."
            ),
        ),
        Dataset(
            name="enwik8",
            title="Enwik8",
            addresses=("https://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"),
            size_bytes=36_445_475,
            sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            folder="enwik8",
            files={"enwik8": "enwik8"},
            licence=(
                "Enwik8 (M. Mahoney, Large Text Compression Benchmark, https://mattmahoney.net/dc/textdata.html): text "
                "of the English Wikipedia of 3 March 2006, GNU Free Documentation License; since 2009 also Creative "
                "Commons Attribution-ShareAlike 3.0."
            ),
        ),
        Dataset(
            name="cifar10",
            title="CIFAR-10",
            addresses=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            size_bytes=170_498_071,
            sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            folder="cifar10",
            files={},
            licence="CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html): no licence is stated.",
        ),
        Dataset(
            name="lra-text",
            title="Large Movie Review Dataset (IMDB)",
            addresses=("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",),
            size_bytes=84_125_825,
            sha256="c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
            folder="imdb",
            files={},
            licence=(
                "Large Movie Review Dataset v1.0 (Maas et al. 2011, https://ai.stanford.edu/~amaas/data/sentiment/): "
                "reviews by users of IMDb; no licence is stated."
            ),
        ),
    )
}


def data_folder(name: str) -> Path:
    """Return the folder ``name`` of the cache: FLOWFORMER_DATA, else that of :func:`cache_folder`."""
    root = os.environ.get("FLOWFORMER_DATA")
    return (Path(root).expanduser() if root else cache_folder()) / name


def make_folder(folder: Path) -> None:
    """Create a folder for data, with its parents; in the user's cache folder, they are the user's own (mode 0700).

    Raises:
        DataError: where it cannot be made.
    """
    try:
        if not os.environ.get("FLOWFORMER_DATA") and folder.is_relative_to(cache_folder()):
            make_private(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create the folder {folder}: {error}; set FLOWFORMER_DATA to another folder for the cache"
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Context in which a folder for data is written to: errors of the file system name it.

    Raises:
        DataError: where it cannot be written to, or its disk is full.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno in _UNWRITABLE:
            raise DataError(
                f"cannot write to {folder}: {error.strerror}; free some space, or set FLOWFORMER_DATA to another folder"
            ) from error
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context that one process at a time enters; says so where it waits for another."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.warning("waiting for another process, which holds %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sync(path: Path) -> None:
    """Have the system write a file to its disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def find_dataset(name: str) -> Dataset:
    """Return a data set of :data:`DATASETS` by its name.

    Raises:
        DataError: for an unknown one.
    """
    if name not in DATASETS:
        hint = nearest(name, DATASETS) or f"; known are {', '.join(DATASETS)}"
        raise DataError(f"unknown data set {name!r}{hint}")
    return DATASETS[name]


def search_folders(dataset: Dataset, data_dir: str | Path | None) -> list[Path]:
    """Return the folders in which a data set is searched, in order: those in ``data_dir`` if given, else the cache."""
    return [Path(data_dir), Path(data_dir) / dataset.folder] if data_dir else [data_folder(dataset.folder)]


def is_here(dataset: Dataset, data_dir: str | Path | None = None) -> bool:
    """Return whether all files of a data set, or its archive, are in one of the searched folders."""
    return any(
        (folder / dataset.archive).is_file() or _is_unpacked(dataset, folder)
        for folder in search_folders(dataset, data_dir)
    )


def _is_unpacked(dataset: Dataset, folder: Path) -> bool:
    return bool(dataset.files) and all((folder / name).is_file() for name in dataset.files.values())


def describe_missing(dataset: Dataset, wanted: str, looked_in: Iterable[Path], *, flag: str = "--data-dir") -> str:
    """Return an error message: what is missing, where it was searched, and how to get it.

    Args:
        dataset: The data set.
        wanted: The files that would do.
        looked_in: Folders.
        flag: The option that names a folder.
    """
    looked_in = list(looked_in)
    given = "" if data_folder(dataset.folder) in looked_in else f"; without {flag}, the cache is searched"
    return (
        f"{dataset.title}: no {wanted} in {', '.join(map(str, looked_in))}{given}. `flowformer data {dataset.name}` "
        f"downloads it; or get {dataset.addresses[0]} ({dataset.size_bytes:,} bytes, SHA-256 {dataset.sha256}) and "
        f"put it into {data_folder(dataset.folder)}, or into any folder DIR and pass {flag} DIR."
    )


def checksum(paths: Iterable[Path], algorithm: str = "sha256") -> str:
    """Return the checksum of the concatenation of files, in hexadecimal."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def fetch(name: str, folder: str | Path | None = None, *, console: Console) -> Path:
    """Download a data set, verify it, and unpack it if it is not kept as an archive, unless it is already there.

    An interrupted download is kept and continued by the next call. If two processes download the same data set, the
    second waits for the first.

    Args:
        name: One of :data:`DATASETS`.
        folder: Folder that the data set's own folder is to be in; the cache if absent.
        console: Where progress is shown.

    Returns:
        The data set's own folder, with its files.

    Raises:
        DataError: for an unknown name, a folder that cannot be made, or where no address gives the whole file with its
            checksum.
    """
    dataset = find_dataset(name)
    place = Path(folder) / dataset.folder if folder else data_folder(dataset.folder)
    make_folder(place)
    with writing(place), locked(place / f".{dataset.archive}.lock"):
        if _is_there(dataset, place):
            console.print(f"{dataset.title} is already in {place}", highlight=False, markup=False, soft_wrap=True)
            return place
        archive = place / f".{dataset.archive}.part"
        for leftover in place.glob(".unpack-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        _download(dataset, archive, console)
        if dataset.files:
            _unpack(dataset, archive, place)
            archive.unlink()
        else:
            sync(archive)
            archive.replace(place / dataset.archive)
    console.print(f"{dataset.title} is in {place}", highlight=False, markup=False, soft_wrap=True)
    return place


def _is_there(dataset: Dataset, place: Path) -> bool:
    if _is_unpacked(dataset, place):
        return True
    archive = place / dataset.archive  # somebody may have put it there, and it is read as it is
    return archive.is_file() and checksum([archive]) == dataset.sha256


def _download(dataset: Dataset, archive: Path, console: Console) -> None:
    """Try one address after another until the whole file is there."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    failures = []
    bar = Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        for address in dataset.addresses:
            task = bar.add_task(dataset.title, total=dataset.size_bytes)
            try:
                _receive(dataset, address, archive, bar, task)
                _verify(dataset, archive)
                return
            except (OSError, HTTPException, DataError) as error:
                if getattr(error, "errno", None) in _UNWRITABLE:
                    raise  # another address would not help
                failures.append(f"{address}: {type(error).__name__}: {error}")
                bar.remove_task(task)
    raise DataError(
        f"{dataset.title} could not be downloaded. {'. '.join(failures)}. Download {dataset.archive} by other means "
        f"({dataset.size_bytes:,} bytes, SHA-256 {dataset.sha256}) and put it into {archive.parent}."
    )


def _receive(dataset: Dataset, address: str, archive: Path, bar: Progress, task: TaskID) -> None:
    """Download the missing part of a file, or all of it if the server does not support ranges."""
    start = archive.stat().st_size if archive.exists() else 0
    if start >= dataset.size_bytes:  # whole, or of something else: its checksum tells
        return
    request = urllib.request.Request(address, headers={"User-Agent": "flowformer", "Range": f"bytes={start}-"})
    with _ask(request, archive) as response:
        if response.status != 206:  # the whole file comes
            start = 0
        block = response.read(BLOCK_BYTES)
        suffix = Path(dataset.archive).suffix
        if not start and not _STARTS[suffix].startswith(block[: len(_STARTS[suffix])]):
            kind = response.headers.get_content_type()
            raise DataError(f"the server sent something else ({kind}: {block[:40]!r}), not a {suffix} file")
        with archive.open("ab" if start else "wb") as file:
            bar.update(task, completed=start)
            while block and file.tell() <= dataset.size_bytes:
                file.write(block)
                bar.update(task, advance=len(block))
                block = response.read(BLOCK_BYTES)


def _ask(request: urllib.request.Request, archive: Path) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file there ends before ours does, so ours is of something else
            archive.unlink(missing_ok=True)
        raise


def _verify(dataset: Dataset, archive: Path) -> None:
    """Raise if the file is not the data set's; an incomplete file is kept, so that the download can continue."""
    size = archive.stat().st_size
    if size < dataset.size_bytes:
        raise DataError(f"got {size:,} of {dataset.size_bytes:,} bytes, which are kept: repeat the command to continue")
    found = checksum([archive]) if size == dataset.size_bytes else None
    if found != dataset.sha256:
        archive.unlink()
        came = f"{size:,} bytes" if found is None else f"SHA-256 {found}"
        raise DataError(f"got {came} instead of {dataset.size_bytes:,} bytes with SHA-256 {dataset.sha256}")


def _unpack(dataset: Dataset, archive: Path, place: Path) -> None:
    # Inside the folder, so that a finished file moves into place in one step.
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=place) as scratch, zipfile.ZipFile(archive) as zipped:
        for member, file in dataset.files.items():
            with zipped.open(member) as source, (Path(scratch) / file).open("wb") as target:
                shutil.copyfileobj(source, target, BLOCK_BYTES)
        for file in dataset.files.values():
            sync(Path(scratch) / file)
        for file in dataset.files.values():
            (Path(scratch) / file).replace(place / file)
