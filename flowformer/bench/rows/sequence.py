"""Classifiers of token sequences: forward, loss and backward, at the sizes of Long Range Arena's Text.

The model is one pre-norm block over bytes with a class token, around every registered mechanism with the options that
it has on Long Range Arena. A shape's heads lie side by side: with 4 heads of 64 channels it is the published model of
256 channels. Its weights are the same random numbers for every attention, but those that only one has.

A contender is a function that takes :class:`Reviews` and returns what is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.bench import registry
from flowformer.bench.rows.attention import count_tokens
from flowformer.bench.rows.forms import by_backend, mechanisms, name_of
from flowformer.bench.rows.models import (
    OfModel,
    apply,
    build_alike,
    computed_by_truth,
    gradients_of,
    mixed,
    model_refusal,
)
from flowformer.mechanisms import Mechanism
from flowformer.models.sequence import SequenceClassifier
from flowformer.recipes.lra_published import OPTIONS

VOCABULARY, CLASSES = 257, 2
FFN_FACTOR = 4  # of the published model of Text
LENGTHS = (1_000, 4_000, 16_000)
CHECK_LENGTH = 127  # with the class token a power of two, as lengths of blocks are
# One block and the two ends of the model; the attention's own error is a part of what its input has. In half precision
# weights and activations are rounded in every layer.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}
NEW_STD = 0.1  # of parameters that only one attention has
CHECKED = (
    "embed.weight",
    "head.0.weight",
    "encoder.blocks.0.linear1.weight",
    "encoder.blocks.0.attention.v_proj.weight",
)
_COPIES = 4  # of a table of scores: the parameter, its gradient, and what the backward pass holds beside them


class Reviews(NamedTuple):
    """What a point is made from.

    Attributes:
        shape: Its sizes.
        tokens: Random ones, (batch, length).
        classes: Random ones, (batch,).
        dtype: Of autocast.
    """

    shape: registry.Shape
    tokens: Tensor
    classes: Tensor
    dtype: torch.dtype


def draw(shape: registry.Shape, dtype: torch.dtype, layout: str) -> registry.Inputs:
    """:class:`Reviews`; tokens have no layout."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (shape.batch, shape.length), generator=generator)
    return (Reviews(shape, tokens, torch.randint(CLASSES, (shape.batch,), generator=generator), dtype),)


def build(attention: str, shape: registry.Shape) -> SequenceClassifier:
    """The model of a shape around an attention, float32."""
    return build_alike(lambda name: _fresh(name, shape), attention, NEW_STD)


def _fresh(attention: str, shape: registry.Shape) -> SequenceClassifier:
    return SequenceClassifier(
        VOCABULARY, CLASSES, shape.length, dim=shape.width, num_heads=shape.heads, ffn_dim=FFN_FACTOR * shape.width,
        dropout=0.0, attention=attention, attention_options=OPTIONS.get(attention),
    )  # fmt: skip


def unavailable(row: Mechanism, backend: str | None, inputs: registry.Inputs) -> str | None:
    """Why a model cannot run on these inputs, or ``None``."""
    given = inputs[0]
    return model_refusal(row, backend, given.shape, given.dtype, given.tokens.device)


def train(attention: str, given: Reviews) -> registry.Call:
    """Loss and gradients of all parameters, of which those in :data:`CHECKED` are returned."""
    place = given.tokens.device
    model = build(attention, given.shape).to(place)

    def run() -> registry.Outputs:
        with mixed(given.dtype, place):
            return _differentiate(model, given)

    return registry.Call(run)


def train_truth(attention: str, given: Reviews) -> registry.Outputs:
    """The same by the truth of the attention."""
    return _differentiate(computed_by_truth(build(attention, given.shape)), given)


def _differentiate(model: nn.Module, given: Reviews) -> registry.Outputs:
    loss = nn.functional.cross_entropy(model(given.tokens), given.classes)
    gradients = gradients_of(model, loss)
    # Before a ReLU or GELU the gradients of a few units are next to nothing: all of a layer's are one row.
    return (loss.detach().view(1), *(gradients[name].view(1, -1) for name in CHECKED))


registry.add_operation(
    registry.Operation(
        "sequence-training", "a classifier of token sequences, forward, loss and backward", "length", LENGTHS,
        draw, apply, apply, count_tokens, check_length=CHECK_LENGTH, tolerances=TOLERANCES, show_rate=True,
    )
)  # fmt: skip


@registry.add_contenders
def registered_mechanisms() -> Iterator[registry.Contender]:
    """The model around every mechanism, in every backend that its operation has."""
    for row in mechanisms("flow"):
        fields: dict[str, Any] = {"needs_bytes": _table_bytes} if row.name == "synthesizer" else {}
        for name, backend, words, device in by_backend(name_of(row), row.operation):
            yield registry.Contender(
                name, "sequence-training", OfModel(train, row.name, backend), OfModel(train_truth, row.name),
                f"a sequence classifier with {row.module.__name__}{words}", ours=True,
                unavailable=partial(unavailable, row, backend), device=device, **fields,
            )  # fmt: skip


def _table_bytes(shape: registry.Shape) -> float:
    """Of synthesizer, which has a score for each head and pair of tokens among its parameters."""
    return 4.0 * _COPIES * shape.heads * shape.length**2
