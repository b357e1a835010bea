"""Pictures of what runs attend to, over an image, a series or a text: the command ``flowformer visualize``.

Here a model is looked at: what comes out are scenes, one for each run, that :mod:`flowformer.report.drawing` draws.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from flowformer.mechanisms import find_attention, list_attentions
from flowformer.mechanisms.maps import LayerMaps, model_maps
from flowformer.models.language import LanguageModel
from flowformer.models.timeseries import SeriesClassifier
from flowformer.models.vision import VisionModel
from flowformer.tasks.images import ImageFormat
from flowformer.tasks.series import SeriesFormat, fill_missing, match_format
from flowformer.tasks.series_files import read_table
from flowformer.tasks.text import TextFormat
from flowformer.tasks.tokenizers import Tokenizer

FLOWS = {
    "conserved_incoming": "conserved incoming flow",
    "conserved_outgoing": "conserved outgoing flow",
    "competition": "competition",
    "allocation": "allocation",
}
MEAN = "mean"
CLASS_TOKEN = "class"
Point = tuple[float, ...]  # a whole number counts places; another is a share of the length


# -------------------------------------------------------------------------------------------------------------- scenes


class Strip(NamedTuple):
    """One map for each head, of one layer: what one query takes, or one kind of flow.

    Attributes:
        label: What it is.
        heads: Names of the maps.
        maps: (maps, places), or (maps, rows, columns) of an image; NaN where there is nothing to see.
        point: Place of the query, or its share of height and width; ``None`` for flows, and where it is no place.
    """

    label: str
    heads: tuple[str, ...]
    maps: np.ndarray
    point: Point | None = None


class Scene(NamedTuple):
    """All that is drawn of one run.

    Attributes:
        title: The mechanism.
        strips: From the first layer to the last.
        image: (rows, columns, channels) from 0 to 1, where it is one.
        series: (steps, channels), where it is one.
        tokens: What tokens are written as, where it is a text.
    """

    title: str
    strips: list[Strip]
    image: np.ndarray | None = None
    series: np.ndarray | None = None
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wish:
    """What to show.

    Attributes:
        at: Queries: (row, column) of an image, (place,) else, each a whole number, or a share between 0 and 1; an empty
            tuple is the class token. The centre of an image or series, and the last token of a text, if there are none.
        layers: Numbers of layers, from 0; all if empty.
        heads: Numbers of heads, from 0, or ``"mean"``; the mean and all heads if empty.
        flows: Show the flows of layers that have them.
    """

    at: tuple[Point, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int | str, ...] = ()
    flows: bool = False


def image_scene(model: VisionModel, form: ImageFormat, pixels: np.ndarray, wish: Wish) -> Scene:
    """What a model of images attends to.

    Args:
        model: The model, in evaluation mode.
        form: How its images are prepared.
        pixels: (size, size, channels) uint8, as :meth:`ImageFormat.prepare` makes it.
        wish: What to show; whole numbers are pixels of the prepared image.

    Raises:
        ValueError: for what is not there.
    """
    x = form.collate([(pixels, 0)])["x"]
    size, grids = x.shape[-2:], model.grids((x.shape[-2], x.shape[-1]))
    first = int(model.class_token is not None)
    points = [_locate(point, size, CLASS_TOKEN if first else "") for point in wish.at or ((0.5, 0.5),)]

    def stage(name: str) -> int:
        return int(name.split(".")[1])

    def rows(name: str, tokens: int) -> list[int]:
        stride, columns = model.strides[stage(name)], grids[stage(name)][1]
        return [first + p[0] // stride * columns + p[1] // stride if p else 0 for p in points]

    def places(name: str, maps: np.ndarray) -> np.ndarray:
        return maps[:, first:].reshape(-1, *grids[stage(name)])

    shares = [tuple((p + 0.5) / n for p, n in zip(point, size, strict=True)) if point else None for point in points]
    names = [f"({', '.join(map(str, point))})" if point else "class token" for point in points]
    strips = _strips(model, (x,), rows, places, list(zip(names, shares, strict=True)), wish)
    return Scene(_mechanism(model), strips, image=pixels / 255)


def series_scene(model: SeriesClassifier, form: SeriesFormat, series: np.ndarray, wish: Wish) -> Scene:
    """What a classifier of series attends to.

    Args:
        model: The model, in evaluation mode.
        form: How its series are prepared.
        series: (length, channels), missing values filled or not.
        wish: What to show.

    Raises:
        ValueError: for what is not there.
    """
    batch = form.collate([(fill_missing(series), 0)])
    length = int(batch["mask"].sum()) if model.mask_padding else batch["x"].shape[1]
    strips = _line(model, (batch["x"], batch["mask"]), length, wish, 0.5, lambda place: f"step {place}")
    return Scene(_mechanism(model), strips, series=batch["x"][0, :length].numpy())


def text_scene(model: LanguageModel, tokenizer: Tokenizer, text: str, wish: Wish) -> Scene:
    """What a language model attends to.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        text: The text, one token or more.
        wish: What to show.

    Raises:
        ValueError: for a text without tokens, or too long for the model, and for what is not there.
    """
    tokens = torch.from_numpy(tokenizer.encode(text).astype(np.int64))
    if not len(tokens):
        raise ValueError("want a text of a token or more, got an empty one")
    shown = tuple(_show(tokenizer, token) for token in tokens.tolist())
    strips = _line(
        model, (tokens.unsqueeze(0),), len(tokens), wish, -1, lambda place: f"token {place}, {shown[place]!r}"
    )
    return Scene(_mechanism(model), strips, tokens=shown)


def _show(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is written on an axis; its number, in hexadecimal, if it is no character by itself."""
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        return f"{token:02x}"
    return "".join({" ": "␣", "\n": "↵", "\t": "→"}.get(c, c if c.isprintable() else "·") for c in text)


