"""Recipes for ImageNet: the experiments of Flowformer and AFT, and Mobile-Attention in DeiT.

``--data DIR`` names ImageNet, or images of your own in its manner: :func:`flowformer.tasks.images.imagenet.load`.

Sources: thuml/Flowformer, Flowformer_CV (Wu et al., ICML 2022); facebookresearch/deit, main.py (Touvron et al., 2021);
Zhai et al., "An Attention Free Transformer", 2021, section 5.3. On any number of devices a step is of the published
number of images: as many batches as that takes are accumulated. Numbers depart from the published code in that mixup
draws its share for each batch on each device, and a batch here is of another size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn

from flowformer.common.fields import option
from flowformer.models.swap import swap_attention
from flowformer.recipes.images import ImageRecipe
from flowformer.recipes.mechanism import merge_fields
from flowformer.recipes.registry import RECIPES, register_recipe
from flowformer.tasks.images import imagenet
from flowformer.tasks.images.imagenet import Augmentation, DrawSampler, ImageNetFormat, ImageNetTask
from flowformer.training.recipe import DataState, Precision

logger = logging.getLogger(__name__)

# The published rows that a command line can reach from one another by --model and --attention.
_ROWS: Mapping[tuple[str, str | None], str] = {
    ("flowformer_vision_small", None): "flowformer",
    ("flowformer_vision_small", "flow"): "flowformer",
    ("flowformer_vision_small", "softmax"): "softmax",
    ("flowformer_vision_small", "linear"): "linear",
    ("flowformer_vision_small", "reformer"): "reformer",
    ("flowformer_vision_small", "longformer"): "longformer",
    ("flowformer_vision_small", "performer"): "performer",
    ("flowformer_vision_small", "nystromformer"): "nystromformer",
    ("flowformer_vision_small", "yoso"): "yoso",
    ("flowformer_vision_soft", None): "soft",
    ("flowformer_vision_small", "cosformer"): "cosformer",
    ("deit_tiny_flow", "softmax"): "deit-tiny-softmax",
    ("deit_small_flow", "softmax"): "deit-small-softmax",
    ("deit_small_flow", None): "deit-small-flow",
    ("deit_tiny_aft_full", None): "aft-full-tiny",
    ("deit_small_aft_full", None): "aft-full-small",
    ("aft_conv_tiny_11_32", None): "aft-conv-tiny-11-32",
    ("aft_conv_tiny_11_192", None): "aft-conv-tiny-11-192",
    ("aft_conv_small_11_16", None): "aft-conv-small-11-16",
    ("aft_conv_small_11_384", None): "aft-conv-small-11-384",
    ("aft_conv_small_15_384", None): "aft-conv-small-15-384",
}


@dataclass(frozen=True, kw_only=True)
class ImageNetRecipe(ImageRecipe):
    """A classifier of ImageNet images."""

    data: Path | None = option(
        None, "folder of the images: folders by class, parquet files or tar files", group="data", neutral=True
    )
    image_size: int = option(224, "image size in pixels", group="data", at_least=1, largest=16_384)
    step_images: int = option(
        1_024,
        "images per step, over all devices, if accumulate is null",
        group="optimisation",
        at_least=1,
        largest=1_000_000_000,
    )
    accumulate: int | None = option(
        None,
        "batches per step (gradient accumulation); null for as many as give step_images",
        group="optimisation",
        at_least=1,
        largest=1_000_000,
    )
    precision: Precision = option("auto", "training precision; auto: 16-mixed on a GPU, else 32-true", group="machine")
    workers: int = option(
        min(8, os.cpu_count() or 1), "worker processes for data loading; 0 for the main process", group="machine",
        neutral=True, at_least=0, largest=1_000,
    )  # fmt: skip
    rand_augment: str | None = option(
        "rand-m9-mstd0.5-inc1", "RandAugment policy, in the notation of timm; null for none", group="data"
    )
    color_jitter: float = option(
        0.4, "strength of color jitter, used without RandAugment", group="data", at_least=0, largest=1
    )
    erasing: float = option(0.0, "probability of random erasing", group="data", at_least=0, at_most=1)
    mixup: float | None = option(0.8, "alpha of mixup; null for none", group="data", above=0, largest=1_000)
    cutmix: float | None = option(1.0, "alpha of CutMix; null for none", group="data", above=0, largest=1_000)
    repeats: int = option(
        1,
        "consecutive views of each image (repeated augmentation); an epoch has as many times fewer images",
        group="data",
        at_least=1,
        largest=1_000,
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.batch_size % 2 and (self.mixup or self.cutmix):
            raise ValueError(f"batch_size must be even, since images are mixed in pairs, got {self.batch_size}")
        if self.accumulate is None and self.step_images % (self.batch_size * self.devices):
            raise ValueError(
                f"step_images {self.step_images} is not a multiple of batch_size {self.batch_size} on "
                f"{self.devices} devices{self._fitting()}; or pass --accumulate N for a step of another size"
            )

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        found = super().misfits()
        if self.accumulate is not None:
            found["step_images"] = f"step_images has no effect where accumulate is given, {self.accumulate}"
        if self.rand_augment is not None:
            found["color_jitter"] = "color_jitter has no effect with RandAugment: pass --rand-augment null"
        return found

    def _fitting(self) -> str:
        share = self.step_images // self.devices
        if share * self.devices != self.step_images:
            return ""
        sizes = [size for size in range(2, self.batch_size + 1, 2) if share % size == 0]
        return f"; --batch-size {sizes[-1]} would do" if sizes else ""

    @property
    def batches_of_a_step(self) -> int:
        """Batches per device and step (gradient accumulation)."""
        return self.accumulate or self.step_images // (self.batch_size * self.devices)

    @property
    def augmentation(self) -> Augmentation:
        """Augmentation of training images."""
        return Augmentation(
            rand_augment=self.rand_augment or "", color_jitter=self.color_jitter, erasing=self.erasing,
            mixup=self.mixup or 0.0, cutmix=self.cutmix or 0.0, smoothing=self.label_smoothing,
        )  # fmt: skip

    def build_task(self, form: ImageNetFormat | None = None) -> ImageNetTask:
        """Find the images."""
        if self.data is None:
            raise ValueError(f"{self.name} requires --data DIR: images as folders by class, parquet files or tar files")
        task = self._load(self.data)
        return task if form is None else task.using(form)

    def _load(self, data: Path, **more: Any) -> ImageNetTask:
        return imagenet.load(
            data, image_size=self.image_size, augmentation=self.augmentation, seed=self.seed,
            validation_fraction=self.validation_fraction or 0.0, **more,
        )  # fmt: skip

    @property
    def data_state(self) -> DataState:
        """Unknown: the user specifies the folder of images."""
        return "unknown"

    def read_format(self, values: dict[str, Any]) -> ImageNetFormat:
        """Read the format saved by a run."""
        return cast("ImageNetFormat", ImageNetFormat.from_json(values))

    def sampler(self, data: Any, world: int, rank: int) -> Any:
        """Whole batches in a new order each epoch."""
        return DrawSampler(
            len(data), self.batch_size, world=world, rank=rank, seed=self.seed, repeats=self.repeats
        )  # fmt: skip

    @property
    def row(self) -> str:
        """The name of this model in the published tables; "" if it is in none of them."""
        changed = self.attention_options or self.patch_size is not None or self.image_size != 224
        return "" if changed else _ROWS.get((self.model, self.attention), "")

    def published_table(self) -> tuple[str, Mapping[str, float]] | None:
        """The published accuracies."""
        return "top-1 accuracy, percent (Wu et al., ICML 2022; Zhai et al., 2021)", imagenet.PUBLISHED


@dataclass(frozen=True, kw_only=True)
class OwnImageRecipe(ImageNetRecipe):
    """A classifier of your own images."""

    test_fraction: float = option(
        0.1, "fraction of each class used as test set if the data has none", group="data", above=0, below=1
    )

    def _load(self, data: Path, **more: Any) -> ImageNetTask:
        return super()._load(data, test_fraction=self.test_fraction, own_numbers=True, **more)

    def published_table(self) -> None:
        """None: there are no published results on a user's images."""


