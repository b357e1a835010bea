"""Attention maps ready to be plotted: one scene per run, one strip of maps per layer and query.

A data format makes a :class:`Scene` of a model and an example (:class:`flowformer.tasks.protocols.Shows`);
:mod:`flowformer.report.drawing` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from flowformer.common.errors import DataError
from flowformer.mechanisms import find_attention, list_attentions
from flowformer.mechanisms.maps import LayerMaps, model_maps
from flowformer.tasks.encodings import check_file

FLOWS = {
    "conserved_incoming": "conserved incoming flow",
    "conserved_outgoing": "conserved outgoing flow",
    "competition": "competition",
    "allocation": "allocation",
}
MEAN = "mean"
CLASS_TOKEN = "class"
Point = tuple[float, ...]  # an int is a position; a float is a share of the length


class Strip(NamedTuple):
    """One map per head of a layer: the attention weights of one query, or one kind of flow.

    Attributes:
        label: What it shows.
        heads: Names of the maps.
        maps: (maps, positions), or (maps, rows, columns) of an image; NaN where attention is masked.
        point: Position of the query, or its share of height and width; ``None`` for flows and for the class token.
    """

    label: str
    heads: tuple[str, ...]
    maps: np.ndarray
    point: Point | None = None


class Scene(NamedTuple):
    """Everything plotted for one run. At most one of ``image``, ``series`` and ``tokens`` is set.

    Attributes:
        title: The mechanism.
        strips: From the first layer to the last.
        image: (rows, columns, channels) from 0 to 1; the maps are drawn as tiles beside it.
        series: (steps, channels); the maps are drawn as bands below it.
        tokens: How tokens are written; the maps are drawn as bands above them.
    """

    title: str
    strips: list[Strip]
    image: np.ndarray | None = None
    series: np.ndarray | None = None
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """Selection of queries, layers and heads.

    Attributes:
        at: Queries: (row, column) of an image, else (position,), each an int, or a share from 0.0 to 1.0; an empty
            tuple is the class token. If empty: the centre of an image or series, the last token of a text.
        layers: Numbers of layers, from 0; all if empty.
        heads: Numbers of heads, from 0, or ``"mean"``; the mean and all heads if empty.
        flows: Also show the flows of layers that have them.
    """

    at: tuple[Point, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int | str, ...] = ()
    flows: bool = False


def line_strips(
    model: nn.Module, inputs: tuple[Any, ...], length: int, view: View, *, default: float, name: Callable[[int], str]
) -> list[Strip]:
    """Return strips over the positions of a sequence.

    Args:
        model: The model, in evaluation mode.
        inputs: What it is called with.
        length: Positions of the sequence.
        view: What to show.
        default: The query if the view names none.
        name: The name of a position.

    Raises:
        ValueError: for a query, layer or head that is not there.
    """
    points = [locate(point, (length,))[0] for point in view.at or ((default,),)]
    named = [(name(point), (point,)) for point in points]
    return model_strips(model, inputs, lambda *_: points, lambda _, maps: maps, named, view)


def model_strips(
    model: nn.Module,
    inputs: tuple[Any, ...],
    rows: Callable[[str, int], Sequence[int]],
    arrange: Callable[[str, np.ndarray], np.ndarray],
    points: Sequence[tuple[str, Point | None]],
    view: View,
) -> list[Strip]:
    """Return strips of all layers of a model.

    Args:
        model: The model, in evaluation mode.
        inputs: What it is called with.
        rows: As in :func:`flowformer.mechanisms.maps.model_maps`.
        arrange: From a layer's name and its maps (maps, tokens) to the maps as they are drawn.
        points: Name and position of each query.
        view: What to show.

    Raises:
        ValueError: for a layer or head that is not there.
    """
    found = model_maps(model, *inputs, rows=rows, flows=view.flows)
    strips = []
    for number in view.layers or range(len(found)):
        if not 0 <= number < len(found):
            raise ValueError(f"no layer {number}: the model has {len(found)}, from 0 to {len(found) - 1}")
        name, layer = list(found.items())[number]
        for index, (query, point) in enumerate(points):
            heads, maps = _pick(number, _weights(layer, index), view)
            label = f"layer {number}, from {query}"
            strips.append(Strip(label, heads, arrange(name, maps), point))
        for kind in FLOWS if layer.flows else ():
            heads, maps = _pick(number, getattr(layer.flows, kind)[0].cpu().numpy(), view)
            strips.append(Strip(f"layer {number}, {FLOWS[kind]}", heads, arrange(name, maps)))
    return strips


def _weights(layer: LayerMaps, index: int) -> np.ndarray:
    """Weights of one query, (heads, positions); NaN where a causal layer masks."""
    weights = layer.weights[0, :, index].cpu().numpy()
    if layer.module.causal:
        weights[:, layer.rows[index] + 1 :] = math.nan
    return weights


def _pick(layer: int, maps: np.ndarray, view: View) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and maps of the heads to show."""
    count = len(maps)
    chosen = view.heads or ((MEAN, *range(count)) if count > 1 else (0,))
    for head in chosen:
        if head != MEAN and not (isinstance(head, int) and 0 <= head < count):
            raise ValueError(f"no head {head!r}: layer {layer} has {count}, from 0 to {count - 1}, and {MEAN!r}")
    names = tuple(MEAN if head == MEAN else f"head {head}" for head in chosen)
    return names, np.stack([maps.mean(0) if head == MEAN else maps[head] for head in chosen])