def _line(
    model: nn.Module, inputs: tuple[Any, ...], length: int, wish: Wish, usual: float, call: Callable[[int], str]
) -> list[Strip]:
    """Strips over the places of a line; ``usual`` is where to look from, and ``call`` what a place is called."""
    points = [_locate(point, (length,))[0] for point in wish.at or ((usual,),)]
    named = [(call(point), (point,)) for point in points]
    return _strips(model, inputs, lambda *_: points, lambda _, maps: maps, named, wish)


def _strips(
    model: nn.Module,
    inputs: tuple[Any, ...],
    rows: Callable[[str, int], Sequence[int]],
    places: Callable[[str, np.ndarray], np.ndarray],
    points: Sequence[tuple[str, Point | None]],
    wish: Wish,
) -> list[Strip]:
    """Look at a model.

    Args:
        model: The model.
        inputs: What it is called with.
        rows: As in :func:`flowformer.mechanisms.maps.model_maps`.
        places: Maps (maps, tokens) of a layer as they are drawn.
        points: Name and place of each query.
        wish: What to show.
    """
    found = model_maps(model, *inputs, rows=rows, flows=wish.flows)
    strips = []
    for number in wish.layers or range(len(found)):
        if not 0 <= number < len(found):
            raise ValueError(f"no layer {number}: there are {len(found)}, from 0 to {len(found) - 1}")
        name, layer = list(found.items())[number]
        for index, (query, point) in enumerate(points):
            heads, maps = _pick(number, _weights(layer, index), wish)
            label = f"layer {number}, from {query}"
            strips.append(Strip(label, heads, places(name, maps), point))
        for kind in FLOWS if layer.flows else ():
            heads, maps = _pick(number, getattr(layer.flows, kind)[0].cpu().numpy(), wish)
            strips.append(Strip(f"layer {number}, {FLOWS[kind]}", heads, places(name, maps)))
    return strips


def _weights(layer: LayerMaps, index: int) -> np.ndarray:
    """Weights of one query, (heads, places); NaN where a causal one does not see."""
    weights = layer.weights[0, :, index].cpu().numpy()
    if layer.module.causal:
        weights[:, layer.rows[index] + 1 :] = math.nan
    return weights


def _pick(layer: int, maps: np.ndarray, wish: Wish) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and maps of the heads in question."""
    count = len(maps)
    chosen = wish.heads or ((MEAN, *range(count)) if count > 1 else (0,))
    for head in chosen:
        if head != MEAN and not (isinstance(head, int) and 0 <= head < count):
            raise ValueError(f"no head {head!r}: layer {layer} has {count}, from 0 to {count - 1}, and {MEAN!r}")
    names = tuple(MEAN if head == MEAN else f"head {head}" for head in chosen)
    return names, np.stack([maps.mean(0) if head == MEAN else maps[head] for head in chosen])


def _locate(point: Point, size: Sequence[int], instead: str = "") -> tuple[int, ...]:
    """Places, from 0, that a point means; none for what there is ``instead`` of a place."""
    if not point and instead:
        return ()
    if len(point) != len(size):
        wanted = ("a place", "ROW,COLUMN")[len(size) - 1] + (f" or {instead}" if instead else "")
        raise ValueError(f"want {wanted} to look from, got {format_point(point)}")
    places = []
    for share, length in zip(point, size, strict=True):
        if isinstance(share, int):
            place = share + length if share < 0 else share
        else:
            place = min(math.floor(share * length), length - 1) if 0 <= share <= 1 else -1
        if not 0 <= place < length:
            raise ValueError(f"{format_point(point)} is no place: want 0 to {length - 1}, or a share from 0.0 to 1.0")
        places.append(place)
    return tuple(places)


def parse_point(text: str) -> Point:
    """A point from ``"112,40"`` (places), ``"0.5,0.2"`` (shares), ``"17"`` or ``"class"``.

    Raises:
        ValueError: for anything else.
    """
    if text == CLASS_TOKEN:
        return ()
    try:
        return tuple(int(part) if part.strip().lstrip("-").isdigit() else float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"want ROW,COLUMN or a place, got {text!r}") from error


def format_point(point: Point) -> str:
    """A point as it was given."""
    return ",".join(map(str, point)) or CLASS_TOKEN


def _mechanism(model: nn.Module) -> str:
    """What the registry calls a model's attention."""
    kinds = {type(module) for module in model.modules()}
    return ", ".join(name for name in list_attentions() if find_attention(name).module in kinds)


