"""Every recipe by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from flowformer.recipes import density, imagenet, images, language, series, toys
from flowformer.training.fields import check_names
from flowformer.training.recipe import Recipe

RecipeFunction = Callable[..., Recipe]


def _recipes() -> Mapping[str, RecipeFunction]:
    return {
        **series.RECIPES,
        **images.RECIPES,
        **imagenet.RECIPES,
        **density.RECIPES,
        **language.RECIPES,
        **toys.RECIPES,
    }


def list_recipes() -> list[str]:
    """Names that :func:`create_recipe` knows."""
    return sorted(_recipes())


def find_recipe(name: str) -> RecipeFunction:
    """The function that makes a recipe.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    recipes = _recipes()
    if name not in recipes:
        # Compared without case, and with the last part alone: people type "japanesevowels".
        plain = {known.casefold(): known for known in recipes} | {k.split("/")[-1].casefold(): k for k in recipes}
        near = difflib.get_close_matches(name.casefold(), plain, 1)
        hint = f"; did you mean {plain[near[0]]!r}?" if near else ""
        raise ValueError(f"no recipe {name!r}{hint} `flowformer list` shows all of them")
    return recipes[name]


def create_recipe(name: str, **fields: Any) -> Recipe:
    """Make a recipe by name, with some of its fields overridden.

    Raises:
        ValueError: for an unknown name, a field that the recipe does not have, or a value that a field does not take.
    """
    function = find_recipe(name)
    check_names(type(function()), fields)
    return function(**fields)


def read_recipe(values: dict[str, Any]) -> Recipe:
    """The recipe that :meth:`flowformer.training.recipe.Recipe.to_json` wrote, as a run's ``recipe.json`` holds it.

    Raises:
        ValueError: as :func:`create_recipe`, or where there is no name.
    """
    fields = dict(values)
    if "name" not in fields:
        raise ValueError("no name among the fields of a recipe")
    return create_recipe(fields.pop("name"), **fields)
