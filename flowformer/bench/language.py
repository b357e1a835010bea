"""Language models: forward, loss and backward of one, and one token of generation.

The model is a decoder of :data:`LAYERS` blocks over :data:`VOCABULARY` tokens, with sinusoidal positions and no
dropout. A shape's heads lie side by side: the model has heads x channels of them. Its weights are the same random
numbers whatever the attention, and of a size that lets an error of the attention show in what the model gives.

A contender is a function that takes a :class:`Text` and returns what is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flowformer import ops
from flowformer.bench.contenders import cache_bytes, count_bytes
from flowformer.bench.operations import count_tokens
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
from flowformer.core.backends import ENVIRONMENT_VARIABLE, choose
from flowformer.mechanisms import find_attention

if TYPE_CHECKING:
    from flowformer.models.language import LanguageModel, LanguageState

LAYERS = 6
VOCABULARY = 256
LENGTHS = (1024, 16_384)
CONTEXTS = (100, 10_000, 100_000)
# The truth of AFT-simple holds length x length x D numbers of float64 for each layer, several times.
CHECK_LENGTH = 128
# Most of a model is the same in all contenders and right: what departs is the attention's, and by less.
TOLERANCES = {torch.float32: 2e-6}
GRADIENT_TOLERANCES = {torch.float32: 1e-5}
PIECE = 8192  # tokens of a context that are read at a time
# The two ends of the model, and of the first block, whose gradients have come through all the others.
CHECKED = (
    "embed.weight", "head.weight", "decoder.blocks.0.attention.q_proj.weight",
    "decoder.blocks.0.attention.k_proj.weight", "decoder.blocks.0.attention.v_proj.weight",
    "decoder.blocks.0.linear1.weight",
)  # fmt: skip
# An old commit, to be compared with, may have none.
HAS_LANGUAGE = importlib.util.find_spec("flowformer.models.language") is not None


class Text(NamedTuple):
    """What a point is made from.

    Attributes:
        shape: Its sizes.
        tokens: Random ones, (batch, length + 1).
        states: States after all but the last token that contenders made before, by attention.
    """

    shape: Shape
    tokens: Tensor
    states: dict[str, Any]


def text(shape: Shape, dtype: torch.dtype, layout: str) -> Inputs:
    """A :class:`Text`; tokens have neither dtype nor layout."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (shape.batch, shape.length + 1), generator=generator)
    return (Text(shape, tokens, {}),)


def _apply(function: Function, inputs: Inputs) -> Any:
    return function(*inputs)


# -------------------------------------------------------------------------------------------------------------- models


def build(attention: str, shape: Shape) -> LanguageModel:
    """The model of a shape around an attention, float32."""
    from flowformer.models.language import LanguageModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # fairseq's way to begin: embeddings N(0, 1) once scaled, and projections that keep the size of what they see.
        return LanguageModel(
            VOCABULARY, dim=shape.heads * shape.channels, num_layers=LAYERS, num_heads=shape.heads,
            positions="sinusoidal", scale_embedding=True, dropout=0.0, attention=attention, init="fairseq",
        )  # fmt: skip


def build_truth(attention: str, shape: Shape) -> LanguageModel:
    """The same in float64, its attentions computed by the reference."""
    model = build(attention, shape).double()
    for block in model.decoder.layers:
        substitute(block.attention, operation=find_attention(attention).truth)
    return model


def substitute(module: Any, **functions: Function) -> None:
    """Give one attention module other functions of its mechanism: ``operation``, ``step``."""
    module.__dict__["mechanism"] = dataclasses.replace(module.mechanism, **functions)


@contextmanager
def chosen(backend: str | None) -> Iterator[None]:
    """Have a backend run inside; without one, whichever the environment chooses."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    if backend is None:
        yield
        return
    os.environ[ENVIRONMENT_VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def unavailable(attention: str, backend: str | None, inputs: Inputs) -> str | None:
    """Why a model cannot run on these inputs, or ``None``."""
    shape = inputs[0].shape
    if shape.channels != shape.value_channels:
        return "a model's values are as wide as its keys: --channels and --value-channels must be equal"
    try:
        choose(find_attention(attention).operation.__name__, backend or "auto")
    except ValueError as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------------------ training


def train(attention: str, backend: str | None, given: Text) -> Call:
    """Loss and gradients of all parameters, of which those in :data:`CHECKED` are returned."""
    model = build(attention, given.shape)

    def run() -> Outputs:
        with chosen(backend):
            return _gradients(model, model.loss(given.tokens[:, :-1], given.tokens[:, 1:]))

    return Call(run)


def train_truth(attention: str, given: Text) -> Outputs:
    """The same by the reference, with PyTorch's cross-entropy of all scores at once."""
    model = build_truth(attention, given.shape)
    scores = model(given.tokens[:, :-1])
    return _gradients(model, nn.functional.cross_entropy(scores.flatten(0, 1), given.tokens[:, 1:].flatten()))


