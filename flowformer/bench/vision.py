"""Image models: a Vision Transformer forward, and forward and backward, at growing resolution.

The model is timm's DeiT, 12 blocks on patches of 16 x 16 pixels, with its own attention or with one of ours in its
place (:func:`flowformer.swap_attention`). A shape's heads lie side by side: with 3, 6 and 12 of 64 channels it is the
tiny, the small and the base model. All have the same weights but where attention needs others, of a size that lets an
error of the attention show. A shape's length is the side of an image in pixels; what is counted as a token is an image.

A contender is a function that takes :class:`Images` and returns what is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.bench.language import chosen, substitute
from flowformer.bench.registry import (
    BACKENDS,
    Call,
    Contender,
    Function,
    Inputs,
    Operation,
    Outputs,
    Shape,
    add_contender,
    add_operation,
)
from flowformer.core.backends import choose
from flowformer.mechanisms import find_attention

MODEL = "deit_small_patch16_224"
BLOCKS = 12
PATCH = 16
CLASSES = 1000
SIDES = (224, 448, 896)
# 7 x 7 patches: the filters of AFT-conv, 11 x 11, reach 5 patches to each side and leave some out.
CHECK_SIDE = 112
BIAS_STD = 0.1
# Twelve layers of float32, and means over patches, against float64.
TOLERANCES = {torch.float32: 2e-6}
GRADIENT_TOLERANCES = {torch.float32: 4e-5}
# What is checked besides the attention of the first block: the two ends of the model, and what follows that attention.
CHECKED = ("patch_embed.proj.weight", "head.weight", "blocks.0.mlp.fc1.weight")
# Options of modules and references alike. AFT-conv has as many heads as channels, and filters of 11 x 11, which are the
# default of swap_attention (Zhai et al., 2021, table 7).
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "softmax": {}, "flow": {"preset": "vision"}, "mobile": {"normalize": True}, "aft_conv": {},
}  # fmt: skip
# An old commit, to be compared with, may have none.
HAS_SWAP = importlib.util.find_spec("flowformer.models.swap") is not None


class Images(NamedTuple):
    """What a point is made from.

    Attributes:
        shape: Its sizes.
        images: Random ones, (batch, 3, side, side).
        classes: Random ones, (batch,).
    """

    shape: Shape
    images: Tensor
    classes: Tensor


def draw(shape: Shape, dtype: torch.dtype, layout: str) -> Inputs:
    """:class:`Images` of a dtype; they have no other layout."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape.batch, 3, shape.length, shape.length, generator=generator).to(dtype)
    return (Images(shape, images, torch.randint(CLASSES, (shape.batch,), generator=generator)),)


def _apply(function: Function, inputs: Inputs) -> Any:
    return function(*inputs)


def build(attention: str | None, shape: Shape) -> nn.Module:
    """The model of a shape, float32, around an attention of ours, or around timm's own."""
    import timm

    from flowformer.models.swap import swap_attention

    width = shape.heads * shape.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(MODEL, depth=BLOCKS, embed_dim=width, num_heads=shape.heads, dynamic_img_size=True)
        _enlarge(model, (name for name, _ in model.named_parameters() if ".attn." in name))
        if attention is not None:
            heads = width if attention == "aft_conv" else shape.heads
            _enlarge(model, swap_attention(model, attention, num_heads=heads, **OPTIONS[attention]).new)
    return model.eval()


