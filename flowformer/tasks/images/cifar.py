"""CIFAR-10: 60,000 pictures of 32 x 32 pixels in ten classes (Krizhevsky, 2009), in the forms it comes in."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from flowformer.common.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32  # pixels
LICENCE = "CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html): no licence is stated."

_RECORD_BYTES = 1 + 3 * SIDE * SIDE  # a label, then the red, the green and the blue plane, row by row
_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST_BATCH = "test_batch"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# What a pickled array of numbers is made of, by the names of NumPy 1 and 2; nothing else is unpickled.
_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}

Files = Mapping[str, Callable[[], bytes]]  # by path, what reads them


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Pictures of one size with the indices of their classes.

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
        """The pictures at ``indices``, in that order."""
        return LabelledImages(self.images[indices], self.labels[indices])


def read_cifar10(path: Path) -> tuple[LabelledImages, LabelledImages | None]:
    """Read CIFAR-10, all of it or a part.

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
            f"{path} holds no CIFAR-10: want data_batch_1.bin and the others, data_batch_1 and the others (Python), or "
            f"pictures in folders named {', '.join(CLASSES)}, maybe within train and test"
        )
    return train, test


def _list_files(path: Path) -> Files:
    if path.is_dir():
        found = sorted(one for one in path.rglob("*") if one.is_file())
        return {one.relative_to(path).as_posix(): one.read_bytes for one in found}
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    try:
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
            return {name: lambda name=name: archive.read(name) for name in names}
        if tarfile.is_tarfile(path):
            # Read at once: in a compressed archive each member costs a pass over all before it.
            with tarfile.open(path) as tar:
                contents = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
                data = {name: file.read() for name, file in contents.items() if file is not None}
            return {name: lambda name=name: data[name] for name in sorted(data)}
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{path}: a damaged archive ({error})") from error
    raise DataError(f"{path}: want a folder, or an archive: zip, tar or tar.gz")


def _read_binary(origin: str, data: bytes) -> LabelledImages:
    if not data or len(data) % _RECORD_BYTES:
        raise DataError(f"{origin}: want records of {_RECORD_BYTES:,} bytes, got {len(data):,} bytes")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, _RECORD_BYTES)
    return _check(origin, records[:, 1:], records[:, 0])


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain values; a pickle may else run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of CIFAR-10")
        return super().find_class(module, name)


def _read_pickle(origin: str, data: bytes) -> LabelledImages:
    try:
        values = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        return _check(origin, np.asarray(values[b"data"]), np.asarray(values[b"labels"]))
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{origin}: not a batch of CIFAR-10 in its Python form ({error})") from error


def _check(origin: str, planes: np.ndarray, labels: np.ndarray) -> LabelledImages:
    if planes.shape != (len(labels), _RECORD_BYTES - 1) or planes.dtype != np.uint8:
        raise DataError(f"{origin}: want {_RECORD_BYTES - 1:,} bytes a picture, got {planes.dtype} {planes.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise DataError(f"{origin}: want labels from 0 to 9, got {labels.min()} to {labels.max()}")
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
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            image = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise DataError(f"{origin}: not a picture, or a damaged one ({error})") from error
    if image.shape != (SIDE, SIDE, 3):
        raise DataError(f"{origin}: want {SIDE} x {SIDE} pixels, got {image.shape[1]} x {image.shape[0]}")
    return image


def _join(parts: list[LabelledImages]) -> LabelledImages:
    return LabelledImages(
        np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
    )
