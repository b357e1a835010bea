"""Files of labelled time series, read as they are and checked: .ts of the UEA archive, and .csv in long form."""

from __future__ import annotations

import csv
import gzip
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

import numpy as np

from flowformer.common.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

ACCEPTED_SUFFIXES = (".ts", ".ts.gz", ".csv", ".csv.gz")
CSV_KEYS = ("series", "time", "label")
# The header handed to aeon: lengths may differ, and the labels stay with us (aeon lowers their case).
_AEON_HEADER = "@missing true\n@univariate false\n@equalLength false\n@classLabel true 0\n@data\n"


@dataclass(frozen=True, eq=False)
class SeriesTable:
    """Series as read, before any preprocessing.

    Attributes:
        origin: the file, for messages.
        series: n arrays of shape (length, channels), float64, NaN where missing.
        labels: n labels as written; empty strings where the source has none.
        names: what the source calls each series; "0", "1", ... where it names none.
        channel_names: where the source names its channels, else None.
        locate: gives the line of series i in the file, for messages.
    """

    origin: str
    series: list[np.ndarray]
    labels: list[str]
    names: tuple[str, ...]
    channel_names: tuple[str, ...] | None = None
    locate: Callable[[int], int] | None = None

    def where(self, index: int) -> str:
        """Name the place of series `index`: the file, and the line where it is known."""
        return f"{self.origin}, " + (f"line {self.locate(index)}" if self.locate else f"series {index}")

    def select_channels(self, names: tuple[str, ...]) -> SeriesTable:
        """Return the table with its channels in the order of `names`, a permutation of its `channel_names`."""
        order = [list(self.channel_names or ()).index(name) for name in names]
        return replace(self, series=[one[:, order] for one in self.series], channel_names=names)


def read_table(path: str | Path, *, labelled: bool = True) -> SeriesTable:
    """Read one file of series by its suffix: .ts, .ts.gz, .csv or .csv.gz.

    Args:
        path: the file.
        labelled: whether every series must have a label. False accepts a .csv without the column `label` or with empty
            cells in it, a .ts without `@classLabel true`, and the label "?" in a .ts; labels that are there are read
            and checked all the same.

    Raises:
        DataError: another suffix, or the file cannot be read (see `read_ts`, `read_csv`).
    """
    path = Path(path)
    stem = path.name.lower().removesuffix(".gz")
    if stem.endswith(".ts"):
        return _read_ts_table(path, labelled)
    if stem.endswith(".csv"):
        return _read_csv_table(path, labelled)
    raise DataError(f"{path}: unknown kind of file; accepted are {', '.join(ACCEPTED_SUFFIXES)}")


def read_ts(path: str | Path) -> tuple[list[np.ndarray], list[str]]:
    """Read a .ts or .ts.gz file of the UEA archive's format.

    Returns:
        The series, each (length, channels) float64 with NaN where missing; and their labels as the header spells them.

    Raises:
        DataError: the file is missing, empty, corrupt, has no @data or no class labels, is a regression problem or
            carries time stamps, or a row has the wrong channels or length, a value that is no number, or an undeclared
            label.
    """
    table = _read_ts_table(Path(path), labelled=True)
    return table.series, table.labels


