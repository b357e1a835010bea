"""Image models: a Vision Transformer forward, and forward and backward, at growing resolution.

The model is timm's DeiT, 12 blocks on patches of 16 x 16 pixels, with its own attention or with a registered mechanism
in its place (:func:`flowformer.swap_attention`). A shape's heads lie side by side: with 3, 6 and 12 of 64 channels it
is the tiny, the small and the base model. All have the same weights but where attention needs others, of a size that
lets an error of the attention show. A shape's length is the side of an image in pixels; what is counted as a token is
an image.

A contender is a function that takes :class:`Images` and returns what is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.bench import registry
from flowformer.bench.rows.forms import by_backend, mechanisms, name_of, refusal
from flowformer.bench.rows.models import (
    CHANNELS_DIFFER,
    OfModel,
    apply,
    computed_by_truth,
    enlarge,
    gradients_of,
    mixed,
    per_sequence,
)
from flowformer.mechanisms import Mechanism, find_attention
from flowformer.models.swap import swap_attention

MODEL = "deit_small_patch16_224"
BLOCKS = 12
PATCH = 16
CLASSES = 1000
SIDES = (224, 448, 896)
# 7 x 7 patches: the filters of AFT-conv, 11 x 11, reach 5 patches to each side and leave some out.
CHECK_SIDE = 112
BIAS_STD = 0.1
# Twelve layers of float32, and means over patches, against float64. In half precision every layer rounds.
TOLERANCES = {**registry.TOLERANCES, torch.float32: 2e-6}
GRADIENT_TOLERANCES = {torch.float32: 4e-5, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}
TIMM = "softmax"  # what timm's own attention is called; ours computes the same
# What is checked besides the attention of the first block: the two ends of the model, and what follows that attention.
CHECKED = ("patch_embed.proj.weight", "head.weight", "blocks.0.mlp.fc1.weight")
# Options of modules, where they are not those of swap_attention.
OPTIONS: Mapping[str, Mapping[str, Any]] = {"mobile": {"normalize": True}}


class Images(NamedTuple):
    """What a point is made from.

    Attributes:
        shape: Its sizes.
        images: Random ones, (batch, 3, side, side). Their dtype is that of the weights in inference, and of autocast in
            training.
        classes: Random ones, (batch,).
    """

    shape: registry.Shape
    images: Tensor
    classes: Tensor


def draw(shape: registry.Shape, dtype: torch.dtype, layout: str) -> registry.Inputs:
    """:class:`Images` of a dtype; they have no other layout."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape.batch, 3, shape.length, shape.length, generator=generator).to(dtype)
    return (Images(shape, images, torch.randint(CLASSES, (shape.batch,), generator=generator)),)


def build(attention: str | None, shape: registry.Shape) -> nn.Module:
    """The model of a shape, float32, around a registered mechanism, or around timm's own attention."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            MODEL, depth=BLOCKS, embed_dim=shape.width, num_heads=shape.heads, dynamic_img_size=True
        )
        enlarge(model, (name for name, _ in model.named_parameters() if ".attn." in name), BIAS_STD)
        if attention is not None:
            # As many heads as channels where keys have one channel for each head (Zhai et al., 2021, table 7).
            heads = shape.width if find_attention(attention).layout.heads else shape.heads
            options = {"num_heads": heads, "img_size": shape.length, **OPTIONS.get(attention, {})}
            enlarge(model, swap_attention(model, attention, **options).new, BIAS_STD)
    return model.eval()


def unavailable(row: Mechanism | None, backend: str | None, inputs: registry.Inputs) -> str | None:
    """Why a model cannot run on these inputs, or ``None``."""
    shape = inputs[0].shape
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed: pip install 'flowformer[vision]'"
    if shape.channels != shape.value_channels:
        return CHANNELS_DIFFER
    if shape.length % PATCH:
        return f"a side of {shape.length} pixels is no whole number of patches of {PATCH}"
    return refusal(row, backend, inputs[0].images) if row is not None and backend is not None else None


# -------------------------------------------------------------------------------------------------------- what is timed


def classify(attention: str | None, given: Images) -> registry.Call:
    """Class scores of the images, (batch, classes)."""
    model = build(attention, given.shape).to(given.images)

    @torch.no_grad()
    def run() -> registry.Outputs:
        return (model(given.images),)

    return registry.Call(run)


@torch.no_grad()
def classify_truth(attention: str, given: Images) -> registry.Outputs:
    """The same by the truth of the attention."""
    return (computed_by_truth(build(attention, given.shape))(given.images.double()),)


def train(attention: str | None, given: Images) -> registry.Call:
    """Loss and gradients of all parameters, of which those that are checked are returned."""
    model = build(attention, given.shape).to(given.images.device)
    return registry.Call(lambda: _differentiate(model, given.images, given.classes, given.images.dtype))


def train_truth(attention: str, given: Images) -> registry.Outputs:
    """The same by the truth of the attention."""
    model = computed_by_truth(build(attention, given.shape))
    return _differentiate(model, given.images.double(), given.classes)


def _differentiate(
    model: nn.Module, images: Tensor, classes: Tensor, dtype: torch.dtype = torch.float32
) -> registry.Outputs:
    with mixed(dtype, images.device):
        loss = nn.functional.cross_entropy(model(images), classes)
    gradients = gradients_of(model, loss)
    checked = [gradients[name].flatten(1) for name in CHECKED]
    for name, gradient in gradients.items():
        if name.startswith("blocks.0.attn.") and gradient.ndim > 1:
            # timm's joint projection is three of ours.
            checked += gradient.chunk(3) if name.endswith("qkv.weight") else [gradient.flatten(1)]
    return (loss.detach().view(1), *checked)


# ----------------------------------------------------------------------------------------------------------------- rows


def _add_operation(name: str, about: str, tolerances: Mapping[torch.dtype, float]) -> None:
    registry.add_operation(
        registry.Operation(
            name, about, "side", SIDES, draw, apply, apply, per_sequence, check_length=CHECK_SIDE,
            tolerances=tolerances, show_rate=True, unit="image", extent="pixels",
        )
    )  # fmt: skip


_add_operation("vision", f"classes of images by a Vision Transformer of {BLOCKS} blocks", TOLERANCES)
_add_operation("vision-training", "the same, forward, loss and backward", GRADIENT_TOLERANCES)


@registry.add_contenders
def registered_mechanisms() -> Iterator[registry.Contender]:
    """The model around every mechanism in every backend that its operation has; first around timm's own attention."""
    for operation, take, truth in (("vision", classify, classify_truth), ("vision-training", train, train_truth)):
        yield registry.Contender(
            TIMM, operation, OfModel(take, None), OfModel(truth, "softmax"),
            "DeiT as timm has it, checked against softmax attention swapped into it",
            unavailable=partial(unavailable, None, None),
        )  # fmt: skip
        for row in mechanisms("flow"):
            if name_of(row) != TIMM:
                yield from _contenders(operation, row, take, truth)


def _contenders(
    operation: str, row: Mechanism, take: registry.Function, truth: registry.Function
) -> Iterator[registry.Contender]:
    for name, backend, words, device in by_backend(name_of(row), row.operation):
        yield registry.Contender(
            name, operation, OfModel(take, row.name, backend), OfModel(truth, row.name),
            f"DeiT with {row.module.__name__}{words}", ours=True, unavailable=partial(unavailable, row, backend),
            device=device,
        )  # fmt: skip
