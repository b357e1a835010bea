"""Recipes for classifiers of small images: CIFAR-10 and scikit-learn's digits. None of them is published.

The published one, and that on a user's own pictures, are in :mod:`flowformer.recipes.imagenet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from flowformer.common.fields import option
from flowformer.models.vision import VisionModel
from flowformer.recipes.mechanism import check_attention, merge_fields
from flowformer.recipes.model import build_model, check_model
from flowformer.recipes.registry import register_recipe
from flowformer.tasks.images import cifar
from flowformer.tasks.images import task as images
from flowformer.tasks.images.format import ImageFormat
from flowformer.tasks.images.task import ImageTask
from flowformer.training.recipe import DataState, EpochRecipe


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(EpochRecipe):
    """An image classifier."""

    own_heads: ClassVar[bool] = False  # whether its attention may have another number of heads than its model

    model: str = option("flowformer_vision_micro", "image model, see `flowformer list models`", group="model")
    attention: str | None = option(
        None, "attention mechanism, see `flowformer list attentions`; null for the model's default", group="attention"
    )
    attention_options: dict[str, Any] = option({}, "options of the attention mechanism", group="attention")
    patch_size: int | None = option(
        None, "patch size in pixels; null for the model's default", group="model", at_least=1, largest=10_000
    )
    drop_path: float = option(
        0.0, "stochastic depth: drop probability of the last block, less in earlier ones", group="model", at_least=0,
        below=1,
    )  # fmt: skip
    dropout: float = option(
        0.0, "dropout on the outputs of attention and feed-forward networks", group="model", at_least=0, below=1
    )
    label_smoothing: float = option(0.0, "label smoothing", group="optimisation", at_least=0, below=1)

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        self._check_model()
        check_attention(self.attention, self.attention_options, own_heads=self.own_heads)

    def _check_model(self) -> None:
        check_model(self.model, VisionModel)

    @property
    def label(self) -> str:
        """Default name of the run's folder."""
        return f"{self.attention or self.model}-seed{self.seed}"

    def read_format(self, values: dict[str, Any]) -> ImageFormat:
        """Read the format saved by a run."""
        return ImageFormat.from_json(values)

    def build_model(self, form: ImageFormat) -> nn.Module:
        """The model of the recipe, with its attention."""
        options: dict[str, Any] = {"img_size": form.size, "in_chans": form.channels}
        if self.patch_size is not None:
            options["patch_size"] = self.patch_size
        if self.attention is not None:
            options["attention"] = self.attention
        if self.attention is not None or self.attention_options:
            options["attention_options"] = self.attention_options
        return build_model(
            self.model, num_classes=len(form.classes), drop_path_rate=self.drop_path, dropout=self.dropout, **options
        )


@dataclass(frozen=True, kw_only=True)
class SmallImageRecipe(ImageRecipe):
    """A classifier of images that fit in memory."""

    flip: bool = option(True, "flip half of the images horizontally in training", group="data")
    crop_padding: int = option(
        4, "largest random shift in training, in pixels", group="data", at_least=0, largest=1_000
    )
    test_fraction: float = option(0.1, "fraction used as test set if the data has none", group="data", above=0, below=1)

    def _prepare(self, task: ImageTask, form: ImageFormat | None) -> ImageTask:
        task = replace(
            task, flip=self.flip, crop_padding=self.crop_padding, label_smoothing=self.label_smoothing
        )  # fmt: skip
        if self.validation_fraction:
            task = task.split_validation(self.validation_fraction, self.seed)
        return task if form is None else replace(task, format=form)


@dataclass(frozen=True, kw_only=True)
class Cifar10Recipe(SmallImageRecipe):
    """A classifier of CIFAR-10."""

    data: Path | None = option(None, "folder or archive of CIFAR-10; null for the cache", group="data", neutral=True)

    def build_task(self, form: ImageFormat | None = None) -> ImageTask:
        """Read CIFAR-10."""
        return self._prepare(images.load_cifar10(self.data, test_fraction=self.test_fraction), form)

    @property
    def data_state(self) -> DataState:
        """Return whether CIFAR-10 is on this machine."""
        return "here" if cifar.is_located(self.data) else "absent"


@dataclass(frozen=True, kw_only=True)
class DigitsRecipe(SmallImageRecipe):
    """A classifier of scikit-learn's digits."""

    def build_task(self, form: ImageFormat | None = None) -> ImageTask:
        """Read the digits."""
        return self._prepare(images.load_digits(test_fraction=self.test_fraction), form)


_OURS: Mapping[str, Any] = {
    "attention": "flow", "optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 0.05, "decayed": "weights",
    "schedule": "cosine", "warmup_epochs": 1, "clip_grad_norm": 1.0, "batch_size": 64, "label_smoothing": 0.1,
}  # fmt: skip


@register_recipe("images/cifar10")
def cifar10(**fields: Any) -> Cifar10Recipe:
    """A small hierarchical Flowformer on CIFAR-10, in any of its forms, --data PATH or downloaded (not published).

    Without a test set (a part of the archive, say) a tenth of each class is held out, always the same.
    """
    return Cifar10Recipe(**merge_fields({"name": "images/cifar10", **_OURS, "epochs": 30}, fields))


@register_recipe("images/digits")
def digits(**fields: Any) -> DigitsRecipe:
    """The same on scikit-learn's digits of 8 x 8 pixels, a fifth held out: about a minute on a laptop."""
    ours = {"patch_size": 1, "epochs": 30, "flip": False, "crop_padding": 1, "test_fraction": 0.2, "eval_every": 5}
    return DigitsRecipe(**merge_fields({"name": "images/digits", **_OURS, **ours}, fields))
