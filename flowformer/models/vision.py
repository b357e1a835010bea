"""Models of images: the hierarchical Flowformer, and DeiT with any attention.

Sources: thuml/Flowformer, Flowformer_CV (the ImageNet experiments of Wu et al., ICML 2022); Touvron et al., "Training
data-efficient image transformers", 2021 (DeiT); Zhai et al., "An Attention Free Transformer", 2021 (section 5.3,
table 7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowformer.core.checks import describe
from flowformer.mechanisms import create_attention
from flowformer.mechanisms.aft import AFTFull, AFTLocal
from flowformer.models.registry import register_model

NORM_EPS = 1e-6  # of every LayerNorm: Flowformer_CV and DeiT alike

# Options of a mechanism on images, unless others are given: the preset of Flowformer_CV, the filters of AFT's table 7.
ATTENTION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "flow": {"preset": "vision"},
    "aft_conv": {"kernel_size": (11, 11)},
}

Grid = tuple[int, int]  # rows and columns of patches


class DropPath(nn.Module):
    """Leaves out what a block adds, for each image with a probability, in training (Huang et al., 2016).

    Args:
        probability: Of leaving out; what stays is scaled up, so that the mean is as without.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Drop rows of (batch, ...)."""
        if not self.training or not self.probability:
            return x
        kept = 1 - self.probability
        mask = torch.empty(x.shape[0], *(1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(kept)
        return x * (mask / kept)

    def extra_repr(self) -> str:
        """The probability, for printing."""
        return f"probability={self.probability}"


class VisionBlock(nn.Module):
    """A pre-norm block: attention, and a feed-forward network under LayerScale, each added to its input.

    Source: the block of Flowformer_CV/flowformer.py, which scales the feed-forward network only; without
    ``layer_scale`` it is DeiT's.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        ffn_dim: Channels inside the feed-forward network.
        attention: Name of the mechanism.
        attention_options: Options of the mechanism.
        max_length: Longest sequence, for mechanisms that need to know.
        layer_scale: Initial factor of the feed-forward network's channels; ``None`` for no factors.
        drop_path: Probability of leaving out each of the two, in training.
        dropout: Probability, on the attention's output and after both layers of the feed-forward network.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = create_attention(
            attention, dim, num_heads, max_length=max_length, **{"dropout": dropout, **(attention_options or {})}
        )
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.activation = nn.GELU()
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path, self.dropout = DropPath(drop_path), nn.Dropout(dropout)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Transform (batch, tokens, dim), the tokens being the patches of ``grid``, and maybe a class token first."""
        x = x + self.drop_path(self._attend(self.norm1(x), grid))
        out = self.dropout(self.linear2(self.dropout(self.activation(self.linear1(self.norm2(x))))))
        return x + self.drop_path(out if self.gamma is None else out * self.gamma)

    def _attend(self, x: Tensor, grid: Grid) -> Tensor:
        if self.attention.axes != "batch, height, width":
            return self.attention(x)
        return self.attention(x.unflatten(1, grid)).flatten(1, 2)


class VisionStage(nn.Module):
    """Patches of an image, or of the stage before, embedded by a convolution, and blocks.

    Args:
        channels: Channels of the input.
        dim: Channels of the stage.
        patch_size: Side of a patch.
        blocks: The blocks.
    """

    def __init__(self, channels: int, dim: int, patch_size: int, blocks: Sequence[VisionBlock]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(blocks)

    def patches(self, x: Tensor) -> Tensor:
        """Embed (batch, channels, height, width), padded with zeros to whole patches: (batch, dim, rows, columns)."""
        height, width = x.shape[-2:]
        missing = (-width % self.patch_size, -height % self.patch_size)
        return self.embed(nn.functional.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x)


class VisionModel(nn.Module):
    """Images to class scores: stages of blocks on ever fewer, ever wider patches, or one stage as in ViT and DeiT.

    An image may have any size: learned positions, which exist for ``image_size``, are interpolated, and an image that
    is no whole number of patches is padded below and to the right. With a mechanism in linear time, cost is linear in
    the number of pixels. AFT-full and AFT-local have parameters for each position: for another size, :meth:`resize`.

    Args:
        classes: Number of classes.
        channels: Channels of an image.
        image_size: Side of the images that positions are made for, or (height, width), in pixels.
        patch_size: Side of a patch of the first stage, in pixels; later stages take 2 x 2 patches together.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads in each stage, or one number for all.
        ffn_ratio: Channels inside feed-forward networks, as a multiple of the stage's.
        attention: Name of the mechanism: :func:`flowformer.list_attentions`.
        attention_options: Options of the mechanism; for ``"flow"`` the preset ``"vision"`` unless one is given, for
            ``"aft_conv"`` filters of 11 x 11 patches.
        class_token: Classify by a token of its own, and not by the mean over patches; with one stage only.
        positions: Learned positions, added to the first stage's patches.
        layer_scale: As in :class:`VisionBlock`.
        drop_path: As in :class:`VisionBlock`, of the last block; in those before it grows linearly from 0.
        dropout: As in :class:`VisionBlock`.
        weight_std: Standard deviation of fresh weights of linear layers (a truncated normal distribution); ``None`` for
            the root of 1 / inputs.
        features_only: Return the maps of all stages, and have no head.

    Raises:
        ValueError: for sizes that do not fit, or a class token where a mechanism or the stages do not take one.
        TypeError: for an option that the mechanism does not have.
    """

    def __init__(
        self,
        classes: int = 1000,
        *,
        channels: int = 3,
        image_size: int | Grid = 224,
        patch_size: int = 4,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int | Sequence[int] = 12,
        ffn_ratio: float = 4.0,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        class_token: bool = False,
        positions: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        weight_std: float | None = 0.02,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        heads = (num_heads,) * len(dims) if isinstance(num_heads, int) else tuple(num_heads)
        _check_sizes(classes, channels, patch_size, tuple(dims), tuple(depths), heads, drop_path)
        if class_token and len(dims) > 1:
            raise ValueError(f"a class token goes with one stage, got {len(dims)}: class_token=False")
        self.classes, self.channels, self.features_only = classes, channels, features_only
        self.dims = tuple(dims)
        self.strides = tuple(patch_size * 2**stage for stage in range(len(dims)))
        self.image_size = _pair(image_size)
        options = {**ATTENTION_DEFAULTS.get(attention, {}), **(attention_options or {})}
        rates = [drop_path * block / max(sum(depths) - 1, 1) for block in range(sum(depths))]
        stages = []
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            grid = self.grids(self.image_size)[stage]
            blocks = [
                VisionBlock(
                    dim, heads[stage], round(ffn_ratio * dim), attention=attention, attention_options=options,
                    max_length=grid[0] * grid[1] + class_token, layer_scale=layer_scale, drop_path=rates.pop(0),
                    dropout=dropout,
                )
                for _ in range(depth)
            ]  # fmt: skip
            if class_token and blocks[0].attention.axes == "batch, height, width":
                raise ValueError(f"{attention} in two dimensions sees a grid of patches, and no class token")
            before, side = (channels, patch_size) if stage == 0 else (dims[stage - 1], 2)
            stages.append(VisionStage(before, dim, side, blocks))
        self.stages = nn.ModuleList(stages)
        rows, columns = self.grids(self.image_size)[0]
        self.class_token = nn.Parameter(torch.zeros(1, dims[0])) if class_token else None
        self.position = nn.Parameter(torch.zeros(rows * columns + class_token, dims[0])) if positions else None
        self.norm = nn.Identity() if features_only else nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.head = nn.Identity() if features_only else nn.Linear(dims[-1], classes)
        self._init(weight_std)

    def _init(self, weight_std: float | None) -> None:
        for parameter in (self.class_token, self.position):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = weight_std or 1 / math.sqrt(module.in_features)
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def grids(self, image_size: int | Grid) -> list[Grid]:
        """Rows and columns of patches in each stage, for images of a size in pixels."""
        height, width = _pair(image_size)
        return [(-(-height // stride), -(-width // stride)) for stride in self.strides]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides those of one axis, that weight decay leaves alone in the published recipes."""
        return {"position", "class_token"}

    def forward(self, images: Tensor) -> Any:
        """Class scores of a batch of images.

        Args:
            images: (batch, channels, height, width).

        Returns:
            Logits (batch, classes); with ``features_only`` what :meth:`features` returns.

        Raises:
            ValueError: for another shape, or another size where the mechanism has parameters for each position.
        """
        return self.features(images) if self.features_only else self.head(self.pool_features(images))

    def pool_features(self, images: Tensor) -> Tensor:
        """What the head sees, the class token or the mean over patches: (batch, channels of the last stage)."""
        tokens = self.norm(self._encode(images)[0])
        return tokens[:, 0] if self.class_token is not None else tokens.mean(1)

    def features(self, images: Tensor) -> list[Tensor]:
        """The map of each stage: (batch, channels, rows, columns), without the final norm."""
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
            tokens = torch.cat([self.class_token.expand(len(tokens), 1, -1).to(tokens.dtype), tokens], 1)
        if self.position is None:
            return tokens
        return tokens + self._interpolate(self.position, self.grids(self.image_size)[0], grid)

    def _interpolate(self, table: Tensor, old: Grid, new: Grid) -> Tensor:
        """Positions (patches, and the class token's first, channels) of one grid for another."""
        if old == new:
            return table
        first = table[: self.class_token is not None]
        image = table[len(first) :].T.unflatten(1, old).unsqueeze(0)
        image = nn.functional.interpolate(image, new, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([first, image.squeeze(0).flatten(1).T])

    def resize(self, image_size: int | Grid) -> VisionModel:
        """Make the model one for another size of images, in place: everything learned of positions is interpolated.

        Only AFT-full and AFT-local need it; what else there is takes images of any size as it is.

        Args:
            image_size: Side, or (height, width), in pixels.

        Returns:
            The model itself.
        """
        before, after = self.grids(self.image_size), self.grids(image_size)
        with torch.no_grad():
            if self.position is not None:
                self.position = nn.Parameter(self._interpolate(self.position, before[0], after[0]))
            for stage, old, new in zip(self.stages, before, after, strict=True):
                for attention in stage.modules():
                    if isinstance(attention, AFTFull | AFTLocal):
                        self._resize_biases(attention, old, new)
        self.image_size = _pair(image_size)
        return self

    def _resize_biases(self, attention: AFTFull | AFTLocal, old: Grid, new: Grid) -> None:
        if attention.position_dim is None:
            rows = self._interpolate(attention.position_table, old, new)
            attention.position_table = nn.Parameter(self._interpolate(rows.T, old, new).T.contiguous())
        else:
            attention.query_positions = nn.Parameter(self._interpolate(attention.query_positions, old, new))
            attention.key_positions = nn.Parameter(self._interpolate(attention.key_positions, old, new))
        attention.max_length = new[0] * new[1] + (self.class_token is not None)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.channels or 0 in images.shape:
            raise ValueError(f"images must be (batch, {self.channels}, height, width), got {describe(images)}")
        size: Grid = (images.shape[-2], images.shape[-1])
        if self.grids(size) != self.grids(self.image_size):
            learner = next((one for one in self.modules() if getattr(one, "learns_positions", False)), None)
            if learner is not None:
                raise ValueError(
                    f"{type(learner).__name__} has learned positions for images of {self.image_size}, got {size}; "
                    f"resize({size}) interpolates them"
                )


def _pair(size: int | Grid) -> Grid:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"an image must have at least one pixel, got {height} x {width}")
    return height, width


