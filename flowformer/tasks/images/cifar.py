"""CIFAR-10: 60,000 images of 32 x 32 pixels in ten classes (Krizhevsky, 2009), in all forms it is distributed in."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.downloads import DATASETS, data_folder, describe_missing, is_here
from flowformer.tasks.images.array_pickles import load_arrays
from flowformer.tasks.images.decoding import UnreadableImage, decode

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32  # pixels
_DATASET = DATASETS["cifar10"]
LICENCE = _DATASET.licence

_RECORD_BYTES = 1 + 3 * SIDE * SIDE  # a label, then the red, the green and the blue plane, row by row
_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST_BATCH = "test_batch"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MOST_BYTES = 2**31  # of an archive's files together; CIFAR-10 is a tenth of that
_DAMAGE = (
    OSError,
    EOFError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    RuntimeError,
)

Files = Mapping[str, Callable[[], bytes]]  # by path, what reads them


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size with the indices of their classes.

    Attributes:
        images: (n, height, width, channels) uint8.
        labels: (n,) int64.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def subset(self, indices: np.ndarray) -> LabelledImages:
        """Return the images at ``indices``, in that order."""
        return LabelledImages(self.images[indices], self.labels[indices])


def locate(path: Path | None) -> Path:
    """Return the path itself, or without one the archive of CIFAR-10 in the cache.

    Raises:
        DataError: if it is not there; the message says how to get it.
    """
    if path is not None:
        return path
    folder = data_folder(_DATASET.folder)
    if not is_here(_DATASET):
        raise DataError(describe_missing(_DATASET, _DATASET.archive, [folder], flag="--data"))
    return folder / _DATASET.archive


def is_located(path: Path | None) -> bool:
    """Return whether :func:`locate` finds something, which is not looked into."""
    return is_here(_DATASET) if path is None else path.exists()


def read_cifar10(path: Path) -> tuple[LabelledImages, LabelledImages | None]:
    """Read CIFAR-10, or a part of it.

    Args:
        path: A folder, or an archive (zip, tar, tar.gz) of one, or the folder of an archive. It holds the binary form
            (``data_batch_1.bin`` to ``_5.bin``, ``test_batch.bin``), the Python form (the same names without ``.bin``),
            or pictures, JPEG or PNG, in folders named by class: ``train/airplane/0000.png``, ``test/...``, or without
            ``train``.

    Returns:
        The training set and the test set, the latter ``None`` where there is none.

    Raises:
        DataError: for a path that is not there, holds none of these forms, or holds a file that is damaged.
    """
    files = _list_files(path)
    by_name = {PurePosixPath(name).name: name for name in files}
    for suffix, read in ((".bin", _read_binary), ("", _read_pickle)):
        parts = []
        for batches in (_TRAIN_BATCHES, (_TEST_BATCH,)):
            names = [by_name[batch + suffix] for batch in batches if batch + suffix in by_name]
            parts.append(_join([read(f"{path}: {name}", files[name]()) for name in names]) if names else None)
        if parts[0] is not None:
            return parts[0], parts[1]
    train, test = _read_pictures(path, files)
    if train is None:
        archives = [path / name for name in files if name.endswith(_ARCHIVE_SUFFIXES)]
        if path.is_dir() and len(archives) == 1:
            return read_cifar10(archives[0])
        raise DataError(
            f"{path} does not contain CIFAR-10: expected data_batch_1.bin etc., data_batch_1 etc. (Python), or "
            f"images in folders named {', '.join(CLASSES)}, optionally within train and test"
        )
    return train, test


def _list_files(path: Path) -> Files:
    if path.is_dir():
        found = sorted(one for one in path.rglob("*") if one.is_file())
        return {one.relative_to(path).as_posix(): partial(_read_file, one) for one in found}
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    try:
        if zipfile.is_zipfile(path):
            return _list_zip(path)
        if tarfile.is_tarfile(path):
            return _read_tar(path)
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged archive ({error})") from error
    raise DataError(f"{path}: expected a folder, or an archive: zip, tar or tar.gz")


def _read(origin: object, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except _DAMAGE as error:
        raise DataError(f"{origin}: cannot be read ({error})") from error


def _read_file(path: Path) -> bytes:
    return _read(path, lambda: _check_total(path, path.stat().st_size) or path.read_bytes())


def _list_zip(path: Path) -> Files:
    archive = zipfile.ZipFile(path)
    members = [member for member in archive.infolist() if not member.is_dir()]
    _check_total(path, sum(member.file_size for member in members))
    names = sorted({member.filename for member in members})
    return {name: partial(_read, f"{path}: {name}", partial(archive.read, name)) for name in names}


def _read_tar(path: Path) -> Files:
    """The files of a tar archive, read at once: in a compressed one each member costs a pass over all before it."""
    total = 0
    data = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if file is not None:
                total += member.size
                _check_total(path, total)
                data[member.name] = file.read()
    return {name: partial(data.__getitem__, name) for name in sorted(data)}


def _check_total(path: Path, total: int) -> None:
    if total > MOST_BYTES:
        raise DataError(f"{path}: files of {total:,} bytes and more, expected CIFAR-10, at most {MOST_BYTES:,} bytes")


def _read_binary(origin: str, data: bytes) -> LabelledImages:
    if not data or len(data) % _RECORD_BYTES:
        raise DataError(f"{origin}: expected records of {_RECORD_BYTES:,} bytes, got {len(data):,} bytes")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, _RECORD_BYTES)
    return _check(origin, records[:, 1:], records[:, 0])


def _read_pickle(origin: str, data: bytes) -> LabelledImages:
    try:
        values = load_arrays(data)
    except Exception as error:  # an unpickler raises whatever broken data lead it to
        raise DataError(f"{origin}: not a batch of CIFAR-10 in its Python form ({error})") from error
    planes, labels = (values.get(name) for name in (b"data", b"labels")) if isinstance(values, dict) else (None, None)
    if not isinstance(planes, np.ndarray) or not isinstance(labels, list | np.ndarray):
        raise DataError(f"{origin}: expected a dictionary with an array {b'data'!r} and a list {b'labels'!r}")
    numbers = [label for label in labels if isinstance(label, int | np.integer)]
    if len(numbers) != len(labels):
        raise DataError(f"{origin}: expected labels that are whole numbers from 0 to 9")
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(CLASSES):
        raise DataError(f"{origin}: expected labels from 0 to 9, got {min(numbers)} to {max(numbers)}")
    return _check(origin, planes, np.array(numbers, dtype=np.int64))


def _check(origin: str, planes: np.ndarray, labels: np.ndarray) -> LabelledImages:
    if planes.shape != (len(labels), _RECORD_BYTES - 1) or planes.dtype != np.uint8:
        raise DataError(f"{origin}: expected {_RECORD_BYTES - 1:,} bytes per image, got {planes.dtype} {planes.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise DataError(f"{origin}: expected labels from 0 to 9, got {labels.min()} to {labels.max()}")
    images = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return LabelledImages(np.ascontiguousarray(images), labels.astype(np.int64))


def _read_pictures(path: Path, files: Files) -> tuple[LabelledImages | None, LabelledImages | None]:
    parts: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "test": ([], [])}
    for name, read in files.items():
        folders = PurePosixPath(name).parts[:-1]
        if not folders or folders[-1] not in CLASSES or not name.lower().endswith(_IMAGE_SUFFIXES):
            continue
        images, labels = parts["test" if "test" in folders[:-1] else "train"]
        images.append(_decode(f"{path}: {name}", read()))
        labels.append(CLASSES.index(folders[-1]))
    sets = [
        LabelledImages(np.stack(images), np.array(labels, dtype=np.int64)) if images else None
        for images, labels in parts.values()
    ]
    return sets[0], sets[1]


def _decode(origin: str, data: bytes) -> np.ndarray:
    try:
        image = np.asarray(decode(data))
    except UnreadableImage as error:
        raise DataError(f"{origin}: {error}") from error
    if image.shape != (SIDE, SIDE, 3):
        raise DataError(f"{origin}: expected {SIDE} x {SIDE} pixels, got {image.shape[1]} x {image.shape[0]}")
    return image


def _join(parts: list[LabelledImages]) -> LabelledImages:
    return LabelledImages(
        np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
    )
