"""A picture of Pathfinder images, to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowformer.tasks.lra.pathfinder.drawing import draw
from flowformer.tasks.lra.pathfinder.kinds import DIFFICULTIES, find_kind

_EDGE, _GREY = 2, 110


def draw_sheet(path: str | Path, side: int = 32, *, columns: int = 10, scale: int = 2, seed: int = 0) -> None:
    """Write a picture (PNG) with a row of connected and a row of different images of each difficulty, easy ones first.

    Args:
        path: The file.
        side: Pixels along each side of an image.
        columns: Images of each difficulty and label.
        scale: Pixels of the picture along each side of a pixel.
        seed: Decides the images.

    Raises:
        DataError: for a size that is not published.
        ValueError: for no column.
    """
    from PIL import Image

    if columns < 1:
        raise ValueError(f"expected at least 1 column, got {columns}")
    rows = []
    for difficulty in DIFFICULTIES:
        drawings = draw(find_kind(side, difficulty), 2 * columns, np.random.default_rng(seed))
        pixels = drawings.pixels()
        for label in (1, 0):
            chosen = pixels[drawings.labels == label]
            tiles = chosen.repeat(scale, axis=1).repeat(scale, axis=2)
            tiles = np.pad(tiles, ((0, 0), (_EDGE, _EDGE), (_EDGE, _EDGE)), constant_values=_GREY)
            rows.append(np.concatenate(list(tiles), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)
