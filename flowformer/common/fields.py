"""Fields of recipes: their types, ranges and help texts, and the checks of their values.

A field's type determines its values: ``int``, ``float``, ``bool``, ``str``, ``Path``, ``Literal[...]`` for choices,
``dict[str, Any]`` for the options of a mechanism, and ``... | None`` where it may be absent. :func:`option` adds the
range, the group and the help text. The command line is made from both; :func:`check_fields` enforces both in Python.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flowformer.common.names import nearest

GROUPS = ("data", "model", "attention", "optimisation", "machine")  # in the order in which help shows them
Group = Literal["", "data", "model", "attention", "optimisation", "machine"]


@dataclass(frozen=True)
class Range:
    """The range of a numeric field; ``None`` for no bound.

    Attributes:
        at_least: The smallest number.
        above: All numbers are larger than this one.
        at_most: The largest number.
        below: All numbers are smaller than this one.
        largest: A bound that only keeps absurd sizes out; it is named where a value is beyond it, and nowhere else.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    largest: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.largest is None or value <= self.largest)
        )

    def explain(self, value: float) -> str:
        """Describe the bounds that a value is to have: the largest, where it is beyond that, or the others."""
        if self.largest is not None and value > self.largest:
            return f"at most {_bound(self.largest)}"
        return str(self)

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"from {_bound(self.at_least)} to {_bound(self.at_most)}"
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {_bound(bound)}" for word, bound in bounds.items() if bound is not None)


def _bound(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def option(
    default: Any,
    help: str,
    *,
    group: Group = "",
    neutral: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    largest: float | None = None,
) -> Any:
    """Declare a field of a recipe, or of the options of a data format, as an option of the command line.

    Args:
        default: Its default; a dictionary is copied for each recipe.
        help: What ``--help`` shows for it.
        group: The heading that ``--help`` shows a recipe's field under.
        neutral: Whether it leaves the result as it is, and may change when a run is resumed.
        at_least: The smallest number it takes.
        above: All numbers it takes are larger.
        at_most: The largest number it takes.
        below: All numbers it takes are smaller.
        largest: A bound that only keeps absurd sizes out, and that help does not show.
    """
    allowed = Range(at_least, above, at_most, below, largest)
    metadata = {"help": help, "group": group, "neutral": neutral, "range": allowed}
    if isinstance(default, dict):
        return field(default_factory=functools.partial(dict, default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """A field of a recipe: type, range, choices, group and help text.

    Attributes:
        name: Of the field.
        type: What it holds, without ``None``: int, float, bool, str, Path, dict, or ``Literal``.
        optional: Whether it may be ``None``.
        choices: The values of a ``Literal``; empty otherwise.
        allowed: The range of numbers.
        help: What it is for.
        group: The heading it belongs under.
        hint: The whole type, as it was written.
    """

    name: str
    type: Any
    optional: bool
    choices: tuple[Any, ...]
    allowed: Range
    help: str
    group: str
    hint: Any

    @property
    def wanted(self) -> str:
        """Describe valid values: "an integer, at least 1, or None"."""
        words = f"one of {', '.join(self.choices)}" if self.choices else _KINDS[self.type]
        words = ", ".join(part for part in (words, str(self.allowed)) if part)
        return words + self._or_none

    @property
    def _or_none(self) -> str:
        return (", or None" if str(self.allowed) or self.choices else " or None") if self.optional else ""

    def convert(self, value: Any) -> Any:
        """Convert a value: numbers to int and float, paths to Path, options to plain JSON values.

        Raises:
            ValueError: for a value of the wrong type, of no choice, or out of range; the message names the field, what
                was wanted, and what came.
        """
        if value is None and self.optional:
            return None
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                raise self.refuse(value)
            return value
        try:
            kept = _CONVERT[self.type](value)
        except (TypeError, ValueError, OverflowError):
            raise self.refuse(value) from None
        if self.type in (int, float):
            self._check_range(value, kept)
        return kept

    def _check_range(self, value: Any, number: float) -> None:
        finite = isinstance(number, int) or math.isfinite(number)  # an integer may be too large for a float
        if not finite or number not in self.allowed:
            words = self.allowed.explain(number) if finite else ""
            wanted = words + (self._or_none if words == str(self.allowed) else "") if words else self.wanted
            raise ValueError(f"{self.name} must be {wanted}, got {_short(value)}")

    def refuse(self, value: Any) -> ValueError:
        """Raise the error for an invalid value."""
        return ValueError(f"{self.name} must be {self.wanted}, got {_short(value)}")


def _short(value: Any) -> str:
    """A value in an error message; long ones are cut."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return "an integer of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def options_of(recipe: type) -> dict[str, Option]:
    """Return the options of a recipe class by name, in the order of its fields, without ``name``."""
    return dict(_options_of(recipe))


@functools.cache
def _options_of(recipe: type) -> tuple[tuple[str, Option], ...]:
    hints = get_type_hints(recipe)
    return tuple(
        (one.name, _read_option(one, hints[one.name])) for one in fields(recipe) if "help" in one.metadata
    )  # fmt: skip


def _read_option(one: Any, hint: Any) -> Option:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [member for member in members if member is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"{one.name}: a field of a recipe must have one type, optionally None; got {hint}")
    kind = kinds[0]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = dict if get_origin(kind) is dict else kind
    if not choices and kind not in _KINDS:
        raise TypeError(f"{one.name}: the type of a field must be one of {', '.join(map(str, _KINDS))}; got {hint}")
    meta = one.metadata
    return Option(
        one.name, kind, NoneType in members, choices, meta["range"], meta["help"], meta["group"], hint
    )  # fmt: skip


def check_fields(recipe: Any) -> None:
    """Check and convert all options of a recipe, see :meth:`Option.convert`.

    Raises:
        ValueError: for a value that the field does not take.
    """
    for name, one in options_of(type(recipe)).items():
        object.__setattr__(recipe, name, one.convert(getattr(recipe, name)))


def plain_fields(recipe: Any) -> dict[str, Any]:
    """Return all fields of a recipe as JSON values, its name first."""
    values = {"name": recipe.name}
    for name in options_of(type(recipe)):
        value = getattr(recipe, name)
        values[name] = str(value) if isinstance(value, Path) else value
    return values


def check_names(recipe: type, given: Iterable[str]) -> None:
    """Raise for names that are not fields of a recipe.

    Raises:
        ValueError: for the first such name; the message suggests the nearest.
    """
    known = options_of(recipe)
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field {name!r}{nearest(name, known)}")


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _to_str(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError
    return value


def _to_path(value: Any) -> Path:
    if not isinstance(value, (str, PathLike)) or not fspath(value) or "\0" in str(value):
        raise TypeError
    return Path(value)


def _to_options(value: Any) -> dict[str, Any]:
    """A copy that holds what JSON gives back: lists for tuples."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError
    return json.loads(json.dumps(dict(value), allow_nan=False))


_KINDS: Mapping[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a non-empty string",
    Path: "a path",
    dict: "a mapping from option names to JSON values (no NaN, no infinity)",
}
_CONVERT: Mapping[Any, Callable[[Any], Any]] = {
    int: _to_int, float: _to_float, bool: _to_bool, str: _to_str, Path: _to_path, dict: _to_options,
}  # fmt: skip
