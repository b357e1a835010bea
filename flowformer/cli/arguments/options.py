"""Command-line options made from the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_METAVARS = {str: "TEXT", int: "N", float: "X", Path: "FILE"}


def add_options(parser: argparse.ArgumentParser, kind: type) -> list[str]:
    """Add an option for every field of a dataclass, declared by :func:`flowformer.common.fields.option`.

    Returns:
        The options as they are typed: ``["--prompt", "--tokens"]``.
    """
    hints, flags = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        flags.append("--" + field.name.replace("_", "-"))
        default = field.default or None if get_origin(hints[field.name]) is tuple else field.default
        parser.add_argument(flags[-1], default=default, **_describe(hints[field.name], field.metadata["help"]))
    return flags


def _describe(hint: Any, help: str) -> dict[str, Any]:
    """Arguments of ``add_argument`` for a field."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "help": help}
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return {"action": "append", "type": kind, "metavar": _METAVARS[kind], "help": f"{help}; may be repeated"}
    kind = next(one for one in _members(hint) if one is not type(None))
    return {"type": kind, "metavar": _METAVARS[kind], "help": help}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def read_options(values: argparse.Namespace, kind: type) -> Any:
    """Return the dataclass with the parsed values."""
    given = {field.name: getattr(values, field.name) for field in dataclasses.fields(kind)}
    repeated = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return kind(**{name: value for name, value in given.items() if value is not None} | repeated)
