"""Following contours of Pathfinder images from their pixels alone: knows the parameters, not where anything lies."""

from __future__ import annotations

import numpy as np

_OFFSETS = np.array([(down, right) for down in (-0.5, 0, 0.5) for right in (-0.5, 0, 0.5)])
_HEADINGS = np.linspace(0, 2 * np.pi, 72, endpoint=False)
_TURNS = np.deg2rad(np.arange(-75, 76, 7.5))


def find_markers(image: np.ndarray) -> np.ndarray:
    """Centres of the two brightest discs of an image, (side, side) uint8: (2, 2), rows and columns."""
    discs = np.lib.stride_tricks.sliding_window_view(np.pad(image, 1), (3, 3)).mean((2, 3)).copy()
    rows, columns = np.indices(image.shape)
    found = []
    for _ in range(2):
        row, column = np.unravel_index(discs.argmax(), discs.shape)
        squares = (rows - row) ** 2 + (columns - column) ** 2
        weights = np.where(squares <= 4.5, image.astype(np.float64) ** 2, 0)
        found.append([(weights * (place + 0.5)).sum() / weights.sum() for place in (rows, columns)])
        discs[squares <= 12] = 0
    return np.array(found)


def connects(image: np.ndarray, dashes: int, length: float, gap: float, beam: int = 250) -> bool:
    """Return whether the best contour of so many dashes from the inner marker ends in the other one.

    A beam search: a contour goes on by a gap, a turn and a dash, and its score is the ink below its dashes.
    """
    markers = find_markers(image)
    start, goal = markers[np.argsort(((markers - len(image) / 2) ** 2).sum(axis=1))]
    ink = np.minimum(image / 255 / 0.6, 1)
    headings = np.tile(_HEADINGS, len(_OFFSETS))
    covered, heads = _follow(ink, np.repeat(start + _OFFSETS, len(_HEADINGS), axis=0).T, headings, length)
    scores = covered[:, 3:].mean(axis=1)  # the marker covers the rest
    for _ in range(dashes - 1):
        source = np.repeat(np.arange(len(scores)), len(_TURNS))
        turn = np.tile(_TURNS, len(scores))
        middles = heads[:, source] + gap / 2 * _direction(headings[source])
        after = headings[source] + turn
        covered, ends = _follow(ink, middles + gap / 2 * _direction(after), after, length)
        gains = covered.mean(axis=1) + 0.5 * covered.min(axis=1) - 0.5 * _sample(ink, *middles)
        total = scores[source] + gains + 0.16 * np.log(np.cos(turn) + 0.02)
        best = np.argsort(-total)[: 6 * beam]
        places = np.round(np.stack([ends[0] * 2, ends[1] * 2, np.mod(after, 2 * np.pi) / np.deg2rad(15)]))[:, best]
        best = best[np.sort(np.unique(places, axis=1, return_index=True)[1])][:beam]
        headings, heads, scores = after[best], ends[:, best], total[best]
    away = np.hypot(*(heads - goal[:, None]))
    return scores[away < 1.2].max(initial=-9) > scores[away >= 2].max(initial=-9) + 0.25


def _follow(ink: np.ndarray, tails: np.ndarray, headings: np.ndarray, length: float) -> tuple[np.ndarray, np.ndarray]:
    along = np.linspace(0, length, 5)
    points = tails[..., None] + along * _direction(headings)[..., None]
    return _sample(ink, *points), points[..., -1]


def _direction(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(angles), np.cos(angles)])


def _sample(ink: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Ink between centres of pixels, bilinearly."""
    rows, columns = (np.clip(place - 0.5, 0, len(ink) - 1.001) for place in (rows, columns))
    row, column = rows.astype(int), columns.astype(int)
    down, right = rows - row, columns - column
    upper = ink[row, column] * (1 - right) + ink[row, column + 1] * right
    lower = ink[row + 1, column] * (1 - right) + ink[row + 1, column + 1] * right
    return upper * (1 - down) + lower * down
