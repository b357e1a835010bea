"""Replace the attention of a model: timm's ViT, DeiT and PVT-v2, and ``torch.nn.MultiheadAttention``.

timm is not imported: its modules are known by what they are made of.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.core.checks import describe
from flowformer.mechanisms import Attention, Mechanism, create_attention, find_attention
from flowformer.mechanisms.aft import AFTConv
from flowformer.models.swap.multihead_attention import MultiheadSwap, find_multiheads
from flowformer.models.vision import ATTENTION_DEFAULTS

NEW_STD = 0.02  # of fresh projections, as timm's ViT begins its own


@dataclass(frozen=True)
class SwapReport:
    """Report of kept, dropped and new weights. Print it for a short table.

    Attributes:
        attention: The mechanism that the model has now.
        modules: Names of the modules that were replaced.
        kept: Parameters of the model as it is now that have the values they had: numbers of weights by name.
        dropped: What is gone of the model as it was, likewise. A part of a joint projection is named
            ``qkv.weight[key]``; dropout of attention weights is here too, though it has none.
        new: Parameters of the model as it is now that are fresh, likewise.
    """

    attention: str
    modules: tuple[str, ...]
    kept: Mapping[str, int]
    dropped: Mapping[str, int]
    new: Mapping[str, int]

    def __str__(self) -> str:
        """Format counts of weights, and dropped and new ones, in one line for all blocks."""
        lines = [f"{self.attention} in {len(self.modules)} attention modules"]
        for label in ("kept", "dropped", "new"):
            weights = getattr(self, label)
            lines.append(f"{label:8}{sum(weights.values()):12,} weights of {len(weights)} tensors")
            if label != "kept":
                lines += [f"{count:20,}   {name}" for name, count in _join_blocks(weights).items()]
        return "\n".join(lines)


def _join_blocks(weights: Mapping[str, int]) -> dict[str, int]:
    """Numbers of weights, those of names that differ in numbers of blocks and stages added up."""
    joined: dict[str, int] = {}
    for name, count in weights.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        joined[pattern] = joined.get(pattern, 0) + count
    return joined


def swap_attention(
    model: nn.Module,
    attention: str,
    *,
    modules: str = "*",
    num_heads: int | None = None,
    spatial_reduction: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> SwapReport:
    """Replace the attention of a model in place, and keep all weights that have a counterpart.

    Known are the attention of timm's ViT, DeiT and PVT-v2, and ``torch.nn.MultiheadAttention`` in any model, such as
    torchvision's ViT or ``torch.nn.Transformer``.

    ``torch.nn.MultiheadAttention`` becomes a :class:`flowformer.models.swap.DropInMultiheadAttention` with the same
    parameters, by the same names. It is called as before, and is causal if the call requests it. Dropout of
    attention weights, and the keys that ``add_bias_kv`` and ``add_zero_attn`` append, go. As ``multihead_attn`` of a
    ``torch.nn.TransformerDecoderLayer``, Flow-Attention lets all queries compete for the memory, later ones too: in a
    causal decoder, replace ``self_attn`` alone (``modules="*self_attn"``).

    In models of timm, all that is not attention is kept, and so are the four projections; but AFT-conv has a key for
    each head and not for each channel, and its query and key projections begin anew, as in the transfer from DeiT in
    its paper (Zhai et al., 2021, ImageNet). With ``"softmax"`` a model computes what it did.

    - AFT-conv over images uses patches only, without position embedding. A ViT loses class and register tokens and
      its position embedding, and pools by the mean where the class token was read. ``kernel_size`` is (11, 11) unless
      given; one number makes it AFT-conv over the sequence of tokens, and no token is lost.
    - AFT-full and AFT-local learn biases for the first ``max_length`` tokens: unless given, those of an image of
      ``img_size``. In images of other sizes a bias belongs to another pair of patches.
    - Flow-Attention has the preset ``"vision"`` unless another is given.
    - Mobile-Attention's outputs grow with the number of tokens, as published, unless ``normalize=True`` is given.

    Norms of queries and keys, a norm of what attention gives, gates, and dropout of attention weights have no
    counterpart: they are dropped and reported. ``"softmax"`` refuses a model with any of these but the last. Whatever
    is refused, the model is left as it was.

    Args:
        model: The model, trained or not.
        attention: One of :func:`flowformer.list_attentions`.
        modules: Pattern of the names of the modules to replace, such as ``"*.self_attn"`` or ``"decoder.*"``.
        num_heads: Heads, which divide the width of the projections; as many as there were if absent.
        spatial_reduction: In PVT-v2, ``"keep"`` has queries look at a reduced map as before, ``"drop"`` at all tokens.
            If absent it is dropped for mechanisms in linear time, and kept for others.
        img_size: In timm's models, pixels of the largest images, (height, width) or one number for both;
            those of the model if absent. For mechanisms that learn positions.
        **options: Options of the mechanism's module; ``max_length`` where it learns positions and ``img_size`` does
            not tell.

    Returns:
        What was kept, what is gone, and what is new.

    Warns:
        UserWarning: where queries of a ``torch.nn.TransformerDecoderLayer`` would compete for the memory.

    Raises:
        TypeError: for a model that is none, or an option that the mechanism does not have.
        ValueError: for an unknown mechanism, a model without an attention that is known, sizes that do not fit, or what
            the mechanism cannot do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_attention: model must be a torch.nn.Module, got {type(model).__name__}")
    mechanism = find_attention(attention)
    if options.get("causal"):
        raise ValueError(
            "swap_attention: causal is not supported for patches of images; in place of "
            "torch.nn.MultiheadAttention, attention is causal if a call requests it"
        )
    sources, multiheads = _find(model, modules), find_multiheads(model, modules)
    _check_found(model, modules, bool(sources or multiheads))
    _check_reduction(spatial_reduction, sources, mechanism)
    if multiheads and img_size is not None:
        raise ValueError(f"swap_attention: img_size does not tell the tokens of {multiheads[0][0][0]}: give max_length")
    keep = not mechanism.can("linear time") if spatial_reduction is None else spatial_reduction == "keep"
    swaps: list[_Swap | MultiheadSwap] = []
    for names, old in multiheads:
        swaps.append(MultiheadSwap.build(model, names, old, mechanism, num_heads, options))
    options = {**ATTENTION_DEFAULTS.get(attention, {}), **options}
    for source in sources:
        limit = options.get("max_length", _count_tokens(model, source, img_size))
        built = _build(source, attention, num_heads, {**options, "max_length": limit})
        swaps.append(_Swap(source, built, source.reduces and keep))
    return _carry_out(model, attention, swaps)