def _gradients(model: LanguageModel, loss: Tensor) -> Outputs:
    parameters = dict(model.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    return (loss.detach().view(1), *(gradients[name] for name in CHECKED))


# ---------------------------------------------------------------------------------------------------------- generation


def step(attention: str, backend: str | None, given: Text) -> Call:
    """Scores of the token after the last, (batch, vocabulary), from the state before the last."""
    model = build(attention, given.shape)
    if attention not in given.states:
        given.states[attention] = prefill(model, given)
    return _time_step(model, given.states[attention], given, backend)


def _time_step(model: LanguageModel, state: LanguageState, given: Text, backend: str | None = None) -> Call:
    token = given.tokens[:, -1]
    model.eval()

    @torch.inference_mode()
    def run() -> Outputs:
        with chosen(backend):
            return (model.step(token, state)[0],)

    return Call(run, count_bytes(state))


@torch.inference_mode()
def prefill(model: LanguageModel, given: Text) -> LanguageState:
    """The state after all tokens but the last, which are read in pieces."""
    state = None
    for piece in given.tokens[:, :-1].split(PIECE, 1):
        _, state = model.hidden(piece, initial_state=state, return_state=True)
    assert state is not None  # no context is empty
    return state


@torch.no_grad()
def step_truth(attention: str, given: Text) -> Outputs:
    """The same by the reference, which reads all tokens."""
    model = build_truth(attention, given.shape)
    return (model.logits(model.hidden(given.tokens)[:, -1]),)


# ------------------------------------------------------------------------------------------------------------- softmax


def softmax_step(given: Text) -> Call:
    """A step of softmax attention as this library has it: keys and values are copied into a state one longer."""
    model = build("softmax", given.shape)
    return _time_step(model, _softmax_state(model, given), given)


def in_place_step(given: Text) -> Call:
    """A step on keys and values kept in place: new ones are written behind the old ones, and nothing is copied."""
    model = build("softmax", given.shape)
    before = _softmax_state(model, given)
    for block in model.decoder.layers:
        substitute(block.attention, step=_attend_in_place)
    layers = tuple((_make_room(layer.key), _make_room(layer.value)) for layer in before.layers)
    return _time_step(model, before._replace(layers=layers), given)


def _softmax_state(model: LanguageModel, given: Text) -> LanguageState:
    """Keys and values of the context.

    Those of a context longer than is checked are random numbers: to read it takes time quadratic in its length, and a
    step takes the same time whatever they are.
    """
    if given.shape.length <= CHECK_LENGTH:
        return prefill(model, given)
    state = model.init_state(given.shape.batch)
    layers = tuple(_random_state(given.shape, layer) for layer in range(LAYERS))
    return state._replace(length=state.length + given.shape.length, layers=layers)


def _random_state(shape: Shape, seed: int) -> ops.SoftmaxState:
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.length, shape.heads, shape.channels)
    key, value = (torch.randn(size, generator=generator) for _ in range(2))
    return ops.SoftmaxState(key, value, torch.ones(size[:2], dtype=torch.bool))


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


MODELS = {
    "flow": "a language model with Flow-Attention", "aft_simple": "a language model with AFT-simple",
    "linear": "a language model of the Linear Transformer", "softmax": "a language model with softmax attention",
}  # fmt: skip
TRUTHS = {
    **{("language-training", attention): partial(train_truth, attention) for attention in MODELS},
    **{("language-step", attention): partial(step_truth, attention) for attention in MODELS},
}


def _add(
    operation: str, name: str, attention: str, function: Function, backend: str | None = None, about: str = "",
    **fields: Any,
) -> None:  # fmt: skip
    add_contender(
        Contender(
            name, operation, function, TRUTHS[operation, attention], MODELS[attention] + about,
            ours=attention in ("flow", "aft_simple"), unavailable=partial(unavailable, attention, backend), **fields,
        )
    )  # fmt: skip


def _add_backends(operation: str, attention: str, take: Function) -> None:
    for name in BACKENDS:
        _add(
            operation, f"{attention.replace('_', '-')}-{name}", attention, partial(take, attention, name), name,
            f", backend {name}",
        )  # fmt: skip


def _add_training() -> None:
    name = "language-training"
    _add_backends(name, "flow", train)
    _add_backends(name, "aft_simple", train)
    _add(name, "linear", "linear", partial(train, "linear", None))
    _add(name, "softmax", "softmax", partial(train, "softmax", None))


def _add_steps() -> None:
    name = "language-step"
    _add_backends(name, "flow", step)
    _add(name, "aft-simple", "aft_simple", partial(step, "aft_simple", None))
    _add(name, "linear", "linear", partial(step, "linear", None))
    # Keys and values as they were made, and the longer ones that a step returns, or the room for one more.
    room: dict[str, Any] = {"needs_bytes": lambda shape: 2.1 * LAYERS * cache_bytes(shape)}
    copied, kept = ", keys and values copied into a state one longer", ", keys and values kept in place"
    _add(name, "softmax", "softmax", softmax_step, None, copied, **room)
    _add(name, "sdpa", "softmax", in_place_step, None, kept, **room)


add_operation(
    Operation(
        "language-training", f"a language model of {LAYERS} layers, forward, loss and backward", "length", LENGTHS,
        text, _apply, _apply, None, count_tokens, check_length=CHECK_LENGTH, tolerances=GRADIENT_TOLERANCES,
        show_rate=True,
    )
)  # fmt: skip
add_operation(
    Operation(
        "language-step", f"one token of generation by a language model of {LAYERS} layers", "context", CONTEXTS,
        text, _apply, _apply, None, lambda shape: shape.batch, check_length=CHECK_LENGTH, tolerances=TOLERANCES,
        measure_memory=False, show_rate=True,
    )
)  # fmt: skip
if HAS_LANGUAGE:
    _add_training()
    _add_steps()
