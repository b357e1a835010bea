"""Text of Long Range Arena: reviews of films, byte by byte, in two classes (Maas et al., 2011)."""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.downloads import DATASETS, describe_missing, search_folders
from flowformer.tasks.encodings import check_file
from flowformer.tasks.lra.sequences import TokenSequences, open_sequences, write_sequences
from flowformer.tasks.lra.texts import DTYPE, encode_bytes, read_json_lines, read_text, to_bytes
from flowformer.tasks.parquet import find_shards, read_columns
from flowformer.tasks.token_cache import keep

CLASSES = ("negative", "positive")
PARTS = ("train", "test")
COUNT = 12_500  # reviews of each class in each part

_FOLDERS = ("neg", "pos")  # of the classes
# In one folder, which is aclImdb in the published archive, or in none.
_MEMBER = re.compile(r"(?:\./)?(?:(?!\.\.?/)[^/]+/)?(train|test)/(neg|pos)/([^./][^/]*\.txt)")
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_LINES = (".jsonl", ".jsonl.gz")
_GZIP_START = b"\x1f\x8b"
_DAMAGE = (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, OverflowError)
MOST_BYTES = 2**30  # of all reviews together; those of IMDB are a sixteenth of that


@dataclass(frozen=True)
class Review:
    """A review.

    Attributes:
        part: ``train`` or ``test``.
        label: Index of its class.
        name: Of its file, ``0_3.txt``; "" in forms that do not tell it.
        text: As it is in that file.
    """

    part: str
    label: int
    name: str
    text: bytes


@dataclass(frozen=True)
class _Found:
    """Files in one of the forms that people have, and what reads their reviews."""

    origin: Path
    files: tuple[Path, ...]
    read: Callable[[], Iterable[Review]]


def load(path: str | Path | None = None, *, check_counts: bool = True) -> tuple[TokenSequences, TokenSequences | None]:
    """Load the reviews of IMDB from ``path`` if given, else from the cache.

    Forms: the folder ``aclImdb`` (``train/neg``, ``train/pos``, ``test/neg``, ``test/pos``, a file for each review);
    its archive ``aclImdb_v1.tar.gz``, which is read, not unpacked; JSON lines (``.jsonl``, ``.jsonl.gz``) with the
    fields ``file`` (``train/neg/0_3.txt``) and ``text``; or the parquet files of stanfordnlp/imdb on the Hugging Face
    hub (``train-00000-of-00001.parquet``, with columns ``text`` and ``label``). ``path`` is a file, or a folder that
    has one of them, itself or in its folders ``imdb``, ``aclImdb`` and ``plain_text``. Without it, the folder is
    ``imdb`` in the cache, which is the folder that the environment variable FLOWFORMER_DATA names, or ``flowformer``
    in the user's cache folder.

    A text is its bytes, all of them: line breaks stay ``<br />``. The token of a byte is its value plus 1; 0 is left
    for padding. Negative reviews come first, in the order of the numbers that their files begin with; those from
    parquet are in the order of the rows. Tokens are kept in the folder ``tokens`` of the cache.

    Args:
        path: A file or a folder.
        check_counts: Whether it is an error if a part has not 12,500 reviews of each class; ``False`` for reviews of
            your own in the same form.

    Returns:
        The training set and the test set, classes :data:`CLASSES`; the latter is ``None`` where there is none.

    Raises:
        DataError: if it is not found, with a message how to get it; if files are damaged, empty or no reviews;
            if counts are not the published ones.
        ModuleNotFoundError: for parquet files without pyarrow.
    """
    found = _find(None if path is None else Path(path))

    def build(folder: Path) -> None:
        reviews = _sort(found)
        for part in PARTS:
            texts = ((encode_bytes(one.text), one.label) for one in reviews if one.part == part)
            write_sequences(folder, part, texts, DTYPE)

    folder = keep("imdb", found.origin, found.files, build)
    parts = {part: open_sequences(folder, part) for part in PARTS}
    _check(found.origin, parts, check_counts)
    return parts["train"], parts["test"] if len(parts["test"]) else None


def is_here(path: str | Path | None = None) -> bool:
    """Return whether :func:`load` would find the files."""
    return _search(None if path is None else Path(path)) is not None


def _find(path: Path | None) -> _Found:
    found = _search(path)
    if found is None:
        if path is not None and not path.is_dir():
            wanted = f"a folder, or a file that ends in {', '.join((*_ARCHIVES, *_LINES))} or .parquet"
            raise DataError(f"{path}: {'expected ' + wanted if path.exists() else 'no such file or folder'}")
        wanted = f"train/neg and train/pos, {DATASETS['lra-text'].archive}, train-*.parquet or *.jsonl"
        folders = search_folders(DATASETS["lra-text"], path)
        raise DataError(describe_missing(DATASETS["lra-text"], wanted, folders, flag="--data"))
    return found


def _search(path: Path | None) -> _Found | None:
    if path is not None and not path.is_dir():
        check_file(path)
        return _open(path) if path.is_file() else None
    folders = search_folders(DATASETS["lra-text"], path)
    inner = [folder / name for folder in folders for name in ("aclImdb", "plain_text")]
    return next((found for folder in (*folders, *inner) if (found := _open_folder(folder))), None)


def _open(path: Path) -> _Found | None:
    if path.name.endswith(_ARCHIVES):
        return _Found(path, (path,), lambda: _read_archive(path))
    if path.name.endswith(_LINES):
        return _Found(path, (path,), lambda: _read_lines(path))
    if path.suffix == ".parquet":
        return _Found(path, (path,), lambda: _read_parquet(path, "test" if path.name.startswith("test") else "train"))
    return None


