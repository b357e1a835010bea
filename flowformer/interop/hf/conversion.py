"""Conversion between language models of this library and of transformers, with the same weights and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flowformer.interop.hf.configuration import FlowformerConfig
from flowformer.interop.hf.modeling import FlowformerForCausalLM
from flowformer.mechanisms import list_attentions
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import find_attention, option_names
from flowformer.models.encoder import ACTIVATIONS
from flowformer.models.language import LanguageModel
from flowformer.models.positions import LearnedPositions

# Options of a language model -> fields of the configuration, where the names differ.
_FIELDS = {
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "max_length": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
_OPTIONS = (
    "vocab_size", "dim", "num_layers", "num_heads", "ffn_dim", "max_length", "positions", "scale_embedding",
    "norm_first", "activation", "dropout", "activation_dropout", "tied", "attention", "attention_options", "init",
)  # fmt: skip
# Arguments of a mechanism's module that the model gives, or that are none of its options.
_OF_THE_MODEL = ("dim", "num_heads", "causal", "max_length", "device", "dtype")


def to_hf(model: LanguageModel, **fields: Any) -> FlowformerForCausalLM:
    """Convert a language model to a model of transformers with a copy of its weights.

    Args:
        model: The language model.
        **fields: Further fields of :class:`FlowformerConfig`, such as ``eos_token_id``.

    Returns:
        The model, in evaluation mode and in the dtype of the weights.

    Raises:
        TypeError: for something else than a language model.
        ValueError: for one that is not built as :class:`LanguageModel` builds it, or fields that contradict it.
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"to_hf: the model must be a LanguageModel, got {type(model).__name__}")
    options = _read_options(model)
    told = {_FIELDS.get(name, name): value for name, value in options.items()}
    wrong = {name: value for name, value in fields.items() if name in told and value != told[name]}
    if wrong:
        raise ValueError(f"the model has {', '.join(f'{name} = {told[name]!r}' for name in wrong)}; got {wrong}")
    config = FlowformerConfig(**{**told, **fields})
    ours = {("lm_" if name.startswith("head.") else "model.") + name: w for name, w in model.state_dict().items()}
    if model.head is None:
        ours["lm_head.weight"] = model.embed.weight
    theirs = FlowformerForCausalLM(config)
    nn.Module.to(theirs, dtype=model.embed.weight.dtype)
    theirs.load_state_dict(ours)
    return theirs.eval()


def from_hf(model: FlowformerForCausalLM) -> LanguageModel:
    """Convert a model of transformers to a language model with a copy of its weights.

    Args:
        model: The model, for example ``FlowformerForCausalLM.from_pretrained(folder)``.

    Returns:
        The language model, in evaluation mode and in the dtype of the weights.

    Raises:
        TypeError: for another model.
    """
    if not isinstance(model, FlowformerForCausalLM):
        raise TypeError(f"from_hf: the model must be a FlowformerForCausalLM, got {type(model).__name__}")
    ours = LanguageModel(**{name: getattr(model.config, _FIELDS.get(name, name)) for name in _OPTIONS})
    theirs = model.state_dict()
    if ours.head is None:
        del theirs["lm_head.weight"]
    ours.to(model.dtype).load_state_dict(
        {name.removeprefix("lm_").removeprefix("model."): weight for name, weight in theirs.items()}
    )
    return ours.eval()


def _read_options(model: LanguageModel) -> dict[str, Any]:
    """The options a language model was built with."""
    block = model.decoder.layers[0]
    options = {
        "vocab_size": model.vocab_size,
        "dim": model.dim,
        "num_layers": len(model.decoder.blocks),
        "num_heads": block.attention.num_heads,
        "ffn_dim": block.linear1.out_features,
        "max_length": model.max_length,
        "positions": _read_positions(model.position),
        "scale_embedding": model.scale != 1.0,
        "norm_first": block.norm_first,
        "activation": _read_activation(block.activation),
        "dropout": model.dropout.p,
        "activation_dropout": block.activation_dropout.p,
        "tied": model.head is None,
        "attention": _read_name(block.attention),
        "attention_options": _read_attention(block.attention),
        "init": model.initialization.kind,
    }
    with torch.device("meta"):
        again = LanguageModel(**options)
    if repr(again) != repr(model):
        raise ValueError(f"the model is not as LanguageModel builds it: {model}\nwhich would be {again}")
    return options


def _read_positions(module: nn.Module | None) -> str | None:
    if module is None:
        return None
    return "learned" if isinstance(module, LearnedPositions) else "sinusoidal"


def _read_activation(module: nn.Module) -> str:
    return next(name for name, make in ACTIVATIONS.items() if repr(make()) == repr(module))


def _read_name(attention: Attention) -> str:
    return next(name for name in list_attentions() if find_attention(name).module is type(attention))


def _read_attention(attention: Attention) -> dict[str, Any]:
    """The options of a mechanism: each is kept under its own name, those that override a preset together."""
    options: dict[str, Any] = {"bias": attention.q_proj.bias is not None, "dropout": attention.dropout.p}
    for name in option_names(_read_name(attention)):
        if hasattr(attention, name) and name not in (*options, *_OF_THE_MODEL):
            options[name] = getattr(attention, name)
    options.update(getattr(attention, "overrides", {}))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
