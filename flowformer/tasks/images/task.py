"""Classification of labelled images: augmentation, loss and metric; CIFAR-10 and digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.tasks.images import cifar
from flowformer.tasks.images.cifar import LabelledImages
from flowformer.tasks.images.format import ImageFormat
from flowformer.tasks.metric import ACCURACY, Metric
from flowformer.tasks.splits import SPLIT_SEED, stratify

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training set, of 1


@dataclass(frozen=True, eq=False)
class ImageTask:
    """A classification problem on images.

    Attributes:
        name: Of the problem.
        train: The training set.
        test: The test set.
        format: How pictures are prepared.
        published: Accuracy in percent by method.
        source: Where the data came from.
        licence: What is known of its terms.
        validation: A set to choose the epoch by; ``None`` for none.
        flip: Mirror half of the pictures in training.
        crop_padding: In training, shift pictures by up to so many pixels, each way.
        label_smoothing: Share of the target that all classes have, in training.
    """

    name: str
    train: Any
    test: Any
    format: ImageFormat
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    validation: Any = None
    flip: bool = False
    crop_padding: int = 0
    label_smoothing: float = 0.0

    @property
    def metric(self) -> Metric:
        """The figure of merit."""
        return ACCURACY

    @property
    def evaluated(self) -> dict[str, Any]:
        """The evaluation sets used during training: test set and validation set, if not empty."""
        sets = {"test": self.test, "validation": self.validation}
        return {name: part for name, part in sets.items() if part is not None and len(part)}

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return mean cross-entropy, and right answers as "accuracy", of a batch, which is augmented in training."""
        x, smoothing = batch["x"], 0.0
        if model.training:
            x, smoothing = self._vary(x), self.label_smoothing
        logits = model(x).float()
        loss = nn.functional.cross_entropy(logits, batch["y"], label_smoothing=smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["y"]).sum()}

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of images in a batch."""
        return len(batch["y"])

    def _vary(self, x: Tensor) -> Tensor:
        if self.crop_padding:
            x = shift_at_random(x, self.crop_padding)
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        return x

    def split_validation(self, fraction: float, seed: int) -> ImageTask:
        """Hold out a stratified part of the training set for validation.

        Raises:
            ValueError: as :func:`flowformer.tasks.splits.stratify`.
        """
        kept, held = stratify(self.train.labels, self.format.classes, fraction, seed)
        return replace(self, train=self.train.subset(kept), validation=self.train.subset(held))


def shift_at_random(x: Tensor, reach: int) -> Tensor:
    """Shift each image randomly by up to ``reach`` pixels on both axes, with zero padding.

    Args:
        x: (batch, channels, height, width).
        reach: In pixels.

    Returns:
        The same shape.
    """
    batch, _, height, width = x.shape
    padded = nn.functional.pad(x, (reach,) * 4)
    down, right = torch.randint(0, 2 * reach + 1, (2, batch, 1), device=x.device)
    rows = down + torch.arange(height, device=x.device)
    columns = right + torch.arange(width, device=x.device)
    number = torch.arange(batch, device=x.device)[:, None, None]
    return padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def load_cifar10(path: Path | None, *, test_fraction: float) -> ImageTask:
    """Load CIFAR-10, or a part of it.

    Args:
        path: As :func:`flowformer.tasks.images.cifar.read_cifar10` takes it; ``None`` for the cache.
        test_fraction: Part of the training set that is held out to test on, where there is no test set.

    Raises:
        DataError: as :func:`flowformer.tasks.images.cifar.read_cifar10`; without a path, if the cache has none.
    """
    path = cifar.locate(path)
    train, test = cifar.read_cifar10(path)
    name, source = "cifar10", str(path)
    if test is None:
        name, source = "cifar10 (a part held out)", f"{path}, without a test set: {test_fraction:g} of it held out"
        train, test = hold_out(train, cifar.CLASSES, test_fraction)
    form = ImageFormat(cifar.CLASSES, cifar.SIDE, 3, CIFAR_MEAN, CIFAR_STD)
    return ImageTask(name, train, test, form, source=source, licence=cifar.LICENCE)


def load_digits(*, test_fraction: float) -> ImageTask:
    """Load scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a part is held out as test set."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = np.rint(pixels / 16 * 255).astype(np.uint8).reshape(-1, 8, 8, 1)  # of 17 levels of grey
    classes = tuple(str(digit) for digit in range(10))
    train, test = hold_out(LabelledImages(images, labels.astype(np.int64)), classes, test_fraction)
    scaled = train.images / 255
    return ImageTask(
        "digits", train, test, ImageFormat(classes, 8, 1, (float(scaled.mean()),), (float(scaled.std()),)),
        source=f"sklearn.datasets.load_digits, {test_fraction:g} of it held out to test on",
        licence="CC BY 4.0: Alpaydin and Kaynak, UCI Machine Learning Repository, 1998",
    )  # fmt: skip


def hold_out(images: LabelledImages, classes: Sequence[str], fraction: float) -> tuple[LabelledImages, LabelledImages]:
    """Split images into a training and a test set, always in the same way."""
    kept, held = stratify(images.labels, classes, fraction, SPLIT_SEED)
    return images.subset(kept), images.subset(held)
