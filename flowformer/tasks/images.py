"""Classification of labelled pictures: preparing and varying them, loss and metric; CIFAR-10, digits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.common.errors import DataError
from flowformer.tasks import cifar
from flowformer.tasks.cifar import LabelledImages
from flowformer.tasks.image_decoding import SUFFIXES, UnreadableImage, decode
from flowformer.tasks.metric import Metric
from flowformer.tasks.splits import stratify

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

# Mean and standard deviation of red, green and blue, of 1; CIFAR-10's are those of its training set.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SPLIT_SEED = 0  # of a test part that we hold out ourselves: the same for all runs


@dataclass(frozen=True)
class ImageFormat:
    """How pictures are prepared for a model: all that is needed to use a trained one on new pictures.

    Attributes:
        classes: Names; class index i means ``classes[i]``.
        size: Side in pixels.
        channels: 3 for red, green and blue; 1 for grey.
        mean: Of each channel, of 1.
        std: Likewise, the standard deviation.
        crop: Part of the side that the centre crop keeps, after resizing: 0.875 resizes to 256 for 224.
    """

    classes: tuple[str, ...]
    size: int
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 1.0

    def prepare(self, image: Image) -> np.ndarray:
        """Convert a picture to the format's colours, resize its shorter side and crop its centre.

        Args:
            image: A picture of any size and mode.

        Returns:
            (size, size, channels) uint8.
        """
        from PIL import Image

        image = image.convert("RGB" if self.channels == 3 else "L")
        if image.size != (self.size, self.size):
            short = round(self.size / self.crop)
            scale = short / min(image.size)
            sides = (max(round(scale * image.width), short), max(round(scale * image.height), short))
            image = image.resize(sides, Image.Resampling.BICUBIC)
            left, top = ((side - self.size) // 2 for side in sides)
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image).reshape(self.size, self.size, self.channels)

    def collate(self, items: Sequence[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            items: (image, label) pairs, each image (size, size, channels) uint8.

        Returns:
            "x": (batch, channels, size, size) float32, standardised; "y": (batch,) int64.

        Raises:
            ValueError: no items, or an image of another shape.
        """
        if not items:
            raise ValueError("want at least one picture in a batch, got none")
        want = (self.size, self.size, self.channels)
        for image, _ in items:
            if image.shape != want:
                raise ValueError(f"want pictures of shape {want}, got {image.shape}")
        x = torch.from_numpy(np.stack([image for image, _ in items])).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        y = torch.tensor([label for _, label in items], dtype=torch.int64)
        return {"x": x.sub_(mean).div_(std).contiguous(), "y": y}

    def to_json(self) -> dict[str, Any]:
        """The format as plain values."""
        return {
            "classes": list(self.classes), "size": self.size, "channels": self.channels, "mean": list(self.mean),
            "std": list(self.std), "crop": self.crop,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ImageFormat:
        """The format that `to_json` wrote."""
        lists = {name: tuple(values[name]) for name in ("classes", "mean", "std")}
        return cls(**{**values, **lists})


@dataclass(frozen=True, eq=False)
class ImageTask:
    """A classification problem on pictures, ready to train on.

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
        return Metric("accuracy", "accuracy", "percent", lambda share: 100 * share)

    @property
    def evaluated(self) -> dict[str, Any]:
        """The sets evaluated during training: the test set, and the validation set; none that is empty."""
        sets = {"test": self.test, "validation": self.validation}
        return {name: part for name, part in sets.items() if part is not None and len(part)}

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch, varied if it trains; means over it of the cross-entropy and the "accuracy"."""
        x, smoothing = batch["x"], 0.0
        if model.training:
            x, smoothing = self._vary(x), self.label_smoothing
        logits = model(x).float()
        loss = nn.functional.cross_entropy(logits, batch["y"], label_smoothing=smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["y"]).float().mean()}

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Pictures in a batch."""
        return len(batch["y"])

    def _vary(self, x: Tensor) -> Tensor:
        if self.crop_padding:
            x = shift_at_random(x, self.crop_padding)
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        return x

    def split_validation(self, fraction: float, seed: int) -> ImageTask:
        """Set a stratified part of the training set aside.

        Raises:
            ValueError: as :func:`flowformer.tasks.splits.stratify`.
        """
        kept, held = stratify(self.train.labels, self.format.classes, fraction, seed)
        return replace(self, train=self.train.subset(kept), validation=self.train.subset(held))


def shift_at_random(x: Tensor, reach: int) -> Tensor:
    """Shift each image by up to ``reach`` pixels, both ways on both axes; what comes in is zero.

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