def read_csv(path: str | Path) -> tuple[list[np.ndarray], list[str]]:
    """Read a .csv or .csv.gz file in long form: one row per series and time step.

    The header names the columns `series`, `time` and `label`, in any place; every other column is a channel. Rows may
    come in any order; time is a number or an ISO 8601 date and only orders the steps. An empty cell is a missing value.

    Returns:
        The series in order of first appearance, each (length, channels) float64; and their labels.

    Raises:
        DataError: the file is missing, empty or corrupt, a column is missing, a row has the wrong number of cells, a
            value is no number, a series, time or label is empty, a time occurs twice in a series, or the label
            changes within one.
    """
    table = _read_csv_table(Path(path), labelled=True)
    return table.series, table.labels


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open plain or gzipped text; every failure to read, then or later, becomes a DataError."""
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        # backslashreplace: the archive's comments are not all UTF-8, and labels must stay distinct.
        with opener(path, "rt", encoding="utf-8-sig", errors="backslashreplace") as handle:
            yield handle
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


@dataclass
class _TsHeader:
    """What the header of a .ts file declares."""

    labelled: bool = False  # rows end in a label
    labels: dict[str, str] = field(default_factory=dict)  # spelling in a row, loosely -> spelling in the header
    channels: int | None = None
    equal_length: bool = False

    def find_label(self, text: str) -> str | None:
        return self.labels.get(text) or self.labels.get(_loose(text))


def _loose(label: str) -> str:
    # Files of the archive's format are written with less care than they are read: "Up" and "up", "1.0" and "1".
    try:
        return repr(float(label))
    except ValueError:
        return label.casefold()


def _read_ts_table(path: Path, labelled: bool) -> SeriesTable:
    with tempfile.TemporaryDirectory(prefix="flowformer-") as folder:
        # aeon stumbles over blank lines, comments between rows, a byte order mark and gzip: it gets a plain copy.
        copy = Path(folder, "rows.ts")
        with _open_text(path) as handle, copy.open("w", encoding="utf-8") as rows:
            labels, lines = _copy_ts(path, handle, rows, labelled)
        series = _load_with_aeon(path, copy, lines)
    names = tuple(str(index) for index in range(len(series)))
    return SeriesTable(str(path), series, labels, names, locate=lines.__getitem__)


def _copy_ts(path: Path, handle: TextIO, rows: TextIO, labelled: bool) -> tuple[list[str], list[int]]:
    """Check header and rows, write the rows for aeon; return label and line number of each series."""
    numbered = enumerate(handle, start=1)
    header = _read_ts_header(path, numbered, labelled)
    rows.write(_AEON_HEADER)
    labels: list[str] = []
    lines: list[int] = []
    length: int | None = None
    for number, text in numbered:
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        channels = text.split(":")
        label = channels.pop().strip() if header.labelled else ""
        length = _check_ts_row(f"{path}, line {number}", channels, header, length)
        labels.append(_check_ts_label(f"{path}, line {number}", label, header, labelled))
        lines.append(number)
        rows.write(":".join(channels) + ":0\n")
    if not labels:
        raise DataError(f"{path}: no rows after @data")
    return labels, lines


def _check_ts_label(place: str, label: str, header: _TsHeader, labelled: bool) -> str:
    """Return the label as the header spells it, or an empty string where none is needed and none is there."""
    if not labelled and (not header.labelled or label == "?"):
        return ""
    spelled = header.find_label(label)
    if spelled is None:
        hint = "" if labelled else "; if the rows have no labels, the header must say @classLabel false"
        raise DataError(f"{place}: label {label!r} is not in the header's @classLabel list{hint}")
    return spelled


def _read_ts_header(path: Path, numbered: Iterable[tuple[int, str]], labelled: bool) -> _TsHeader:
    header = _TsHeader()
    number = 0
    for number, text in numbered:
        tag, *values = text.split() or [""]
        if tag.lower() == "@data":
            if not header.labels and (labelled or header.labelled):
                raise DataError(f"{path}, line {number}: no class labels: the header lacks '@classLabel true ...'")
            return header
        _read_ts_tag(f"{path}, line {number}", tag.lower(), values, header)
    if number == 0:
        raise DataError(f"{path}: the file is empty")
    raise DataError(f"{path}: no @data line in {number} lines; not a .ts file, or cut short")


def _read_ts_tag(place: str, tag: str, values: list[str], header: _TsHeader) -> None:
    first = values[0].lower() if values else ""
    if tag == "@targetlabel" and first == "true":
        raise DataError(f"{place}: a regression problem (@targetLabel true); classes are wanted")
    if tag == "@timestamps" and first == "true":
        # aeon's reader drops the signs of time-stamped values and whole numbers altogether.
        raise DataError(f"{place}: values with time stamps (@timeStamps true) are not supported; use a .csv file")
    if tag == "@classlabel" and first == "true":
        header.labelled = True
        # Spelled exactly wins over spelled alike.
        header.labels = {_loose(label): label for label in reversed(values[1:])} | {one: one for one in values[1:]}
    elif tag == "@dimensions" and first.isdigit():
        header.channels = int(first)
    elif tag == "@equallength":
        header.equal_length = first == "true"


def _check_ts_row(place: str, channels: list[str], header: _TsHeader, length: int | None) -> int:
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
        raise DataError(f"{place}: {steps} time steps, but {length} before it and the header says @equalLength true")
    return steps


def _load_with_aeon(path: Path, copy: Path, lines: list[int]) -> list[np.ndarray]:
    from aeon.datasets import load_from_ts_file

    try:
        series = load_from_ts_file(str(copy))[0]
    except ValueError as error:  # without a place: find it
        raise _find_bad_number(path, copy, lines) or DataError(f"{path}: {error}") from error
    return [np.ascontiguousarray(one.T) for one in series]


def _find_bad_number(path: Path, copy: Path, lines: list[int]) -> DataError | None:
    with copy.open(encoding="utf-8") as handle:
        rows = handle.readlines()[_AEON_HEADER.count("\n") :]
    for number, row in zip(lines, rows, strict=True):
        for channel, values in enumerate(row.split(":")[:-1], start=1):
            for step, value in enumerate(values.split(","), start=1):
                if not _is_number(value):
                    return DataError(
                        f"{path}, line {number}: channel {channel}, time step {step}: {value!r} is not a number "
                        "(a missing value is written ?)"
                    )
    return None


def _is_number(text: str, missing: tuple[str, ...] = ("?",)) -> bool:
    if text.strip() in missing:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python reads 1_000, pandas does not


def _read_csv_table(path: Path, labelled: bool) -> SeriesTable:
    wanted = CSV_KEYS if labelled else tuple(key for key in CSV_KEYS if key != "label")
    names = _read_csv_header(path, wanted)
    channels = tuple(name for name in names if name not in CSV_KEYS)
    frame = _read_frame(path, names, channels, wanted)
    import pandas as pd

    codes, series_names = pd.factorize(frame["series"])
    labels = frame["label"].to_numpy()
    first_rows = np.unique(codes, return_index=True)[1]
    changed = np.flatnonzero(labels != labels[first_rows[codes]])
    if len(changed):
        before = labels[first_rows[codes[changed[0]]]]
        _fail_at_row(path, changed[0], f"label {labels[changed[0]]!r}, but the same series had {before!r} before")
    order = _order_steps(path, codes, _read_times(path, frame["time"]))
    values = frame[list(channels)].to_numpy(dtype=np.float64)[order]
    series = np.split(values, np.flatnonzero(np.diff(codes[order])) + 1)
    return SeriesTable(
        str(path),
        series,
        [str(label) for label in labels[first_rows]],
        tuple(str(name) for name in series_names),
        channels,
        lambda index: _find_csv_line(path, int(first_rows[index])),
    )


def _read_csv_header(path: Path, wanted: tuple[str, ...]) -> list[str]:
    with _open_text(path) as handle:
        names = [name.strip() for name in next(csv.reader(handle), [])]
    if not any(names):
        raise DataError(f"{path}: the file is empty" if not names else f"{path}, line 1: no header")
    absent = [key for key in wanted if key not in names]
    if absent:
        raise DataError(f"{path}, line 1: missing column {', '.join(absent)}; the header has {', '.join(names)}")
    if "" in names or len(set(names)) < len(names):
        raise DataError(f"{path}, line 1: a column without a name, or two of one name: {', '.join(names)}")
    if not set(names).difference(CSV_KEYS):
        raise DataError(f"{path}, line 1: no channel columns besides {', '.join(names)}")
    return names


def _read_frame(path: Path, names: list[str], channels: tuple[str, ...], wanted: tuple[str, ...]) -> pd.DataFrame:
    """Read all rows: keys as stripped text, "label" empty where the file has none, channels as float64."""
    import pandas as pd

    # A first row that is too long would make pandas drop cells; any other is an error to it.
    first = next(_csv_rows(path), (0, names))
    _check_csv_cells(path, names, *first)
    types = {name: np.float64 if name in channels else str for name in names}
    missing = {name: ["", "?", "nan", "NaN"] for name in channels}
    try:
        with _open_text(path) as handle:
            frame = pd.read_csv(
                handle,
                names=names,
                header=0,
                index_col=False,
                dtype=types,  # pyright: ignore[reportArgumentType] -- the stubs want one type for all keys
                keep_default_na=False,
                na_values=missing,
                skipinitialspace=True,
            )
    except DataError:
        raise
    except ValueError as error:  # pandas names no true line: find it
        _check_csv_rows(path, names, wanted)
        raise DataError(f"{path}: {error}") from error
    if frame.empty:
        raise DataError(f"{path}: no rows below the header")
    for key in CSV_KEYS:
        frame[key] = frame[key].fillna("").str.strip() if key in names else ""
    # pandas fills a row that is cut short and cannot tell it from one that ends in a missing value.
    last = frame[names[-1]]
    if (frame[list(wanted)] == "").any(axis=None) or last.isna().any() or (last == "").any():
        _check_csv_rows(path, names, wanted)
    return frame


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of each row below the header, without blank lines, as pandas counts rows."""
    with _open_text(path) as handle:
        reader = csv.reader(handle, skipinitialspace=True)
        next(reader)
        number = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells) or len(cells) > 1:
                yield number, cells
            number = reader.line_num + 1


