"""Parquet files of the Hugging Face hub: the shards of a part, and their columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flowformer.common.errors import DataError

BATCH_ROWS = 2**13


def find_shards(folder: Path, part: str) -> list[Path]:
    """Return the files of a part, ``PART-00000-of-00002.parquet`` and so on, in order.

    Raises:
        DataError: where any of them is missing, or there are others.
    """
    files = sorted(folder.glob(f"{part}-*-of-*.parquet"))
    count = files[0].stem.rsplit("-", 1)[1] if files else "00001"
    wanted = [f"{part}-{index:05}-of-{count}.parquet" for index in range(int(count) if count.isdigit() else 1)]
    if missing := set(wanted).symmetric_difference(file.name for file in files):
        raise DataError(
            f"{folder}: expected {', '.join(wanted)} and no others; missing or unexpected: {', '.join(sorted(missing))}"
        )
    return files


def read_columns(file: Path, columns: Sequence[str]) -> Iterator[tuple[list[Any], ...]]:
    """Read columns of a file, some thousand rows at a time: of each a list, in the order asked for.

    Raises:
        DataError: for a file that lacks one of them, or is damaged.
        ModuleNotFoundError: without pyarrow.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            raise DataError(f"{file} has no column {' and no column '.join(missing)}; available: {', '.join(names)}")
        for batch in table.iter_batches(BATCH_ROWS, columns=list(columns)):
            yield tuple(batch.column(name).to_pylist() for name in columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
