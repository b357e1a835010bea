"""Labelled images in parquet files, as on the Hugging Face hub, and in tar files in WebDataset format.

Nothing but labels, names and places is kept in memory; an image is read when it is asked for. Both stores can be
pickled, and go into other processes.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.encodings import decode
from flowformer.tasks.images.decoding import SUFFIXES, UnreadableImage

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
LABEL_KEYS = ("label", "cls", "class_index", "index", "wnid", "synset", "class_id")

# A label as its source has it: a number, or a name.
Label = int | str
UNLABELLED = -1  # the number in place of a label that is not known
MOST_LABEL_BYTES = 2**20
# What tarfile raises where headers are damaged.
DAMAGED_TAR = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,99}")


def parse_label(text: str) -> Label:
    """Return the label that a text is: a whole number in its usual spelling, else a name, as "007" and "1.0" are."""
    return int(text) if _WHOLE.fullmatch(text) else text


class Store(Protocol):
    """Encoded images by index; can be pickled."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of an image."""
        ...

    def read(self, index: int) -> bytes:
        """Read the encoded image; raises UnreadableImage or OSError."""
        ...

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Return a size in bytes for each of some images: its own, or that of the file that it is in."""
        ...


class Found(NamedTuple):
    """Contents of files of labelled images.

    Attributes:
        store: The images.
        labels: A label for each.
        class_names: Names of the classes that numbers stand for, where the source has them.
        left_out: What is not among the images though it is in the files: why, by name.
    """

    store: Store
    labels: list[Label]
    class_names: tuple[str, ...] | None
    left_out: dict[str, str]


def read_parquet(files: Sequence[Path]) -> Found:
    """Read labelled images in parquet files: a column of structs of ``bytes`` and ``path``, or of bytes, and labels.

    Names of classes are found where the ``datasets`` library wrote the files.

    Raises:
        DataError: for a file that is no parquet file, or that has no such columns.
    """
    import pyarrow
    from pyarrow import parquet

    labels: list[Label] = []
    names: tuple[str, ...] | None = None
    groups: list[tuple[int, int, int]] = []
    column = ""
    for number, path in enumerate(files):
        try:
            file = parquet.ParquetFile(path)
            column, label = (_column(path, file.schema_arrow, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
            values = file.read([label], use_threads=False).column(0).to_pylist()
        except DataError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: cannot read the parquet file: {error}") from error
        if any(value is None for value in values):
            raise DataError(f"{path}: row {values.index(None)} has no {label}")
        _check_unlabelled(path, values)
        names = names or _class_names(file.schema_arrow, label)
        first = len(labels)
        for group in range(file.num_row_groups):
            groups.append((number, group, first))
            first += file.metadata.row_group(group).num_rows
        labels += values
    return Found(ParquetImages(files, column, groups, len(labels)), labels, names, {})


def _check_unlabelled(path: Path, values: Sequence[Any]) -> None:
    """Raise where some rows, not all, have the number of a label that is not known."""
    numbers = {value for value in values if isinstance(value, int)}
    if numbers and min(numbers) < 0 and numbers != {UNLABELLED}:
        raise DataError(
            f"{path}: labels from {min(numbers)} to {max(numbers)}, expected numbers from 0 on; {UNLABELLED} in all "
            "rows stands for no labels"
        )


class ParquetImages:
    """Images in the rows of parquet files.

    A row is read with the group of rows that it is in, the smallest that can be read; the last group is kept.

    Args:
        files: The files, in their order.
        column: The images' column.
        groups: Of each group of rows the file, its number there, and its first row among all.
        rows: All rows.
    """

    def __init__(self, files: Sequence[Path], column: str, groups: Sequence[tuple[int, int, int]], rows: int) -> None:
        self.files, self.column, self.rows = list(files), column, rows
        self.groups = np.array(groups, dtype=np.int64).reshape(-1, 3)
        self._drop_handles()

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._drop_handles()

    def _drop_handles(self) -> None:
        self._open, self._kept = {}, (-1, None)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self.groups[:, 2], index, side="right")) - 1

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Return the size of the file that each image is in, in bytes."""
        sizes = np.array([path.stat().st_size for path in self.files], dtype=np.int64)
        groups = np.searchsorted(self.groups[:, 2], rows, side="right") - 1
        return sizes[self.groups[groups, 0]]

    def name(self, index: int) -> str:
        """Return the name of an image: its file and row."""
        number = self.groups[self._group_of(index), 0]
        first = self.groups[np.searchsorted(self.groups[:, 0], number), 2]
        return f"{self.files[number].name}:{index - int(first)}"

    def read(self, index: int) -> bytes:
        """Read the encoded image.

        Raises:
            UnreadableImage: where the row holds none, or cannot be read.
        """
        import pyarrow

        place = self._group_of(index)
        try:
            value = self._read_group(place)[index - int(self.groups[place, 2])].as_py()
        except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
            raise UnreadableImage(f"cannot read rows: {error}") from error
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes):
            raise UnreadableImage("the row contains no bytes")
        return data

    def _read_group(self, place: int) -> Any:
        from pyarrow import parquet

        if self._kept[0] != place:
            number, group, _ = (int(value) for value in self.groups[place])
            # Not mapped into memory: a file that becomes shorter would end the process. A process that is forked opens
            # its own, for both would share the position in the file.
            key = os.getpid(), number
            if key not in self._open:
                self._open[key] = parquet.ParquetFile(self.files[number])
            table = self._open[key].read_row_group(group, [self.column], use_threads=False)
            self._kept = (place, table.column(0))
        return self._kept[1]