@dataclass(frozen=True, kw_only=True)
class TransferRecipe(ImageNetRecipe):
    """A ViT of timm that is trained further with another attention."""

    own_heads: ClassVar[bool] = True

    weights: Path | None = option(
        None, "file with the weights of the ViT; null to download them with timm", group="model", neutral=True
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.attention is None:
            raise ValueError("attention must be the mechanism that replaces the ViT's attention, got None")

    def _check_model(self) -> None:
        """Leave the name to timm."""

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        of_timm = "has no effect: the ViT of timm has its own"
        return {**super().misfits(), "patch_size": f"patch_size {of_timm}", "dropout": f"dropout {of_timm}"}

    def build_model(self, form: Any) -> nn.Module:
        """Build the ViT with replaced attention; for training, with its pretrained weights."""
        import timm

        trains = form.augmentation is not None  # a model that a run has will be given the run's weights
        options = {"num_classes": len(form.classes), "img_size": form.size, "drop_path_rate": self.drop_path}
        try:
            model = timm.create_model(self.model, pretrained=trains and self.weights is None, **options)
        except Exception as error:  # of timm, the hub's client, or what it uses
            raise ValueError(
                f"timm cannot create {self.model}: {error}. Without a network, pass --weights FILE"
            ) from error
        if trains and self.weights is not None:
            _load_weights(model, self.weights)
        try:
            report = swap_attention(model, cast("str", self.attention), **self.attention_options)
        except TypeError as error:
            raise ValueError(str(error)) from error
        logger.info("%s", report)
        return model

    @property
    def row(self) -> str:
        """The name of this model in the published table; "" if it is not in it."""
        published = transfer()
        same = all(
            getattr(self, name) == getattr(published, name)
            for name in ("model", "attention", "attention_options", "image_size")
        )
        return "aft-conv-transfer" if same else ""


def _load_weights(model: nn.Module, path: Path) -> None:
    """Weights of a file, as timm reads it; a head for other classes and positions of other sizes stay fresh."""
    import timm.models

    try:
        given = timm.models.load_state_dict(str(path))
    except Exception as error:  # of pickle, safetensors, the file system
        raise ValueError(f"{path}: cannot read weights: {error}") from error
    own = model.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    missing = [name for name in own if name not in fitting and not name.startswith(("head.", "pos_embed"))]
    if missing:
        raise ValueError(f"{path}: {len(missing)} missing or unexpected weights: {', '.join(missing[:5])}")
    model.load_state_dict(fitting, strict=False)


# Flowformer_CV, its script and its defaults; DeiT's main.py has the same but for what is in _DEIT.
_SHARED: Mapping[str, Any] = {
    "optimizer": "adamw", "weight_decay": 0.05, "decayed": "weights", "schedule": "cosine", "min_learning_rate": 1e-5,
    "warmup_epochs": 5, "warmup_learning_rate": 1e-6, "label_smoothing": 0.1, "epochs": 300, "eval_every": 1,
}  # fmt: skip
_FLOWFORMER: Mapping[str, Any] = {
    **_SHARED, "learning_rate": 7.5e-4, "step_images": 768, "batch_size": 96,
    "clip_grad_norm": 1.0, "drop_path": 0.2,
}  # fmt: skip
_DEIT: Mapping[str, Any] = {
    **_SHARED, "learning_rate": 1e-3, "step_images": 1_024, "batch_size": 128, "clip_grad_norm": None, "drop_path": 0.1,
    "erasing": 0.25, "repeats": 3,
}  # fmt: skip


def flowformer(row: str, model: str, attention: str | None, /, **fields: Any) -> ImageNetRecipe:
    """The published experiment on ImageNet-1K (Wu et al., ICML 2022): the hierarchical Flowformer, 43.3 M parameters.

    300 epochs of AdamW, cosine from 5e-4 * 768 / 512 to 1e-5 after 5 epochs of warm-up from 1e-6, weight decay 0.05,
    gradient norm 1, float16 on a GPU; mixup 0.8, CutMix 1.0, label smoothing 0.1, RandAugment, no erasing; drop path
    0.2 as its code has it, whatever its option says. A step is of 768 images, there 6 GPUs of 128, here batches of 96,
    which 1, 2, 4 or 8 devices divide. The published runs add 10 epochs at 1e-5 (timm's cooldown); these do not.
    The published figure is that of the best epoch on the validation set, which stands as test set here.

    Of the mechanisms that Flow-Attention is compared with, no option is published: they have the defaults of their
    modules, SOFT those of its own image models (``flowformer info flowformer_vision_soft``).
    """
    published = {"name": f"imagenet/{row}", **_FLOWFORMER, "model": model, "attention": attention}
    return ImageNetRecipe(**merge_fields(published, fields))


def deit(row: str, model: str, attention: str | None, /, **fields: Any) -> ImageNetRecipe:
    """DeiT with other attention, by DeiT's own recipe (facebookresearch/deit, main.py), which AFT's experiments follow.

    300 epochs of AdamW, cosine from 5e-4 * 1,024 / 512 to 1e-5 after 5 epochs of warm-up from 1e-6, weight decay 0.05,
    no clipping; drop path 0.1, mixup 0.8, CutMix 1.0, label smoothing 0.1, RandAugment, erasing 0.25, each image three
    times in a row. A mean of weights over time, which DeiT's code keeps beside them, is left out: its figures are of
    the weights themselves. Of Flow-Attention in DeiT the accuracy is published, and of Mobile-Attention that it was
    done, but neither's recipe nor the latter's accuracy.
    """
    return ImageNetRecipe(
        **merge_fields({"name": f"imagenet/{row}", **_DEIT, "model": model, "attention": attention}, fields)
    )


@register_recipe("imagenet/aft-conv-transfer")
def transfer(**fields: Any) -> TransferRecipe:
    """AFT-conv from DeiT's weights at 384 pixels (Zhai et al., 2021, table 8): 32 heads, kernel 25.

    All of DeiT-base but positions, class token, and the projections of queries and keys. 100 epochs in steps of 64
    images, as published. The learning rate is not: here it is DeiT's rule, 5e-4 * 64 / 512, as is all else. timm
    fetches the weights, or --weights FILE has them.
    """
    published: dict[str, Any] = {
        **_DEIT, "model": "deit_base_patch16_384", "attention": "aft_conv", "image_size": 384, "epochs": 100,
        "attention_options": {"num_heads": 32, "kernel_size": [25, 25]},
        "learning_rate": 6.25e-5, "min_learning_rate": 1e-6, "step_images": 64, "batch_size": 16,
    }  # fmt: skip
    return TransferRecipe(**merge_fields({"name": "imagenet/aft-conv-transfer", **published}, fields))


@register_recipe("images/own")
def own(**fields: Any) -> OwnImageRecipe:
    """A small hierarchical Flowformer on your own images: DIR/CLASS/IMAGE, or the same in DIR/train and DIR/val.

    --data DIR also holds parquet or tar files, as ImageNet's does. Without a val or test part, a tenth of each class is
    held out, always the same. Settings of our own: 64 x 64 pixels, crops and mirror images, 50 epochs. Larger pictures:
    --image-size 224 --model flowformer_vision_tiny --patch-size 4.
    """
    ours: dict[str, Any] = {
        "model": "flowformer_vision_micro", "attention": "flow", "image_size": 64, "patch_size": 4, "epochs": 50,
        "optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 0.05, "decayed": "weights", "schedule": "cosine",
        "warmup_epochs": 1, "clip_grad_norm": 1.0, "batch_size": 64, "accumulate": 1, "label_smoothing": 0.1,
        "rand_augment": None, "color_jitter": 0.2, "mixup": None, "cutmix": None, "eval_every": 1,
    }  # fmt: skip
    return OwnImageRecipe(**merge_fields({"name": "images/own", **ours}, fields))


_FLOWFORMER_ROWS: Mapping[str, tuple[str, str | None]] = {
    row: pair for pair, row in _ROWS.items() if pair[0].startswith("flowformer")
}
_DEIT_ROWS: Mapping[str, tuple[str, str | None]] = {
    **{row: pair for pair, row in _ROWS.items() if not pair[0].startswith("flowformer")},
    "deit-tiny-mobile": ("deit_tiny_mobile", None),
    "deit-small-mobile": ("deit_small_mobile", None),
}
for _row, _pair in _FLOWFORMER_ROWS.items():
    RECIPES.add(f"imagenet/{_row}", partial(flowformer, _row, *_pair))
for _row, _pair in _DEIT_ROWS.items():
    RECIPES.add(f"imagenet/{_row}", partial(deit, _row, *_pair))
