"""Values of JSON from a file that may be damaged: read with their types, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def read_number(values: Mapping[str, Any], name: str, *, above: float | None = None) -> float:
    """Return a finite number.

    Raises:
        ValueError: naming what is missing, no number, or out of range.
    """
    return _check_number(name, _get(values, name), above)


def read_integer(values: Mapping[str, Any], name: str, *, at_least: int = 1) -> int:
    """Return a whole number; errors as :func:`read_number`."""
    value = _get(values, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be a whole number, at least {at_least}, got {value!r:.80}")
    return value


def read_numbers(values: Mapping[str, Any], name: str, *, above: float | None = None) -> tuple[float, ...]:
    """Return a list of finite numbers, not empty; errors as :func:`read_number`."""
    return tuple(_check_number(name, one, above) for one in _list(values, name))


def read_flag(values: Mapping[str, Any], name: str) -> bool:
    """Return true or false; errors as :func:`read_number`."""
    value = _get(values, name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.80}")
    return value


def read_texts(values: Mapping[str, Any], name: str, *, distinct: bool = False) -> tuple[str, ...]:
    """Return a list of texts, not empty, each other than the rest if ``distinct``; errors as :func:`read_number`."""
    for one in (found := _list(values, name)):
        if not isinstance(one, str):
            raise ValueError(f"{name} must hold texts, got {one!r:.80}")
    if distinct and len(set(found)) < len(found):
        raise ValueError(f"{name} must differ from each other, {len(found) - len(set(found))} of {len(found)} do not")
    return tuple(found)


def _get(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ValueError(f"{name} is missing")
    return values[name]


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = _get(values, name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name} must be a list that is not empty, got {found!r:.80}")
    return found


def _check_number(name: str, value: Any, above: float | None) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or (above is not None and value <= above):
        wanted = "a finite number" if above is None else f"a finite number above {above:g}"
        raise ValueError(f"{name} must be {wanted}, got {value!r:.80}")
    return float(value)