def _check_sizes(
    classes: int, channels: int, patch_size: int, dims: tuple, depths: tuple, heads: tuple, drop_path: float
) -> None:
    if not dims or not len(dims) == len(depths) == len(heads):
        raise ValueError(f"dims, depths and num_heads must be as many as stages, got {dims}, {depths}, {heads}")
    if min(classes, channels, patch_size, *dims, *depths) < 1:
        raise ValueError(
            f"classes, channels, patch_size, dims and depths must be positive, got {classes}, {channels}, "
            f"{patch_size}, {dims}, {depths}"
        )
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path}")


# Both LayerScale and drop path as Flowformer_CV/flowformer.py has them.
_HIERARCHICAL: Mapping[str, Any] = {"layer_scale": 1e-5, "drop_path": 0.2}


@register_model
def flowformer_vision_small(classes: int = 1000, **options: Any) -> VisionModel:
    """The published hierarchical Flowformer, 43.3 M parameters: 3, 3, 10 and 3 blocks of 96, 192, 384 and 768 channels.

    Source: Flowformer_CV/flowformer.py: patches of 4 x 4 pixels, 12 heads in every stage, LayerScale 1e-5 on the
    feed-forward networks, drop path 0.2, positions learned for images of 224 x 224.

    Args:
        classes: Number of classes.
        **options: As in :class:`VisionModel`.
    """
    return VisionModel(classes, **{**_HIERARCHICAL, **options})


