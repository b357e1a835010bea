"""Readers of labelled time series: .ts files of the UEA archive, and .csv in long form."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, cast

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.encodings import open_text
from flowformer.tasks.series.table import SeriesTable, describe_excess, find_excess
from flowformer.tasks.series.ts import is_number, read_ts_table

if TYPE_CHECKING:
    import pandas as pd

ACCEPTED_SUFFIXES = (".ts", ".ts.gz", ".csv", ".csv.gz")
CSV_KEYS = ("series", "time", "label")


def read_table(path: str | Path, *, labelled: bool = True) -> SeriesTable:
    """Read a file of series: .ts, .ts.gz, .csv or .csv.gz.

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
        return read_ts_table(path, labelled)
    if stem.endswith(".csv"):
        return _read_csv_table(path, labelled)
    raise DataError(f"{path}: unknown file type; expected {', '.join(ACCEPTED_SUFFIXES)}")


def read_ts(path: str | Path) -> tuple[list[np.ndarray], list[str]]:
    """Read a .ts or .ts.gz file in the format of the UEA archive.

    Returns:
        The series, each (length, channels) float64 with NaN where missing; and their labels as the header spells them.

    Raises:
        DataError: the file is missing, empty, corrupt, has no @data or no class labels, is a regression problem or
            carries time stamps, or a row has the wrong channels or length, a value that is no number, or an undeclared
            label.
    """
    table = read_ts_table(Path(path), labelled=True)
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
def _open_csv(path: Path) -> Iterator[IO[str]]:
    with open_text(path) as handle:
        try:
            yield handle
        except csv.Error as error:
            raise DataError(f"{path}: cannot be read: {error}") from error


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
    values = frame[list(channels)].to_numpy(dtype=np.float64)
    if place := find_excess(values):
        number, cells = _find_csv_row(path, place[0])
        name = channels[place[1]]
        text = cells[names.index(name)].strip()
        raise DataError(f"{path}, line {number}: column {name!r}: {describe_excess(text)}")
    series = np.split(values[order], np.flatnonzero(np.diff(codes[order])) + 1)
    return SeriesTable(
        str(path),
        series,
        [str(label) for label in labels[first_rows]],
        tuple(str(name) for name in series_names),
        channels,
        lambda index: _find_csv_line(path, int(first_rows[index])),
    )


def _read_csv_header(path: Path, wanted: tuple[str, ...]) -> list[str]:
    with _open_csv(path) as handle:
        if any("\0" in piece for piece in iter(lambda: handle.read(2**20), "")):
            raise DataError(f"{path}: contains a null character, which text has not")
    with _open_csv(path) as handle:
        names = [name.strip() for name in next(csv.reader(handle), [])]
    if not any(names):
        raise DataError(f"{path}: the file is empty" if not names else f"{path}, line 1: no header")
    absent = [key for key in wanted if key not in names]
    if absent:
        raise DataError(
            f"{path}, line 1: missing column {', '.join(absent)}; the header has {', '.join(names)}"
            f"{_hint_at_columns(names, absent)}"
        )
    if "" in names or len(set(names)) < len(names):
        raise DataError(f"{path}, line 1: a column without a name, or two of one name: {', '.join(names)}")
    if not set(names).difference(CSV_KEYS):
        raise DataError(f"{path}, line 1: no channel columns besides {', '.join(names)}")
    return names


def _hint_at_columns(names: list[str], absent: list[str]) -> str:
    for separator, what in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            return f": expected commas between columns, not {what}"
    alike = [name for name in names if name.strip("'\"").lower() in absent]
    return f": {', '.join(map(repr, alike))} must be written in small letters without quotes" if alike else ""


def _describe_cell(cell: str) -> str:
    """The likely cause for a cell that is no number."""
    if "," in cell and is_number(cell.replace(",", ".", 1)):
        return "; the decimal sign must be a point"
    if is_number(cell.strip().translate(str.maketrans("", "", ",' \u00a0\u202f"))):
        return "; digits must not be grouped"
    return ""


def _read_frame(path: Path, names: list[str], channels: tuple[str, ...], wanted: tuple[str, ...]) -> pd.DataFrame:
    """Read all rows: keys as stripped text, "label" empty where the file has none, channels as float64."""
    import pandas as pd

    # A first row that is too long would make pandas drop cells; any other is an error to it.
    first = next(_csv_rows(path), (0, names))
    _check_csv_cells(path, names, *first)
    types = {name: np.float64 if name in channels else str for name in names}
    missing = {name: ["", "?", "nan", "NaN"] for name in channels}
    try:
        with _open_csv(path) as handle:
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
    with _open_csv(path) as handle:
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
            if name not in CSV_KEYS and not is_number(cell, missing=("", "?")):
                raise DataError(
                    f"{path}, line {number}: column {name!r}: {cell!r:.80} is not a number{_describe_cell(cell)}"
                )


def _check_csv_cells(path: Path, names: list[str], number: int, cells: list[str]) -> None:
    if len(cells) != len(names):
        raise DataError(f"{path}, line {number}: {len(cells)} cells, but the header has {len(names)}")


def _find_csv_row(path: Path, row: int) -> tuple[int, list[str]]:
    return next(found for index, found in enumerate(_csv_rows(path)) if index == row)


def _find_csv_line(path: Path, row: int) -> int:
    return _find_csv_row(path, row)[0]


def _fail_at_row(path: Path, row: int | np.integer, cause: str) -> NoReturn:
    raise DataError(f"{path}, line {_find_csv_line(path, int(row))}: {cause}")


def _read_times(path: Path, column: pd.Series) -> np.ndarray:
    import pandas as pd

    times = cast("pd.Series", pd.to_numeric(column, errors="coerce"))
    if times.isna().any():
        dates = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True).dt.tz_localize(None)
        # Judge by the kind that fits more rows, so that the message names the odd one out.
        times = dates if dates.notna().sum() > times.notna().sum() else times
    bad = np.flatnonzero(times.isna().to_numpy() | times.isin([np.inf, -np.inf]).to_numpy())
    if len(bad):
        _fail_at_row(path, bad[0], f"time {column.iloc[bad[0]]!r:.80} is neither a number nor an ISO 8601 date")
    return np.asarray(times)


def _order_steps(path: Path, codes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Sort rows by series, then time; refuse a time that occurs twice in one series."""
    order = np.lexsort((times, codes))
    twice = (np.diff(codes[order]) == 0) & (times[order][1:] == times[order][:-1])
    if twice.any():
        row = np.min(order[1:][twice])
        _fail_at_row(path, row, f"time {times[row]} occurs twice in the same series")
    return order
