"""Labelled images in folders by class, parquet files or tar files.

What cannot be read never ends a run: it is left out, named once in the log, and kept in :attr:`ImageFiles.left_out`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from flowformer.common.errors import DataError
from flowformer.tasks.classes import as_number, find_class, order_classes
from flowformer.tasks.fingerprint import hash_values
from flowformer.tasks.images.decoding import SUFFIXES, UnreadableImage, decode
from flowformer.tasks.images.lists import read_list
from flowformer.tasks.images.shards import UNLABELLED, Found, Label, Store, read_parquet, read_tar

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

SPLITS: Mapping[str, str] = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
PLACES = ("", "data", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # below a data set's root, where its splits lie
WANTED = (
    "expected folders of images by class (CLASS/IMAGE, or train/CLASS/IMAGE and val/CLASS/IMAGE; a val of images "
    "alone requires a labels.tsv or labels.csv of names and classes), parquet files with columns image and label, or "
    "tar files of KEY.jpg and KEY.cls; the names of files, or of their folders, contain train or validation"
)
_IGNORED = ("thumbs.db", "desktop.ini")
_TRIES = 1_000  # images, before a set counts as unreadable
_NAMED = 20  # what is left out, in one message


class EncodedImage(NamedTuple):
    """An encoded image: bytes, class index, and name."""

    data: bytes
    label: int
    name: str


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset[EncodedImage]):
    """Labelled images that are read on access; can be pickled.

    Attributes:
        origin: Where they are.
        form: How: "folders by class", "a folder and a list of labels", "parquet files" or "tar files".
        store: The encoded images.
        rows: (n,) int64, which of the store's images these are.
        labels: (n,) int64, indices of classes.
        classes: Names of the classes, sorted; of numbered ones what the source calls them, or else their numbers.
        numbers: Number of each class in the source; None where it has names only.
        left_out: What is not among the images or could not be read: why, by name.
    """

    origin: str
    form: str
    store: Store
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    numbers: tuple[int, ...] | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def numbered(self) -> bool:
        """Whether the source has numbers of classes, not names."""
        return self.numbers is not None

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        present = len(np.unique(self.labels))
        return f"{self.origin}: {len(self):,} images of {present:,} classes in {self.form}"

    def __getitem__(self, index: int) -> EncodedImage:
        return EncodedImage(self.store.read(int(self.rows[index])), int(self.labels[index]), self.name(index))

    def name(self, index: int) -> str:
        """Return the name of an image: its path below the origin, or its file and its position in it."""
        return self.store.name(int(self.rows[index]))

    def fingerprint(self) -> str:
        """Return a hash of names, classes and sizes in bytes, without reading the images."""
        classes = [self.classes[label] for label in self.labels]
        return hash_values(zip(map(self.name, range(len(self))), classes, self.store.sizes(self.rows), strict=True))

    def decode(self, index: int) -> Image.Image:
        """Decode an image, see :func:`decode`.

        Raises:
            UnreadableImage: where it cannot be read, whatever the reason.
        """
        try:
            data = self.store.read(int(self.rows[index]))
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error
        return decode(data)

    def leave_out(self, name: str, reason: str) -> None:
        """Record and log once that an image cannot be read."""
        if name not in self.left_out:
            self.left_out[name] = reason
            logger.warning("%s: %s is left out: %s (%d so far)", self.origin, name, reason, len(self.left_out))

    def check(self) -> ImageFiles:
        """Raise unless at least one of the first thousand images can be read.

        Raises:
            DataError: if there is none.
        """
        why = "there is none"
        for index in np.unique(np.linspace(0, max(len(self) - 1, 0), min(len(self), _TRIES)).astype(int)):
            reason = self._reason(int(index))
            if reason is None:
                return self
            why = f"{self.name(int(index))}: {reason}"
        raise DataError(f"{self.origin}: none of {len(self):,} images can be read; {why}")

    def _reason(self, index: int) -> str | None:
        """Why an image cannot be read; None where it can."""
        try:
            self.decode(index)
        except UnreadableImage as error:
            return str(error)
        return None

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageFiles:
        """Return the images at ``indices``, in that order; both share the record of unreadable images."""
        indices = np.asarray(indices, dtype=np.int64)
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def with_classes(self, classes: Sequence[str]) -> ImageFiles:
        """Return the same images with the class indices of another set.

        Raises:
            DataError: for images of a class that is not among them.
        """
        if tuple(classes) == self.classes:
            return self
        index = {name: number for number, name in enumerate(classes)}
        found = [find_class(name, index) for name in self.classes]
        unknown = [self.classes[label] for label in np.unique(self.labels) if found[label] is None]
        if unknown:
            some = ", ".join(repr(name) for name in unknown[:5])
            raise DataError(f"{self.origin}: unknown classes {some}{', ...' if len(unknown) > 5 else ''}")
        numbers = np.array([-1 if number is None else number for number in found], dtype=np.int64)
        return replace(self, labels=numbers[self.labels], classes=tuple(classes), numbers=None)


class FileImages:
    """Images stored as files.

    Args:
        root: The folder that names are below.
        names: Of the files, relative to the root.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        # One array: a list of a million strings is copied, bit by bit, into every process that reads it.
        self.names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path below the root."""
        return os.fsdecode(bytes(self.names[index]))

    def read(self, index: int) -> bytes:
        """Read the encoded image; raises OSError."""
        return (self.root / self.name(index)).read_bytes()

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Return the sizes of images in bytes."""
        return np.array([(self.root / self.name(int(row))).stat().st_size for row in rows], dtype=np.int64)


