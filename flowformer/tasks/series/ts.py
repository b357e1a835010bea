"""Reader of .ts files, the format of the UEA archive."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import IO

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.classes import as_number
from flowformer.tasks.encodings import find_undecodable, open_text
from flowformer.tasks.series.table import SeriesTable, describe_excess, find_excess

# The header handed to aeon: lengths may differ, and the labels stay with us (aeon lowers their case).
_AEON_HEADER = "@missing true\n@univariate false\n@equalLength false\n@classLabel true 0\n@data\n"
_QUOTES = "'\""
# A label in the header: in quotes that end where the next space is, or without spaces.
_LABEL = re.compile(r"""(?P<quote>['"])(?P<quoted>.*?)(?P=quote)(?=\s|$)|(?P<plain>\S+)""")


@dataclass
class _Header:
    """What the header of a .ts file declares."""

    class_line: str = ""  # the line @classLabel
    labelled: bool = False  # rows end in a label
    listed: list[str] = field(default_factory=list)  # labels, as the header spells them
    labels: dict[str | Decimal, str] = field(default_factory=dict)  # spelling in a row, or loosely -> in the header
    channels: int | None = None
    equal_length: bool = False

    def find_label(self, text: str) -> str | None:
        return self.labels.get(text) or self.labels.get(_loose(text))


def _loose(label: str) -> str | Decimal:
    # Files of the archive's format are written with less care than they are read: "Up" and "up", "1.0" and "1".
    value = as_number(label)
    return label.casefold() if value is None else value


def read_ts_table(path: Path, labelled: bool) -> SeriesTable:
    """Read a .ts or .ts.gz file; see :func:`flowformer.tasks.series.files.read_table`."""
    with tempfile.TemporaryDirectory(prefix="flowformer-") as folder:
        # aeon stumbles over blank lines, comments between rows, a byte order mark and gzip: it gets a plain copy.
        copy = Path(folder, "rows.ts")
        # surrogateescape: the archive's comments are not all UTF-8; whatever is read must be.
        with open_text(path, errors="surrogateescape") as handle, copy.open("w", encoding="utf-8") as rows:
            labels, lines = _copy(path, handle, rows, labelled)
        series = _load_with_aeon(path, copy, lines)
        for one, line in zip(series, lines, strict=True):
            if place := find_excess(one):
                raise _find_in_copy(path, copy, line, lines, *place)
    names = tuple(str(index) for index in range(len(series)))
    return SeriesTable(str(path), series, labels, names, locate=lines.__getitem__)


def _copy(path: Path, handle: IO[str], rows: IO[str], labelled: bool) -> tuple[list[str], list[int]]:
    """Check header and rows, write the rows for aeon; return label and line number of each series."""
    numbered = enumerate(handle, start=1)
    header = _read_header(path, numbered, labelled)
    rows.write(_AEON_HEADER)
    labels: list[str] = []
    lines: list[int] = []
    length: int | None = None
    for number, text in numbered:
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        _check_encoding(path, text)
        channels, label = _split_row(text, header)
        length = _check_row(f"{path}, line {number}", channels, header, length)
        labels.append(_check_label(f"{path}, line {number}", label, header, labelled))
        lines.append(number)
        rows.write(":".join(channels) + ":0\n")
    if not labels:
        raise DataError(f"{path}: no rows after @data")
    return labels, lines


def _check_encoding(path: Path, text: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(find_undecodable(path) or f"{path} is not UTF-8")


def _split_row(text: str, header: _Header) -> tuple[list[str], str]:
    """Return the channels of a row and its label, which may contain colons if it is quoted."""
    if not header.labelled:
        return text.split(":"), ""
    if text[-1] in _QUOTES:
        opening = text.find(text[-1])
        values, label = text[:opening].rstrip(), text[opening:]
        if values.endswith(":") and len(label) > 1:
            return values[:-1].split(":"), label[1:-1]
    *channels, label = text.split(":")
    return channels, label.strip()


def _check_label(place: str, label: str, header: _Header, labelled: bool) -> str:
    """Return the label as the header spells it, or an empty string where none is needed and none is there."""
    if not labelled and (not header.labelled or label == "?"):
        return ""
    spelled = header.find_label(label)
    if spelled is None:
        raise DataError(f"{place}: label {label!r} is not in {_describe_labels(label, header)}{_hint(label, labelled)}")
    return spelled


def _describe_labels(label: str, header: _Header) -> str:
    listed = ", ".join(map(repr, header.listed[:20]))
    if len(label.split()) > 1:
        return (
            f"the header's @classLabel list, which spaces separate into {listed}; a label that contains spaces must be "
            "quoted, there and in the rows"
        )
    return f"the header's @classLabel list ({listed})"


def _hint(label: str, labelled: bool) -> str:
    if labelled or " " in label:
        return ""
    return "; if the rows have no labels, the header must contain @classLabel false"


def _read_header(path: Path, numbered: Iterable[tuple[int, str]], labelled: bool) -> _Header:
    header = _Header()
    number = 0
    for number, text in numbered:
        tag, *values = text.split() or [""]
        if tag.lower() == "@data":
            if not header.labels and (labelled or header.labelled):
                raise DataError(f"{path}, line {number}: no class labels: {_describe_class_line(header)}")
            return header
        if tag.lower() == "@classlabel":
            _check_encoding(path, text)
            header.class_line = text.strip()
        _read_tag(f"{path}, line {number}", tag.lower(), values, header)
    if number == 0:
        raise DataError(f"{path}: the file is empty")
    raise DataError(f"{path}: no @data line in {number} lines; not a .ts file, or cut short")


def _describe_class_line(header: _Header) -> str:
    wanted = "expected '@classLabel true' and the labels"
    return f"the header has {header.class_line!r}, {wanted}" if header.class_line else f"no @classLabel line, {wanted}"


def _read_tag(place: str, tag: str, values: list[str], header: _Header) -> None:
    first = values[0].lower() if values else ""
    if tag == "@targetlabel" and first == "true":
        raise DataError(f"{place}: a regression problem (@targetLabel true); expected classes")
    if tag == "@timestamps" and first == "true":
        # aeon's reader drops the signs of time-stamped values and whole numbers altogether.
        raise DataError(f"{place}: values with time stamps (@timeStamps true) are not supported; use a .csv file")
    if tag == "@classlabel" and first == "true":
        header.labelled = True
        listed = header.class_line.split(maxsplit=2)[2:]
        labels = [found["quoted"] or found["plain"] for found in _LABEL.finditer(listed[0] if listed else "")]
        header.listed = list(dict.fromkeys(filter(None, labels)))
        # Spelled exactly wins over spelled alike.
        header.labels = {_loose(label): label for label in reversed(labels) if label} | {
            one: one for one in labels if one
        }
    elif tag == "@classlabel" and first != "false":
        raise DataError(
            f"{place}: {header.class_line!r}: expected 'true' and the labels, or 'false', after @classLabel"
        )
    elif tag == "@dimensions" and first.isdecimal():
        header.channels = int(first)
    elif tag == "@equallength":
        header.equal_length = first == "true"


def _check_row(place: str, channels: list[str], header: _Header, length: int | None) -> int:
    """Check the shape of one row; return the length to expect of the next where all are declared equal."""
    wanted = header.channels = header.channels or len(channels)
    before = " before the label" if header.labelled else ""
    hint = "" if header.labelled else "; the header declares no labels (@classLabel), so every part is a channel"
    if len(channels) != wanted or not channels:
        raise DataError(f"{place}: {len(channels)} channels{before}, {wanted or 'at least 1'} expected{hint}")
    lengths = {channel.count(",") + 1 for channel in channels}
    if len(lengths) > 1:
        raise DataError(f"{place}: channels of different lengths {sorted(lengths)} in one series{hint}")
    steps = lengths.pop()
    if header.equal_length and length not in (None, steps):
        raise DataError(f"{place}: {steps} time steps, but {length} before it and the header has @equalLength true")
    return steps


def _load_with_aeon(path: Path, copy: Path, lines: list[int]) -> list[np.ndarray]:
    from aeon.datasets import load_from_ts_file

    try:
        series = load_from_ts_file(str(copy))[0]
    except ValueError as error:  # without a place: find it
        raise _find_bad_number(path, copy, lines) or DataError(f"{path}: {error}") from error
    return [np.ascontiguousarray(one.T) for one in series]


def _find_bad_number(path: Path, copy: Path, lines: list[int]) -> DataError | None:
    for number, row in zip(lines, _read_copy(copy), strict=True):
        for channel, values in enumerate(row, start=1):
            for step, value in enumerate(values, start=1):
                if not is_number(value):
                    return DataError(
                        f"{path}, line {number}: channel {channel}, time step {step}: {value!r} is not a number "
                        f"({_describe_value(value)})"
                    )
    return None


def _describe_value(value: str) -> str:
    if value.strip().startswith("("):
        return "values with time stamps are not supported; use a .csv file"
    return "a missing value is written ?"


def _read_copy(copy: Path) -> list[list[list[str]]]:
    """The values of each channel of each row, as written."""
    with copy.open(encoding="utf-8") as handle:
        rows = handle.readlines()[_AEON_HEADER.count("\n") :]
    return [[values.split(",") for values in row.split(":")[:-1]] for row in rows]


def _find_in_copy(path: Path, copy: Path, line: int, lines: list[int], step: int, channel: int) -> DataError:
    value = _read_copy(copy)[lines.index(line)][channel][step]
    return DataError(
        f"{path}, line {line}: channel {channel + 1}, time step {step + 1}: {describe_excess(value.strip())}"
    )


def is_number(text: str, missing: tuple[str, ...] = ("?",)) -> bool:
    """Return whether a cell is a number, or stands for a missing value."""
    if text.strip() in missing:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text and text.isascii()  # Python reads 1_000 and the digits of all scripts, pandas does not
