"""Recipes for the density of images, sub-pixel by sub-pixel: CIFAR-10 (AFT), your own images, and digits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from flowformer.common.fields import option
from flowformer.recipes.language import LanguageRecipe
from flowformer.recipes.mechanism import find_row, merge_fields
from flowformer.recipes.registry import RECIPES, register_recipe
from flowformer.tasks.images import cifar, density
from flowformer.tasks.images.density import DensityTask
from flowformer.tasks.images.pixels import PixelFormat
from flowformer.training.order import RoundSampler
from flowformer.training.recipe import DataState


class SeededRounds(Sampler[tuple[int, tuple[int, int]]]):
    """A :class:`RoundSampler` that yields each example with a seed for its augmentation.

    The seed is the order's and the place in it: the changes are others each time an example is seen, and the same for
    any length of rounds, number of workers, and in a run that is resumed.

    Args:
        order: The order.
    """

    def __init__(self, order: RoundSampler) -> None:
        self.order = order

    def set_epoch(self, epoch: int) -> None:
        """Set the round, counted from 0; called by Lightning."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, int]]]:
        order = self.order
        for number, index in enumerate(order, order.round * order.length):
            yield index, (order.seed, number * order.world + order.rank)


@dataclass(frozen=True, kw_only=True)
class PixelRecipe(LanguageRecipe):
    """A model of images, sub-pixel by sub-pixel."""

    flip: bool = option(True, "flip half of the images horizontally in training", group="data")
    shift: int = option(
        10,
        "largest value added to or subtracted from all sub-pixels of an image in training",
        group="data",
        at_least=0,
        largest=255,
    )

    def read_format(self, values: dict[str, Any]) -> Any:
        """Read the format saved by a run."""
        return PixelFormat.from_json(values)

    def sampler(self, data: Any, world: int, rank: int) -> Any:
        """Return the training set in repeated random order, with a seed for the augmentation of each image."""
        return SeededRounds(super().sampler(data, world, rank))


@dataclass(frozen=True, kw_only=True)
class Cifar10DensityRecipe(PixelRecipe):
    """A model of CIFAR-10, or of other images of 32 x 32 pixels."""

    data: Path | None = option(
        None,
        "folder or archive of CIFAR-10, or of PNG images in folders named by its classes; null for the cache",
        group="data",
    )
    held_out: float = option(
        0.1, "fraction of the images used as test set if the data has none", group="data", above=0, below=1
    )

    def build_task(self, form: PixelFormat | None = None) -> DensityTask:
        """Read the images."""
        return density.load_cifar10(cifar.locate(self.data), flip=self.flip, shift=self.shift, held_out=self.held_out)

    @property
    def data_state(self) -> DataState:
        """Return whether CIFAR-10 is on this machine."""
        return "here" if cifar.is_located(self.data) else "absent"

    @property
    def row(self) -> str:
        """The name of this model in the published tables; "" if it is in none of them."""
        return find_row(self, _ROWS, _PLAIN)

    def published_table(self) -> tuple[str, Mapping[str, float]]:
        """The published figures."""
        return "test bits per dimension of CIFAR-10 (Zhai et al., 2021)", density.PUBLISHED


@dataclass(frozen=True, kw_only=True)
class DigitsRecipe(PixelRecipe):
    """A model of handwritten digits."""

    def build_task(self, form: PixelFormat | None = None) -> DensityTask:
        """Read the digits."""
        return density.load_digits(flip=self.flip, shift=self.shift)


def cifar10(row: str, model: Mapping[str, Any], /, **fields: Any) -> Cifar10DensityRecipe:
    """The published experiment on CIFAR-10 (Zhai et al., 2021, tables 2 and 3): 3,072 sub-pixels.

    AdamW at 3e-3 with the schedule of Vaswani et al. (2017), weight decay 0.1 on the weights of linear layers, dropout
    0.1, batches of 128, learned positions; images are turned left to right at random, then one number from -10 to 10 is
    added to all sub-pixels. 200 epochs of 50,000 images are 78,125 steps. Not given, and chosen here: 4,000 steps of
    warm-up (those of Vaswani et al.), no clipping, a head that is not the embedding. A batch is 8 images, and the
    gradients of 16 make a step: on a smaller device --batch-size 1 --accumulate 128 is the same.
    """
    published: dict[str, Any] = {
        **_PLAIN, **model, "dropout": 0.1, "optimizer": "adamw", "weight_decay": 0.1,
        "decayed": "linear", "learning_rate": 3e-3, "schedule": "inverse-sqrt", "warmup_steps": 4_000,
        "clip_grad_norm": None, "batch_size": 8, "accumulate": 16, "steps": 78_125, "eval_every": 625,
    }  # fmt: skip
    return Cifar10DensityRecipe(**merge_fields({"name": f"density/{row}", **published}, fields))


@register_recipe("density/digits")
def digits(**fields: Any) -> DigitsRecipe:
    """A model of handwritten digits, 8 x 8 pixels of 17 grey levels, in minutes on a laptop (not published).

    The digits come with scikit-learn: nothing is downloaded. AFT-local with a window of two rows.
    """
    ours: dict[str, Any] = {
        "model": "aft_cifar_24", "attention": "aft_local", "attention_options": {"window": 16, "position_dim": 16},
        "num_layers": 4, "dim": 64, "num_heads": 1, "ffn_dim": 256, "positions": "learned", "dropout": 0.1,
        "flip": False, "shift": 0, "optimizer": "adamw", "weight_decay": 0.1, "decayed": "linear",
        "learning_rate": 4e-3, "schedule": "cosine", "warmup_steps": 100, "clip_grad_norm": 1.0, "batch_size": 32,
        "steps": 1_000, "eval_every": 250,
    }  # fmt: skip
    return DigitsRecipe(**merge_fields({"name": "density/digits", **ours}, fields))


# What tells a row of the tables from the others.
_PLAIN: Mapping[str, Any] = {
    "attention_options": {}, "num_layers": None, "num_heads": None, "dim": None, "ffn_dim": None,
    "positions": "learned",
    "model": "aft_cifar_24", "attention": "aft_local",
}  # fmt: skip
_ROWS: Mapping[str, Mapping[str, Any]] = {
    "aft-local-12": {"model": "aft_cifar_12"},
    "aft-local-24": {},
    "aft-local-24-free": {"attention_options": {"position_dim": None}},
    "aft-simple": {"attention": "aft_simple"},
    "transformer-12": {"model": "aft_cifar_12", "attention": "softmax", "num_heads": 4},
    "transformer-24": {"attention": "softmax", "num_heads": 2},
}
for _row, _fields in _ROWS.items():
    RECIPES.add(f"density/{_row}", partial(cifar10, _row, _fields))
