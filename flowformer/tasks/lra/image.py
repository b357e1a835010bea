"""Image of Long Range Arena: CIFAR-10 in grey, row by row, a sequence of 1,024 levels in ten classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from flowformer.tasks.images import cifar
from flowformer.tasks.images.cifar import LabelledImages
from flowformer.tasks.lra.sequences import TokenSequences

CLASSES = cifar.CLASSES
LENGTH = cifar.SIDE**2
VOCAB_SIZE = 256  # levels of grey; no token is padding, for all sequences are of one length
SIZES = (45_000, 5_000, 10_000)  # of the published training, validation and test set

# Of tf.image.rgb_to_grayscale.
_WEIGHTS = np.array((0.2989, 0.5870, 0.1140), np.float32)
# convert_image_dtype of TensorFlow: to floats by one factor, and back by another, so that truncation gives the nearest.
_TO_FLOAT, _FROM_FLOAT = np.float32(1 / 255), np.float32(255.5)
_AT_A_TIME = 1_000  # images, of which the floats are in memory
# The first images of the training set in the order of tensorflow_datasets: their numbers in the files, and classes.
_FIRST = (16399, 1680, 47917, 17307, 27051, 48736, 26263, 1456, 19135, 31598, 12970, 4223, 27152, 49635, 4093, 17537)
_FIRST_LABELS = (7, 8, 4, 4, 6, 5, 2, 9, 6, 6, 9, 9, 3, 0, 8, 7)


def load(path: str | Path) -> tuple[TokenSequences, TokenSequences | None, TokenSequences | None]:
    """Load CIFAR-10 as sequences of grey levels.

    Args:
        path: A folder or an archive, in any form that :func:`flowformer.tasks.images.cifar.read_cifar10` reads.

    Returns:
        The training, validation and test set, each sequence (1024,) uint8, classes :data:`CLASSES`. The validation
        set is that of the published pipeline, ``train[90%:]`` of tensorflow_datasets, where the training images are
        all 50,000 in the order of the published files; otherwise it is ``None``, and the training set has all images.
        The test set is ``None`` where there is none.

    Raises:
        DataError: for a path that is not there, holds no CIFAR-10, or holds a file that is damaged.
    """
    train, test = cifar.read_cifar10(Path(path))
    sequences = _flatten(train)
    split = split_as_published(train.labels)
    return (
        sequences if split is None else sequences.subset(split[0]),
        None if split is None else sequences.subset(split[1]),
        None if test is None else _flatten(test),
    )


def split_as_published(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return which images of the training set the published pipeline trains on and which it validates on.

    It is the split ``train[:90%]`` and ``train[90%:]`` of ``cifar10`` in tensorflow_datasets, version 3.0.2, whose
    order is that of MD5 hashes of the images' numbers.

    Args:
        labels: (n,) indices of classes, in the order of the published files.

    Returns:
        Indices of 45,000 and of 5,000 images, in the order of tensorflow_datasets. ``None`` where there are not 50,000,
        or the classes of the first ones tell that they are in another order.
    """
    if len(labels) != sum(SIZES[:2]) or labels[list(_FIRST)].tolist() != list(_FIRST_LABELS):
        return None
    order = np.array(_order(len(labels)))
    return order[: SIZES[0]], order[SIZES[0] :]


def _order(count: int) -> list[int]:
    return sorted(range(count), key=lambda number: hashlib.md5(b"train%d" % number, usedforsecurity=False).digest())


def to_grey(images: np.ndarray) -> np.ndarray:
    """Convert images as ``tf.image.rgb_to_grayscale`` does, bit for bit.

    Args:
        images: (..., 3) uint8, red, green and blue.

    Returns:
        (...) uint8.
    """
    # Summed in this order without fused multiplication, all 256**3 colours in images of 32 x 32 come out as in
    # TensorFlow 2.21 on a CPU.
    red, green, blue = (images[..., channel] * _TO_FLOAT * _WEIGHTS[channel] for channel in range(3))
    return ((red + green + blue) * _FROM_FLOAT).astype(np.uint8)


def _flatten(data: LabelledImages) -> TokenSequences:
    grey = [to_grey(data.images[start : start + _AT_A_TIME]) for start in range(0, len(data), _AT_A_TIME)]
    lengths = np.full(len(data), LENGTH, np.int64)
    return TokenSequences.joined(np.concatenate(grey).reshape(-1), lengths, data.labels)
