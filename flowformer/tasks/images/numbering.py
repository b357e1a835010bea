"""Classes of ImageNet-1K, and how numbers and names in data stand for them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.classes import as_number
from flowformer.tasks.images.files import ImageFiles


@cache
def classes() -> tuple[str, ...]:
    """Return the 1,000 classes of ImageNet-1K in order, by their WordNet ids: "n01440764" is class 0."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def choose_classes(train: ImageFiles, own_numbers: bool) -> tuple[str, ...]:
    """Return the classes of a training set: ImageNet-1K's where its names or numbers are those, else its own.

    Args:
        train: The training set.
        own_numbers: Whether numbers without names are classes of their own.
    """
    if train.numbers is None:
        return classes() if set(train.classes) <= set(classes()) else train.classes
    if not _is_unnamed(train):
        return classes() if len(train.classes) == len(classes()) else train.classes
    indices = not own_numbers and 0 <= train.numbers[0] <= train.numbers[-1] < len(classes())
    return classes() if indices else train.classes


def _is_unnamed(files: ImageFiles) -> bool:
    return files.numbers is not None and files.classes == tuple(map(str, files.numbers))


def renumber(files: ImageFiles, names: tuple[str, ...]) -> ImageFiles:
    """Return the same images with indices of the classes named; numbers are such indices unless they are names.

    Raises:
        DataError: for a class that is not among them.
    """
    if files.numbers is None or (_is_unnamed(files) and all(as_number(name) is not None for name in names)):
        return files.with_classes(names)
    present = [files.numbers[label] for label in np.unique(files.labels)]
    if present and not 0 <= present[0] <= present[-1] < len(names):
        span = f"up to {present[-1]}" if present[0] >= 0 else f"from {present[0]} on"
        raise DataError(f"{files.origin}: labels {span} for {len(names)} classes")
    numbers = np.array([number if 0 <= number < len(names) else -1 for number in files.numbers], dtype=np.int64)
    return replace(files, labels=numbers[files.labels], classes=names, numbers=None)