@register_model
def flowformer_vision_tiny(classes: int = 1000, **options: Any) -> VisionModel:
    """A smaller hierarchical Flowformer, a shape of our own, 28.6 M parameters: 2, 2, 6 and 2 blocks.

    Args:
        classes: Number of classes.
        **options: As in :class:`VisionModel`.
    """
    return VisionModel(classes, **{**_HIERARCHICAL, "depths": (2, 2, 6, 2), "drop_path": 0.1, **options})


@register_model
def flowformer_vision_base(classes: int = 1000, **options: Any) -> VisionModel:
    """A larger hierarchical Flowformer, a shape of our own, 76.5 M parameters: 128 to 1,024 channels, 16 heads.

    Args:
        classes: Number of classes.
        **options: As in :class:`VisionModel`.
    """
    shape = {"dims": (128, 256, 512, 1024), "num_heads": 16, "drop_path": 0.3}
    return VisionModel(classes, **{**_HIERARCHICAL, **shape, **options})


@register_model
def flowformer_vision_micro(classes: int = 10, **options: Any) -> VisionModel:
    """A hierarchical Flowformer for pictures of 32 x 32 pixels, a shape of our own, 0.6 M parameters.

    Patches of 2 x 2 pixels, 2 blocks each of 32, 64 and 128 channels in 4 heads. Fresh weights are larger than the
    published ones (the root of 1 / inputs): with 0.02, narrow layers begin with attention that tells no token from
    another, and short training with them.

    Args:
        classes: Number of classes.
        **options: As in :class:`VisionModel`.
    """
    shape: dict[str, Any] = {
        "image_size": 32, "patch_size": 2, "dims": (32, 64, 128), "depths": (2, 2, 2), "num_heads": 4,
        "layer_scale": None, "drop_path": 0.0, "weight_std": None,
    }  # fmt: skip
    return VisionModel(classes, **{**shape, **options})