def locate(point: Point, size: Sequence[int], *, class_token: bool = False) -> tuple[int, ...]:
    """Return the indices of a point on each axis; an empty tuple for the class token.

    Args:
        point: The point.
        size: Positions on each axis.
        class_token: Whether the model has one.

    Raises:
        ValueError: for a point that is not there.
    """
    if not point and class_token:
        return ()
    if len(point) != len(size):
        wanted = ("a position", "ROW,COLUMN")[len(size) - 1] + (f" or {CLASS_TOKEN}" if class_token else "")
        raise ValueError(f"expected {wanted} as query, got {format_point(point)}")
    position = []
    for share, length in zip(point, size, strict=True):
        if isinstance(share, int):
            index = share + length if share < 0 else share
        else:
            index = min(math.floor(share * length), length - 1) if 0 <= share <= 1 else -1
        if not 0 <= index < length:
            raise ValueError(
                f"{format_point(point)} is out of range: expected 0 to {length - 1}, or a fraction from 0.0 to 1.0"
            )
        position.append(index)
    return tuple(position)


def parse_point(text: str) -> Point:
    """Parse a point: ``"112,40"`` (indices), ``"0.5,0.2"`` (fractions), ``"17"`` or ``"class"``.

    Raises:
        ValueError: for anything else.
    """
    if text == CLASS_TOKEN:
        return ()
    try:
        return tuple(int(part) if part.strip().lstrip("-").isdigit() else float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"expected ROW,COLUMN or a position, got {text!r}") from error


def format_point(point: Point) -> str:
    """Format a point for :func:`parse_point`."""
    return ",".join(map(str, point)) or CLASS_TOKEN


def has_flows(scene: Scene) -> bool:
    """Return whether a scene contains flows of any layer."""
    return any(strip.label.endswith(FLOWS["allocation"]) for strip in scene.strips)


def find_mechanisms(model: nn.Module) -> list[str]:
    """Return the names of the registered attention mechanisms in a model."""
    kinds = {type(module) for module in model.modules()}
    return [name for name in list_attentions() if find_attention(name).module in kinds]


def read_example(file: Path | None, what: str) -> bytes:
    """Read the file of an example.

    Raises:
        ValueError: without a file, saying ``what`` is needed.
        DataError: for a file that cannot be read.
    """
    if file is None:
        raise ValueError(f"a file is required: {what}")
    check_file(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
