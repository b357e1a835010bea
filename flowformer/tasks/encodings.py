"""Encodings of text files: UTF-8, or UTF-16 and UTF-32 with a byte order mark."""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flowformer.common.errors import DataError

BLOCK_BYTES = 2**20
COMPRESSED: Mapping[str, Callable[[Path], io.BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
# What reading a damaged compressed file raises.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
# UTF-32 first: its mark begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_binary(path: Path) -> io.BufferedIOBase:
    """Open a file for reading; one that ends in .gz, .bz2 or .xz is decompressed."""
    suffix = path.suffix.lower()
    return COMPRESSED[suffix](path) if suffix in COMPRESSED else path.open("rb")


def find_mark(start: bytes) -> tuple[bytes, str]:
    """Return the byte order mark at the start of a text, and its encoding; b"" and UTF-8 if there is none."""
    return next(((mark, name) for mark, name in _MARKS if start.startswith(mark)), (b"", "utf-8"))


def decode(data: bytes, origin: object) -> str:
    """Decode the content of a text file, without its byte order mark.

    Raises:
        DataError: naming the origin and the first byte that is wrong.
    """
    mark, name = find_mark(data)
    try:
        # The mark is decoded as a character and removed, for errors to count it as well.
        return data.decode(name.removesuffix("-sig")).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(describe(origin, name, error.start, error.reason, bool(mark))) from error


@contextmanager
def open_text(path: Path, *, errors: str = "strict", newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file, compressed or not, in the encoding that its byte order mark states, else UTF-8.

    Args:
        path: The file.
        errors: As in :func:`open`.
        newline: As in :func:`open`.

    Raises:
        DataError: in the ``with`` block too, for a file that is absent, cannot be read or is damaged, and for bytes
            that are no text, with the place of the first of them.
    """
    try:
        with open_binary(path) as binary:
            _, name = find_mark(binary.read(4))
        with open_binary(path) as binary, io.TextIOWrapper(binary, name, errors, newline) as text:
            yield text
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: a folder, expected a file") from error
    except DAMAGE as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # of what the block writes
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(find_undecodable(path) or f"{path}: {error}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def find_undecodable(path: Path) -> str | None:
    """Return a message about the first byte of a file that is not text in its encoding; ``None`` if all of it is."""
    place = 0
    with open_binary(path) as source:
        block = source.read(BLOCK_BYTES)
        mark, name = find_mark(block)
        decoder: Any = codecs.getincrementaldecoder(name.removesuffix("-sig"))()
        try:
            while block:
                kept = len(decoder.getstate()[0])
                decoder.decode(block)
                place += len(block)
                block = source.read(BLOCK_BYTES)
            kept = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return describe(path, name, place - kept + error.start, error.reason, bool(mark))
    return None


def describe(origin: object, name: str, place: int, reason: str, marked: bool) -> str:
    """Return an error message about bytes that are not text in an encoding."""
    wanted = name.removesuffix("-sig").upper()
    said = "" if not marked else ", which its byte order mark states"
    hint = "; save it as UTF-8" if wanted == "UTF-8" else ""
    return f"{origin} is not {wanted}{said}: byte {place:,}: {reason}{hint}"