def find_images(path: str | Path) -> dict[str, ImageFiles]:
    """Find labelled images in any of the supported forms.

    Args:
        path: A folder: of class folders; of ``train`` and ``val`` (or ``validation``, ``test``) with class folders in
            them; of parquet files; of tar files; of train and val with such files; the root of ImageNet as Kaggle has
            it. Or one parquet or tar file.

    Returns:
        Sets by split: "train", "validation", "test"; or "all" if the split is not given.

    Raises:
        DataError: for none of these forms, or more than one; the message lists the expected ones.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} not found; {WANTED}")
    if path.is_file():
        readers = [(form, read) for form, (suffix, read) in _SHARDS.items() if path.suffix == suffix]
        if not readers:
            raise DataError(f"{path} is a file; {WANTED}. Archives of other kinds must be unpacked")
        form, read = readers[0]
        return _logged({"all": _labelled(str(path), form, read([path]))})
    places = [place for below in PLACES if (place := path / below).is_dir()]
    for place in places:
        forms = {form: files for form, (suffix, _) in _SHARDS.items() if (files := _shards(place, suffix))}
        folders = _split_folders(place)
        if len(forms) + bool(folders) > 1:
            kinds = [*forms, *(["folders by class"] if folders else [])]
            raise DataError(f"{place} contains {' and '.join(kinds)}: pass the folder of one of them")
        if folders:
            return _logged({split: _read_split(folder) for split, folder in folders.items()})
        for form, files in forms.items():
            return _logged(_read_shards(place, form, files))
    if _is_labelled(path):
        return _logged({"all": _read_split(path)})
    raise DataError(f"{path} contains no labelled images; {WANTED}")


_SHARDS = {"parquet files": (".parquet", read_parquet), "tar files": (".tar", read_tar)}


def _logged(sets: dict[str, ImageFiles]) -> dict[str, ImageFiles]:
    for files in sets.values():
        if files.left_out:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(files.left_out.items())[:_NAMED])
            more = f"; and {len(files.left_out) - _NAMED} more" if len(files.left_out) > _NAMED else ""
            logger.warning("%s: left out are %s%s", files.origin, some, more)
    return sets


def _shards(place: Path, suffix: str) -> list[Path]:
    files = [file for pattern in ("*", "*/*") for file in place.glob(pattern + suffix) if file.is_file()]
    archives = [file.name for file in files if file.name.startswith("ILSVRC2012_")]
    if archives:
        raise DataError(f"{place}: {archives[0]} is a published archive of ImageNet: unpack it; {WANTED}")
    return sorted(file for file in files if not file.name.startswith("."))


def _split_of(name: str) -> str | None:
    return next((SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), None)


def _read_shards(place: Path, form: str, files: Sequence[Path]) -> dict[str, ImageFiles]:
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.stem) or SPLITS.get(file.parent.name.lower(), "all"), []).append(file)
    if len(by_split) > 1 and "all" in by_split:
        raise DataError(f"{by_split['all'][0]}: the name does not contain train or validation")
    sets = {}
    for split, shards in _in_order(by_split).items():
        found = _SHARDS[form][1](shards)
        if set(found.labels) == {UNLABELLED}:
            logger.info("%s: the %s set has no labels, and is not used", place, split)
            continue
        sets[split] = _labelled(f"{place}, {split}", form, found)
    if not sets:
        raise DataError(f"{place}: no image has a label")
    return sets


def _labelled(origin: str, form: str, found: Found) -> ImageFiles:
    """Number the classes."""
    labels = found.labels
    if len({isinstance(label, int) for label in labels}) > 1:
        if any(as_number(str(label)) is None for label in labels):
            number = next(label for label in labels if isinstance(label, int))
            name = next(label for label in labels if not isinstance(label, int))
            raise DataError(f"{origin}: labels are partly numbers and partly names: {number} and {name!r}")
        labels = [str(label) for label in labels]  # decimals, or with leading zeros
    numbers: tuple[int, ...] | None = None
    if labels and isinstance(labels[0], int):
        numbers = tuple(sorted({int(label) for label in labels}))
        if found.class_names:
            if numbers[0] < 0 or numbers[-1] >= len(found.class_names):
                span = f"labels from {numbers[0]} to {numbers[-1]}"
                raise DataError(f"{origin}: {span} for {len(found.class_names)} classes")
            numbers = tuple(range(len(found.class_names)))
    classes = order_classes(map(str, labels)) if numbers is None else found.class_names or tuple(map(str, numbers))
    index = {name: place for place, name in enumerate(numbers or classes)}
    places = np.array([index[label] for label in labels], dtype=np.int64)
    rows = np.arange(len(found.store), dtype=np.int64)
    return ImageFiles(origin, form, found.store, rows, places, classes, numbers, found.left_out)


def read_folder(path: str | Path) -> ImageFiles:
    """Read a folder of class folders: ``CLASS/IMAGE``, including nested folders.

    Hidden files are passed over; what is no image by its name is left out by name.

    Raises:
        DataError: where there are no class folders, one only, or one without images.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; expected one with a folder for each class, CLASS/IMAGE")
    files = _read_class_folders(path)
    if len(files.classes) == 1:
        raise DataError(f"{path} has only one class folder, {files.classes[0]!r}; classification requires two classes")
    return _logged({"all": files})["all"]


