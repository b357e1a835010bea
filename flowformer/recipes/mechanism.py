"""The attention mechanism of a recipe, by name, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowformer.common.names import nearest
from flowformer.mechanisms.registry import create_attention, option_names


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
    known = option_names(name)
    for key in options:
        if key not in known and key != "num_heads":  # other attention in a trained model may have heads of its own
            raise ValueError(f"{name} has no option {key!r}{nearest(key, known)}; available: {', '.join(known)}")
    try:
        with torch.device("meta"):  # no memory, and no random numbers
            create_attention(name, 64, 4, max_length=64, **{key: options[key] for key in options if key != "num_heads"})
    except TypeError as error:
        raise ValueError(f"attention_options: {error}") from error
    except ValueError:
        return


def merge_fields(published: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the published fields of a recipe with those that override them.

    The published options of the mechanism are left out where another mechanism is asked for: they are not its own.
    """
    merged = {**published, **fields}
    replaced = "attention" in fields and fields["attention"] != published.get("attention")
    if replaced and "attention_options" not in fields:
        merged.pop("attention_options", None)
    return merged
