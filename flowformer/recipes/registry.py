"""Registry of recipes: each is a function that returns a recipe, registered under its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flowformer.common.fields import check_names
from flowformer.common.registry import Registry
from flowformer.training.recipe import Recipe

RecipeFunction = Callable[..., Recipe]
F = TypeVar("F", bound=RecipeFunction)
RECIPES: Registry[RecipeFunction] = Registry(
    "recipe", package="flowformer.recipes", see="`flowformer list` shows all of them"
)


def register_recipe(name: str) -> Callable[[F], F]:
    """Return a decorator that registers a function which returns a recipe; its keyword arguments override fields.

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
    """Return the names that :func:`create_recipe` accepts, sorted."""
    return RECIPES.names()


def find_recipe(name: str) -> RecipeFunction:
    """Return the function that makes a recipe.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    return RECIPES.find(name)


def create_recipe(name: str, **fields: Any) -> Recipe:
    """Create a recipe by name, with some of its fields overridden.

    Raises:
        ValueError: for an unknown name, a field that the recipe does not have, or a value that a field does not take.
    """
    function = find_recipe(name)
    check_names(type(function()), fields)
    return function(**fields)


def check_given(recipe: Recipe, given: Iterable[str]) -> None:
    """Check that the fields that a user gives have an effect.

    Raises:
        ValueError: for the first that has none beside the values of the others.
    """
    misfits = recipe.misfits()
    for name in given:
        if name in misfits:
            raise ValueError(misfits[name])


def read_recipe(values: dict[str, Any]) -> Recipe:
    """Read a recipe from the output of :meth:`flowformer.training.recipe.Recipe.to_json`, saved in ``recipe.json``.

    Raises:
        ValueError: as :func:`create_recipe`, or where there is no name.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"values must be the mapping that recipe.json contains, got {type(values).__name__}")
    fields = dict(values)
    if "name" not in fields:
        raise ValueError("the fields of a recipe must include name")
    return create_recipe(fields.pop("name"), **fields)
