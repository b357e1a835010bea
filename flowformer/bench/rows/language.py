"""Language models: forward, loss and backward of one, and one token of generation.

The model is a decoder of :data:`LAYERS` blocks over :data:`VOCABULARY` tokens, with sinusoidal positions and no
dropout, around every registered mechanism that has a state. A shape's heads lie side by side: the model has
heads x channels of them. Its weights are the same random numbers for every attention, but those that only one has, and
of a size that lets an error of the attention show in what the model gives.

A contender is a function that takes a :class:`Text` and returns what is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flowformer.bench import registry
from flowformer.bench.rows.attention import count_tokens
from flowformer.bench.rows.forms import (
    by_backend,
    cache_bytes,
    count_bytes,
    mechanisms,
    name_of,
)
from flowformer.bench.rows.models import (
    OfModel,
    apply,
    build_alike,
    computed_by_truth,
    gradients_of,
    mixed,
    model_refusal,
    per_sequence,
    substitute,
)
from flowformer.bench.rows.step import random_cache
from flowformer.mechanisms import Mechanism, find_attention
from flowformer.models.language import LanguageModel, LanguageState

LAYERS = 6
VOCABULARY = 256
LENGTHS = (1024, 16_384)
CONTEXTS = (100, 10_000, 100_000)
# The truth of AFT-simple holds length x length x D numbers of float64 for each layer, several times.
CHECK_LENGTH = 128
# Most of a model is the same in all contenders and right: what departs is the attention's, and by less. In half
# precision weights and activations are rounded in every layer.
TOLERANCES = {**registry.TOLERANCES, torch.float32: 2e-6}
GRADIENT_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}
PIECE = 8192  # tokens of a context that are read at a time
NEW_STD = 0.1  # of parameters that only one attention has
# The two ends of the model, and of the first block, whose gradients have come through all the others. A mechanism that
# compares queries with themselves has no projection of keys.
CHECKED = (
    "embed.weight", "head.weight", "decoder.blocks.0.attention.q_proj.weight",
    "decoder.blocks.0.attention.k_proj.weight", "decoder.blocks.0.attention.v_proj.weight",
    "decoder.blocks.0.linear1.weight",
)  # fmt: skip


class Text(NamedTuple):
    """What a point is made from.

    Attributes:
        shape: Its sizes.
        tokens: Random ones, (batch, length + 1).
        states: States after all but the last token that contenders made before, by attention.
        dtype: Of the weights in a step, and of autocast in training.
    """

    shape: registry.Shape
    tokens: Tensor
    states: dict[str, Any]
    dtype: torch.dtype


def text(shape: registry.Shape, dtype: torch.dtype, layout: str) -> registry.Inputs:
    """A :class:`Text`; tokens have no layout."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (shape.batch, shape.length + 1), generator=generator)
    return (Text(shape, tokens, {}, dtype),)


# -------------------------------------------------------------------------------------------------------------- models


def build(attention: str, shape: registry.Shape) -> LanguageModel:
    """The model of a shape around an attention, float32."""
    return build_alike(lambda name: _fresh(name, shape), attention, NEW_STD)


def _fresh(attention: str, shape: registry.Shape) -> LanguageModel:
    # fairseq's way to begin: embeddings N(0, 1) once scaled, and projections that keep the size of what they see.
    return LanguageModel(
        VOCABULARY, dim=shape.width, num_layers=LAYERS, num_heads=shape.heads, max_length=shape.length + 1,
        positions="sinusoidal", scale_embedding=True, dropout=0.0, attention=attention, init="fairseq",
    )  # fmt: skip


def unavailable(row: Mechanism, backend: str | None, inputs: registry.Inputs) -> str | None:
    """Why a model cannot run on these inputs, or ``None``."""
    given = inputs[0]
    return model_refusal(row, backend, given.shape, given.dtype, given.tokens.device)


# ------------------------------------------------------------------------------------------------------------ training


def train(attention: str, given: Text) -> registry.Call:
    """Loss and gradients of all parameters, of which those in :data:`CHECKED` are returned."""
    place = given.tokens.device
    model = build(attention, given.shape).to(place)

    def run() -> registry.Outputs:
        with mixed(given.dtype, place):
            loss = model.loss(given.tokens[:, :-1], given.tokens[:, 1:])
        return _gradients(model, loss)

    return registry.Call(run)


def train_truth(attention: str, given: Text) -> registry.Outputs:
    """The same by the truth of the attention, with PyTorch's cross-entropy of all scores at once."""
    model = computed_by_truth(build(attention, given.shape))
    scores = model(given.tokens[:, :-1])
    return _gradients(model, nn.functional.cross_entropy(scores.flatten(0, 1), given.tokens[:, 1:].flatten()))


def _gradients(model: nn.Module, loss: Tensor) -> registry.Outputs:
    gradients = gradients_of(model, loss)
    return (loss.detach().view(1), *(gradients[name] for name in CHECKED if name in gradients))


# ---------------------------------------------------------------------------------------------------------- generation


