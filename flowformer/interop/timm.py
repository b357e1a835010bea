"""Image models in timm: importing this module registers them with ``timm.create_model``.

They have the same names in both libraries, have parameters of the same names, and can read each other's state dicts.
timm's arguments have the meaning that they have in its own models. Source: timm 1.0, models/vision_transformer.py and
models/pvt_v2.py, for what it asks of a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from timm.models._features import feature_take_indices
from torch import Tensor, is_grad_enabled, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from flowformer.common.errors import DataError
from flowformer.interop.checkpoints import vision_state_dict
from flowformer.mechanisms.aft import AFTFull
from flowformer.models import list_models, vision
from flowformer.models.initialization import draw_parameters, set_initializer, truncated_normal
from flowformer.models.registry import find_model
from flowformer.models.vision import VisionModel
from flowformer.models.vision_blocks import Grid, VisionStage

__all__ = ["TimmVisionModel", "checkpoint_filter_fn"]

_NAMES = tuple(name for name in list_models() if find_model(name).__module__ == vision.__name__)
HEAD_STD = 0.02  # of a fresh head: timm's ViT and ours alike


class TimmVisionModel(VisionModel):
    """A :class:`flowformer.models.vision.VisionModel` with the methods of timm's models.

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
            raise TypeError("unknown argument dropout: timm calls it proj_drop_rate")
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
        """Return logits (batch, num_classes) of images (batch, channels, height, width); features without a head.

        Raises:
            TypeError: for a proxy of ``torch.fx``, which cannot trace checks of shapes; for AFT-full under
                ``torch.jit.trace``.
            ValueError: as :meth:`VisionModel.forward`.
        """
        if isinstance(images, Proxy):
            raise TypeError(
                "torch.fx cannot trace this model, whose steps depend on the image's size: use features_only=True,"
                " forward_intermediates, or forward hooks on the modules of feature_info"
            )
        tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] - it is documented
        if tracing and any(isinstance(module, AFTFull) for module in self.modules()):
            raise TypeError("torch.jit.trace cannot trace AFT-full attention: use torch.export")
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return all tokens after the final norm: (batch, tokens, dim), the class token first."""
        tokens = images
        for tap in self._taps(images):  # a list of all would keep tensors that are not needed any more
            tokens = tap[0]
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits from the output of :meth:`forward_features`; with ``pre_logits`` the input of the head."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Return the pooled tokens (batch, dim), or all, (batch, tokens, dim), for the pooling ``""``.

        Args:
            x: Tokens (batch, tokens, dim), the class token first.
            pool_type: As ``global_pool``, which it is if absent.

        Raises:
            ValueError: for pooling that the model does not have.
        """
        kind = self.global_pool if pool_type is None else self._pooling(pool_type)
        if kind == "token":
            return x[:, 0]
        return x[:, self.num_prefix_tokens :].mean(1) if kind == "avg" else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]] | dict[str, Any]:
        """Return intermediate feature maps: see ``feature_info``.

        Args:
            x: Images (batch, channels, height, width).
            indices: Which maps: the last so many, those of these numbers, or all.
            return_prefix_tokens: Return pairs of a map and its class token (batch, 1, dim), where there is one.
            norm: Apply the final norm to maps that it fits: those of the stage that it was made for.
            stop_early: Compute no more than is asked for.
            output_fmt: ``"NCHW"`` for (batch, dim, rows, columns), ``"NLC"`` for (batch, patches, dim).
            intermediates_only: Return nothing but the maps.
            output_dict: Return a dictionary: ``"image_intermediates"``, the maps; with ``return_prefix_tokens``
                ``"image_intermediates_prefix"``; without ``intermediates_only`` ``"image_features"``.

        Returns:
            :meth:`forward_features` and the list of maps, or the list alone, or the dictionary.

        Raises:
            ValueError: for an unknown format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.feature_info), cast("Any", indices))
        maps, prefixes, tokens, first = [], [], x, self.num_prefix_tokens
        for number, (tokens, grid) in enumerate(self._taps(x)):
            if number in wanted:
                fits = self._by_block or number == len(self.feature_info) - 1
                shown = self.norm(tokens) if norm and fits else tokens
                prefixes.append(shown[:, :first])
                patches = shown[:, first:]
                maps.append(patches if output_fmt == "NLC" else patches.transpose(1, 2).unflatten(2, grid).contiguous())
            if stop_early and number == last:
                break
        with_prefix = return_prefix_tokens and bool(first)
        if not output_dict:
            maps = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
            return maps if intermediates_only else (self.norm(tokens), maps)
        parts = {"image_intermediates": maps} | ({"image_intermediates_prefix": prefixes} if with_prefix else {})
        return parts if intermediates_only else {**parts, "image_features": self.norm(tokens)}

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return maps as DINO's models do: :meth:`forward_intermediates` with other names of its arguments.

        Args:
            x: Images (batch, channels, height, width).
            n: ``indices`` there.
            reshape: (batch, dim, rows, columns) instead of (batch, patches, dim).
            return_prefix_tokens: As there.
            norm: As there.
        """
        maps = self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )
        return cast("list[Any]", maps)

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
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for ``num_classes``, 0 for none; optionally change the pooling."""
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
        self.head.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove layers after the requested feature maps, and optionally the final norm and the head.

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
        """Switch gradient checkpointing of the blocks on or off."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Grid, patch_size: None = None) -> None:
        """Adapt the model to another image size: see :meth:`VisionModel.resize`.

        Raises:
            ValueError: for a size of patches, which are what they were made as.
        """
        if patch_size is not None:
            raise ValueError(f"the patch size of this model cannot be changed, got patch_size={patch_size}")
        self.resize(img_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by layer, for layer-wise learning rate decay."""
        blocks = [(r"^stages\.(\d+)\.embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {
            "stem": r"^class_token|^position|^stages\.0\.embed",
            "blocks": r"^stages\.(\d+)" if coarse else blocks,
        }


# ------------------------------------------------------------------------------------------------------------- weights


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: TimmVisionModel) -> dict[str, Tensor]:
    """Adapt weights to a model: of another image size, or of the published hierarchical Flowformer.

    Learned positions, and those of AFT-full and AFT-local, are interpolated from the grid of the images that the
    weights were trained on: that of ``input_size`` in ``model.pretrained_cfg`` if it fits, else a square.

    ``timm.create_model(..., pretrained=True, pretrained_cfg_overlay={"file": ...})`` calls it, and
    ``timm.models.load_checkpoint(model, file, filter_fn=checkpoint_filter_fn)``.

    Args:
        state_dict: Tensors by name, perhaps within ``"model"`` or ``"state_dict"``.
        model: The model to load them into.

    Raises:
        ValueError: for positions of a grid that is not known.
    """
    state = state_dict.get("model", state_dict)
    state = dict(state.get("state_dict", state))
    if "patch_embed.0.proj.weight" in state:
        state = vision_state_dict(state)
    own = model.state_dict()
    tables = [name for name in state if name in own and _POSITIONS.search(name)]
    if not tables:
        return state
    size = _trained_size(model, state[tables[0]].shape[0] - model.num_prefix_tokens, tables[0])
    for name in tables:
        stage = 0 if name == "position" else int(name.split(".")[1])
        old, new = (model.grids(pixels)[stage] for pixels in (size, model.img_size))
        if len(state[name]) != old[0] * old[1] + model.num_prefix_tokens:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, and its stage has {old[0]} x {old[1]} patches")
        state[name] = model.interpolate_positions(state[name], old, new, square=name.endswith("table"))
    return state


# Parameters with a row for each position; a table of AFT has a column for each as well.
_POSITIONS = re.compile(r"^position$|\.(position_table|query_positions|key_positions)$")


def _trained_size(model: TimmVisionModel, patches: int, name: str) -> Grid:
    """Height and width of the images that weights were trained on, by the patches of the first stage, ``name`` says."""
    stage = 0 if name == "position" else int(name.split(".")[1])
    known = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    side = math.isqrt(patches) * model.strides[stage]
    for size in (known and known[-2:], (side, side), model.img_size):
        if size and math.prod(model.grids((size[0], size[1]))[stage]) == patches:
            return size[0], size[1]
    raise ValueError(
        f"{name} has {patches} patches, which are no square: give the size of the images, pretrained_cfg_overlay="
        "{'input_size': (3, height, width)}"
    )


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


def _build_from(file: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with the weights of a file; errors of the file name it."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} not found")
    try:
        return build()
    except (SafetensorError, RuntimeError, EOFError, KeyError, AttributeError) as error:
        raise DataError(f"{file} could not be loaded: {error}") from error


def _register(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        # As timm has it: the last three blocks of a ViT, all stages of a pyramid.
        maps = None if name.startswith("flowformer_vision") else 3
        features = {"feature_cls": "getter", "out_indices": maps}
        build = partial(build_model_with_cfg, partial(TimmVisionModel, name), name, pretrained, feature_cfg=features,
                        pretrained_filter_fn=checkpoint_filter_fn, **options)  # fmt: skip
        file = (options.get("pretrained_cfg_overlay") or {}).get("file") if pretrained else None
        return build() if file is None else _build_from(file, build)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"``{name}`` for timm: see :func:`flowformer.create_model` and :class:`TimmVisionModel`."
    return register_with_timm(create)


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in _NAMES})
globals().update({name: _register(name) for name in _NAMES})
