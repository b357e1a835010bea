"""Fit state dicts of other code to our models: names, shapes, and what is said of those that do not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from flowformer.core.checks import describe

Names = Sequence[tuple[str, str]]
M = TypeVar("M", bound=nn.Module)


def rename(published: Mapping[str, Tensor], names: Names, what: str) -> dict[str, Tensor]:
    """Return tensors by our names.

    Args:
        published: The state dict.
        names: Patterns of its names, and ours.
        what: What it is of, for messages.

    Raises:
        TypeError: for anything but tensors of floating point numbers.
        ValueError: for a name that no pattern fits.
    """
    if not isinstance(published, Mapping):
        raise TypeError(f"the weights of {what} must be a state dict, got {type(published).__name__}")
    ours = {}
    for name, tensor in published.items():
        if not isinstance(name, str):
            raise TypeError(f"names of the weights of {what} must be text, got {name!r}")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name!r} of {what} must be a tensor of floating point numbers, got {describe(tensor)}")
        ours[_rename_one(name, names, what)] = tensor
    return ours


def _rename_one(name: str, names: Names, what: str) -> str:
    for pattern, replacement in names:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"{name!r} is not a parameter of {what}")


def split_qkv(ours: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Put queries, keys and values that are one tensor under their own names.

    Raises:
        ValueError: for a tensor that does not hold three.
    """
    if not tensor.ndim or len(tensor) % 3:
        raise ValueError(f"{name} must have queries, keys and values in one, got {describe(tensor)} (in our names)")
    for part, rows in zip("qkv", tensor.chunk(3), strict=True):
        ours[name.replace("qkv", f"{part}_proj")] = rows


def require(state: Mapping[str, Tensor], axes: Mapping[str, int]) -> None:
    """Check the tensors that sizes are read from: that they are there, and how many axes they have.

    Raises:
        ValueError: naming what is missing, or of another shape.
    """
    missing = [name for name in axes if name not in state]
    if missing:
        raise ValueError(f"the weights do not fit the model: missing {', '.join(missing)} (in our names)")
    for name, wanted in axes.items():
        if state[name].ndim != wanted or not state[name].numel():
            raise ValueError(
                f"the weights do not fit the model: {name} must have {wanted} axes, none of them empty, got"
                f" {describe(state[name])} (in our names)"
            )


def fill(model: M, state: Mapping[str, Tensor]) -> M:
    """Load weights, all of which must fit, and return the model in evaluation mode.

    Raises:
        ValueError: naming what is missing, unexpected, or of another shape.
    """
    wanted = model.state_dict()
    shared = sorted(set(wanted) & set(state))
    wrong = [
        f"{name} is {tuple(state[name].shape)} and must be {tuple(wanted[name].shape)}"
        for name in shared
        if state[name].shape != wanted[name].shape
    ]
    troubles = {
        "missing": sorted(set(wanted) - set(state)),
        "unexpected": sorted(set(state) - set(wanted)),
        "of another shape": wrong,
    }
    said = "; ".join(f"{what}: {', '.join(names)}" for what, names in troubles.items() if names)
    if said:
        raise ValueError(f"the weights do not fit the model: {said} (in our names)")
    model.load_state_dict(state)
    return model.eval()