def _read_class_folders(root: Path) -> ImageFiles:
    folders = [entry for entry in _visible(root) if entry.is_dir()]
    if not folders:
        raise DataError(f"{root} has no class folders; expected a folder for each class, CLASS/IMAGE")
    left_out = {entry.name: "beside the class folders" for entry in _visible(root) if _is_image(entry.name)}
    folders = [entry for entry in folders if entry.name not in left_out]
    names: list[str] = []
    labels: list[Label] = []
    for folder in folders:
        before = len(names)
        for name in _walk(root, folder.name):
            if _is_image(name):
                names.append(name)
            else:
                left_out[name] = "no image by its name"
        labels += [folder.name] * (len(names) - before)
        if len(names) == before:
            raise DataError(f"{root}: class folder {folder.name!r} contains no images ({', '.join(SUFFIXES)})")
    return _labelled(str(root), "folders by class", Found(FileImages(root, names), labels, None, left_out))


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        shown = [one for one in entries if not one.name.startswith(".") and one.name.lower() not in _IGNORED]
    return sorted(shown, key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _walk(root: Path, below: str) -> Iterator[str]:
    """Paths of files; a folder that is called like an image counts as one, and will be named as unreadable."""
    for entry in _visible(root / below):
        name = f"{below}/{entry.name}"
        if entry.is_dir() and not _is_image(name):
            yield from _walk(root, name)
        else:
            yield name


def _split_folders(place: Path) -> dict[str, Path]:
    """Folders of images by split; none where there is neither a train nor a validation set.

    What is in a folder decides, not its name: beside class folders, images right within "train" are those of a class.
    """
    folders = [Path(entry.path) for entry in _visible(place) if entry.is_dir() and not _is_image(entry.name)]
    named = [folder for folder in folders if folder.name.lower() in SPLITS and _has_images(folder, flat=True)]
    others = [folder.name for folder in folders if folder not in named and _has_images(folder, flat=True)]
    if others and not any(map(_is_labelled, named)):
        return {}
    found: dict[str, Path] = {}
    for folder in named:
        split = SPLITS[folder.name.lower()]
        if split in found:
            raise DataError(f"{place} contains two folders for {split}: {found[split].name} and {folder.name}")
        found[split] = folder
    if "train" not in found and "validation" not in found:
        return {}
    if others:
        _check_others(place, found, others)
    if "test" in found and not _is_labelled(found["test"]):
        logger.info("%s has no labels, and is not used", found.pop("test"))
    return _in_order(found)


def _check_others(place: Path, found: Mapping[str, Path], others: Sequence[str]) -> None:
    """Refuse what may be a set or a class; log what stands beside sets, and is not used."""
    listed = ", ".join(map(repr, others[:_NAMED])) + (", ..." if len(others) > _NAMED else "")
    if len(found) == 1:
        (folder,) = found.values()
        raise DataError(
            f"{place}: {folder.name!r} is either a set, for it contains class folders or a list, or a class beside "
            f"{listed}: move the class folders out of {folder.name!r} or the other folders elsewhere"
        )
    logger.warning(
        "%s: beside %s, the images in %s are not used", place, ", ".join(one.name for one in found.values()), listed
    )


def _in_order(by_split: Mapping[str, Any]) -> dict[str, Any]:
    return {split: by_split[split] for split in (*dict.fromkeys(SPLITS.values()), "all") if split in by_split}


def _has_images(folder: Path, *, flat: bool) -> bool:
    entries = _visible(folder)
    if flat and any(_is_image(entry.name) for entry in entries):
        return True
    return any(any(map(_is_image, _walk(folder, entry.name))) for entry in entries if entry.is_dir())


def _is_labelled(folder: Path) -> bool:
    return _has_images(folder, flat=_labels_file(folder) is not None)


def _read_split(folder: Path) -> ImageFiles:
    if _has_images(folder, flat=False):
        return _read_class_folders(folder)
    path = _labels_file(folder)
    if path is None:
        raise DataError(
            f"{folder} contains images but no class folders; add a labels.tsv or labels.csv with the name "
            "and class of each image"
        )
    return _read_flat(folder, path)


def _labels_file(folder: Path) -> Path | None:
    beside = [folder.parent / f"{folder.name}{rest}" for rest in ("_labels.tsv", "_labels.csv", ".tsv", ".csv")]
    kaggle = [
        above / "LOC_val_solution.csv" for above in (folder, *folder.parents[:4]) if folder.name.lower() in SPLITS
    ]
    candidates = [folder / "labels.tsv", folder / "labels.csv", *beside, *kaggle]
    return next((path for path in candidates if path.is_file()), None)


def _read_flat(folder: Path, path: Path) -> ImageFiles:
    label_of = read_list(path)
    names: list[str] = []
    labels: list[Label] = []
    left_out: dict[str, str] = {}
    for entry in _visible(folder):
        if not _is_image(entry.name):
            continue
        label = label_of.get(entry.name, label_of.get(Path(entry.name).stem))
        if label is None:
            left_out[entry.name] = f"not in {path.name}"
            continue
        names.append(entry.name)
        labels.append(label)
    if not names:
        raise DataError(f"{path} lists none of the images in {folder}")
    found = Found(FileImages(folder, names), labels, None, left_out)
    return _labelled(str(folder), "a folder and a list of labels", found)
