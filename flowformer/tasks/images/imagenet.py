"""ImageNet: classes, preprocessing, augmentation, loss and metric.

Training images are varied by timm as DeiT's are (Touvron et al., 2021; facebookresearch/deit, main.py), which
Flowformer and AFT follow. The random changes of an image are a function of the seed, the round, and its place in
the round; those of a batch, of its first image's. They are drawn where the batch is made, by a worker or not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from flowformer.common.errors import DataError
from flowformer.tasks.images.decoding import UnreadableImage
from flowformer.tasks.images.files import ImageFiles, find_images
from flowformer.tasks.images.format import ImageFormat
from flowformer.tasks.images.numbering import choose_classes, classes, renumber
from flowformer.tasks.metric import Metric
from flowformer.tasks.splits import SPLIT_SEED, stratify

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = (1_281_167, 50_000)  # images to train on, and of the validation set, which is what results are quoted on
EVAL_CROP = 0.875  # part of the shorter side that an evaluation sees: 224 of 256 pixels
LICENCE = "ImageNet (https://www.image-net.org): for research that is not commercial; its images have their owners."
OWN_LICENCE = "Images of your own: their terms are yours to know."

# Top-1 accuracy in percent on ImageNet's validation set, by recipe.
PUBLISHED: Mapping[str, float] = {
    # Wu et al., ICML 2022, the table of ImageNet-1K.
    "flowformer": 80.6, "softmax": 78.7, "linear": 79.0, "reformer": 79.6, "longformer": 77.6, "performer": 78.1,
    "nystromformer": 77.2, "yoso": 79.0, "soft": 79.2, "cosformer": 68.3,
    "deit-small-softmax": 79.8, "deit-small-flow": 80.0,
    # Zhai et al., 2021, tables 7 and 8.
    "deit-tiny-softmax": 72.2,
    "aft-full-tiny": 72.4, "aft-full-small": 79.8, "aft-conv-tiny-11-32": 73.9, "aft-conv-tiny-11-192": 74.8,
    "aft-conv-small-11-16": 80.2, "aft-conv-small-11-384": 80.8, "aft-conv-small-15-384": 81.0,
    "aft-conv-transfer": 83.4,
}  # fmt: skip


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context in which the three CPU generators used by timm are seeded; restores them afterwards."""
    legacy = np.random.get_state()  # noqa: NPY002 - timm draws from NumPy's global generator
    before = random.getstate(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(legacy)  # noqa: NPY002
        torch.default_generator.set_state(before[1])


class Draw(NamedTuple):
    """Index of an image, and the seed of its augmentation."""

    row: int
    seed: int


class DrawSampler(Sampler[Draw]):
    """Sampler of whole batches in a new order each round, with a seed for each image.

    With ``repeats``, as many views of an image follow each other, and a round has as many views as without, of fewer
    images (repeated augmentation, Hoffer et al., 2020; the idea is that of RASampler in facebookresearch/deit,
    samplers.py): on several devices they go to different ones. What is no whole batch at the end is left out; a set
    smaller than one batch is gone through more than once to make one.

    Args:
        size: Images of the set.
        batch_size: Images of a batch.
        world: Devices.
        rank: This device, from 0.
        seed: Of all rounds.
        repeats: Views of each image.

    Raises:
        ValueError: for an empty set.
    """

    def __init__(self, size: int, batch_size: int, *, world: int = 1, rank: int = 0, seed: int = 0, repeats: int = 1):
        if size < 1:
            raise ValueError("the training set is empty")
        self.size, self.world, self.rank, self.seed, self.repeats = size, world, rank, seed, repeats
        self.length = max(size // (world * batch_size), 1) * batch_size
        self.round = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the round, counted from 0; called by Lightning."""
        self.round = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Draw]:
        sequence = np.random.SeedSequence((self.seed, self.round))
        order = np.random.default_rng(sequence).permutation(self.size)
        seeds = sequence.spawn(1)[0].generate_state(self.length * self.world)
        for place in range(self.rank, self.length * self.world, self.world):
            yield Draw(int(order[place // self.repeats % self.size]), int(seeds[place]))


class Sample(NamedTuple):
    """An image with its label, before batching.

    Attributes:
        image: (size, size, channels) uint8; None where none could be read.
        label: Index of its class.
        seed: Seed of the augmentation; None in an evaluation.
        left_out: Images that could not be read, in whose place it stands: origin, name, and why.
    """

    image: np.ndarray | None
    label: int
    seed: int | None = None
    left_out: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class TrainingImages(Dataset[Sample]):
    """Training images with random augmentation. An unreadable image is replaced by the next one.

    Attributes:
        files: The images.
        vary: From a picture to (size, size, 3) uint8, at random.
    """

    files: ImageFiles
    vary: Callable[[Any], np.ndarray]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> np.ndarray:
        """Class indices, (n,) int64."""
        return self.files.labels

    def fingerprint(self) -> str:
        """Return that of the files."""
        return self.files.fingerprint()

    def __getitem__(self, draw: Draw) -> Sample:
        left_out = []
        for step in range(len(self)):
            index = (draw.row + step) % len(self)
            image = _try(self.files, index, left_out)
            if image is not None:
                with seeded(draw.seed):
                    return Sample(self.vary(image), int(self.files.labels[index]), draw.seed, tuple(left_out))
        raise DataError(f"{self.files.origin}: no readable image left")


@dataclass(frozen=True, eq=False)
class EvaluationImages(Dataset[Sample]):
    """Evaluation images. Unreadable images are not counted.

    Attributes:
        files: The images.
        prepare: From a picture to (size, size, 3) uint8.
    """

    files: ImageFiles
    prepare: Callable[[Any], np.ndarray]

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """Return that of the files."""
        return self.files.fingerprint()

    def __getitem__(self, index: int) -> Sample:
        left_out = []
        image = _try(self.files, index, left_out)
        prepared = None if image is None else self.prepare(image)
        return Sample(prepared, int(self.files.labels[index]), None, tuple(left_out))


def _try(files: ImageFiles, index: int, left_out: list[tuple[str, str, str]]) -> Image | None:
    try:
        return files.decode(index)
    except UnreadableImage as error:
        left_out.append((files.origin, files.name(index), str(error)))
        return None


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images by timm; the defaults are those of Flowformer and DeiT.

    Attributes:
        rand_augment: timm's name of what RandAugment does; "" for none, and colours are then jittered.
        color_jitter: Strength of that.
        erasing: Probability of erasing a part of an image with noise.
        mixup: Parameter of the beta distribution of mixup's shares; 0 for none.
        cutmix: Likewise of CutMix.
        smoothing: Share of the target that all classes have.
    """

    rand_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    erasing: float = 0.0
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1

    def transform(self, form: ImageFormat) -> Callable[[Any], np.ndarray]:
        """Return the augmentation of one image: random resized crop (8 to 100%), horizontal flip, RandAugment."""
        from timm.data.transforms_factory import create_transform

        varied = create_transform(
            form.size, is_training=True, auto_augment=self.rand_augment or None, color_jitter=self.color_jitter,
            interpolation="bicubic", mean=form.mean, std=form.std, normalize=False,
        )  # fmt: skip
        return _Channels(varied)

    def mix(self, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Apply random erasing, mixup and CutMix to a batch.

        Args:
            x: (batch, channels, height, width), standardised; changed in place.
            y: (batch,) int64.
            classes: Number of classes.

        Returns:
            The images, and the share of each class: (batch, classes).
        """
        from timm.data.mixup import Mixup, mixup_target
        from timm.data.random_erasing import RandomErasing

        if self.erasing:
            x = RandomErasing(self.erasing, mode="pixel", device="cpu")(x)
        if not (self.mixup or self.cutmix):
            return x, mixup_target(y, classes, 1.0, self.smoothing)
        mixer = Mixup(self.mixup, self.cutmix, label_smoothing=self.smoothing, num_classes=classes)
        return mixer(x, y)


class _Channels:
    """A transform of timm's, which gives a tensor (channels, height, width), as one to an array with channels last."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> np.ndarray:
        return self.transform(image).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class ImageNetFormat(ImageFormat):
    """Format of ImageNet's images: evaluation preprocessing as in timm, and batch augmentation for training.

    Attributes:
        augmentation: What varies training images; None in the format of a run that was read, which trains no more.
    """

    augmentation: Augmentation | None = None

    def prepare(self, image: Image) -> np.ndarray:
        """Resize the shorter side, by cubic interpolation, and crop the centre.

        Args:
            image: A picture of any size and mode.

        Returns:
            (size, size, 3) uint8.
        """
        return _evaluation_transform(self.size, self.crop)(image.convert("RGB"))

    def collate(self, items: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        """Make a batch of the readable images.

        Args:
            items: Each a :class:`Sample`, or a pair of an image and a label.

        Returns:
            "x": (batch, channels, size, size) float32, standardised; "y": (batch,) int64, or for training
            (batch, classes), the share of each class; "left_out": of each image that could not be read its origin, its
            name, and why.
        """
        samples = [Sample(*item) for item in items]
        read = [(sample.image, sample.label) for sample in samples if sample.image is not None]
        seed = next((sample.seed for sample in samples if sample.image is not None), None)
        if read:
            batch: dict[str, Any] = super().collate(read)
        else:
            batch = {"x": torch.zeros(0, self.channels, self.size, self.size), "y": torch.zeros(0, dtype=torch.int64)}
        if self.augmentation is not None and seed is not None:
            with seeded(seed ^ 1):  # not the numbers that the image was varied by
                batch["x"], batch["y"] = self.augmentation.mix(batch["x"], batch["y"], len(self.classes))
        return {**batch, "left_out": [one for sample in samples for one in sample.left_out]}


@cache
def _evaluation_transform(size: int, crop: float) -> _Channels:
    from timm.data.transforms_factory import create_transform

    return _Channels(create_transform(size, interpolation="bicubic", crop_pct=crop, normalize=False))


@dataclass(frozen=True, eq=False)
class ImageNetTask:
    """Classification of ImageNet's images, or of others in the same form.

    The sets' ``files.left_out`` lists the unreadable images found by this process.

    Attributes:
        name: Of the problem.
        train: The training set.
        test: ImageNet's validation set, on which results are published.
        format: How images are prepared.
        validation: A part of the training images to choose the epoch by; None for none.
        published: Top-1 accuracy in percent by recipe; of the whole of ImageNet only.
        licence: What is known of the terms of the data.
    """

    name: str
    train: TrainingImages
    test: EvaluationImages
    format: ImageNetFormat
    validation: EvaluationImages | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    licence: str = LICENCE

    @property
    def metric(self) -> Metric:
        """The figure of merit."""
        return Metric("top-1 accuracy", "accuracy", "percent", lambda share: 100 * share)

    @property
    def evaluated(self) -> dict[str, EvaluationImages]:
        """The evaluation sets used during training: test set and validation set, if not empty."""
        sets = {"test": self.test, "validation": self.validation}
        return {name: part for name, part in sets.items() if part is not None and len(part)}

    @property
    def source(self) -> str:
        """Origin of the images, and the number of unreadable ones so far."""
        parts = []
        for files in (self.train.files, self.test.files):
            lost = f", {len(files.left_out):,} left out" if files.left_out else ""
            parts.append(f"{files}{lost}")
        return "; ".join(parts)

    def using(self, form: ImageNetFormat) -> ImageNetTask:
        """Return the task prepared as the model of a run expects it, with its classes.

        Raises:
            DataError: for a class that the run does not have.
        """
        form = replace(form, augmentation=self.format.augmentation)

        def prepared(part: EvaluationImages) -> EvaluationImages:
            return EvaluationImages(part.files.with_classes(form.classes), form.prepare)

        return replace(
            self,
            train=replace(self.train, files=self.train.files.with_classes(form.classes)),
            test=prepared(self.test),
            validation=None if self.validation is None else prepared(self.validation),
            format=form,
        )

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the model on a batch.

        Returns:
            The mean cross-entropy, "loss"; in an evaluation also the numbers of images whose class is the likeliest,
            "accuracy" (top-1), and among the five likeliest, "top5". Of mixed images, as in training, there are none.
        """
        self._record(batch)
        x, y = batch["x"], batch["y"]
        if not len(x):
            none = torch.zeros((), dtype=torch.int64, device=x.device)
            return {"loss": none.float(), "accuracy": none, "top5": none}
        logits = model(x).float()
        loss = nn.functional.cross_entropy(logits, y)
        if y.ndim == 2:
            return {"loss": loss}
        best = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        return {"loss": loss, "accuracy": best[:, 0].sum(), "top5": best.any(1).sum()}

    def size(self, batch: Mapping[str, Any]) -> int:
        """Images in a batch."""
        return len(batch["x"])

    def _record(self, batch: Mapping[str, Any]) -> None:
        for origin, name, reason in batch["left_out"]:
            for data in (self.train, self.test):
                if data.files.origin == origin:
                    data.files.leave_out(name, reason)


def load(
    path: str | Path,
    *,
    image_size: int = 224,
    augmentation: Augmentation | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    test_fraction: float = 0.0,
    own_numbers: bool = False,
) -> ImageNetTask:
    """Find ImageNet's images, a part of them, or others in the same form.

    Classes with WordNet names that ImageNet-1K has are its classes, with its indices, also where some are missing.
    Numbers without names are its indices too, if all are below 1,000. Otherwise classes are those of the training
    images, sorted.

    Args:
        path: As :func:`flowformer.tasks.images.files.find_images` takes it; it must hold a training and a validation
            set, unless there is ``test_fraction``. Without a validation set one named test will do.
        image_size: Side of an image, in pixels.
        augmentation: What varies training images.
        validation_fraction: Part of each class's training images to choose the epoch by.
        seed: Decides which.
        test_fraction: Part of each class that is held out to test on, always the same, where there is one set only; 0
            to refuse that.
        own_numbers: Whether numbers without names are classes of their own: as many as there are different numbers.

    Raises:
        DataError: where sets are missing, no image of one can be read, or classes do not fit.
        ValueError: where a class has too few images for a validation part.
    """
    sets = find_images(path)
    train, test = sets.get("train"), sets.get("validation", sets.get("test"))
    if len(sets) == 1 and test_fraction:
        train, test = _split(next(iter(sets.values())), test_fraction, SPLIT_SEED)
    if train is None or test is None:
        found = "; ".join(f"{split}: {files}" for split, files in sets.items())
        raise DataError(f"{path}: expected a train and a val set; found {found}")
    is_whole = (len(train), len(test)) == SIZES
    names = choose_classes(train, own_numbers)
    train, test = renumber(train, names).check(), renumber(test, names).check()
    if len(names) < 2:
        raise DataError(f"{train}; classification requires two classes")
    augmentation = augmentation or Augmentation()
    form = ImageNetFormat(names, image_size, crop=EVAL_CROP, augmentation=augmentation)
    validation = None
    if validation_fraction:
        train, held = _split(train, validation_fraction, seed)
        validation = EvaluationImages(held, form.prepare)
    return ImageNetTask(
        name="imagenet",
        train=TrainingImages(train, augmentation.transform(form)),
        test=EvaluationImages(test, form.prepare),
        format=form,
        validation=validation,
        published=PUBLISHED if is_whole else {},
        licence=LICENCE if names == classes() else OWN_LICENCE,
    )


def _split(files: ImageFiles, fraction: float, seed: int) -> tuple[ImageFiles, ImageFiles]:
    """Set a part of each class that has images aside."""
    present, ranks = np.unique(files.labels, return_inverse=True)
    kept, held = stratify(ranks, [files.classes[label] for label in present], fraction, seed)
    return files.subset(kept), files.subset(held)
