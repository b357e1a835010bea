"""Every recipe by name: a recipe is a small function that its file registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from flowformer.common.registry import Registry
from flowformer.training.recipe import Recipe

RecipeFunction = Callable[..., Recipe]
F = TypeVar("F", bound=RecipeFunction)
RECIPES: Registry[RecipeFunction] = Registry(
    "recipe", package="flowformer.recipes", see="`flowformer list` shows all of them"
)


def register_recipe(name: str) -> Callable[[F], F]:
    """A decorator that registers a function that makes a recipe; its keyword arguments override fields.

    Example:
        >>> @register_recipe("text/tiny")
        ... def tiny(**fields):
        ...     return TextRecipe(**{"name": "text/tiny", "steps": 10, **fields})
    """

    def register(function: F) -> F:
        RECIPES.add(name, function)
        return function

    return register


def list_recipes() -> list[str]:
    """Names that :func:`create_recipe` accepts, sorted."""
    return RECIPES.names()


def find_recipe(name: str) -> RecipeFunction:
    """The function that makes a recipe.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    return RECIPES.find(name)


def create_recipe(name: str, **fields: Any) -> Recipe:
    """Make a recipe by name, with some of its fields overridden.

    Raises:
        ValueError: for an unknown name or an invalid value.
        TypeError: for a field that the recipe does not have.
    """
    return find_recipe(name)(**fields)


def read_recipe(values: dict[str, Any]) -> Recipe:
    """The recipe of a run, from the contents of its ``recipe.json``."""
    fields = dict(values)
    return create_recipe(fields.pop("name"), **fields)