def _column(path: Path, schema: Any, known: Sequence[str]) -> str:
    found = next((name for name in known if name in schema.names), None)
    if found is None:
        raise DataError(f"{path}: no column {' or '.join(known)}; available: {', '.join(schema.names) or 'none'}")
    return found


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Names of classes from what the ``datasets`` library leaves in a file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label].get("names")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def read_tar(files: Sequence[Path]) -> Found:
    """Read labelled images in tar files in WebDataset format: KEY.jpg with KEY.cls (number or name) or KEY.json.

    The headers of all members are read once. Tar files do not name their classes.

    Raises:
        DataError: for a file that is no tar file, and for labels that cannot be read.
    """
    labels: list[Label] = []
    left_out: dict[str, str] = {}
    places: list[tuple[int, int, int]] = []
    names: list[str] = []
    for number, path in enumerate(files):
        for key, sample in _samples(path, left_out).items():
            missing = [part for part in ("image", "label") if part not in sample]
            if missing:
                left_out[f"{path.name}:{key}"] = f"no {' and no '.join(missing)} of this name"
                continue
            names.append(sample["image"].name)
            places.append((number, sample["image"].offset_data, sample["image"].size))
            labels.append(sample["label"])
    if not names and left_out:
        found = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:3])
        raise DataError(
            f"{', '.join(map(str, files))}: expected images KEY.jpg with their labels KEY.cls, where a key ends at the "
            f"first dot; found {found}. Unpack a tar file of folders by class"
        )
    return Found(TarImages(files, places, names), labels, None, left_out)


def _samples(path: Path, left_out: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What belongs together in a tar file, by key; what lies behind damage is left out."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            try:
                for member in archive:
                    if member.isfile() and not member.issparse():
                        _add(samples, path, archive, member)
            except DataError:  # of a label
                raise
            except DAMAGED_TAR as error:
                left_out[f"{path.name}, from byte {archive.offset:,} on"] = f"damaged: {error}"
    except DataError:
        raise
    except DAMAGED_TAR as error:
        raise DataError(f"{path}: cannot read the tar file (compressed ones are not supported): {error}") from error
    return samples


def _add(samples: dict[str, dict[str, Any]], path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    folder, _, file = member.name.rpartition("/")
    key, _, extension = file.partition(".")
    sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
    suffix = f".{extension.lower()}"
    if suffix in SUFFIXES:
        sample["image"] = member
    elif suffix == ".cls" or (suffix == ".json" and "label" not in sample):
        content = archive.extractfile(member)
        text = content.read(MOST_LABEL_BYTES) if content else b""
        label = _label_of(decode(text, f"{path}: {member.name}").strip(), suffix)
        if label is None:
            raise DataError(f"{path}: {member.name} contains no label: {text[:80]!r}{_hint(suffix)}")
        sample["label"] = label


class TarImages:
    """Images in tar files, read by offset.

    Args:
        files: The tar files.
        places: Of each image the file, its first byte there, and its size in bytes.
        names: Of each image.
    """

    def __init__(self, files: Sequence[Path], places: Sequence[tuple[int, int, int]], names: Sequence[str]) -> None:
        self.files = list(files)
        self.places = np.array(places, dtype=np.int64).reshape(-1, 3)
        self.names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.places)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Return the sizes of images in bytes."""
        return self.places[rows, 2]

    def name(self, index: int) -> str:
        """Return the name of an image: its file and member name."""
        return f"{self.files[self.places[index, 0]].name}:{os.fsdecode(bytes(self.names[index]))}"

    def read(self, index: int) -> bytes:
        """Read the encoded image.

        Raises:
            UnreadableImage: where the file has become shorter.
            OSError: where the file cannot be read.
        """
        number, offset, size = (int(value) for value in self.places[index])
        with self.files[number].open("rb") as file:
            whole = os.fstat(file.fileno()).st_size
            if whole < offset + size:
                raise UnreadableImage(f"the tar file has become shorter: {whole:,} bytes, {offset + size:,} expected")
            file.seek(offset)
            return file.read(size)


def _hint(suffix: str) -> str:
    return f"; expected a number or a name, in JSON as {', '.join(LABEL_KEYS)}" if suffix == ".json" else ""


def _label_of(text: str, suffix: str) -> Label | None:
    value: Any = text
    try:
        if suffix == ".json":
            content = json.loads(text)
            value = next((content[key] for key in LABEL_KEYS if key in content), None)
    except (ValueError, TypeError, RecursionError):
        return None
    if isinstance(value, str):
        return parse_label(value) if value else None
    if isinstance(value, bool | float):
        return json.dumps(value)
    return value if isinstance(value, int) else None