def _carry_out(model: nn.Module, attention: str, swaps: list[_Swap | MultiheadSwap]) -> SwapReport:
    before, dropped, new, grid = _count_weights(model), {}, set(), None
    if any(isinstance(swap, _Swap) and swap.sees_patches_only for swap in swaps):
        gone, grid = _leave_patches(model)
        dropped = {name: before[name] for name in gone}
    for swap in swaps:
        fresh, gone = swap.carry_out(model, grid)
        new.update(fresh)
        dropped |= gone
    now = _count_weights(model)
    return SwapReport(
        attention, tuple(swap.name for swap in swaps), dropped=dropped,
        kept={name: count for name, count in now.items() if name not in new},
        new={name: count for name, count in now.items() if name in new},
    )  # fmt: skip


def _count_weights(model: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class _Kind:
    """One of timm's attentions.

    Attributes:
        parts: Where our projections find their weights: a module of timm's, and which of how many parts of its rows.
        others: Further modules that it has.
        options: Modules that it may have.
        arguments: What its forward may take after x.
    """

    parts: Mapping[str, tuple[str, int, int]]
    others: frozenset[str]
    options: frozenset[str]
    arguments: frozenset[str]

    def matches(self, module: nn.Module) -> bool:
        """Whether a module has the modules and arguments of this kind, and nothing else that could matter."""
        linear = {name for name, _, _ in self.parts.values()}
        wanted, children = linear | self.others, dict(module.named_children())
        if not wanted <= set(children) <= wanted | self.options:
            return False
        arguments = list(inspect.signature(module.forward).parameters)[1:]
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        linears = all(isinstance(children[name], nn.Linear) for name in linear)
        return linears and not own and set(arguments) <= self.arguments


_DROPOUT = frozenset({"attn_drop", "proj_drop"})
# timm.layers.Attention: attention(x, attn_mask=None, is_causal=False)
_FUSED = _Kind(
    {"q_proj": ("qkv", 0, 3), "k_proj": ("qkv", 1, 3), "v_proj": ("qkv", 2, 3), "out_proj": ("proj", 0, 1)},
    _DROPOUT, frozenset({"q_norm", "k_norm", "norm", "gate"}), frozenset({"attn_mask", "is_causal"}),
)  # fmt: skip
# timm.models.pvt_v2.Attention: attention(x, feat_size)
_SPATIAL = _Kind(
    {"q_proj": ("q", 0, 1), "k_proj": ("kv", 0, 2), "v_proj": ("kv", 1, 2), "out_proj": ("proj", 0, 1)},
    _DROPOUT, frozenset({"sr", "norm", "pool", "act"}), frozenset({"feat_size"}),
)  # fmt: skip
_ROWS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


@dataclass(frozen=True)
class _Source:
    """An attention of timm, and its name in the model."""

    name: str
    module: Any
    kind: _Kind

    @property
    def reduces(self) -> bool:
        """Whether queries look at a reduced map."""
        return self.kind is _SPATIAL and self.module.sr is not None

    def optional_weights(self) -> dict[str, int]:
        """Parameters of the modules that not all of the kind have: numbers of weights by name."""
        names = [name for name, _ in self.module.named_children() if name in self.kind.options]
        parameters = [(name, pair) for name in names for pair in getattr(self.module, name).named_parameters()]
        return {f"{self.name}.{name}.{key}": parameter.numel() for name, (key, parameter) in parameters}


def _find(model: nn.Module, pattern: str) -> list[_Source]:
    """Attention of timm whose name matches a pattern."""
    named = [(name, module) for name, module in model.named_modules() if fnmatchcase(name, pattern)]
    return [_Source(*pair, kind) for pair in named for kind in (_FUSED, _SPATIAL) if kind.matches(pair[1])]


def _check_found(model: nn.Module, pattern: str, found: bool) -> None:
    if not found:
        where = "" if pattern == "*" else f" with a name like {pattern!r}"
        raise ValueError(
            f"swap_attention: {type(model).__name__} has no supported attention{where}; supported are timm's ViT, DeiT "
            "and PVT-v2, and torch.nn.MultiheadAttention, unless already replaced"
        )


def _check_reduction(wanted: str | None, sources: list[_Source], mechanism: Mechanism) -> None:
    if wanted not in (None, "keep", "drop"):
        raise ValueError(f"swap_attention: spatial_reduction must be 'keep', 'drop' or None, got {wanted!r}")
    if wanted is not None and not any(source.reduces for source in sources):
        raise ValueError(f"swap_attention: spatial_reduction={wanted!r}, but this model has no spatial reduction")
    if wanted == "keep" and not mechanism.can("cross"):
        raise ValueError(
            f"swap_attention: {mechanism.name} requires as many keys as queries; spatial_reduction='keep' leaves fewer"
        )


def _count_tokens(model: Any, source: _Source, img_size: int | tuple[int, int] | None) -> int | None:
    """Tokens that an attention sees in an image, where the model tells."""
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if source.kind is _FUSED:
        patches = getattr(model, "patch_embed", None)
        count = getattr(patches, "num_patches", None)
        if patches is not None and size is not None:
            count = math.prod(patches.dynamic_feat_size(size))
        return None if count is None else count + getattr(model, "num_prefix_tokens", 0)
    size = size or getattr(model, "pretrained_cfg", {}).get("input_size", (0,))[1:]
    stages = [info for info in getattr(model, "feature_info", ()) if source.name.startswith(f"{info['module']}.")]
    return math.prod(math.ceil(side / stages[0]["reduction"]) for side in size) if size and stages else None


# ------------------------------------------------------------------------------------------------------ what takes over


class SwappedAttention(nn.Module):
    """An attention module with the interface of timm's ViT attention.

    Args:
        attention: The attention.
        grid: Rows and columns of patches, for attention over images.
    """

    def __init__(self, attention: Attention, grid: Grid | None = None) -> None:
        super().__init__()
        self.attention, self.grid = attention, grid

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among tokens x (batch, tokens, dim).

        Raises:
            ValueError: for a mask, which this attention would have to ignore, or tokens that are not those of a grid.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(
                f"{type(self.attention).__name__} in place of timm's attention does not support masks: "
                f"got attn_mask {describe(attn_mask)} and is_causal {is_causal}"
            )
        return self.attention(x) if self.grid is None else _attend_on_grid(self.attention, x, self.grid.size)


class SwappedSpatialAttention(nn.Module):
    """An attention module with the interface of timm's PVT-v2 attention.

    Args:
        attention: The attention.
        reduction: What reduces the map that queries look at, by timm's names for it: ``sr`` and ``norm``, and where its
            attention is called linear ``pool`` and ``act``. Empty for attention to all tokens.
    """

    def __init__(self, attention: Attention, reduction: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.attention = attention
        self.pool, self.sr, self.norm, self.act = (reduction.get(name) for name in ("pool", "sr", "norm", "act"))

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Attend from tokens x (batch, height * width, dim) of a (height, width) map to it, or to its reduction."""
        if self.attention.axes != "batch, length":
            return _attend_on_grid(self.attention, x, feat_size)
        return self.attention(x, self._reduce(x, feat_size) if self.sr is not None else None)

    def _reduce(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, tuple(feat_size))
        for step in (self.pool, self.sr):
            maps = maps if step is None else step(maps)
        x = maps.flatten(2).transpose(1, 2)
        for step in (self.norm, self.act):
            x = x if step is None else step(x)
        return x


def _attend_on_grid(attention: nn.Module, x: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None or math.prod(size) != x.shape[1]:
        raise ValueError(f"{type(attention).__name__}: x must contain the tokens of a grid {size}, got {describe(x)}")
    return attention(x.unflatten(1, tuple(size))).flatten(1, 2)


class Grid:
    """Rows and columns of patches in the latest images of a model, shared by all its attention modules.

    Attributes:
        size: (rows, columns); ``None`` before the first image.
    """

    size: tuple[int, int] | None = None

    def __call__(self, patch_embed: Any, inputs: tuple[Tensor, ...]) -> None:
        """Read the grid from images (batch, channels, height, width), as a forward pre-hook of the patch embedding."""
        self.size = tuple(patch_embed.dynamic_feat_size(tuple(inputs[0].shape[-2:])))


def _build(source: _Source, name: str, num_heads: int | None, options: Mapping[str, Any]) -> Attention:
    """The attention that is to take over, its parameters fresh."""
    module, (linear, _, parts) = source.module, source.kind.parts["q_proj"]
    query = getattr(module, linear)
    dim, width, heads = query.in_features, query.out_features // parts, num_heads or module.num_heads
    if module.proj.out_features != dim:
        raise ValueError(f"swap_attention: {source.name} makes {module.proj.out_features} channels of {dim}")
    if heads < 1 or width % heads:
        raise ValueError(f"swap_attention: num_heads must divide {width} in {source.name}, got {heads}")
    if name == "softmax" and source.kind is _FUSED and (lost := source.optional_weights()):
        raise ValueError(
            f"swap_attention: softmax does not support {', '.join(lost)}, and would compute different outputs"
        )
    options = {"dropout": module.proj_drop.p, **options}
    built = create_attention(name, dim, heads, head_dim=width // heads, **options)
    return built.to(query.weight.device, query.weight.dtype).train(module.training)


@dataclass(frozen=True)
class _Swap:
    """An attention of timm, the one that takes over, and whether it looks at a reduced map."""

    source: _Source
    attention: Attention
    keeps_reduction: bool

    @property
    def name(self) -> str:
        """That of the module that goes."""
        return self.source.name

    @property
    def sees_patches_only(self) -> bool:
        """Whether this is attention over images, in a ViT."""
        return self.source.kind is _FUSED and self.attention.axes != "batch, length"

    def carry_out(self, model: nn.Module, grid: Grid | None) -> tuple[list[str], dict[str, int]]:
        """Copy weights and replace the module.

        Returns:
            Names of parameters that are fresh, and what is gone, as in :class:`SwapReport`.
        """
        source, module = self.source, self.source.module
        fresh, gone = _copy(source, self.attention)
        if source.kind is _FUSED:
            adapter = SwappedAttention(self.attention, grid)
        else:
            names = [name for name, _ in module.named_children() if name in _SPATIAL.options]
            adapter = SwappedSpatialAttention(
                self.attention, {name: getattr(module, name) for name in names if self.keeps_reduction}
            )
        if not self.keeps_reduction:
            gone |= source.optional_weights()
        if module.attn_drop.p:
            gone[f"{source.name}.attn_drop"] = 0
        model.set_submodule(source.name, adapter.train(module.training))
        return [f"{source.name}.attention.{name}" for name in fresh], gone


@torch.no_grad()
def _copy(source: _Source, attention: Attention) -> tuple[list[str], dict[str, int]]:
    """Give a fresh attention the weights of timm's; names of those it has of its own, and what found no place."""
    # By mechanism, not by shape: with as many heads as channels its keys look like others, and mean something else.
    anew = ("q_proj", "k_proj") if isinstance(attention, AFTConv) else ()
    copied, gone = set(), {}
    for name, (linear, part, parts) in source.kind.parts.items():
        old, projection = getattr(source.module, linear), getattr(attention, name, None)
        rows = f"[{_ROWS[name]}]" if parts > 1 else ""
        if projection is None:  # as of keys that are the queries
            whole = {what: getattr(old, what) for what in ("weight", "bias")}
            lost = {what: tensor for what, tensor in whole.items() if tensor is not None}
            gone |= {f"{source.name}.{linear}.{what}{rows}": t.numel() // parts for what, t in lost.items()}
            continue
        if name in anew:
            nn.init.trunc_normal_(projection.weight, std=NEW_STD)
        for what in ("weight", "bias"):
            whole, goal = getattr(old, what), getattr(projection, what)
            if whole is None:
                projection.register_parameter(what, None)
            elif name in anew or goal is None:
                gone[f"{source.name}.{linear}.{what}{rows}"] = whole.numel() // parts
                if goal is not None and what == "bias":
                    goal.zero_()
            else:
                goal.copy_(whole.chunk(parts)[part]).requires_grad_(whole.requires_grad)
                copied.add(f"{name}.{what}")
    return [name for name, _ in attention.named_parameters() if name not in copied], gone


def _leave_patches(model: Any) -> tuple[list[str], Grid]:
    """Have a ViT see nothing but patches, without positions, and tell their rows and columns.

    Returns:
        Names of the parameters that are gone, and what knows rows and columns.
    """
    _check_patches(model)
    gone = [name for name in ("cls_token", "reg_token", "pos_embed") if getattr(model, name, None) is not None]
    for name in gone:
        setattr(model, name, None)
    model.num_prefix_tokens, model.num_reg_tokens, model.has_class_token = 0, 0, False
    if model.global_pool == "token":
        model.global_pool = "avg"
    grid = Grid()
    model.patch_embed.register_forward_pre_hook(grid)
    return gone, grid


def _check_patches(model: Any) -> None:
    name = "swap_attention: AFT-conv over images"
    if hasattr(model, "dist_token"):
        raise ValueError(
            f"{name} removes class and distillation tokens, which the two heads of a distilled model require; "
            "use a model that is not distilled, or kernel_size=N for AFT-conv over the sequence"
        )
    wanted = ("cls_token", "pos_embed", "num_prefix_tokens", "has_class_token", "global_pool", "patch_drop")
    lacking = [attribute for attribute in wanted if not hasattr(model, attribute)]
    if lacking or not hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size"):
        raise ValueError(
            f"{name} requires a VisionTransformer of timm, to remove its tokens, got {type(model).__name__}"
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(f"{name} requires all patches, but this model drops some (patch_drop_rate)")
    if model.global_pool == "prr" and model.has_class_token:
        raise ValueError(f"{name} removes the class token, which this model's pooling (global_pool='prr') requires")