def _check_csv_rows(path: Path, names: list[str], wanted: tuple[str, ...]) -> None:
    """Raise for the first row that is wrong by itself."""
    for number, cells in _csv_rows(path):
        _check_csv_cells(path, names, number, cells)
        for name, cell in zip(names, cells, strict=True):
            if name in wanted and not cell.strip():
                raise DataError(f"{path}, line {number}: {name} is missing")
            if name not in CSV_KEYS and not _is_number(cell, missing=("", "?")):
                raise DataError(f"{path}, line {number}: column {name!r}: {cell!r} is not a number")


def _check_csv_cells(path: Path, names: list[str], number: int, cells: list[str]) -> None:
    if len(cells) != len(names):
        raise DataError(f"{path}, line {number}: {len(cells)} cells, but the header has {len(names)}")


def _find_csv_line(path: Path, row: int) -> int:
    return next(number for index, (number, _) in enumerate(_csv_rows(path)) if index == row)


def _fail_at_row(path: Path, row: int | np.integer, cause: str) -> NoReturn:
    raise DataError(f"{path}, line {_find_csv_line(path, int(row))}: {cause}")


def _read_times(path: Path, column: pd.Series) -> np.ndarray:
    import pandas as pd

    times = cast("pd.Series", pd.to_numeric(column, errors="coerce"))
    if times.isna().any():
        dates = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True).dt.tz_localize(None)
        # Judge by the kind that fits more rows, so that the message names the odd one out.
        times = dates if dates.notna().sum() > times.notna().sum() else times
    bad = np.flatnonzero(times.isna().to_numpy())
    if len(bad):
        _fail_at_row(path, bad[0], f"time {column.iloc[bad[0]]!r} is neither a number nor an ISO 8601 date")
    return np.asarray(times)


def _order_steps(path: Path, codes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Sort rows by series, then time; refuse a time that occurs twice in one series."""
    order = np.lexsort((times, codes))
    twice = (np.diff(codes[order]) == 0) & (times[order][1:] == times[order][:-1])
    if twice.any():
        row = np.min(order[1:][twice])
        _fail_at_row(path, row, f"time {times[row]} occurs twice in the same series")
    return order