def _open_folder(folder: Path) -> _Found | None:
    if any((folder / "train" / name).is_dir() for name in _FOLDERS):
        return _open_files(folder)
    archive = folder / DATASETS["lra-text"].archive
    if archive.is_file():
        return _open(archive)
    shards = {part: find_shards(folder, part) for part in PARTS if any(folder.glob(f"{part}-*-of-*.parquet"))}
    if "train" in shards:
        tables = [(file, part) for part, files in shards.items() for file in files]
        return _Found(folder, tuple(file for file, _ in tables), lambda: _chain(_read_parquet, tables))
    lines = sorted(file for suffix in _LINES for file in folder.glob(f"*{suffix}") if not file.name.startswith("."))
    return _Found(folder, tuple(lines), lambda: _chain(_read_lines, [(file,) for file in lines])) if lines else None


def _chain(read: Callable[..., Iterator[Review]], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Review]:
    for one in arguments:
        yield from read(*one)


def _open_files(folder: Path) -> _Found:
    files = sorted(file for part in PARTS for name in _FOLDERS for file in (folder / part / name).glob("[!.]*.txt"))

    def read() -> Iterator[Review]:
        for file in files:
            check_file(file)
            try:
                yield _review(str(file.relative_to(folder).as_posix()), file.read_bytes())
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error

    return _Found(folder, tuple(files), read)


def _review(member: str, text: bytes) -> Review:
    """The review in a file whose name :data:`_MEMBER` matches."""
    match = _MEMBER.fullmatch(member)
    if match is None:
        raise DataError(f"{member}: expected a file such as train/neg/0_3.txt")
    return Review(match[1], _FOLDERS.index(match[2]), match[3], text)


def _read_archive(path: Path) -> Iterator[Review]:
    """Read the reviews of a tar archive in the order that they have there; whatever else it has stays unread."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP_START
            file.seek(0)
            # Read to its end, for that is where gzip has its checksum.
            with gzip.GzipFile(fileobj=file) if packed else file as source:
                with tarfile.open(fileobj=source, mode="r|") as tar:
                    yield from _read_members(path, tar)
                while source.read(2**20):
                    pass
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged archive ({type(error).__name__}: {error})") from error


def _read_members(path: Path, tar: tarfile.TarFile) -> Iterator[Review]:
    for member in tar:
        if not _MEMBER.fullmatch(member.name):
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{path}: {member.name}: a link or device, expected a file")
        if member.size > MOST_BYTES:
            raise DataError(f"{path}: {member.name}: {member.size:,} bytes, expected a review")
        content = tar.extractfile(member)
        yield _review(member.name, content.read() if content is not None else b"")


def _read_lines(path: Path) -> Iterator[Review]:
    for origin, values in read_json_lines(path):
        member = read_text(origin, values, "file")
        if not _MEMBER.fullmatch(member):
            raise DataError(f"{origin}: expected a file such as train/neg/0_3.txt, got {member[:80]!r}")
        review = _review(member, to_bytes(origin, read_text(origin, values, "text")))
        if values.get("label", review.label) != review.label:
            raise DataError(f"{origin}: expected label {review.label}, that of {member}, got {values['label']!r}")
        yield review


def _read_parquet(file: Path, part: str) -> Iterator[Review]:
    row = 0
    for texts, labels in read_columns(file, ["text", "label"]):
        for text, label in zip(texts, labels, strict=True):
            row += 1
            if not isinstance(text, str) or label not in range(len(CLASSES)):
                raise DataError(
                    f"{file}, row {row}: expected a text and a label 0 or 1, got {text!r:.40} and {label!r}"
                )
            yield Review(part, int(label), "", to_bytes(f"{file}, row {row}", text))


def _sort(found: _Found) -> list[Review]:
    """All reviews, in one order for every form that tells the names of their files."""
    reviews, seen, total = [], set(), 0
    for one in found.read():
        total += len(one.text)
        place = f"{one.part}/{_FOLDERS[one.label]}/{one.name}"
        if not one.text:
            raise DataError(f"{found.origin}: {place}: an empty review")
        if total > MOST_BYTES:
            raise DataError(f"{found.origin}: reviews of more than {MOST_BYTES:,} bytes together")
        if one.name and place in seen:
            raise DataError(f"{found.origin}: {place} is there twice")
        seen.add(place)
        reviews.append(one)
    return sorted(reviews, key=_order)


def _order(review: Review) -> tuple[int, int, str]:
    number = re.match(r"\d{1,18}", review.name, re.ASCII)
    return review.label if review.name else 0, int(number[0]) if number else -1, review.name


def _check(origin: Path, parts: Mapping[str, TokenSequences], check_counts: bool) -> None:
    counts = {part: np.bincount(one.labels, minlength=len(CLASSES)).tolist() for part, one in parts.items()}
    if not min(counts["train"]):
        raise DataError(f"{origin}: no {CLASSES[counts['train'].index(0)]} review to train on")
    wrong = [part for part, count in counts.items() if any(count) and count != [COUNT, COUNT]]
    if wrong and check_counts:
        came = "; ".join(f"{part} {counts[part][0]:,} negative and {counts[part][1]:,} positive" for part in wrong)
        raise DataError(
            f"{origin}: not the reviews of IMDB: {came}, instead of {COUNT:,} each: incomplete? "
            "flowformer.tasks.lra.imdb.load(path, check_counts=False) reads reviews of your own in the same form."
        )
