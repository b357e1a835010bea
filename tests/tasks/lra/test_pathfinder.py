"""Pathfinder images: labels that hold in the picture, and nothing but contours that tells them."""

from functools import cache as once

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from flowformer.common.errors import DataError
from flowformer.tasks.lra.pathfinder.drawing import Drawings, draw, draw_block
from flowformer.tasks.lra.pathfinder.kinds import DIFFICULTIES, find_kind
from flowformer.tasks.lra.pathfinder.sheet import draw_sheet
from tests.tasks.lra.tracing import connects, find_markers

KINDS = [(32, "easy"), (32, "intermediate"), (32, "hard"), (128, "easy")]


@once
def drawn(side: int, difficulty: str, count: int = 100) -> Drawings:
    return draw(find_kind(side, difficulty), count, np.random.default_rng(1))


def contour(drawings: Drawings, index: int, number: int) -> np.ndarray:
    return drawings.dashes[index, drawings.contours == number].astype(np.float64)


def distance(points: np.ndarray, dashes: np.ndarray) -> np.ndarray:
    """Distances of points, (p, 2), from dashes, (d, 2, 2): (p, d)."""
    tails, along = dashes[:, 0], dashes[:, 1] - dashes[:, 0]
    share = (((points[:, None] - tails) * along).sum(-1) / (along**2).sum(-1)).clip(0, 1)
    return np.linalg.norm(points[:, None] - tails - share[..., None] * along, axis=-1)


def test_published_parameters():
    kinds = [find_kind(32, name) for name in DIFFICULTIES]
    assert [(kind.contour_length, kind.distractor_length, kind.num_distractors) for kind in kinds] == [
        (6, 2, 10), (9, 3, 6), (14, 4, 5),
    ]  # fmt: skip
    hard = find_kind(128, "hard")
    assert (hard.contour_length, hard.distractor_length, hard.num_distractors, hard.margins) == (14, 4, 8, (2, 3))
    for side, name, words in ((32, "hardest", "did you mean 'hard'"), (64, "hard", "32 or 128 pixels, got 64")):
        with pytest.raises(DataError, match=words):
            find_kind(side, name)


@pytest.mark.parametrize(("side", "difficulty"), KINDS)
def test_markers_are_ends_of_one_contour_or_of_two(side, difficulty):
    drawings = drawn(side, difficulty)
    assert drawings.labels.sum() == 50
    for index, label in enumerate(drawings.labels):
        ends = [contour(drawings, index, number)[[0, -1], [0, 1]] for number in (0, 1)]
        found = [
            [number for number in (0, 1) if np.array_equal(drawings.markers[index, mark], ends[number][mark])]
            for mark in (0, 1)
        ]
        assert [len(numbers) for numbers in found] == [1, 1]
        assert (found[0] == found[1]) == bool(label)


@pytest.mark.parametrize(("side", "difficulty"), KINDS)
def test_a_contour_goes_on_by_a_gap_and_a_turn(side, difficulty):
    drawings = drawn(side, difficulty)
    kind = drawings.kind
    numbers, counts = np.unique(drawings.contours, return_counts=True)
    assert counts[:2].tolist() == [kind.contour_length] * 2
    assert set(counts[2:]) == {kind.distractor_length}
    for number in numbers:
        dashes = drawings.dashes[:, drawings.contours == number].astype(np.float64)
        there = ~np.isnan(dashes).any(axis=(1, 2, 3))
        assert number > 1 or there.all()
        dashes, gap = dashes[there], 2 * drawings.margins[there, None]
        onward = (dashes[:, :, 1] - dashes[:, :, 0]) / kind.dash_length
        assert np.allclose(np.linalg.norm(onward, axis=-1), 1, atol=1e-4)
        turns = np.arccos((onward[:, 1:] * onward[:, :-1]).sum(-1).clip(-1, 1))
        assert turns.max() <= np.pi / 2 / kind.continuity + 1e-2
        # Both halves of a gap are straight, so that turning takes some of it.
        gaps = np.linalg.norm(dashes[:, 1:, 0] - dashes[:, :-1, 1], axis=-1)
        assert np.allclose(gaps, gap * np.cos(turns / 2), atol=1e-2)


