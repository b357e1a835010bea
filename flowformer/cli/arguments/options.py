"""Command-line options made from the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flowformer.cli.arguments.parser import UsageError
from flowformer.cli.output.paths import output_path

_METAVARS = {str: "TEXT", int: "N", float: "X", Path: "FILE"}


def add_options(parser: argparse.ArgumentParser, kind: type) -> list[str]:
    """Add an option for every field of a dataclass, declared by :func:`flowformer.common.fields.option`.

    Returns:
        The options as they are typed: ``["--prompt", "--tokens"]``.
    """
    hints, flags = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        flags.append(_flag(field))
        default = field.default or None if get_origin(hints[field.name]) is tuple else field.default
        allowed = str(field.metadata["range"])
        help = field.metadata["help"] + (f" ({allowed})" if allowed else "")
        parser.add_argument(flags[-1], default=default, **_describe(hints[field.name], help))
    return flags


def _flag(field: Any) -> str:
    return "--" + field.name.replace("_", "-")


def _describe(hint: Any, help: str) -> dict[str, Any]:
    """Arguments of ``add_argument`` for a field."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "help": help}
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return {
            "action": "append", "type": _READ[kind], "metavar": _METAVARS[kind], "help": f"{help}; may be repeated",
        }  # fmt: skip
    kind = next(one for one in _members(hint) if one is not type(None))
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "help": help}
    return {"type": _READ[kind], "metavar": _METAVARS[kind], "help": help}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def whole_number(text: str) -> int:
    """Read an integer; the type of an option.

    Raises:
        ArgumentTypeError: for anything else.
    """
    try:
        return int(text)
    except ValueError as error:  # also for more digits than Python converts
        raise argparse.ArgumentTypeError(f"expects a whole number, got {text[:50]!r}") from error


def number(text: str) -> float:
    """Read a finite number; the type of an option.

    Raises:
        ArgumentTypeError: for anything else.
    """
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expects a number, got {text[:50]!r}") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expects a finite number, got {text!r}")
    return value


def _text(text: str) -> str:
    """Text in Unicode: a byte of the command line that is not in its encoding comes as half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"expects text in UTF-8, got {text!r}") from error
    return text


_READ: Mapping[Any, Callable[[str], Any]] = {str: _text, int: whole_number, float: number, Path: output_path}


def read_options(values: argparse.Namespace, kind: type) -> Any:
    """Return the dataclass with the parsed values.

    Raises:
        UsageError: for a number out of range; the message names the option.
    """
    given = {field.name: getattr(values, field.name) for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(kind):
        value, allowed = given[field.name], field.metadata["range"]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value not in allowed:
            raise UsageError(f"{_flag(field)} must be {allowed.explain(value)}, got {value}")
    repeated = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return kind(**{name: value for name, value in given.items() if value is not None} | repeated)


def fill_options(options: Any, recipe: Any) -> Any:
    """Return options in which those that are ``None`` have the value of the recipe's field of the same name."""
    absent = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) is None]
    return dataclasses.replace(options, **{name: getattr(recipe, name) for name in absent if hasattr(recipe, name)})
