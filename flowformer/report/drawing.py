"""Scenes on paper: maps over an image as tiles, maps over time or tokens as bands. Sizes are in inches.

Matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from flowformer.common.files import replacing
from flowformer.tasks.scenes import Scene, Strip

FORMATS = (".png", ".pdf", ".svg")
COLOURS, UNSEEN = "viridis", "#e4e4e4"
WIDEST = 30.0  # scenes stand side by side in a picture no wider than this, else one below the other
DPI, MOST_PIXELS = 120, 30_000
MARGIN = 0.25
TILE, GAP, CAPTION, NAMES, LABEL, HEADER, LEAST_TILES = 0.95, 0.06, 0.2, 0.14, 0.85, 0.85, 4
NOTE = (
    "What the query in the ring takes from each patch. Each tile has a scale of its own: its least value is dark, its "
    "largest bright, and both stand below it."
)
HEAD, BAND, TITLE, PLACES, TOP, SIDE, SCALE = 0.17, 0.36, 0.22, 0.2, 1.15, 0.75, 0.7
LABELLED_TOKENS, LEVEL = 160, 2  # of more, none is written; longer ones are turned


def check_path(path: Path) -> None:
    """Refuse a path that no picture can be written to.

    Raises:
        ValueError: for an unknown suffix.
        ModuleNotFoundError: without matplotlib.
    """
    import matplotlib  # noqa: F401 - said now, not when the models have run

    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"a picture is written as {', '.join(FORMATS)}, got {path}")


def write(scenes: Sequence[Scene], path: Path) -> None:
    """Draw scenes and write the picture, whole or not at all."""
    figure = draw(scenes)
    dpi = min(DPI, MOST_PIXELS / max(figure.get_size_inches()))
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower())


def draw(scenes: Sequence[Scene]) -> Any:
    """A matplotlib figure of scenes, which are all of one kind.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, paint = (_tiles_size, _paint_tiles) if scenes[0].image is not None else (_bands_size, _paint_bands)
    sizes = [size(scene) for scene in scenes]
    width = sum(width for width, _ in sizes) + MARGIN * (len(sizes) + 1)
    abreast = width <= WIDEST
    height = max(height for _, height in sizes) + 2 * MARGIN
    if not abreast:
        width = max(width for width, _ in sizes) + 2 * MARGIN
        height = sum(height for _, height in sizes) + MARGIN * (len(sizes) + 1)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    left, top = MARGIN, height - MARGIN
    for scene, (wide, high) in zip(scenes, sizes, strict=True):
        paint(figure, scene, left, top)
        left, top = (left + wide + MARGIN, top) if abreast else (left, top - high - MARGIN)
    return figure


