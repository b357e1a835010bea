"""The attention of a recipe: a mechanism by name, and its options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from flowformer.common.names import nearest
from flowformer.mechanisms import find_attention

# What a model or recipe decides, and no option of a mechanism can say.
_DECIDED = ("self", "dim", "causal", "max_length")


def check_attention(name: str | None, options: Mapping[str, Any]) -> None:
    """Refuse a mechanism or an option that does not exist, before any data is read.

    Args:
        name: The mechanism; ``None`` for the model's own, whose options the model checks.
        options: Options of its module.

    Raises:
        ValueError: for an unknown name, or the first unknown option; the message suggests the nearest.
    """
    if name is None:
        return
    module = find_attention(name).module
    parameters = inspect.signature(module).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        _try_options(module, {key: value for key, value in options.items() if key != "num_heads"})
        return
    known = [key for key in parameters if key not in _DECIDED]
    for key in options:
        if key not in known:
            there = ", ".join(one for one in known if one != "num_heads")
            raise ValueError(f"{name} has no option {key!r}{nearest(key, known)}; it has {there}")


def _try_options(module: Any, options: Mapping[str, Any]) -> None:
    """Let a mechanism that takes any keyword say which of them it does not know."""
    try:
        with torch.device("meta"):  # no memory, and no random numbers
            module(64, 4, **options)
    except TypeError as error:
        raise ValueError(str(error)) from error


def merge_fields(published: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe: the published ones, and those that replace them.

    The published options of the mechanism are left out where another mechanism is asked for: they are not its own.
    """
    merged = {**published, **fields}
    replaced = "attention" in fields and fields["attention"] != published.get("attention")
    if replaced and "attention_options" not in fields:
        merged.pop("attention_options", None)
    return merged
