"""Initialization of parameters, when layers are built and when they are reset.

Each layer knows how: ``reset_parameters()`` of a layer inside a model draws what the model's constructor draws, in
whatever order the layers are reset. So a model can be built without memory and filled later, as FSDP does it::

    with torch.device("meta"):
        model = create_model("flowformer_gpt2")
    model.to_empty(device="cuda")
    reset_parameters(model)
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from flowformer.models.encoder import EncoderBlock

# Draws all parameters of one layer in place. It calls functions as attributes of ``torch.nn.init``, which transformers
# replaces while it loads weights.
Initializer = Callable[[Any], None]

LANGUAGE_INITS = ("gpt", "fairseq")
GPT_STD = 0.02  # Flowformer_TorchModule, flowformergpt/model.py


class _Reset:
    """The method ``reset_parameters`` of one layer, which it does not keep alive; copied and pickled with the layer."""

    def __init__(self, initializer: Initializer, layer: nn.Module) -> None:
        self._initializer, self._layer = initializer, weakref.ref(layer)

    def __call__(self) -> None:
        self._initializer(self._layer())

    def __reduce__(self) -> tuple[Any, ...]:
        return _Reset, (self._initializer, self._layer())


def set_initializer(layer: nn.Module, initializer: Initializer) -> None:
    """Set what ``layer.reset_parameters()`` draws. The parameters are not changed.

    The layer keeps its class: what replaces ``torch.nn.Linear`` in a model, such as dynamic quantization, finds it.

    Args:
        layer: A linear layer or an embedding.
        initializer: Draws the layer's parameters in place.

    Raises:
        TypeError: for another layer.
    """
    if not isinstance(layer, (nn.Linear, nn.Embedding)):
        raise TypeError(f"layer must be a linear layer or an embedding, got {type(layer).__name__}")
    vars(layer)["reset_parameters"] = _Reset(initializer, layer)


def has_initializer(module: nn.Module) -> bool:
    """Return whether :func:`set_initializer` has been called on a module."""
    return "reset_parameters" in vars(module)


def draw_parameters(model: nn.Module) -> None:
    """Re-initialize the layers that have an initializer, and no others."""
    for module in model.modules():
        if has_initializer(module):
            cast("Any", module).reset_parameters()


@torch.no_grad()
def reset_parameters(model: nn.Module) -> None:
    """Re-initialize a model, by ``reset_parameters()`` of every module that has it.

    Args:
        model: The model, for example one that ``to_empty`` has just moved from the meta device.
    """
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


# --------------------------------------------------------------------------------------------------------- initializers


def normal(layer: Any, std: float) -> None:
    """Initialize weights from N(0, std^2), biases with zero."""
    nn.init.normal_(layer.weight, std=std)
    _zero_bias(layer)


def truncated_normal(layer: Any, std: float | None) -> None:
    """Initialize weights normal, truncated at 2 std, biases with zero; std is 1 / sqrt(inputs) if None."""
    std = std or 1 / math.sqrt(layer.in_features)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    _zero_bias(layer)


def xavier_uniform(layer: Any, gain: float) -> None:
    """Initialize weights Xavier-uniform, biases like PyTorch."""
    nn.Linear.reset_parameters(layer)
    nn.init.xavier_uniform_(layer.weight, gain=gain)


def xavier_output(layer: Any) -> None:
    """Initialize weights Xavier-uniform, biases with zero, like fairseq's output projection."""
    nn.init.xavier_uniform_(layer.weight)
    _zero_bias(layer)


def _zero_bias(layer: Any) -> None:
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------------------------------------------ language models


@dataclass(frozen=True)
class LanguageInit:
    """Initialization of a language model.

    ``"gpt"`` is the GPT-style module of thuml/Flowformer: weights N(0, std), no biases, the second layer of each
    feed-forward network scaled down by 1 / sqrt(2 num_layers). The published code scales the layers named ``c_proj``,
    as GPT-2 does, which leaves out the output projections of its attentions; so does this.

    ``"fairseq"`` is fairseq's transformer_lm: embeddings and head N(0, 1 / sqrt(dim)); in attentions Xavier-uniform
    projections, with gain 1 / sqrt(2) for queries, keys, values and the output gate, which fairseq does not have;
    PyTorch's own elsewhere.

    Parameters of mechanisms that are not linear layers keep the initialisation of the mechanism.

    Attributes:
        kind: ``"gpt"`` or ``"fairseq"``.
        dim: Channels of the model.
        num_layers: Blocks.
        std: Standard deviation of ``"gpt"``.

    Raises:
        ValueError: for another kind.
    """

    kind: str
    dim: int
    num_layers: int
    std: float = GPT_STD

    def __post_init__(self) -> None:
        check_language_init(self.kind)

    @property
    def embedding(self) -> Initializer:
        """The initializer of embeddings and of the output head."""
        return partial(normal, std=self.std if self.kind == "gpt" else self.dim**-0.5)

    def set_on(self, layers: nn.Module) -> None:
        """Set the initializers of embeddings and linear layers; their parameters are not changed.

        Args:
            layers: A module that holds them; linear layers outside of blocks count as output heads.
        """
        for module in layers.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                set_initializer(module, self.embedding)
        for block in layers.modules():
            if isinstance(block, EncoderBlock):
                self._set_block(block)

    def _set_block(self, block: EncoderBlock) -> None:
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                set_initializer(layer, self._in_block(name))

    def _in_block(self, name: str) -> Initializer:
        """The initializer of a linear layer by its name in the block."""
        if self.kind == "gpt":
            return partial(normal, std=self.std / math.sqrt(2 * self.num_layers) if name == "linear2" else self.std)
        if name in tuple(f"attention.{one}_proj" for one in ("q", "k", "v", "gate")):
            return partial(xavier_uniform, gain=1 / math.sqrt(2))
        return xavier_output if name == "attention.out_proj" else cast("Initializer", nn.Linear.reset_parameters)


def check_language_init(kind: str) -> None:
    """Raise ValueError for an unknown initialization.

    Raises:
        ValueError: naming those that are known.
    """
    if kind not in LANGUAGE_INITS:
        raise ValueError(f'init must be "gpt" or "fairseq", got {kind!r}')
