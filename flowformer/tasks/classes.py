"""Names of classes as data spells them: their order, and which of them a label means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation


def as_number(name: str) -> Decimal | None:
    """Return the value of a name that is a finite number in ASCII digits ("2", "-1", "0.50", "1e3"), else ``None``."""
    if not name.isascii() or "_" in name:
        return None
    try:
        value = Decimal(name)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the different names in the order of classes, the same for every kind of data.

    Numbers come first, by value (-1, 2, 2.5, 10) and by their spelling where values are equal; then other names by
    their characters.
    """

    def key(name: str) -> tuple[bool, Decimal, str]:
        value = as_number(name)
        return value is None, value or Decimal(0), name

    return tuple(sorted(set(names), key=key))


def find_class(label: str, index: Mapping[str, int]) -> int | None:
    """Return the number of the class that a label means.

    Args:
        label: As written.
        index: Numbers of classes by name.

    Returns:
        That of the class of this name; else that of the only class whose name is a number of the same value ("1.0"
        stands for "1": programs rewrite whole numbers so); ``None`` if there is none.
    """
    if label in index:
        return index[label]
    value = as_number(label)
    if value is None:
        return None
    alike = [number for name, number in index.items() if as_number(name) == value]
    return alike[0] if len(alike) == 1 else None
