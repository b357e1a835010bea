"""The attention mechanism of a recipe, by name, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowformer.common.names import nearest
from flowformer.core.checks import check_sizes
from flowformer.mechanisms.registry import create_attention, option_names


def check_attention(
    name: str | None, options: Mapping[str, Any], *, causal: bool = False, own_heads: bool = False
) -> None:
    """Check the name and options of a mechanism before any data is read.

    Args:
        name: The mechanism; ``None`` for the model's own, whose options the model checks.
        options: Options of its module.
        causal: Whether the model needs its causal form.
        own_heads: Whether ``num_heads`` is among the options, of attention that enters a trained model.

    Raises:
        ValueError: for an unknown name, the first unknown option, where the message suggests the nearest, or a value
            that an option does not take.
    """
    if name is None:
        return
    known = option_names(name)
    for key in options:
        if key not in known and not (own_heads and key == "num_heads"):
            raise ValueError(f"{name} has no option {key!r}{nearest(key, known)}; available: {', '.join(known)}")
    own = {key: options[key] for key in options if key != "num_heads"}
    if "seed" in known:  # else it would be drawn
        own = {"seed": 0, **own}
    try:
        check_sizes(num_heads=options.get("num_heads", 4))
        with torch.device("meta"):  # no memory, and no random numbers
            create_attention(name, 64, 4, causal=causal, max_length=64, **own)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"attention_options: {error}" if options else str(error)) from error


def merge_fields(published: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the published fields of a recipe with those that override them.

    The published options of the mechanism are left out where another mechanism is asked for: they are not its own.
    """
    merged = {**published, **fields}
    replaced = "attention" in fields and fields["attention"] != published.get("attention")
    if replaced and "attention_options" not in fields:
        merged.pop("attention_options", None)
    return merged


def find_row(recipe: Any, rows: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Any]) -> str:
    """Find the row of a published table whose model a recipe trains.

    Args:
        recipe: The recipe.
        rows: Fields of the rows by name, where they differ from ``plain``.
        plain: The fields that tell rows from each other, and their most frequent values.

    Returns:
        The name of the first row that fits; "" if none does.
    """
    own = {name: getattr(recipe, name) for name in plain}
    return next((row for row, fields in rows.items() if {**plain, **fields} == own), "")
