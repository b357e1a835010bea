"""Recipes of published experiments: functions that return typed dataclasses."""

from flowformer.recipes.registry import create_recipe, find_recipe, list_recipes, read_recipe, register_recipe

__all__ = ["create_recipe", "find_recipe", "list_recipes", "read_recipe", "register_recipe"]
