"""Every model by name: a model is a small function that its file registers."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_FILES = ("language", "timeseries", "vision")  # imported on first use

F = TypeVar("F", bound=Callable[..., nn.Module])


def register_model(function: F) -> F:
    """Make a function that builds a model known by its own name."""
    _MODELS[function.__name__] = function
    return function


def _models() -> dict[str, Callable[..., nn.Module]]:
    for name in _FILES:
        importlib.import_module(f"flowformer.models.{name}")
    return _MODELS


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return sorted(_models())


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: One of :func:`list_models`.
        **options: Arguments of the function of that name.

    Returns:
        The model, with fresh parameters.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
        TypeError: for an option that the model does not have.
    """
    return find_model(name)(**options)


def find_model(name: str) -> Callable[..., nn.Module]:
    """The function that builds a model.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    models = _models()
    if name not in models:
        near = difflib.get_close_matches(name, models, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no model {name!r}; there is {', '.join(sorted(models))}{hint}")
    return models[name]
