"""Options that a dataclass declares and a command line offers: `flowformer generate` asks a data format for them."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(default: Any, help: str) -> Any:
    """Declare a field of a dataclass that is an option of a command.

    The field's type says what the option takes: ``str``, ``int``, ``float``, ``bool`` or ``Path``, each ``| None`` if
    it may be absent, or a ``tuple`` of these for an option that may be given more than once.

    Args:
        default: The default.
        help: What ``--help`` shows for it.
    """
    return dataclasses.field(default=default, metadata={"help": help})
