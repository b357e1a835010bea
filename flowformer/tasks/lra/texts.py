"""Texts as sequences of bytes, the files that they are kept in, and files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.encodings import open_text

# Token of a byte: its value plus 1, for 0 is padding, as with ByteTextEncoder of tensorflow_datasets.
VOCAB_SIZE = 257
DTYPE = np.dtype(np.uint16)
MOST_CHARACTERS = 2**26  # of a line: what a compressed file unpacks to may be of any size


def encode_bytes(text: bytes) -> np.ndarray:
    """Return the tokens of a text, its bytes plus 1: (len(text),) uint16."""
    return np.frombuffer(text, np.uint8).astype(DTYPE) + DTYPE.type(1)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the objects of a file of JSON lines, compressed or not, each with its place, for messages: file and line.

    Raises:
        DataError: for a file that is absent, damaged or not UTF-8, and a line that is not a JSON object.
    """
    with open_text(path) as text:
        for number, line in enumerate(iter(partial(text.readline, MOST_CHARACTERS), ""), 1):
            origin = f"{path}, line {number}"
            if len(line) == MOST_CHARACTERS:
                raise DataError(f"{origin}: more than {MOST_CHARACTERS:,} characters")
            if line.strip():
                yield origin, _parse(origin, line)


def _parse(origin: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{origin}: expected a JSON object, got {line.strip()[:40]}")
    return value


def read_text(origin: str, values: dict[str, Any], name: str) -> str:
    """Return the text that a JSON object has under a name.

    Raises:
        DataError: where there is none, or it is empty.
    """
    value = values.get(name)
    if not isinstance(value, str) or not value:
        found = repr(value)[:40] if name in values else f"fields {', '.join(values)[:200] or 'none'}"
        raise DataError(f"{origin}: expected a text {name!r}, got {found}")
    return value


def to_bytes(origin: str, text: str) -> bytes:
    """Return a text in UTF-8.

    Raises:
        DataError: for half of a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{origin}: character {error.start:,} is half of a surrogate pair") from error
