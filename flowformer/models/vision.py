"""Image models: the hierarchical Flowformer, and DeiT with any attention.

Sources: thuml/Flowformer, Flowformer_CV (the ImageNet experiments of Wu et al., ICML 2022); Touvron et al., "Training
data-efficient image transformers", 2021 (DeiT); Zhai et al., "An Attention Free Transformer", 2021 (section 5.3,
table 7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import check_flag, check_integer, check_number, check_probability, check_sizes, describe
from flowformer.core.precision import FLOAT_DTYPES
from flowformer.mechanisms.aft import AFTFull, AFTLocal
from flowformer.models.initialization import draw_parameters, set_initializer, truncated_normal
from flowformer.models.registry import register_model
from flowformer.models.vision_blocks import NORM_EPS, Grid, VisionBlock, VisionStage

# Options of a mechanism on images, unless others are given: the preset of Flowformer_CV, the filters of AFT's table 7.
ATTENTION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "flow": {"preset": "vision"},
    "aft_conv": {"kernel_size": (11, 11)},
}


class VisionModel(nn.Module):
    """Image classifier: a hierarchy of stages with fewer and wider patches, or one stage as in ViT and DeiT.

    An image may have any size: learned positions, which exist for ``img_size``, are interpolated, and an image that
    is no whole number of patches is padded below and to the right. With a mechanism in linear time, cost is linear in
    the number of pixels. AFT-full and AFT-local have parameters for each position: for another size, :meth:`resize`.

    Args:
        num_classes: Number of classes; 0 for no head, as in timm.
        in_chans: Channels of an image.
        img_size: Side of the images that positions are made for, or (height, width), in pixels.
        patch_size: Side of a patch of the first stage, in pixels; later stages merge 2 x 2 patches.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads in each stage, or one number for all.
        mlp_ratio: Channels inside feed-forward networks, as a multiple of the stage's.
        attention: Name of the mechanism, :func:`flowformer.list_attentions`; or one for each stage.
        attention_options: Options of the mechanism, or a mapping for each stage; for ``"flow"`` the preset ``"vision"``
            unless one is given, for ``"aft_conv"`` filters of 11 x 11 patches.
        class_token: Classify by a class token instead of the mean over patches; requires a single stage.
        positions: Learned positions, added to the first stage's patches.
        layer_scale: As in :class:`VisionBlock`.
        drop_path_rate: Probability of stochastic depth in the last block; in those before it grows linearly from 0.
        dropout: As in :class:`VisionBlock`.
        weight_std: Standard deviation of fresh weights of linear layers (a truncated normal distribution); ``None`` for
            the root of 1 / inputs.
        features_only: Return the maps of all stages, and have no head.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: for sizes that do not fit, or a class token where a mechanism or the stages do not take one.
        TypeError: for an option that the mechanism does not have.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        img_size: int | Grid = 224,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int | Sequence[int] = 12,
        mlp_ratio: float = 4.0,
        attention: str | Sequence[str] = "flow",
        attention_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        class_token: bool = False,
        positions: bool = True,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        weight_std: float | None = 0.02,
        features_only: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, sizes in (("embed_dims", embed_dims), ("depths", depths)):
            if not isinstance(sizes, Sequence):
                raise TypeError(f"{name} must be a sequence with one number for each stage, got {sizes!r}")
        several = isinstance(num_heads, Sequence) and not isinstance(num_heads, str)
        heads = tuple(cast("Sequence[int]", num_heads)) if several else (num_heads,) * len(embed_dims)
        check_sizes(in_chans=in_chans, patch_size=patch_size)
        _check_image_size(img_size)
        _check_stages(num_classes, tuple(embed_dims), tuple(depths), heads)
        _check_numbers(mlp_ratio, weight_std, drop_path_rate, dropout)
        for name, flag in (("class_token", class_token), ("positions", positions), ("features_only", features_only)):
            check_flag(name, flag)
        if class_token and len(embed_dims) > 1:
            raise ValueError(f"class_token=True requires a single stage, got {len(embed_dims)}")
        self.num_classes, self.in_chans, self.features_only = num_classes, in_chans, features_only
        self.embed_dims = tuple(embed_dims)
        self.strides = tuple(patch_size * 2**stage for stage in range(len(embed_dims)))
        self.img_size = _pair(img_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        mechanisms = _attention_of_stages(attention, attention_options, len(embed_dims))
        block = partial(VisionBlock, layer_scale=layer_scale, dropout=dropout, **factory)
        rates = [drop_path_rate * number / max(sum(depths) - 1, 1) for number in range(sum(depths))]
        stages, before = [], in_chans
        for stage, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            length = math.prod(self.grids(self.img_size)[stage]) + class_token
            blocks = [
                block(
                    dim, heads[stage], round(mlp_ratio * dim), max_length=length, drop_path=rates.pop(0),
                    **mechanisms[stage],
                )
                for _ in range(depth)
            ]  # fmt: skip
            stages.append(VisionStage(before, dim, 2 if stage else patch_size, blocks, **factory))
            before = dim
        self.stages = nn.ModuleList(stages)
        if class_token and stages[0].blocks[0].attention.axes == "batch, height, width":
            raise ValueError(
                f"{mechanisms[0]['attention']} in two dimensions requires a grid of patches without class token"
            )
        self._build_ends(class_token, positions, factory)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                set_initializer(module, partial(truncated_normal, std=weight_std))
        self.reset_parameters()
        draw_parameters(self)

    def _build_ends(self, class_token: bool, positions: bool, factory: dict[str, Any]) -> None:
        """Make what comes before the blocks and after them."""
        first, last = self.embed_dims[0], self.embed_dims[-1]
        places = math.prod(self.grids(self.img_size)[0]) + class_token
        self.class_token = nn.Parameter(torch.empty(1, first, **factory)) if class_token else None
        self.position = nn.Parameter(torch.empty(places, first, **factory)) if positions else None
        headless = self.features_only or self.num_classes == 0
        self.norm = nn.Identity() if self.features_only else nn.LayerNorm(last, eps=NORM_EPS, **factory)
        self.head = nn.Identity() if headless else nn.Linear(last, self.num_classes, **factory)

    def reset_parameters(self) -> None:
        """Re-initialize positions and class token; submodules are reset separately."""
        for parameter in (self.class_token, self.position):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.embed_dims[-1]

    def grids(self, img_size: int | Grid) -> list[Grid]:
        """Return rows and columns of patches in each stage, for an image size in pixels."""
        height, width = _pair(img_size)
        return [(-(-height // stride), -(-width // stride)) for stride in self.strides]

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without weight decay in the published recipes, besides one-dimensional ones."""
        return {"position", "class_token"}

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return class logits of a batch of images.

        Args:
            images: (batch, in_chans, height, width).

        Returns:
            Logits (batch, num_classes), or (batch, channels of the last stage) without a head; with ``features_only``
            what :meth:`features` returns.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or another size where the mechanism has parameters for each position.
        """
        return self.features(images) if self.features_only else self.head(self.pool_features(images))

    def pool_features(self, images: Tensor) -> Tensor:
        """Return the input of the head, class token or mean over patches: (batch, channels of the last stage)."""
        tokens = self.norm(self._encode(images)[0])
        return tokens[:, 0] if self.class_token is not None else tokens.mean(1)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the feature map of each stage: (batch, channels, rows, columns), without the final norm."""
        return self._encode(images)[1]

    def _encode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The tokens of the last stage, and the maps of all."""
        tokens, maps = images, []
        for tokens, grid, ends in self._walk(images):
            if ends:
                maps.append(self._map(tokens, grid))
        return tokens, maps

    def _walk(self, images: Tensor) -> Iterator[tuple[Tensor, Grid, bool]]:
        """After each block: its tokens, their grid, and whether it is the last of its stage."""
        self._check(images)
        x = images
        for number, stage in enumerate(cast("list[VisionStage]", list(self.stages))):
            x = stage.patches(x)
            grid: Grid = (x.shape[-2], x.shape[-1])
            tokens = x.flatten(2).transpose(1, 2)
            if number == 0:
                tokens = self._place(tokens, grid)
            for left, block in enumerate(stage.blocks, 1 - len(stage.blocks)):
                tokens = self._run_block(block, tokens, grid)
                yield tokens, grid, left == 0
            x = self._map(tokens, grid)

    def _run_block(self, block: nn.Module, tokens: Tensor, grid: Grid) -> Tensor:
        return block(tokens, grid)

    def _map(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Patches as an image, (batch, dim, rows, columns), without the class token."""
        return tokens[:, self.class_token is not None :].transpose(1, 2).unflatten(2, grid)

    def _place(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Prepend the class token and add positions."""
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], 1, -1).to(tokens.dtype), tokens], 1)
        if self.position is None:
            return tokens
        return tokens + self._interpolate(self.position, self.grids(self.img_size)[0], grid)

    def _interpolate(self, table: Tensor, old: Grid, new: Grid) -> Tensor:
        """Positions (patches, and the class token's first, channels) of one grid for another."""
        if old == new:
            return table
        first = table[: self.class_token is not None]
        image = table[len(first) :].T.unflatten(1, old).unsqueeze(0)
        image = nn.functional.interpolate(image, new, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([first, image.squeeze(0).flatten(1).T])

    def interpolate_positions(self, table: Tensor, old: Grid, new: Grid, *, square: bool = False) -> Tensor:
        """Interpolate parameters of positions from one grid of patches to another.

        Args:
            table: (positions, channels), the class token's first where there is one.
            old: Rows and columns of patches that it is made for.
            new: Those that it shall be for.
            square: Whether the second axis is positions too.
        """
        rows = self._interpolate(table, old, new)
        return self._interpolate(rows.T, old, new).T.contiguous() if square else rows

    def resize(self, img_size: int | Grid) -> VisionModel:
        """Adapt the model to another image size in place: all learned positions are interpolated.

        Only AFT-full and AFT-local need it; what else there is takes images of any size as it is.

        Args:
            img_size: Side, or (height, width), in pixels.

        Returns:
            The model itself.
        """
        _check_image_size(img_size)
        before, after = self.grids(self.img_size), self.grids(img_size)
        with torch.no_grad():
            if self.position is not None:
                self.position = nn.Parameter(self._interpolate(self.position, before[0], after[0]))
            for stage, old, new in zip(self.stages, before, after, strict=True):
                for attention in stage.modules():
                    if isinstance(attention, AFTFull | AFTLocal):
                        self._resize_biases(attention, old, new)
        self.img_size = _pair(img_size)
        return self

    def _resize_biases(self, attention: AFTFull | AFTLocal, old: Grid, new: Grid) -> None:
        if attention.position_dim is None:
            table = self.interpolate_positions(attention.position_table, old, new, square=True)
            attention.position_table = nn.Parameter(table)
        else:
            attention.query_positions = nn.Parameter(self._interpolate(attention.query_positions, old, new))
            attention.key_positions = nn.Parameter(self._interpolate(attention.key_positions, old, new))
        attention.max_length = new[0] * new[1] + (self.class_token is not None)

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or images.dtype not in FLOAT_DTYPES:
            raise TypeError(f"images must be a tensor of floating-point dtype, got {describe(images)}")
        if images.ndim != 4 or images.shape[1] != self.in_chans or 0 in images.shape[1:]:
            raise ValueError(f"images must be (batch, {self.in_chans}, height, width), got {describe(images)}")
        size: Grid = (images.shape[-2], images.shape[-1])
        if self.grids(size) != self.grids(self.img_size):
            learner = next((one for one in self.modules() if getattr(one, "learns_positions", False)), None)
            if learner is not None:
                raise ValueError(
                    f"{type(learner).__name__} has learned positions for images of {self.img_size}, got {size}; "
                    f"resize({size}) interpolates them"
                )


def _pair(size: int | Grid) -> Grid:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height, width


def _check_image_size(size: Any) -> None:
    sides = size if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"img_size must be a number of pixels or (height, width), got {size!r}")
    for side in sides:
        check_sizes(img_size=side)


def _check_stages(num_classes: int, embed_dims: tuple, depths: tuple, heads: tuple) -> None:
    if not embed_dims or not len(embed_dims) == len(depths) == len(heads):
        raise ValueError(
            f"embed_dims, depths and num_heads must have one entry for each stage, got {embed_dims}, {depths}, {heads}"
        )
    check_integer("num_classes", num_classes)
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    check_sizes(num_classes=max(num_classes, 1))
    for name, sizes in (("embed_dims", embed_dims), ("depths", depths), ("num_heads", heads)):
        for size in sizes:
            check_sizes(**{name: size})


def _attention_of_stages(attention: Any, options: Any, stages: int) -> list[dict[str, Any]]:
    """The mechanism of each stage and its options, as arguments of its blocks."""
    names = [attention] * stages if isinstance(attention, str) else attention
    given = [options] * stages if options is None or isinstance(options, Mapping) else options
    for what, of_stages in (("attention", names), ("attention_options", given)):
        if not isinstance(of_stages, Sequence) or len(of_stages) != stages:
            raise ValueError(f"{what} must be one for all stages, or one for each of the {stages}, got {of_stages!r}")
    return [
        {"attention": name, "attention_options": {**ATTENTION_DEFAULTS.get(name, {}), **(own or {})}}
        for name, own in zip(names, given, strict=True)
    ]


def _check_numbers(mlp_ratio: float, weight_std: float | None, drop_path_rate: float, dropout: float) -> None:
    for name, value in (("mlp_ratio", mlp_ratio), ("weight_std", 1.0 if weight_std is None else weight_std)):
        check_number(name, value, at_most=1_000)
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name, value in (("drop_path_rate", drop_path_rate), ("dropout", dropout)):
        check_probability(name, value)


_LAYER_SCALE = 1e-5  # Flowformer_CV/flowformer.py


@register_model
def flowformer_vision_small(num_classes: int = 1000, **options: Any) -> VisionModel:
    """The published hierarchical Flowformer, 43.3 M parameters: 3, 3, 10 and 3 blocks of 96, 192, 384 and 768 channels.

    Source: Flowformer_CV/flowformer.py: patches of 4 x 4 pixels, 12 heads in every stage, LayerScale 1e-5 on the
    feed-forward networks, positions learned for images of 224 x 224. It is trained with ``drop_path_rate=0.2`` there;
    here, as in timm, the rate is 0 unless given.

    Args:
        num_classes: Number of classes.
        **options: As in :class:`VisionModel`.
    """
    return VisionModel(num_classes, **{"layer_scale": _LAYER_SCALE, **options})


@register_model
def flowformer_vision_tiny(num_classes: int = 1000, **options: Any) -> VisionModel:
    """A smaller hierarchical Flowformer (not published), 28.6 M parameters: 2, 2, 6 and 2 blocks.

    Args:
        num_classes: Number of classes.
        **options: As in :class:`VisionModel`.
    """
    return VisionModel(num_classes, **{"layer_scale": _LAYER_SCALE, "depths": (2, 2, 6, 2), **options})


@register_model
def flowformer_vision_base(num_classes: int = 1000, **options: Any) -> VisionModel:
    """A larger hierarchical Flowformer (not published), 76.5 M parameters: 128 to 1,024 channels, 16 heads.

    Args:
        num_classes: Number of classes.
        **options: As in :class:`VisionModel`.
    """
    shape = {"layer_scale": _LAYER_SCALE, "embed_dims": (128, 256, 512, 1024), "num_heads": 16}
    return VisionModel(num_classes, **{**shape, **options})


@register_model
def flowformer_vision_soft(num_classes: int = 1000, **options: Any) -> VisionModel:
    """The hierarchical Flowformer with the attention of SOFT (Lu et al., NeurIPS 2021), 41.8 M parameters.

    As in SOFT's own models (fudan-zvg/SOFT), whose grids are the same: landmarks of patches of 8 x 8, 4 x 4 and 2 x 2
    tokens in the first three stages, 49 for images of 224 x 224, and convolutions of the values 9, 5 and 3 wide;
    softmax attention in the last. Wu et al. (ICML 2022) compare with SOFT in this shape, and do not say with which
    options.

    Args:
        num_classes: Number of classes.
        **options: As in :class:`VisionModel`; another ``attention`` takes the place of both.
    """
    ratios = [2**left for left in range(len(options.get("embed_dims", range(4))) - 1, 0, -1)]
    shape: dict[str, Any] = {"layer_scale": _LAYER_SCALE}
    if "attention" not in options:
        shape["attention"] = ["soft"] * len(ratios) + ["softmax"]
        shape["attention_options"] = [*({"ratio": ratio, "value_conv": ratio + 1} for ratio in ratios), {}]
    return VisionModel(num_classes, **{**shape, **options})


@register_model
def flowformer_vision_micro(num_classes: int = 10, **options: Any) -> VisionModel:
    """A hierarchical Flowformer for images of 32 x 32 pixels (not published), 0.6 M parameters.

    Patches of 2 x 2 pixels, 2 blocks each of 32, 64 and 128 channels in 4 heads. Fresh weights are larger than the
    published ones (the root of 1 / inputs): with 0.02, narrow layers begin with attention that tells no token from
    another, and short training with them.

    Args:
        num_classes: Number of classes.
        **options: As in :class:`VisionModel`.
    """
    shape: dict[str, Any] = {
        "img_size": 32, "patch_size": 2, "embed_dims": (32, 64, 128), "depths": (2, 2, 2), "num_heads": 4,
        "weight_std": None,
    }  # fmt: skip
    return VisionModel(num_classes, **{**shape, **options})


def _deit(dim: int, attention: str, attention_options: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """DeiT of 12 blocks with heads of 64 channels, patches of 16 x 16 pixels, a class token and learned positions."""
    published = {
        "patch_size": 16, "embed_dims": (dim,), "depths": (12,), "num_heads": dim // 64, "class_token": True,
        "attention": attention, "attention_options": attention_options,
    }  # fmt: skip
    return {**published, **shape}


def _register_deit(size: str, dim: int, mechanism: str, options: Mapping[str, Any], what: str) -> None:
    def build(num_classes: int = 1000, **changes: Any) -> VisionModel:
        return VisionModel(num_classes, **_deit(dim, mechanism, options, changes))

    build.__name__ = build.__qualname__ = f"deit_{size}_{mechanism}"
    build.__doc__ = f"""DeiT {size} with {what}: 12 blocks of {dim} channels, heads of 64.

    Args:
        num_classes: Number of classes.
        **changes: As in :class:`VisionModel`.
    """
    register_model(build)


def _register_aft_conv(size: str, dim: int, kernel: int, heads: int) -> None:
    def build(num_classes: int = 1000, **changes: Any) -> VisionModel:
        shape = {"num_heads": heads, "class_token": False, "positions": False, **changes}
        return VisionModel(num_classes, **_deit(dim, "aft_conv", {"kernel_size": (kernel, kernel)}, shape))

    build.__name__ = build.__qualname__ = f"aft_conv_{size}_{kernel}_{heads}"
    build.__doc__ = f"""AFT-conv {size}, kernel {kernel}, {heads} heads (Zhai et al., 2021, table 7).

    DeiT's 12 blocks of {dim} channels without class token and positions, which filters know by themselves; the mean
    over patches is classified.

    Args:
        num_classes: Number of classes.
        **changes: As in :class:`VisionModel`.
    """
    register_model(build)


for _size, _dim in (("tiny", 192), ("small", 384)):
    _register_deit(_size, _dim, "flow", {}, "Flow-Attention (Wu et al., ICML 2022)")
    # As published, outputs grow with the number of tokens: divided by it, a model keeps to its scale at any resolution.
    _register_deit(_size, _dim, "mobile", {"normalize": True}, "Mobile-Attention (Yao et al., ICML 2024)")
    _register_deit(_size, _dim, "aft_full", {}, "AFT-full, position factors of 128 channels (Zhai et al., 2021)")
for _row in (("tiny", 192, 11, 32), ("tiny", 192, 11, 192), ("small", 384, 11, 16), ("small", 384, 11, 384),
             ("small", 384, 15, 384)):  # fmt: skip
    _register_aft_conv(*_row)
