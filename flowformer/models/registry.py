"""Registry of models: each is a function that builds the model, registered under its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from flowformer.common.registry import Registry

MODELS: Registry[Callable[..., nn.Module]] = Registry("model", package="flowformer.models")

F = TypeVar("F", bound=Callable[..., nn.Module])


def register_model(function: F) -> F:
    """Register a function that builds a model, under its own name."""
    MODELS.add(function.__name__, function)
    return function


def list_models() -> list[str]:
    """Return the names that :func:`create_model` accepts, sorted."""
    return MODELS.names()


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
    """Return the function that builds a model.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    return MODELS.find(name)
