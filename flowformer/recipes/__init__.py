"""Published experiments, each a small function that returns a typed recipe."""

from flowformer.recipes.registry import create_recipe, find_recipe, list_recipes, read_recipe

__all__ = ["create_recipe", "find_recipe", "list_recipes", "read_recipe"]
