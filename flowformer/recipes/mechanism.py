"""The attention mechanism of a recipe, by name, and its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch

from flowformer.common.names import nearest
from flowformer.mechanisms import create_attention, find_attention

# Arguments set by the model or recipe, which are not options of a mechanism.
_DECIDED = ("self", "dim", "num_heads", "causal", "max_length", "device", "dtype")


def check_attention(name: str | None, options: Mapping[str, Any]) -> None:
    """Check the name and options of a mechanism before any data is read.

    Values of options are left to the model, whose sizes they depend on.

    Args:
        name: The mechanism; ``None`` for the model's own, whose options the model checks.
        options: Options of its module.

    Raises:
        ValueError: for an unknown name, or the first unknown option; the message suggests the nearest.
    """
    if name is None:
        return
    module = find_attention(name).module
    known = _option_names(module)
    for key in options:
        if key in _DECIDED and key != "num_heads":  # other attention in a trained model may have heads of its own
            raise ValueError(_no_option(name, key, known))
    try:
        with torch.device("meta"):  # no memory, and no random numbers
            create_attention(name, 64, 4, max_length=64, **{key: options[key] for key in options if key != "num_heads"})
    except TypeError as error:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        raise ValueError(_no_option(name, unexpected[1], known) if unexpected else str(error)) from error
    except ValueError:
        return


def _option_names(module: type) -> list[str]:
    """Return the options of a module's constructor, including inherited ones."""
    names: dict[str, None] = {}
    for one in module.__mro__:
        if "__init__" not in vars(one):
            continue
        parameters = inspect.signature(one.__init__).parameters.values()
        kinds = {parameter.name: parameter.kind for parameter in parameters}
        names.update({key: None for key, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD})
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break
    return [key for key in names if key not in _DECIDED]


def _no_option(name: str, key: str, known: list[str]) -> str:
    return f"{name} has no option {key!r}{nearest(key, known)}; available: {', '.join(known)}"


def merge_fields(published: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the published fields of a recipe with those that override them.

    The published options of the mechanism are left out where another mechanism is asked for: they are not its own.
    """
    merged = {**published, **fields}
    replaced = "attention" in fields and fields["attention"] != published.get("attention")
    if replaced and "attention_options" not in fields:
        merged.pop("attention_options", None)
    return merged