@pytest.mark.parametrize(("side", "difficulty"), KINDS)
def test_contours_keep_apart(side, difficulty):
    drawings = drawn(side, difficulty)
    kind = drawings.kind
    for index in range(100):
        there = ~np.isnan(drawings.dashes[index, :, 0, 0])
        dashes, numbers = drawings.dashes[index, there].astype(np.float64), drawings.contours[there]
        points = np.concatenate([dashes[:, 0], dashes[:, 1], dashes.mean(axis=1)])
        inset = kind.padding + kind.thickness / 2
        assert inset <= points.min() <= points.max() <= kind.side - inset
        apart = np.where(np.tile(numbers, 3)[:, None] == numbers, np.inf, distance(points, dashes))
        assert apart.min() > 2 * drawings.margins[index] - 1e-3
        room = drawings.margins[index] + kind.thickness / 2 + kind.marker_radius
        touching = (distance(drawings.markers[index].astype(np.float64), dashes) < room - 1e-3).sum(axis=1)
        assert touching.tolist() == [1, 1]  # the marked dash alone


def test_pixels_show_what_is_described():
    drawings = drawn(32, "easy")
    pixels = drawings.pixels()
    assert pixels.shape == (100, 32, 32)
    assert pixels.dtype == np.uint8
    for index in range(100):
        there = ~np.isnan(drawings.dashes[index, :, 0, 0])
        rows, columns = (np.indices((32, 32)) + 0.5).reshape(2, -1)
        centres = np.stack([rows, columns], axis=1)
        away = distance(centres, drawings.dashes[index, there].astype(np.float64)).min(axis=1)
        discs = np.linalg.norm(centres[:, None] - drawings.markers[index], axis=-1).min(axis=1)
        ink = pixels[index].reshape(-1)
        assert ink[(away > 1.3) & (discs > 2.5)].max() == 0
        assert ink[discs < 0.75].min() == 255
        assert ink[away < 0.25].min() > 60
        near = np.linalg.norm(find_markers(pixels[index])[:, None] - drawings.markers[index], axis=-1)
        assert near.min(axis=1).max() < 0.8


def test_whoever_follows_dashes_knows_the_label():
    drawings = drawn(32, "easy")
    pixels = drawings.pixels()
    answers = [connects(pixels[index], 6, 2, 2) for index in range(60)]
    assert (np.array(answers) == drawings.labels[:60]).mean() >= 0.95


@pytest.mark.parametrize(("difficulty", "count"), [("easy", 1500), ("hard", 300)])
def test_nothing_simple_tells_the_label(difficulty, count):
    drawings = drawn(32, difficulty, count)
    pixels = drawings.pixels()
    marks = drawings.markers.reshape(-1, 4)
    distances = np.linalg.norm(drawings.markers[:, 0] - drawings.markers[:, 1], axis=1)
    ink = [pixels.mean((1, 2)), pixels.std((1, 2)), (pixels > 0).mean((1, 2)), (pixels > 128).mean((1, 2))]
    missing = np.isnan(drawings.dashes[:, :, 0, 0]).sum(axis=1)
    found = np.stack([distances, distances**2, *marks.T, *np.abs(marks - 16).T, *ink, missing], axis=1)
    found = (found - found.mean(axis=0)) / (found.std(axis=0) + 1e-9)
    assert cross_val_score(LogisticRegression(max_iter=1000), found, drawings.labels, cv=5).mean() <= 0.55


def test_blocks_differ_and_repeat(monkeypatch):
    monkeypatch.setattr("flowformer.tasks.lra.pathfinder.drawing.BLOCK_IMAGES", 50)
    kind = find_kind(32, "easy")
    first, again, other, later = (draw_block(kind, *which).pixels() for which in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert np.array_equal(first, again)
    assert len({image.tobytes() for image in np.concatenate([first, other, later])}) == 150


def test_a_sheet_of_images(tmp_path):
    from PIL import Image

    draw_sheet(tmp_path / "sheet.png", columns=3, scale=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 36, 6 * 36)
    with pytest.raises(ValueError, match="column"):
        draw_sheet(tmp_path / "sheet.png", columns=0)
