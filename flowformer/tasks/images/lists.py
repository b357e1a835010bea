"""Lists of labelled images: labels.csv, labels.tsv and the like."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from flowformer.common.errors import DataError
from flowformer.tasks.encodings import open_text
from flowformer.tasks.images.shards import Label, parse_label

_NAME_COLUMNS = ("name", "file", "filename", "image", "imageid")
_BOXES = "predictionstring"  # Kaggle's column: the class, then boxes
_CLASS_COLUMNS = ("class", "label", "wnid", "synset", "index", _BOXES)


def read_list(path: Path) -> dict[str, Label]:
    """Classes by name of file, with or without its suffix: of columns with a header, or else of the first two.

    A class is the whole cell, spaces included; in Kaggle's column ``PredictionString`` it is the first word.

    Raises:
        DataError: for a file that cannot be read or is not text, a line without a name or a class, and a file that has
            two classes.
    """
    try:
        with open_text(path, newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", skipinitialspace=True)
            lines = [(reader.line_num, row) for row in reader if any(row)]
    except csv.Error as error:
        raise DataError(f"{path}: cannot read the table: {error}") from error
    header = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    name_at, class_at = (
        next((header.index(name) for name in known if name in header), -1) for known in (_NAME_COLUMNS, _CLASS_COLUMNS)
    )
    boxes = class_at >= 0 and header[class_at] == _BOXES
    if min(name_at, class_at) < 0:
        name_at, class_at = 0, 1
    else:
        del lines[0]
    found: dict[str, Label] = {}
    for number, row in lines:
        cells = [cell.strip() for cell in row]
        if len(cells) <= max(name_at, class_at) or not cells[name_at] or not cells[class_at]:
            raise DataError(
                f"{path}, line {number}: expected a name and a class in each line, got {row}{_hint(path, row)}"
            )
        label = parse_label(cells[class_at].split()[0] if boxes else cells[class_at])
        if found.setdefault(cells[name_at], label) != label:
            before = found[cells[name_at]]
            raise DataError(
                f"{path}, line {number}: {cells[name_at]!r} is of class {label!r}, but was of {before!r} before"
            )
    return found


def _hint(path: Path, row: Sequence[str]) -> str:
    wanted, other = ("tabs", ",") if path.suffix.lower() == ".tsv" else ("commas", "\t")
    for separator in (other, ";"):
        if len(row) == 1 and separator in row[0]:
            return f"; columns must be separated by {wanted}, not {separator!r}"
    return ""