# --------------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``flowformer visualize``."""
    parser.usage = "%(prog)s RUN [RUN ...] FILE --out PICTURE [options]"
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN FILE", help=(
        "folders of runs, and what they are to look at: an image, series as .ts or .csv, or a text; no file with --text"
    ))  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="picture to write: .png, .pdf or .svg")
    parser.add_argument("--checkpoint", default="last", help="last, best-test or best-validation")
    parser.add_argument("--at", action="append", metavar="PLACE", help=(
        "query to look from, more than one may be given: ROW,COLUMN of an image, else a step or token; whole numbers "
        "count from 0 (pixels of the image as the model sees it), fractions are shares; 'class' is the class token"
    ))  # fmt: skip
    parser.add_argument("--layer", action="append", type=int, help="layer to show, from 0; all if absent")
    parser.add_argument("--head", action="append", help="head to show, from 0, or mean; all if absent")
    parser.add_argument("--flows", action="store_true", help="show the flows of Flow- and Mobile-Attention too")
    parser.add_argument("--text", help="text to look at, instead of a file")
    parser.add_argument("--index", type=int, default=0, help="which series of the file, from 0")


def visualize(values: argparse.Namespace, load: Callable[[Path, str], tuple[Any, Any]]) -> str:
    """Carry out ``flowformer visualize``.

    Args:
        values: The arguments that :func:`add_arguments` describes.
        load: Model and format of a run, from its folder and the name of a checkpoint.

    Returns:
        What to tell the user.

    Raises:
        ValueError: for what is not there or cannot be drawn.
    """
    from flowformer.report import drawing

    folders, file = (values.paths, None) if values.text is not None else (values.paths[:-1], values.paths[-1])
    if not folders:
        raise ValueError("want RUN ... FILE, or RUN ... --text TEXT: a run, and what it is to look at")
    drawing.check_path(values.out)
    wish = Wish(
        tuple(parse_point(text) for text in values.at or ()),
        tuple(values.layer or ()),
        tuple(int(head) if head.isdigit() else head for head in values.head or ()),
        values.flows,
    )
    scenes = []
    for folder in folders:
        model, form = load(folder, values.checkpoint)
        scenes.append(_open(folder, model, form, file, values, wish))
    if len({(scene.image is None, scene.series is None) for scene in scenes}) > 1:
        raise ValueError("want runs on one kind of data: images, series or text")
    if wish.flows and not any(strip.label.endswith(FLOWS["allocation"]) for scene in scenes for strip in scene.strips):
        raise ValueError("only Flow- and Mobile-Attention have flows: --flows has nothing to show")
    titles = [scene.title for scene in scenes]
    for place, scene in enumerate(scenes):
        if titles.count(scene.title) > 1:
            scenes[place] = scene._replace(title=f"{scene.title}: {folders[place]}")
    drawing.write(scenes, values.out)
    strips = sum(len(scene.strips) for scene in scenes)
    return f"{strips} strips of {', '.join(scene.title for scene in scenes)} in {values.out}"


def _open(folder: Path, model: Any, form: Any, file: Path | None, values: argparse.Namespace, wish: Wish) -> Scene:
    """The scene of one run."""
    if isinstance(model, LanguageModel) and isinstance(form, TextFormat):
        return text_scene(model, form.tokenizer, values.text if file is None else _read_text(file), wish)
    if isinstance(model, SeriesClassifier | VisionModel):
        if file is None:
            raise ValueError(f"{folder} is a run of a {type(model).__name__}, which reads no text: give a file")
        if isinstance(model, VisionModel):
            return image_scene(model, form, _read_image(file, form), wish)
        series = match_format(read_table(file, labelled=False), form)
        if not 0 <= values.index < len(series):
            raise ValueError(
                f"{file} has {len(series)} series, from 0 to {len(series) - 1}; got --index {values.index}"
            )
        return series_scene(model, form, series[values.index], wish)
    raise ValueError(
        f"{folder} is a run of a {type(model).__name__} on {type(form).__name__}: there is no picture of it"
    )


def _read_image(file: Path, form: ImageFormat) -> np.ndarray:
    from flowformer.tasks.image_decoding import UnreadableImage, decode

    try:
        return form.prepare(decode(_read_bytes(file)))
    except UnreadableImage as error:
        raise ValueError(f"{file}: {error}") from error


def _read_text(file: Path) -> str:
    try:
        return _read_bytes(file).decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
