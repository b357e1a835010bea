"""A registry of items by name: recipes, models, attention mechanisms."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from flowformer.common.names import nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Items by name.

    An item registers itself when its module is imported. The modules of ``package`` are imported when the registry is
    first read, so that adding an item means adding a file and nothing else.

    Args:
        kind: What an item is called in error messages, for example ``"model"``.
        package: Name of the package whose modules (and packages, one level deep) register items; "" for none.
        see: Where a user finds all names, for the error message of an unknown one; the names themselves if empty.
    """

    def __init__(self, kind: str, *, package: str = "", see: str = "") -> None:
        self._kind, self._package, self._see = kind, package, see
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register an item and return it.

        Raises:
            ValueError: if the name is taken by another item.
        """
        if self._items.setdefault(name, item) is not item:
            raise ValueError(f"the {self._kind} {name!r} is already registered")
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an item.

        Example:
            >>> recipes = Registry("recipe")
            >>> @recipes.register("text/tiny")
            ... def tiny(**fields): ...
        """
        return lambda item: self.add(name, item)

    def remove(self, name: str) -> None:
        """Remove an item.

        Raises:
            ValueError: for an unknown name.
        """
        self.find(name)
        del self._items[name]

    def find(self, name: str) -> T:
        """Return the item with a name.

        Raises:
            ValueError: for an unknown name; the message suggests the nearest.
        """
        items = self._load()
        if not isinstance(name, str) or name not in items:  # a list cannot be looked up
            hint = nearest(name, items)
            listed = f"{hint}; {self._see}" if self._see else f"; available: {', '.join(sorted(items))}{hint}"
            raise ValueError(f"unknown {self._kind} {name!r}{listed}")
        return items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._load())

    def _load(self) -> dict[str, T]:
        if self._package:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                importlib.import_module(module.name)
        return self._items
