"""Flowformer's image models in timm: importing this module makes them known to ``timm.create_model``.

They have the same names in both libraries, have parameters of the same names, and can read each other's state dicts.
timm's arguments have the meaning that they have in its own models. Source: timm 1.0, models/vision_transformer.py and
models/pvt_v2.py, for what it asks of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from timm.models._features import feature_take_indices
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from flowformer.models import list_models, vision
from flowformer.models.initialization import draw_parameters, set_initializer, truncated_normal
from flowformer.models.registry import find_model
from flowformer.models.vision import VisionModel
from flowformer.models.vision_blocks import Grid, VisionStage

__all__ = ["TimmVisionModel"]

_NAMES = tuple(name for name in list_models() if find_model(name).__module__ == vision.__name__)
HEAD_STD = 0.02  # of a fresh head: timm's ViT and ours alike


class TimmVisionModel(VisionModel):
    """A :class:`flowformer.models.vision.VisionModel` with all that timm asks of a model.

    Args:
        name: The model's name in :func:`flowformer.list_models`.
        num_classes: Number of classes; 0 for no head.
        global_pool: What the head sees: ``"token"``, the class token; ``"avg"``, the mean over patches; ``""``, all
            tokens. What the model does by itself if absent.
        drop_rate: Probability of dropping a channel before the head.
        proj_drop_rate: ``dropout`` of :class:`VisionModel`.
        **options: Other options of :class:`VisionModel`, ``in_chans``, ``img_size`` and ``drop_path_rate`` among them.

    Attributes:
        feature_info: Channels, pixels per patch, and last module, of the maps that can be had: one for each stage, or
            for each block where there is one stage.

    Raises:
        TypeError: for an option that neither has.
        ValueError: as :class:`VisionModel`, and for pooling that the model does not have.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        if "dropout" in options:
            raise TypeError("timm's word for dropout is proj_drop_rate")
        # The model is what the function of that name builds: all that it has becomes this one's.
        vars(self).update(vars(find_model(name)(num_classes, dropout=proj_drop_rate, **options)))
        self.grad_checkpointing = False
        self.num_prefix_tokens = int(self.class_token is not None)
        self.global_pool = self._pooling(
            ("token" if self.num_prefix_tokens else "avg") if global_pool is None else global_pool
        )
        self.head_drop = nn.Dropout(drop_rate)
        self._by_block = len(self.stages) == 1
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{stage}.blocks.{block}"}
            for stage, (dim, stride) in enumerate(zip(self.embed_dims, self.strides, strict=True))
            for block in self._tapped_blocks(stage)
        ]

    def _tapped_blocks(self, stage: int) -> range:
        depth = len(cast("VisionStage", self.stages[stage]).blocks)
        return range(0 if self._by_block else depth - 1, depth)

    def _pooling(self, name: str) -> str:
        known = ("token", "avg", "") if self.num_prefix_tokens else ("avg", "")
        if name not in known:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, known))} in this model, got {name!r}")
        return name

    @property
    def head_hidden_size(self) -> int:
        """Channels of the head's input."""
        return self.num_features

    @property
    def embed_dim(self) -> int:
        """Channels of the last stage."""
        return self.num_features

    # ---------------------------------------------------------------------------------------------------------- forward

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width), or what goes without a head."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the final norm: (batch, tokens, dim), a class token first."""
        tokens = images
        for tap in self._taps(images):  # a list of all would keep tensors that are not needed any more
            tokens = tap[0]
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From :meth:`forward_features` to logits, or with ``pre_logits`` to what the head sees."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps along the way: see ``feature_info``.

        Args:
            x: Images (batch, channels, height, width).
            indices: Which maps: the last so many, those of these numbers, or all.
            norm: Apply the final norm to maps that it fits: those of the stage that it was made for.
            stop_early: Compute no more than is asked for.
            output_fmt: ``"NCHW"`` for (batch, dim, rows, columns), ``"NLC"`` for (batch, patches, dim).
            intermediates_only: Return nothing but the maps.

        Returns:
            :meth:`forward_features` and the list of maps, or the list alone.

        Raises:
            ValueError: for an unknown format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.feature_info), cast("Any", indices))
        maps, tokens = [], x
        for number, (tokens, grid) in enumerate(self._taps(x)):
            if number in wanted:
                fits = self._by_block or number == len(self.feature_info) - 1
                patches = (self.norm(tokens) if norm and fits else tokens)[:, self.num_prefix_tokens :]
                maps.append(patches if output_fmt == "NLC" else patches.transpose(1, 2).unflatten(2, grid).contiguous())
            if stop_early and number == last:
                break
        return maps if intermediates_only else (self.norm(tokens), maps)

    def _taps(self, images: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        """Tokens and their grid wherever ``feature_info`` has a map."""
        for tokens, grid, ends in self._walk(images):
            if ends or self._by_block:
                yield tokens, grid

    def _run_block(self, block: nn.Module, tokens: Tensor, grid: Grid) -> Tensor:
        if self.grad_checkpointing and is_grad_enabled():
            return cast("Tensor", checkpoint(block, tokens, grid, use_reentrant=False))
        return super()._run_block(block, tokens, grid)

    # ---------------------------------------------------------------------------------------------------------- changes

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Have a fresh head for another number of classes, or none for 0; and maybe another pooling."""
        if global_pool is not None:
            self.global_pool = self._pooling(global_pool)
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        like = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        set_initializer(self.head, partial(truncated_normal, std=HEAD_STD))
        draw_parameters(self.head)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that maps of these numbers do not need, and on request the final norm and the head.

        Returns:
            The numbers of the maps.
        """
        wanted, last = feature_take_indices(len(self.feature_info), cast("Any", indices))
        whole = last == len(self.feature_info) - 1
        if self._by_block:
            stage = cast("VisionStage", self.stages[0])
            stage.blocks = stage.blocks[: last + 1]
        else:
            self.stages = self.stages[: last + 1]
            self.embed_dims, self.strides = self.embed_dims[: last + 1], self.strides[: last + 1]
        self.feature_info = self.feature_info[: last + 1]
        if prune_norm or not (whole or self._by_block):
            self.norm = nn.Identity()
        if prune_head or not (whole or self._by_block):
            self.reset_classifier(0, "")
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass, and their insides not kept until then."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Grid, patch_size: None = None) -> None:
        """Make the model one for another size of images: see :meth:`VisionModel.resize`.

        Raises:
            ValueError: for a size of patches, which are what they were made as.
        """
        if patch_size is not None:
            raise ValueError(f"the patches of this model keep their size, got patch_size={patch_size}")
        self.resize(img_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        blocks = [(r"^stages\.(\d+)\.embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {
            "stem": r"^class_token|^position|^stages\.0\.embed",
            "blocks": r"^stages\.(\d+)" if coarse else blocks,
        }


# --------------------------------------------------------------------------------------------------------- registration


def _cfg(name: str) -> dict[str, Any]:
    """Describe a model's images to timm: ImageNet as in the published evaluation, 224 of 256 pixels."""
    small = name == "flowformer_vision_micro"
    return {
        "input_size": (3, 32, 32) if small else (3, 224, 224), "num_classes": 10 if small else 1000,
        "crop_pct": 1.0 if small else 0.875, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD, "first_conv": "stages.0.embed", "classifier": "head",
        "fixed_input_size": "aft_full" in name,
    }  # fmt: skip


def _register(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        # As timm has it: the last three blocks of a ViT, all stages of a pyramid.
        maps = None if name.startswith("flowformer_vision") else 3
        features = {"feature_cls": "getter", "out_indices": maps}
        return build_model_with_cfg(partial(TimmVisionModel, name), name, pretrained, feature_cfg=features, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"``{name}`` for timm: see :func:`flowformer.create_model` and :class:`TimmVisionModel`."
    return register_with_timm(create)


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in _NAMES})
globals().update({name: _register(name) for name in _NAMES})