def _axes(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at a place in inches from the lower left corner."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, (top - height) / high, width / wide, height / high))


def _limits(maps: np.ndarray) -> tuple[float, float]:
    """Least and largest value; for maps of one value alone, 0 and twice that."""
    low, high = float(np.nanmin(maps)), float(np.nanmax(maps))
    return (low, high) if high - low > 1e-6 * abs(high) else (0.0, 2 * high or 1.0)


def _range(maps: np.ndarray) -> str:
    low, high = float(np.nanmin(maps)), float(np.nanmax(maps))
    if high - low <= 1e-6 * abs(high):
        return f"{high:.2g} throughout"
    return f"{_number(low, high)} to {high:.2g}"


def _number(low: float, high: float) -> str:
    """A least value, as 0 where it is next to nothing beside the largest."""
    return f"{low:.2g}" if low > 1e-4 * high else "0"


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps[COLOURS].with_extremes(bad=UNSEEN)


# --------------------------------------------------------------------------------------------------- tiles, of images


def _tiles_size(scene: Scene) -> tuple[float, float]:
    columns = 1 + max(len(strip.heads) for strip in scene.strips)
    return LABEL + max(columns, LEAST_TILES) * (TILE + GAP), _tile_tops(scene)[-1]


def _tile_tops(scene: Scene) -> list[float]:
    """Where the tiles of each strip begin, from the top, and where all end."""
    tops = [HEADER]
    for strip, after in zip(scene.strips, [*scene.strips[1:], None], strict=True):
        renamed = after is not None and after.heads != strip.heads
        tops.append(tops[-1] + TILE + CAPTION + NAMES * renamed)
    return tops


def _paint_tiles(figure: Any, scene: Scene, left: float, top: float) -> None:
    """For each strip the image and a row of tiles: one axes, in inches, downwards."""
    image = scene.image
    assert image is not None  # else these were bands
    width, height = _tiles_size(scene)
    axes = _axes(figure, left, top, width, height)
    axes.axis("off")
    axes.text(0, 0, scene.title, fontsize=13, fontweight="bold", va="top", parse_math=False)
    axes.text(0, 0.3, "\n".join(wrap(NOTE, int(width * 17))), fontsize=7, va="top", linespacing=1.3)
    previous = ()
    for strip, y in zip(scene.strips, _tile_tops(scene), strict=False):
        layer, what = strip.label.split(", ", 1)
        words = [layer, *wrap(what, 15), f"{strip.maps.shape[1]} x {strip.maps.shape[2]}"]
        axes.text(0, y + TILE / 2, "\n".join(words), fontsize=7, va="center", parse_math=False)
        axes.imshow(
            image.repeat(3 // image.shape[2], 2), extent=(LABEL, LABEL + TILE, y + TILE, y), interpolation="nearest"
        )
        _mark(axes, strip, LABEL, y)
        for column, (head, one) in enumerate(zip(strip.heads, strip.maps, strict=True), 1):
            x = LABEL + column * (TILE + GAP)
            if strip.heads != previous:
                axes.text(x + TILE / 2, y - 0.04, head, fontsize=7, ha="center", va="bottom")
            low, high = _limits(one)
            axes.imshow(one, extent=(x, x + TILE, y + TILE, y), vmin=low, vmax=high, cmap=_colours())
            axes.text(x + TILE / 2, y + TILE + 0.03, _range(one), fontsize=5.5, ha="center", va="top", color="0.35")
            _mark(axes, strip, x, y)
        previous = strip.heads
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")


def _mark(axes: Any, strip: Strip, x: float, y: float) -> None:
    """A ring around the query, in a tile."""
    if not strip.point:
        return
    down, across = strip.point
    for colour, size in (("black", 4.6), ("white", 3.6)):
        axes.plot(
            [x + across * TILE], [y + down * TILE], "o", color=colour, markersize=size, markerfacecolor="none",
            markeredgewidth=0.9,
        )  # fmt: skip


# --------------------------------------------------------------------------------------- bands, over time and tokens


def _plot_width(scene: Scene) -> float:
    places = scene.strips[0].maps.shape[1]
    return min(max(0.15 * places, 4.0), 24.0) if scene.tokens else 5.5


def _bands_size(scene: Scene) -> tuple[float, float]:
    bands = sum(HEAD * len(strip.heads) + BAND + _words(scene) for strip in scene.strips)
    series = 0.0 if scene.series is None else TOP
    return SIDE + _plot_width(scene) + SCALE, 0.35 + series + bands + (0.0 if _words(scene) else PLACES)


def _words(scene: Scene) -> float:
    """Room for tokens below a band; none where there are none, or so many that they would not be legible."""
    longest = max(map(len, scene.tokens), default=0)
    if not longest or len(scene.tokens) > LABELLED_TOKENS:
        return 0.0
    return 0.17 if longest <= LEVEL else 0.08 + 0.065 * longest


def _paint_bands(figure: Any, scene: Scene, left: float, top: float) -> None:
    """The series, and below it a band for each strip, with a line for each head."""
    wide, high = figure.get_size_inches()
    figure.text(
        left / wide, top / high, scene.title, fontsize=13, fontweight="bold", va="top", parse_math=False
    )  # fmt: skip
    width, x, y = _plot_width(scene), left + SIDE, top - 0.35
    if scene.series is not None:
        _paint_series(_axes(figure, x, y, width, TOP - 0.1), scene)
        y -= TOP
    for strip in scene.strips:
        height = HEAD * len(strip.heads)
        axes = _axes(figure, x, y - TITLE, width, height)
        scale = _axes(figure, x + width + 0.08, y - TITLE, 0.08, height)
        _paint_band(axes, scale, strip)
        if _words(scene):
            _label_tokens(axes, scene, strip)
        elif strip is scene.strips[-1]:
            axes.set_xticks(np.unique(np.linspace(0, strip.maps.shape[1] - 1, 7).round().astype(int)))
            axes.tick_params(axis="x", labelsize=6, length=2)
            axes.set_xlabel("token" if scene.tokens else "step", fontsize=7, labelpad=2)
        y -= height + BAND + _words(scene)


def _paint_series(axes: Any, scene: Scene) -> None:
    series = scene.series
    assert series is not None  # else there are none to paint
    axes.plot(series, linewidth=0.8)
    axes.set(xlim=(-0.5, len(series) - 0.5), xticks=[])
    axes.tick_params(labelsize=6)
    axes.set_ylabel("standardised", fontsize=7)
    for point in {strip.point for strip in scene.strips if strip.point is not None}:
        axes.axvline(point[0], color="black", linewidth=0.8, linestyle=":")
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _paint_band(axes: Any, scale: Any, strip: Strip) -> None:
    low, high = _limits(strip.maps)
    drawn = axes.imshow(strip.maps, aspect="auto", interpolation="nearest", cmap=_colours(), vmin=low, vmax=high)
    axes.set_title(strip.label, fontsize=8, loc="left", pad=5, parse_math=False)
    axes.set_yticks(range(len(strip.heads)), strip.heads, fontsize=6)
    axes.set_xticks([])
    axes.tick_params(length=0)
    if strip.heads[0] == "mean" and len(strip.heads) > 1:
        axes.axhline(0.5, color="white", linewidth=1.5)
    if strip.point is not None:
        axes.plot([strip.point[0]], [-0.5], "v", color="black", markersize=5, clip_on=False)
    bar = axes.figure.colorbar(drawn, cax=scale, ticks=[low, high])
    bar.ax.set_yticklabels([_number(low, high), f"{high:.2g}"], fontsize=6)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def _label_tokens(axes: Any, scene: Scene, strip: Strip) -> None:
    """Tokens below a band, that of the query in bold."""
    level = max(map(len, scene.tokens)) <= LEVEL
    axes.set_xticks(range(len(scene.tokens)), scene.tokens, rotation=0 if level else 90, fontsize=7, family="monospace")
    axes.tick_params(axis="x", pad=2)
    for place, label in enumerate(axes.get_xticklabels()):
        label.set_parse_math(False)
        if strip.point == (place,):
            label.set_fontweight("bold")
