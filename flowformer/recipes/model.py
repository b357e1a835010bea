"""The model of a recipe: of the right kind, and small enough for the memory of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import nn

from flowformer.models import create_model
from flowformer.models.classical.lstm import LSTMClassifier
from flowformer.models.decision import DecisionModel
from flowformer.models.language import LanguageModel
from flowformer.models.registry import MODELS, find_model
from flowformer.models.sequence import SequenceClassifier
from flowformer.models.timeseries import SeriesClassifier
from flowformer.models.vision import VisionModel

KINDS: Mapping[type[nn.Module], str] = {
    LanguageModel: "a language model", VisionModel: "an image classifier", SeriesClassifier: "a series classifier",
    LSTMClassifier: "a series classifier", SequenceClassifier: "a classifier of token sequences",
    DecisionModel: "a decision model",
}  # fmt: skip
# How torch says that a tensor is too large, whatever the type of its error.
_TOO_LARGE = ("overflow", "can't allocate memory", "not enough memory", "out of memory", "exceed")


def check_model(name: str, kind: type[nn.Module]) -> None:
    """Check the name of a recipe's model before any data is read.

    A function that builds a model says of which kind by the annotation of what it returns; without one it passes.

    Args:
        name: One of :func:`flowformer.list_models`.
        kind: One of :data:`KINDS`.

    Raises:
        ValueError: for an unknown name, or a model of another kind.
    """
    if _kind_of(name) not in (None, kind):
        fitting = ", ".join(one for one in MODELS.names() if _kind_of(one) is kind)
        raise ValueError(f"model must be {KINDS[kind]}, got {name!r}, {KINDS[_kind_of(name)]}; available: {fitting}")


def _kind_of(name: str) -> Any:
    built = get_type_hints(find_model(name)).get("return")
    return next((kind for kind in KINDS if isinstance(built, type) and issubclass(built, kind)), None)


def build_model(name: str, **options: Any) -> nn.Module:
    """Build a model, unless its parameters alone take more than the memory of this machine.

    Args:
        name: As in :func:`flowformer.create_model`.
        **options: Likewise.

    Raises:
        ValueError: for options that the model does not take, and for a model that is too large; the message has its
            sizes.
    """
    sizes = ", ".join(f"{key} {value}" for key, value in options.items() if type(value) is int)
    try:
        with torch.device("meta"):  # no memory, and no random numbers
            parameters = list(create_model(name, **options).parameters())
        needed, there = sum(one.numel() * one.element_size() for one in parameters), _memory()
        if needed > there:
            raise ValueError(
                f"the model is too large for this machine: its parameters take {needed / 1e9:,.0f} GB, and there are"
                f" {there / 1e9:.0f} GB of memory; its sizes are {sizes}"
            )
        return create_model(name, **options)
    except TypeError as error:  # an option that the model, or its mechanism, does not have
        raise ValueError(str(error)) from error
    except (RuntimeError, MemoryError, OverflowError) as error:
        if not isinstance(error, RuntimeError) or any(words in str(error) for words in _TOO_LARGE):
            raise ValueError(f"the model is too large for this machine: its sizes are {sizes}") from error
        raise


def _memory() -> int:
    """Memory of this machine in bytes; the largest integer where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**63
