"""Options of a mechanism, as recipes and the command line write them."""

from __future__ import annotations

import json
from typing import Any


def read_options(text: str) -> dict[str, Any]:
    """Options of a mechanism from JSON; none from the empty text.

    Raises:
        ValueError: for what is no JSON object.
    """
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"attention_options must be JSON, got {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"attention_options must be a JSON object, got {text!r}")
    return options
