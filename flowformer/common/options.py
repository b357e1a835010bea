"""Dataclass fields that are command-line options, for example those of ``flowformer generate``."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(default: Any, help: str) -> Any:
    """Declare a dataclass field that is a command-line option.

    The field's type determines the values of the option: ``str``, ``int``, ``float``, ``bool`` or ``Path``, each
    ``| None`` if it may be absent, or a ``tuple`` of these for an option that may be given more than once.

    Args:
        default: The default.
        help: What ``--help`` shows for it.
    """
    return dataclasses.field(default=default, metadata={"help": help})
