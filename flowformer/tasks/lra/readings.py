"""How sequences of tokens are read from a user's files, and written: texts, list operations, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.encodings import open_text
from flowformer.tasks.images.decoding import UnreadableImage, decode
from flowformer.tasks.images.format import ImageFormat, find_pictures
from flowformer.tasks.lra.image import to_grey
from flowformer.tasks.lra.listops.blocks import VOCABULARY
from flowformer.tasks.lra.listops.files import read_rows, tokenize
from flowformer.tasks.lra.texts import VOCAB_SIZE, encode_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

Named = tuple[str, np.ndarray]  # where a sequence is, and its tokens
_TEXTS = (".txt", ".text", ".md", ".html", ".htm")


class Reading(NamedTuple):
    """One way to read sequences.

    Attributes:
        item: What one sequence is called.
        files: Which files are accepted.
        vocab_size: Number of tokens, padding included.
        read: From a file or folder and the largest length to its sequences. Raises DataError.
        write: From tokens to how each is written.
        picture: Whether tokens are the pixels of a square, row by row.
    """

    item: str
    files: str
    vocab_size: int
    read: Callable[[Path, int], Iterator[Named]]
    write: Callable[[np.ndarray], tuple[str, ...]]
    picture: bool = False


def _read_texts(path: Path, most: int) -> Iterator[Named]:
    """A text of any encoding is its bytes, of which no more are read than the model sees."""
    files = sorted(one for one in path.rglob("*") if one.suffix.lower() in _TEXTS) if path.is_dir() else [path]
    for file in files:
        yield str(file), encode_bytes(_read_bytes(file, most))


def _read_bytes(file: Path, most: int = -1) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _write_bytes(tokens: np.ndarray) -> tuple[str, ...]:
    return tuple(ascii(chr(token - 1))[1:-1] if token else "" for token in tokens.tolist())


def _read_operations(path: Path, most: int) -> Iterator[Named]:
    if path.name.removesuffix(".gz").endswith(".tsv"):
        for row in read_rows(path):
            yield _operations(f"{path}, line {row.line}", row.source)
        return
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _operations(f"{path}, line {number}", line)


def _operations(name: str, text: str) -> Named:
    try:
        return name, tokenize(text)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error


def _read_pictures(path: Path, most: int) -> Iterator[Named]:
    """Pictures of any size are resized, and cut to a square of ``most`` pixels."""
    side = round(most**0.5)
    for file in find_pictures(path):
        yield str(file), _read_picture(file, side)


def _read_picture(file: Path, side: int) -> np.ndarray:
    try:
        return _grey(decode(_read_bytes(file)), side).reshape(-1)
    except UnreadableImage as error:
        raise DataError(f"{file}: {error}") from error


def _grey(image: Image, side: int) -> np.ndarray:
    """Grey levels: of a grey picture its own, of colours as the published pipeline computes them."""
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"):
        return ImageFormat((), side, 1, (0.0,), (1.0,)).prepare(image)
    return to_grey(ImageFormat((), side).prepare(image)[np.newaxis])


READINGS: Mapping[str, Reading] = {
    "bytes": Reading("text", "texts, and folders of them", VOCAB_SIZE, _read_texts, _write_bytes),
    "listops": Reading(
        "expression", "expressions such as [MAX 4 [MIN 2 3 ] 1 ] by lines, or .tsv with columns Source and Target",
        len(VOCABULARY), _read_operations, lambda tokens: tuple(VOCABULARY[token] for token in tokens),
    ),
    "grey": Reading(
        "picture", "pictures, and folders of them", 256, _read_pictures, lambda tokens: tuple(map(str, tokens)),
        picture=True,
    ),
}  # fmt: skip