def step(attention: str, given: Text) -> registry.Call:
    """Scores of the token after the last, (batch, vocabulary), from the state before the last."""
    model = build(attention, given.shape).to(given.tokens.device, given.dtype)
    if attention in given.states:
        return time_step(model, given.states[attention], given)
    state = state_after(model, attention, given)
    if find_attention(attention).can("fixed state"):
        given.states[attention] = state
    return time_step(model, state, given)


def time_step(model: LanguageModel, state: LanguageState, given: Text) -> registry.Call:
    """A call of the model's step from a state."""
    token = given.tokens[:, -1]
    model.eval()

    @torch.inference_mode()
    def run() -> registry.Outputs:
        return (model.step(token, state)[0],)

    return registry.Call(run, count_bytes(state))


def state_after(model: LanguageModel, attention: str, given: Text) -> LanguageState:
    """The state after the context; random keys and values where it takes time quadratic in length to read it."""
    if find_attention(attention).can("fixed state") or given.shape.length <= CHECK_LENGTH:
        return prefill(model, given)
    state = model.init_state(given.shape.batch)
    layers = tuple(random_cache(layer, given.shape.length) for layer in state.layers)
    return state._replace(length=state.length + given.shape.length, layers=layers)


@torch.inference_mode()
def prefill(model: LanguageModel, given: Text) -> LanguageState:
    """The state after all tokens but the last, which are read in pieces."""
    state = None
    for piece in given.tokens[:, :-1].split(PIECE, 1):
        _, state = model.hidden(piece, initial_state=state, return_state=True)
    assert state is not None  # no context is empty
    return state


@torch.no_grad()
def step_truth(attention: str, given: Text) -> registry.Outputs:
    """The same by the truth of the attention, which reads all tokens."""
    model = computed_by_truth(build(attention, given.shape))
    assert isinstance(model, LanguageModel)  # as it was built
    return (model.logits(model.hidden(given.tokens)[:, -1]),)


# ------------------------------------------------------------------------------------------------------------- softmax


def in_place_step(attention: str, given: Text) -> registry.Call:
    """A step on keys and values kept in place: new ones are written behind the old ones, and nothing is copied."""
    model = build(attention, given.shape).to(given.tokens.device, given.dtype)
    before = state_after(model, attention, given)
    for block in model.decoder.layers:
        substitute(block.attention, step=_attend_in_place)
    layers = tuple((_make_room(layer.key), _make_room(layer.value)) for layer in before.layers)
    return time_step(model, before._replace(layers=layers), given)


def _make_room(past: Tensor) -> Tensor:
    """(batch, tokens, heads, channels) as SDPA likes it, (batch, heads, tokens + 1, channels)."""
    batch, tokens, heads, channels = past.shape
    room = past.new_zeros(batch, heads, tokens + 1, channels)
    room[:, :, :-1] = past.transpose(1, 2)
    return room


def _attend_in_place(q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
    for room, new in zip(state, (k, v), strict=True):
        room[:, :, -1] = new
    return scaled_dot_product_attention(q.unsqueeze(2), *state).squeeze(2), state


# ---------------------------------------------------------------------------------------------------------------- rows


registry.add_operation(
    registry.Operation(
        "language-training", f"a language model of {LAYERS} layers, forward, loss and backward", "length", LENGTHS,
        text, apply, apply, count_tokens, check_length=CHECK_LENGTH, tolerances=GRADIENT_TOLERANCES, show_rate=True,
    )
)  # fmt: skip
registry.add_operation(
    registry.Operation(
        "language-step", f"one token of generation by a language model of {LAYERS} layers", "context", CONTEXTS,
        text, apply, apply, per_sequence, check_length=CHECK_LENGTH, tolerances=TOLERANCES, measure_memory=False,
        show_rate=True,
    )
)  # fmt: skip


@registry.add_contenders
def registered_mechanisms() -> Iterator[registry.Contender]:
    """The model around every mechanism that has a state, in every backend that its operation, or step, has."""
    for row in mechanisms("flow"):
        if row.step is not None and row.can("state"):
            yield from _contenders("language-training", row, row.operation, train, train_truth)
            yield from _contenders("language-step", row, row.step, step, step_truth)


def _contenders(
    operation: str, row: Mechanism, function: registry.Function, take: registry.Function, truth: registry.Function
) -> Iterator[registry.Contender]:
    fields: dict[str, Any] = {}
    if operation == "language-step" and not row.can("fixed state"):
        fields = {"needs_bytes": _two_caches}
    for name, backend, words, device in by_backend(name_of(row), function):
        yield registry.Contender(
            name, operation, OfModel(take, row.name, backend), OfModel(truth, row.name),
            f"a language model with {row.module.__name__}{words}", ours=True,
            unavailable=partial(unavailable, row, backend), device=device, **fields,
        )  # fmt: skip


def _two_caches(shape: registry.Shape) -> float:
    """Keys and values as they were made, and the longer copy that a step makes, or the room for one more."""
    return 2.1 * LAYERS * cache_bytes(shape)


registry.add_contender(
    registry.Contender(
        "sdpa", "language-step", OfModel(in_place_step, "softmax"), OfModel(step_truth, "softmax"),
        "a language model with softmax attention, keys and values kept in place", needs_bytes=_two_caches,
        unavailable=partial(unavailable, find_attention("softmax"), None),
    )
)  # fmt: skip