def _deit(dim: int, attention: str, attention_options: Mapping[str, Any], shape: Mapping[str, Any]) -> Any:
    """DeiT of 12 blocks with heads of 64 channels, patches of 16 x 16 pixels, a class token and learned positions."""
    published = {
        "patch_size": 16, "dims": (dim,), "depths": (12,), "num_heads": dim // 64, "class_token": True,
        "drop_path": 0.1, "attention": attention, "attention_options": attention_options,
    }  # fmt: skip
    return {**published, **shape}


def _register_deit(size: str, dim: int, mechanism: str, options: Mapping[str, Any], what: str) -> None:
    def build(classes: int = 1000, **changes: Any) -> VisionModel:
        return VisionModel(classes, **_deit(dim, mechanism, options, changes))

    build.__name__ = build.__qualname__ = f"deit_{size}_{mechanism}"
    build.__doc__ = f"""DeiT {size} with {what}: 12 blocks of {dim} channels, heads of 64.

    Args:
        classes: Number of classes.
        **changes: As in :class:`VisionModel`.
    """
    register_model(build)


def _register_aft_conv(size: str, dim: int, kernel: int, heads: int) -> None:
    def build(classes: int = 1000, **changes: Any) -> VisionModel:
        shape = {"num_heads": heads, "class_token": False, "positions": False, **changes}
        return VisionModel(classes, **_deit(dim, "aft_conv", {"kernel_size": (kernel, kernel)}, shape))

    build.__name__ = build.__qualname__ = f"aft_conv_{size}_{kernel}_{heads}"
    build.__doc__ = f"""AFT-conv {size}, kernel {kernel}, {heads} heads (Zhai et al., 2021, table 7).

    DeiT's 12 blocks of {dim} channels without class token and positions, which filters know by themselves; the mean
    over patches is classified.

    Args:
        classes: Number of classes.
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
