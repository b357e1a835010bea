"""Stratified splits of labelled data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.classes import find_class

SPLIT_SEED = 0  # of a test part that we hold out ourselves: the same for all runs


def stratify(labels: np.ndarray, classes: Sequence[str], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose examples to hold out, the same fraction of each class.

    Args:
        labels: (n,) indices of classes.
        classes: Names of the classes.
        fraction: Of each class to set aside, in (0, 1); at least one example is, and at least one stays.
        seed: Decides which.

    Returns:
        Indices of those that stay and of those set aside, each in ascending order.

    Raises:
        ValueError: `fraction` is out of range, or a class has fewer than two examples.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be above 0 and below 1, got {fraction}")
    generator = np.random.default_rng(seed)
    held: list[int] = []
    for index, name in enumerate(classes):
        members = np.flatnonzero(labels == index)
        if len(members) < 2:
            raise ValueError(f"class {name!r} has {len(members)} training examples; a split requires at least 2")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held.extend(generator.permutation(members)[:count])
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def find_classes(names: Sequence[str], classes: Sequence[str], source: str) -> np.ndarray:
    """Return the index of each name among classes: (names,) int64.

    Args:
        names: Classes of the data.
        classes: Classes of a model.
        source: Where the data came from, for the message.

    Raises:
        DataError: for a name that the model does not have.
    """
    index = {name: number for number, name in enumerate(classes)}
    found = {name: find_class(name, index) for name in names}
    if unknown := [name for name in names if found[name] is None]:
        some, known = (", ".join(map(repr, some)) for some in (unknown[:5], classes[:20]))
        raise DataError(f"{source}: classes that the run does not have: {some}; it has {known}")
    return np.array([found[name] for name in names], dtype=np.int64)
