"""Image format: how images are preprocessed for a classifier."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.common.errors import DataError
from flowformer.common.values import read_integer, read_number, read_numbers, read_texts
from flowformer.models.vision import VisionModel
from flowformer.tasks.encodings import check_file
from flowformer.tasks.images.decoding import SUFFIXES, UnreadableImage, decode
from flowformer.tasks.scenes import Scene, View, find_mechanisms, locate, model_strips, read_example

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


# Mean and standard deviation of red, green and blue, of 1; CIFAR-10's are those of its training set.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class NoChoice:
    """No options: a file contains a single image."""


@dataclass(frozen=True)
class ImageFormat:
    """Image format: everything needed to use a trained classifier on new images.

    Attributes:
        classes: Names; class index i means ``classes[i]``.
        size: Side in pixels.
        channels: 3 for red, green and blue; 1 for grey.
        mean: Of each channel, of 1.
        std: Likewise, the standard deviation.
        crop: Part of the side that the centre crop keeps, after resizing: 0.875 resizes to 256 for 224.
    """

    kind: ClassVar[str] = "images"
    item: ClassVar[str] = "picture"
    files: ClassVar[str] = "pictures, and folders of them"
    show_options: ClassVar[type] = NoChoice

    classes: tuple[str, ...]
    size: int
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 1.0

    def prepare(self, image: Image) -> np.ndarray:
        """Convert an image to the format's channels, resize its shorter side and crop its centre.

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
            raise ValueError("a batch must contain at least one image, got none")
        want = (self.size, self.size, self.channels)
        for image, _ in items:
            if image.shape != want:
                raise ValueError(f"expected images of shape {want}, got {image.shape}")
        x = torch.from_numpy(np.stack([image for image, _ in items])).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        y = torch.tensor([label for _, label in items], dtype=torch.int64)
        return {"x": x.sub_(mean).div_(std).contiguous(), "y": y}

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        return {
            "classes": list(self.classes), "size": self.size, "channels": self.channels, "mean": list(self.mean),
            "std": list(self.std), "crop": self.crop,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ImageFormat:
        """Read a format that ``to_json`` wrote.

        Raises:
            ValueError: for values of another kind, or that do not fit each other.
        """
        channels, mean = read_integer(values, "channels"), read_numbers(values, "mean")
        std = read_numbers(values, "std", above=0)
        if not channels == len(mean) == len(std) or channels not in (1, 3):
            raise ValueError(f"expected 1 or 3 channels, means and deviations, got {channels}, {len(mean)}, {len(std)}")
        size, crop = read_integer(values, "size"), read_number(values, "crop", above=0)
        return cls(read_texts(values, "classes", distinct=True), size, channels, mean, std, crop)

    def classify_files(self, model: nn.Module, paths: Sequence[Path]) -> tuple[list[str], np.ndarray]:
        """Return class probabilities of image files by a trained model. Unreadable files are logged.

        Args:
            model: As :func:`classify` takes it.
            paths: Files, and folders, whose pictures are taken, subfolders included.

        Returns:
            Names of the files, and (n, classes) float64.

        Raises:
            DataError: for a path that is not there, or where no picture can be read.
        """
        files: list[Path] = []
        for path in paths:
            if not path.exists():
                raise DataError(f"{path}: no such file or folder")
            check_file(path)
            files += find_pictures(path)
        names, pieces = [], []
        for start in range(0, len(files), 64):
            read = [(file, image) for file in files[start : start + 64] if (image := self._read(file)) is not None]
            if read:
                names += [str(file) for file, _ in read]
                pieces.append(classify(model, self, [image for _, image in read]))
                if not np.isfinite(pieces[-1]).all():
                    row = int(np.argmin(np.isfinite(pieces[-1]).all(axis=1)))
                    raise DataError(f"{read[row][0]}: the model gives no finite probabilities for this image")
        if not pieces:
            listed = ", ".join(map(str, paths))
            if not files:
                raise DataError(f"{listed} contains no pictures; expected files that end in {', '.join(SUFFIXES)}")
            raise DataError(f"none of {len(files)} files in {listed} is a readable image")
        return names, np.concatenate(pieces)

    def _read(self, file: Path) -> np.ndarray | None:
        try:
            return self.prepare(decode(file.read_bytes()))
        except (UnreadableImage, OSError) as error:
            logger.warning("%s is left out: %s", file, getattr(error, "strerror", None) or error)
            return None

    def show(self, model: VisionModel, file: Path | None, options: NoChoice, view: View) -> Scene:
        """Return the attention maps of a classifier for an image file.

        Raises:
            ValueError: as :meth:`scene`.
            DataError: for a file that cannot be read.
        """
        data = read_example(file, "a picture")
        try:
            pixels = self.prepare(decode(data))
        except UnreadableImage as error:
            raise DataError(f"{file}: {error}") from error
        return self.scene(model, pixels, view)

    def scene(self, model: VisionModel, pixels: np.ndarray, view: View) -> Scene:
        """Return the attention maps of a classifier for a preprocessed image.

        Args:
            model: The model, in evaluation mode.
            pixels: (size, size, channels) uint8, as :meth:`prepare` makes it.
            view: What to show; whole numbers are pixels of the prepared image.

        Raises:
            ValueError: for a query, layer or head that is not there.
        """
        x = self.collate([(pixels, 0)])["x"]
        size, grids = x.shape[-2:], model.grids((x.shape[-2], x.shape[-1]))
        first = int(model.class_token is not None)
        points = [locate(point, size, class_token=bool(first)) for point in view.at or ((0.5, 0.5),)]

        def rows(name: str, tokens: int) -> list[int]:
            stage = _stage(name)
            stride, columns = model.strides[stage], grids[stage][1]
            return [first + p[0] // stride * columns + p[1] // stride if p else 0 for p in points]

        def arrange(name: str, maps: np.ndarray) -> np.ndarray:
            return maps[:, first:].reshape(-1, *grids[_stage(name)])

        shares = [tuple((p + 0.5) / n for p, n in zip(point, size, strict=True)) if point else None for point in points]
        names = [f"({', '.join(map(str, point))})" if point else "class token" for point in points]
        strips = model_strips(model, (x,), rows, arrange, list(zip(names, shares, strict=True)), view)
        return Scene(", ".join(find_mechanisms(model)), strips, image=pixels / 255)


def _stage(name: str) -> int:
    """The stage of a layer, from its name: 1 for "stages.1.blocks.0.attention"."""
    return int(name.split(".")[1])


def find_pictures(path: Path) -> list[Path]:
    """Return the file itself, or all pictures in a folder, subfolders included, sorted."""
    within = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    return [one for one in within if one.is_file()]


def classify(model: nn.Module, form: ImageFormat, images: Sequence[np.ndarray], *, batch_size: int = 64) -> np.ndarray:
    """Return class probabilities of images by a trained model.

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