@torch.no_grad()
def _enlarge(model: nn.Module, names: Iterable[str]) -> None:
    """Give parameters values that keep the size of what they see: of fresh ones, attention is next to the mean."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.normal_(std=BIAS_STD if parameter.ndim == 1 else parameter[0].numel() ** -0.5)


def build_truth(attention: str, shape: Shape) -> nn.Module:
    """The same in float64 around an attention of ours, computed by the reference."""
    model = build(attention, shape).double()
    for block in model.get_submodule("blocks").children():
        substitute(block.get_submodule("attn.attention"), operation=find_attention(attention).truth)
    return model


def unavailable(attention: str | None, backend: str | None, inputs: Inputs) -> str | None:
    """Why a model cannot run on these inputs, or ``None``."""
    shape = inputs[0].shape
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed: pip install 'flowformer[vision]'"
    if shape.channels != shape.value_channels:
        return "a model's values are as wide as its keys: --channels and --value-channels must be equal"
    if shape.length % PATCH:
        return f"a side of {shape.length} pixels is no whole number of patches of {PATCH}"
    if attention is not None and backend is not None:
        try:
            choose(find_attention(attention).operation.__name__, backend)
        except ValueError as error:
            return str(error)
    return None


# -------------------------------------------------------------------------------------------------------- what is timed


def classify(attention: str | None, backend: str | None, given: Images) -> Call:
    """Class scores of the images, (batch, classes)."""
    model = build(attention, given.shape)

    @torch.no_grad()
    def run() -> Outputs:
        with chosen(backend):
            return (model(given.images),)

    return Call(run)


@torch.no_grad()
def classify_truth(attention: str, given: Images) -> Outputs:
    """The same by the reference."""
    return (build_truth(attention, given.shape)(given.images.double()),)


def train(attention: str | None, backend: str | None, given: Images) -> Call:
    """Loss and gradients of all parameters, of which those that are checked are returned."""
    model = build(attention, given.shape)

    def run() -> Outputs:
        with chosen(backend):
            return _differentiate(model, given.images, given.classes)

    return Call(run)


def train_truth(attention: str, given: Images) -> Outputs:
    """The same by the reference."""
    return _differentiate(build_truth(attention, given.shape), given.images.double(), given.classes)


def _differentiate(model: nn.Module, images: Tensor, classes: Tensor) -> Outputs:
    parameters = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(images), classes)
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    checked = [gradients[name].flatten(1) for name in CHECKED]
    for name, gradient in gradients.items():
        if name.startswith("blocks.0.attn.") and gradient.ndim > 1:
            # timm's joint projection is three of ours.
            checked += gradient.chunk(3) if name.endswith("qkv.weight") else [gradient.flatten(1)]
    return (loss.detach().view(1), *checked)


# ----------------------------------------------------------------------------------------------------------------- rows


# Name, attention in the model and in the truth, backend, and what it is; the first is what others are compared with.
ROWS: tuple[tuple[str, str | None, str, str | None, str], ...] = (
    ("softmax", None, "softmax", None, "DeiT as timm has it, checked against softmax attention swapped into it"),
    *(
        (f"flow-{name}", "flow", "flow", name, f"DeiT with Flow-Attention, backend {name}")
        for name in BACKENDS
    ),
    ("mobile", "mobile", "mobile", None, "DeiT with Mobile-Attention, normalised"),
    ("aft-conv", "aft_conv", "aft_conv", None, "DeiT with AFT-conv, 11 x 11, as many heads as channels; patches only"),
)  # fmt: skip
_CLASSIFY_TRUTHS = {name: partial(classify_truth, name) for name in OPTIONS}
_TRAIN_TRUTHS = {name: partial(train_truth, name) for name in OPTIONS}


def _add(operation: str, take: Function, truths: Mapping[str, Function]) -> None:
    for name, attention, truth, backend, about in ROWS:
        add_contender(
            Contender(
                name, operation, partial(take, attention, backend), truths[truth], about, ours=attention is not None,
                unavailable=partial(unavailable, attention, backend),
            )
        )  # fmt: skip


add_operation(
    Operation(
        "vision", f"classes of images by a Vision Transformer of {BLOCKS} blocks", "side", SIDES, draw, _apply, _apply,
        None, lambda shape: shape.batch, check_length=CHECK_SIDE, tolerances=TOLERANCES, show_rate=True, unit="image",
        extent="pixels",
    )
)  # fmt: skip
add_operation(
    Operation(
        "vision-training", "the same, forward, loss and backward", "side", SIDES, draw, _apply, _apply, None,
        lambda shape: shape.batch, check_length=CHECK_SIDE, tolerances=GRADIENT_TOLERANCES, show_rate=True,
        unit="image", extent="pixels",
    )
)  # fmt: skip
if HAS_SWAP:
    _add("vision", classify, _CLASSIFY_TRUTHS)
    _add("vision-training", train, _TRAIN_TRUTHS)
