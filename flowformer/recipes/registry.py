"""Every recipe by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from flowformer.recipes import density, imagenet, images, language, series, toys
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
        ValueError: for an unknown name or a value that means nothing.
        TypeError: for a field that the recipe does not have.
    """
    return find_recipe(name)(**fields)


def read_recipe(values: dict[str, Any]) -> Recipe:
    """The recipe whose fields a run has written down."""
    fields = dict(values)
    return create_recipe(fields.pop("name"), **fields)
