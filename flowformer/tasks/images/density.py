"""Density of images: a sub-pixel at a time, in bits per dimension.

Source: Zhai et al., "An Attention Free Transformer", 2021, on CIFAR-10 (tables 2 and 3). How an image becomes a
sequence of tokens: :mod:`flowformer.tasks.images.pixels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowformer.common.errors import DataError
from flowformer.tasks.images import cifar
from flowformer.tasks.images.pixels import PixelFormat
from flowformer.tasks.metric import Metric
from flowformer.tasks.protocols import SupportsLoss

# Test bits per dimension of CIFAR-10: Zhai et al., 2021, table 2, and table 3 for the free table of position biases.
PUBLISHED: Mapping[str, float] = {
    "pixelcnn": 3.14,
    "pixelcnn++": 2.92,
    "pixelsnail": 2.85,
    "sparse-transformer": 2.80,
    "image-transformer": 2.90,
    "transformer-12": 2.88,
    "transformer-24": 2.86,
    "aft-local-12": 2.80,
    "aft-local-24": 2.74,
    "aft-local-24-free": 2.84,
    "aft-simple": 2.89,
}
CIFAR10_SIZES = (50_000, 10_000)  # images to train on, and to test with
# Sums of red, green and blue over the images to train on: the means 125.306918046875, 122.950394140625 and
# 113.86538318359375, which many programs subtract, times 50,000 x 1,024.
CIFAR10_SUMS = (6_415_714_204, 6_295_060_180, 5_829_907_619)

BITS_PER_DIMENSION = Metric(
    "bits per dimension", "loss", shown=lambda nats: nats / math.log(2), higher_is_better=False, digits=3
)


def augment(image: np.ndarray, *, flip: bool, shift: int, levels: int, generator: np.random.Generator) -> np.ndarray:
    """An image as it is trained on: turned left to right half of the time, then brighter or darker.

    Args:
        image: (height, width, channels) uint8.
        flip: Whether to turn it, with probability 1/2.
        shift: One whole number from -shift to shift, each as likely, is added to all sub-pixels.
        levels: Results are clipped to 0 and levels - 1.
        generator: Of the random numbers.

    Returns:
        Likewise.
    """
    if flip and generator.random() < 0.5:
        image = image[:, ::-1]
    if shift:
        moved = image.astype(np.int64) + generator.integers(-shift, shift, endpoint=True)
        image = moved.clip(0, levels - 1).astype(np.uint8)
    return image


@dataclass(frozen=True, eq=False)
class PixelImages(Dataset[np.ndarray]):
    """Images by number; by (number, seed), as they are trained on: with random changes that are the seed's.

    Attributes:
        images: (n, height, width, channels) uint8, below ``levels``.
        levels: Values that a sub-pixel has.
        flip: As in :func:`augment`.
        shift: As in :func:`augment`.
    """

    images: np.ndarray
    levels: int = 256
    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        """Refuse images that are none."""
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or not len(self.images):
            raise ValueError(
                f"images must be (n, height, width, channels) of uint8, got {self.images.dtype} {self.images.shape}"
            )
        if (brightest := int(self.images.max())) >= self.levels:
            raise ValueError(f"sub-pixels must be below {self.levels}, got {brightest}")
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0, got {self.shift}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, Any]) -> np.ndarray:
        if not isinstance(key, tuple):
            return self.images[key]
        generator = np.random.default_rng(key[1])
        return augment(
            self.images[key[0]], flip=self.flip, shift=self.shift, levels=self.levels, generator=generator
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class DensityTask:
    """Images to model, and others to test the model with, in bits per dimension.

    Attributes:
        name: Of the task.
        train: Images to train on.
        test: Images to test with.
        format: How they are prepared.
        published: Published values of the metric, by method; of CIFAR-10 itself only.
        licence: What is known of the terms of the data.
        source: Where the data came from.
    """

    name: str
    train: PixelImages
    test: PixelImages
    format: PixelFormat
    published: Mapping[str, float] = field(default_factory=dict)
    licence: str = ""
    source: str = ""

    @property
    def metric(self) -> Metric:
        """Bits per dimension: the mean over all sub-pixels of all images."""
        return BITS_PER_DIMENSION

    @property
    def evaluated(self) -> dict[str, PixelImages]:
        """The set evaluated during training."""
        return {"test": self.test}

    def step(self, model: nn.Module | SupportsLoss, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean loss of a batch's sub-pixels, in nats."""
        return {"loss": model.loss(batch["tokens"], batch["targets"])}  # pyright: ignore[reportCallIssue] - nn.Module hides what it offers

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Sub-pixels of a batch."""
        return batch["targets"].numel()


def load_cifar10(path: Path, *, flip: bool = True, shift: int = 10, held_out: float = 0.1) -> DensityTask:
    """CIFAR-10, or other images in one of its forms.

    CIFAR-10 is known by its 50,000 images to train on, the sums of their red, green and blue, and 10,000 images to test
    with; published values stand beside figures on it alone. A copy that JPEG has changed is not CIFAR-10. Without
    images to test with, some of those given are held out, the same ones each time.

    Args:
        path: As in :func:`flowformer.tasks.images.cifar.read_cifar10`.
        flip: As in :func:`augment`.
        shift: As in :func:`augment`.
        held_out: The part that is held out, where there are no images to test with.

    Raises:
        DataError: as :func:`flowformer.tasks.images.cifar.read_cifar10`, or if there is nothing left to train on or to
            test with.
        ValueError: for a ``held_out`` out of range.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be above 0 and below 1, got {held_out}")
    train, test = cifar.read_cifar10(path)
    whole = _is_cifar10(train.images, test)
    name, source = ("cifar10" if whole else "images in a form of CIFAR-10"), str(path)
    if test is None:
        tested = max(1, round(held_out * len(train)))
        source += f"; {tested} of its {len(train)} images held out to test with (no test set of CIFAR-10)"
        images, held = split(train.images, tested)
    else:
        images, held = train.images, test.images
    if not len(images) or not len(held):
        raise DataError(f"{path}: {len(images)} images to train on and {len(held)} to test with are not enough")
    return DensityTask(
        name=name,
        train=PixelImages(images, flip=flip, shift=shift),
        test=PixelImages(held),
        format=PixelFormat(*images.shape[1:]),
        published=PUBLISHED if whole else {},
        licence=cifar.LICENCE,
        source=source,
    )


def _is_cifar10(train: np.ndarray, test: cifar.LabelledImages | None) -> bool:
    if test is None or (len(train), len(test)) != CIFAR10_SIZES:
        return False
    return tuple(train.sum((0, 1, 2), dtype=np.int64).tolist()) == CIFAR10_SUMS


def load_digits(*, flip: bool = False, shift: int = 0) -> DensityTask:
    """Handwritten digits of 8 x 8 pixels and 17 grey levels, which scikit-learn ships; a fifth of them to test with."""
    from sklearn import datasets

    pixels, _ = datasets.load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 8, 8, 1).astype(np.uint8)
    train, test = split(images, len(images) // 5)
    return DensityTask(
        name="digits",
        train=PixelImages(train, 17, flip, shift),
        test=PixelImages(test, 17),
        format=PixelFormat(8, 8, 1, 17),
        licence="UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998): CC BY 4.0",
        source=f"sklearn.datasets.load_digits; {len(test)} of its {len(images)} images held out to test with",
    )


def split(images: np.ndarray, tested: int) -> tuple[np.ndarray, np.ndarray]:
    """Images to train on, and ``tested`` others; which ones is the same each time."""
    order = np.random.default_rng(0).permutation(len(images))
    return images[order[tested:]], images[order[:tested]]