def classify(model: nn.Module, form: ImageFormat, images: Sequence[np.ndarray], *, batch_size: int = 64) -> np.ndarray:
    """Class probabilities of pictures, by a trained model.

    Args:
        model: From (batch, channels, height, width) to logits (batch, classes), in evaluation mode.
        form: How the model's pictures are prepared.
        images: As :meth:`ImageFormat.prepare` makes them.
        batch_size: Pictures at a time.

    Returns:
        (n, classes) float64.
    """
    device = next(model.parameters()).device
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = form.collate([(image, 0) for image in images[start : start + batch_size]])
            pieces.append(model(batch["x"].to(device)).double().softmax(-1).cpu().numpy())
    return np.concatenate(pieces)


def classify_files(model: nn.Module, form: ImageFormat, paths: Sequence[Path]) -> tuple[list[str], np.ndarray]:
    """Class probabilities of files of pictures, by a trained model. One that cannot be read is named in the log.

    Args:
        model: As :func:`classify` takes it.
        form: Likewise.
        paths: Files, and folders, of which all pictures are taken, those in folders within included.

    Returns:
        Names of the files, and (n, classes) float64.

    Raises:
        DataError: for a path that is not there, or where no picture can be read.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        within = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        files += [one for one in within if one.is_file()]
    names, pieces = [], []
    for start in range(0, len(files), 64):
        read = [(file, image) for file in files[start : start + 64] if (image := _read(form, file)) is not None]
        if read:
            names += [str(file) for file, _ in read]
            pieces.append(classify(model, form, [image for _, image in read]))
    if not pieces:
        raise DataError(f"none of {len(files)} files in {', '.join(map(str, paths))} is a picture that can be read")
    return names, np.concatenate(pieces)


def _read(form: ImageFormat, file: Path) -> np.ndarray | None:
    try:
        return form.prepare(decode(file.read_bytes()))
    except UnreadableImage as error:
        logger.warning("%s is left out: %s", file, error)
        return None


def load_cifar10(path: str, *, test_fraction: float) -> ImageTask:
    """CIFAR-10, all or a part of it.

    Args:
        path: As :func:`flowformer.tasks.cifar.read_cifar10` takes it.
        test_fraction: Part of the training set that is held out to test on, where there is no test set.

    Raises:
        ValueError: where nothing is given.
        DataError: as :func:`flowformer.tasks.cifar.read_cifar10`.
    """
    if not path:
        raise ValueError("give --data PATH: a folder or an archive of CIFAR-10 (binary, Python, or pictures by class)")
    train, test = cifar.read_cifar10(Path(path))
    name, source = "cifar10", path
    if test is None:
        name, source = "cifar10 (a part held out)", f"{path}, without a test set: {test_fraction:g} of it held out"
        train, test = hold_out(train, cifar.CLASSES, test_fraction)
    form = ImageFormat(cifar.CLASSES, cifar.SIDE, 3, CIFAR_MEAN, CIFAR_STD)
    return ImageTask(name, train, test, form, source=source, licence=cifar.LICENCE)


def load_digits(*, test_fraction: float) -> ImageTask:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships; a part is held out to test on."""
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
    """Divide pictures into a training and a test set, always in the same way."""
    kept, held = stratify(images.labels, classes, fraction, SPLIT_SEED)
    return images.subset(kept), images.subset(held)
