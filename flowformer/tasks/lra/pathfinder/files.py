"""Pathfinder as sequences of pixels: images that are generated once, or read from the folders of Long Range Arena."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from flowformer.common.errors import DataError, describe
from flowformer.common.processes import map_in_order
from flowformer.common.progress import progress_bar
from flowformer.tasks.images.decoding import UnreadableImage, decode
from flowformer.tasks.lra.pathfinder.drawing import BLOCK_IMAGES, VERSION, draw_block
from flowformer.tasks.lra.pathfinder.kinds import Kind, find_kind
from flowformer.tasks.lra.sequences import Splits, TokenSequences, open_sequences, write_sequences
from flowformer.tasks.token_cache import keep

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

logger = logging.getLogger(__name__)

NUM_IMAGES = 200_000  # of each kind, in the release of Long Range Arena
# Folders of the release, in pathfinder32, pathfinder128, ...
FOLDERS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}
_NAME = "images"
_METADATA = re.compile(r"\d+\.(npy|txt)")
_NPY_START = b"\x93NUMPY"
_NO_PICKLE = "Pickled objects are not read, for they could run any program"


class Row(NamedTuple):
    """A line of metadata: an image's file, its label, and where it is written."""

    path: Path
    label: int
    source: str


def load(
    difficulty: str = "hard",
    side: int = 32,
    *,
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    workers: int = 1,
    console: Console | None = None,
) -> Splits:
    """Return Pathfinder images, generated the first time and kept in the cache.

    Args:
        difficulty: "easy", "intermediate" or "hard": long contours of 6, 9 or 14 dashes.
        side: Pixels along each side: 32, or 128 for Path-X.
        num_images: Of training, validation and test images together.
        seed: Decides the images. They do not depend on the number of processes, and fewer images are the first ones of
            more.
        workers: Number of processes that generate.
        console: Where progress is shown.

    Returns:
        80, 10 and 10 percent of the images, each a sequence of side * side pixels (uint8, row by row) with class 0
        ("different") or 1 ("connected").

    Raises:
        DataError: for an unknown difficulty or size, fewer than 10 images, and where the cache cannot be written to.
    """
    kind = find_kind(side, difficulty)
    if num_images < 10 or workers < 1 or seed < 0:
        raise DataError(
            f"Pathfinder takes at least 10 images, 1 worker and a seed of 0, got {num_images:,}, {workers} and {seed}"
        )

    def build(folder: Path) -> None:
        blocks = map_in_order(partial(_draw, kind, seed), range(-(-num_images // BLOCK_IMAGES)), workers)
        title = f"Pathfinder {side} x {side}, {difficulty}"
        with closing(blocks), progress_bar(title, num_images, console) as advance:
            images = islice((image for block in blocks for image in zip(*block, strict=True)), num_images)
            write_sequences(folder, _NAME, _counted(images, advance), np.uint8)

    options = {"kind": asdict(kind), "images": num_images, "seed": seed, "version": VERSION}
    return split(open_sequences(keep(f"pathfinder{side}-{difficulty}", None, [], build, options=options), _NAME))


def load_official(
    data_dir: str | Path, difficulty: str = "hard", side: int = 32, *, console: Console | None = None
) -> Splits:
    """Return Pathfinder images of the release of Long Range Arena, read the first time and kept in the cache.

    An image that is empty or damaged is skipped, as in the published pipeline, and their number logged.

    Args:
        data_dir: The folder that has ``pathfinder32`` in it, that folder, or its ``curv_...``, with ``imgs`` and
            ``metadata``.
        difficulty: As in :func:`load`.
        side: As in :func:`load`.
        console: Where progress is shown.

    Returns:
        As :func:`load`, in the order of the metadata.

    Raises:
        DataError: where folders or files are missing, metadata are not readable without pickle, have labels other than
            0 and 1, list an image twice, or an image has another size. The message names the file.
    """
    find_kind(side, difficulty)
    folder = _find_folder(Path(data_dir), side, difficulty)
    try:
        files = sorted(
            (path for path in (folder / "metadata").iterdir() if _METADATA.fullmatch(path.name)),
            key=lambda path: (int(path.stem), path.name),
        )
        folders = sorted(path for path in (folder / "imgs").iterdir() if path.is_dir())
    except OSError as error:
        raise DataError(
            f"{describe(error)}; expected the folders imgs and metadata of Pathfinder in {folder}"
        ) from error
    if not files:
        raise DataError(f"{folder / 'metadata'}: no metadata, expected files 0.npy, 1.npy, ...")

    def build(place: Path) -> None:
        rows = [row for file in files for row in read_metadata(file, folder)]
        _check_once(rows)
        with progress_bar(f"Pathfinder {side} x {side}, {difficulty}", len(rows), console) as advance:
            count = write_sequences(place, _NAME, _read_images(_counted(rows, advance), side), np.uint8)
        if skipped := len(rows) - count:
            logger.warning("%s: %d of %d images are empty or damaged and were skipped", folder, skipped, len(rows))
        if count < 10:
            raise DataError(f"{folder}: {count} readable images, expected at least 10")

    options = {"side": side}
    place = keep(f"pathfinder{side}-{difficulty}-official", folder, [*files, *folders], build, options=options)
    return split(open_sequences(place, _NAME))


def split(images: TokenSequences) -> Splits:
    """Return the first 80 percent of the images, the next 10 and the last 10."""
    held = len(images) // 10
    bounds = (0, len(images) - 2 * held, len(images) - held, len(images))
    return Splits(*(images.subset(np.arange(*part)) for part in pairwise(bounds)))


def read_metadata(path: Path, folder: Path) -> list[Row]:
    """Read a file of metadata: subfolder, file, number, label, and parameters of each image.

    It is a NumPy array of strings, or text, as in the release: one image a line, with spaces between columns.

    Args:
        path: The file.
        folder: The folder that subfolders are in.

    Raises:
        DataError: as :func:`load_official`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(describe(error)) from error
    rows = _read_array(path) if data.startswith(_NPY_START) else _read_lines(path, data)
    return [_parse(row, f"{path}, row {number}", folder) for number, row in enumerate(rows, 1)]


def _draw(kind: Kind, seed: int, block: int) -> tuple[np.ndarray, list[int]]:
    drawings = draw_block(kind, seed, block)
    return drawings.pixels().reshape(BLOCK_IMAGES, -1), drawings.labels.tolist()


def _counted(items: Iterable[T], advance: Callable[[int], None]) -> Iterator[T]:
    """The items, each of which moves the bar once the next is asked for."""
    for item in items:
        yield item
        advance(1)


def _find_folder(data_dir: Path, side: int, difficulty: str) -> Path:
    name = FOLDERS[difficulty]
    places = [data_dir / f"pathfinder{side}" / name, data_dir / name]
    if data_dir.name == name:
        places.append(data_dir)
    for place in places:
        if place.is_dir():
            return place
    raise DataError(
        f"Pathfinder {side} x {side}, {difficulty}: none of the folders {', '.join(map(str, places))} is there; "
        "expected those of lra_release (pathfinder32/curv_contour_length_14, ...)"
    )


def _read_array(path: Path) -> list[list[str]]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: {error}; expected an array of strings. {_NO_PICKLE}") from error
    if array.ndim != 2 or array.dtype.kind not in "US":
        raise DataError(f"{path}: expected an array of strings with two axes, got {array.dtype} {array.shape}")
    return array.astype(str).tolist()


def _read_lines(path: Path, data: bytes) -> list[list[str]]:
    try:
        return [line.split() for line in data.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: neither an array of NumPy nor text ({error}). {_NO_PICKLE}") from error


def _parse(row: list[str], source: str, folder: Path) -> Row:
    if len(row) < 4:
        raise DataError(f"{source}: {len(row)} columns, expected subfolder, file, number and label, got {row}")
    subfolder, file, _, label = row[:4]
    if label not in ("0", "1"):
        raise DataError(f"{source}: the label is {label!r}, expected 0 or 1")
    inside = PurePosixPath(subfolder) / file
    if inside.is_absolute() or ".." in inside.parts or "\\" in str(inside):
        raise DataError(f"{source}: {str(inside)!r} is no file in {folder}")
    return Row(folder / inside, int(label), source)


def _check_once(rows: list[Row]) -> None:
    seen: dict[Path, Row] = {}
    for row in rows:
        if other := seen.get(row.path):
            raise DataError(f"{row.source}: {row.path} is listed before, in {other.source}")
        seen[row.path] = row


def _read_images(rows: Iterable[Row], side: int) -> Iterator[tuple[np.ndarray, int]]:
    for row in rows:
        try:
            image = decode(row.path.read_bytes())
        except UnreadableImage as error:
            logger.debug("%s: %s", row.path, error)
            continue
        except OSError as error:
            raise DataError(f"{describe(error)}; listed in {row.source}") from error
        if image.size != (side, side):
            raise DataError(f"{row.path}: {image.width} x {image.height} pixels, expected {side} x {side}")
        yield np.asarray(image.convert("L")).reshape(-1), row.label
