"""Pathfinder images: do two markers lie on one dashed contour?

Two long contours of dashes start near the centre and wind over the image, among short contours that distract. Two discs
mark ends of long contours: of one and the same (label 1), or of both (label 0). Whoever follows the dashes knows.

The task and its parameters are published: Linsley, Kim, Veerabadran, Windolf, Serre, "Learning long-range spatial
dependencies with horizontal gated recurrent units" (2018), github.com/drewlinsley/pathfinder, ``snakes2.py``; for 32 x
32 and 128 x 128 pixels the data of Long Range Arena (Tay et al. 2021), ``lra_benchmarks/data/pathfinder.py``. The
generator is our own; docs/lra.md says where it differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowformer.tasks.lra.pathfinder.kinds import Kind

# Raise it when the same seed gives other images.
VERSION = 1
BLOCK_IMAGES = 512

_FAR = np.float32(1e4)  # where dashes lie that are not there
_TURNS = 12  # that are tried at once
_MOST_BACK = 6  # dashes of both contours that are given up at once
_STEPS = 4  # for each dash of a contour, before it starts afresh
_DISTRACTOR_TRIES = 5  # max_distractor_contour_retrial of snakes2_wrapper.py, and the first
_PLACES = 8  # for a distractor, tried at once
# Rounded, so that every machine has the same: all else is additions, multiplications, divisions and roots.
_SINES = np.sin(np.deg2rad(np.arange(360))).round(6).astype(np.float32)
_COSINES = np.cos(np.deg2rad(np.arange(360))).round(6).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Drawings:
    """Pathfinder images and what is drawn in them. Positions are (row, column) in pixels from the upper left corner.

    Attributes:
        kind: Their parameters.
        labels: (n,) int64, 1 where both markers lie on one contour.
        margins: (n,) float32, half of the gap between dashes.
        dashes: (n, dashes, 2, 2) float32, ends of dashes: of the first contour from start to end, of the second, and
            of one distractor after another. NaN where a distractor found no room.
        contours: (dashes,) int64, the contour that each dash belongs to: 0 and 1 are the long ones.
        markers: (n, 2, 2) float32, centres of markers.
    """

    kind: Kind
    labels: np.ndarray
    margins: np.ndarray
    dashes: np.ndarray
    contours: np.ndarray
    markers: np.ndarray

    def pixels(self) -> np.ndarray:
        """Return the images: (n, side, side) uint8."""
        return _render(self)


def draw(kind: Kind, count: int, rng: np.random.Generator) -> Drawings:
    """Draw images, as many of each label, in random order; of an odd number, one more is "different"."""
    scenes = _grow(kind, count, rng)
    _distract(scenes, rng)
    return _finish(kind, scenes, rng.permutation(np.arange(count) % 2))


def draw_block(kind: Kind, seed: int, block: int) -> Drawings:
    """Return block number ``block`` of an endless row of images, ``BLOCK_IMAGES`` of them.

    A block depends on nothing but the arguments.
    """
    return draw(kind, BLOCK_IMAGES, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(block,))))


class _Scenes:
    """Dashes of n images while they are placed; those of the long contours alternate in the first slots.

    Attributes:
        kind: Parameters.
        margins: (n,) float32.
        dashes: (4, n, slots) float32: row and column of the tail, row and column of the head.
        headings: (n, slots) int64, in degrees.
    """

    def __init__(self, kind: Kind, margins: np.ndarray, dashes: np.ndarray, headings: np.ndarray) -> None:
        self.kind, self.margins, self.dashes, self.headings = kind, margins, dashes, headings

    @classmethod
    def empty(cls, kind: Kind, margins: np.ndarray) -> _Scenes:
        shape = len(margins), 2 * kind.contour_length + kind.num_distractors * kind.distractor_length
        return cls(kind, margins, np.full((4, *shape), _FAR, np.float32), np.zeros(shape, np.int64))

    def take(self, rows: np.ndarray) -> _Scenes:
        return _Scenes(self.kind, self.margins[rows], self.dashes[:, rows], self.headings[rows])

    def tips(self) -> np.ndarray:
        """Ends of both long contours, (2, n, 4): both first tails, then both last heads."""
        last = 2 * self.kind.contour_length
        return np.concatenate([self.dashes[:2, :, :2], self.dashes[2:, :, last - 2 : last]], axis=2)

    def remove(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Take away the dashes of ``rows`` in ``slots`` and after."""
        gone = np.arange(self.dashes.shape[2]) >= slots[:, None]
        self.dashes[:, rows] = np.where(gone, _FAR, self.dashes[:, rows])


def _grow(kind: Kind, count: int, rng: np.random.Generator) -> _Scenes:
    """Return scenes with two long contours each, which grow by a dash in turn.

    One that is stuck, or whose ends would tell the label by where they lie, loses some dashes and goes another way.
    After many steps it starts afresh.
    """
    scenes = _Scenes.empty(kind, rng.choice(np.array(kind.margins, np.float32), count))
    slots, steps = np.zeros(count, np.int64), np.zeros(count, np.int64)
    while len(rows := np.flatnonzero(slots < 2 * kind.contour_length)):
        fresh = rows[slots[rows] == 0]
        slots[fresh] = 2 * _seed(scenes, fresh, rng)
        rows = rows[slots[rows] > 0]
        found = _extend(scenes, rows, slots[rows], slots[rows] - 2, rng)
        slots[rows[found]] += 1
        steps[rows] += 1
        ready = rows[slots[rows] == 2 * kind.contour_length]
        difference = _choose_markers(scenes.take(ready))[1]
        stuck = np.concatenate([rows[~found], ready[difference > kind.dash_length * kind.contour_length / 6]])
        back = np.maximum(slots[stuck] - rng.integers(1, _MOST_BACK + 1, len(stuck)), 2)
        slots[stuck] = np.where(steps[stuck] < _STEPS * kind.contour_length, back, 0)
        steps[slots == 0] = 0
        scenes.remove(rows, slots[rows])
    return scenes


def _choose_markers(scenes: _Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Choose the start that is marked for either label: the end that is marked too lies alike for both.

    Returns:
        Which contour's start it is, (n,) int64; and how much the ends differ, (n,), in their distance from it or from
        the centre of the image, whichever differs more.
    """
    tips = scenes.tips()
    starts, ends, centre = tips[..., :2], tips[..., 2:], np.float32(scenes.kind.side / 2)
    distances = _length(starts[..., None] - ends[..., None, :])  # (n, starts, ends)
    outward = _length(ends - centre)
    differences = np.abs(distances[..., 0] - distances[..., 1])
    differences = np.maximum(differences, np.abs(outward[:, :1] - outward[:, 1:]))
    return differences.argmin(axis=1), differences.min(axis=1)


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(vectors[0] ** 2 + vectors[1] ** 2)


def _seed(scenes: _Scenes, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Place the first dashes of both long contours of the images ``rows``; returns where they may lie so, (rows,)."""
    kind, count = scenes.kind, len(rows)
    centre = 2 * min(kind.seed_distance, kind.side // 4)
    first = rng.uniform(centre, kind.side - centre, (2, count)).astype(np.float32)
    second = first + kind.seed_distance * _direction(rng.integers(0, 360, count))
    headings = rng.integers(0, 360, (count, 2))
    tails = np.stack([first, second], axis=2)
    ends = np.concatenate([tails, tails + kind.dash_length * _direction(headings)])
    scenes.dashes[:, rows, :2], scenes.headings[rows, :2] = ends, headings
    squares = _squared_distances(ends[..., 0], ends[..., 1], kind.dash_length)
    return squares >= _room(kind, scenes.margins[rows])[1] ** 2


def _extend(
    scenes: _Scenes, rows: np.ndarray, slots: np.ndarray, previous: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Continue contours of the images ``rows``: after the dashes ``previous`` by the dashes ``slots``, (rows,) each.

    Several turns are drawn, and the first for which there is room is taken.

    Returns:
        Where there was room, (rows,) boolean.
    """
    part, here = scenes.take(rows), np.arange(len(rows))
    before = part.headings[here, previous]
    headings = (before[:, None] + _draw_turns(scenes.kind, len(rows), rng)) % 360
    margins, onward = part.margins[:, None], _direction(headings)
    middles = part.dashes[2:, here, previous][..., None] + margins * _direction(before)[..., None]
    tails = middles + margins * onward
    ends = np.concatenate([tails, tails + scenes.kind.dash_length * onward])
    free = _is_free(part, ends, slots, previous)
    found, taken = np.asarray(free.any(axis=1)), free.argmax(axis=1)
    hit, slot = rows[found], slots[found]
    scenes.dashes[:, hit, slot] = ends[:, here[found], taken[found]]
    scenes.headings[hit, slot] = headings[here[found], taken[found]]
    return found


def _draw_turns(kind: Kind, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw angles by which contours turn at a gap: (count, _TURNS) integers, in degrees.

    Those of a row are spread: each is from another part of the distribution, in random order.
    """
    most = int(90 / kind.continuity)
    angles = np.arange(-most, most + 1)
    weights = np.cos(np.deg2rad(angles * kind.continuity)).clip(0) ** 2
    part = rng.permuted(np.broadcast_to(np.arange(_TURNS), (count, _TURNS)), axis=1)
    levels = (part + rng.random((count, _TURNS))) / _TURNS
    return angles[np.searchsorted(np.cumsum(weights / weights.sum()).round(9), levels).clip(0, 2 * most)]


def _can_turn(kind: Kind, ends: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Return where a contour can still turn away from the border, to the left or to the right: (n, choices) boolean."""
    angle = int(54 / kind.continuity)
    onward = (ends[2:] - ends[:2]) / np.float32(kind.dash_length)
    can = np.zeros(ends.shape[1:], bool)
    for sine in (_SINES[angle], -_SINES[angle]):
        point, ahead, inside = ends[2:], onward, np.ones(ends.shape[1:], bool)
        for _ in range(-(-90 // angle)):
            point = point + margins * ahead
            ahead = np.stack(
                [ahead[0] * _COSINES[angle] + ahead[1] * sine, ahead[1] * _COSINES[angle] - ahead[0] * sine]
            )
            point = point + (margins + np.float32(kind.dash_length)) * ahead
            inside &= _is_inside(kind, point)
        can |= inside
    return can


def _is_inside(kind: Kind, points: np.ndarray) -> np.ndarray:
    inset = max(kind.padding + kind.thickness / 2, kind.marker_radius)
    return np.asarray(((points >= inset) & (points <= kind.side - inset)).all(axis=0))


def _direction(degrees: np.ndarray) -> np.ndarray:
    """Unit vectors: (2, ...) float32, rows and columns."""
    return np.stack([_SINES[degrees % 360], _COSINES[degrees % 360]])


def _room(kind: Kind, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least distances of a dash from dashes that it does not continue, and from ends that may be marked: (n,) each."""
    return 2 * margins, margins + np.float32(kind.thickness / 2 + kind.marker_radius)


def _is_free(scenes: _Scenes, ends: np.ndarray, slots: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """Return where dashes may lie: (n, choices) boolean.

    A dash stays inside the image, as far from earlier dashes as the gap between two dashes of a contour is wide (with
    room for their ink), except from the one that it continues; and still farther from ends that may be marked. All ends
    of long contours are such ends, so that the room around markers does not tell labels.

    Args:
        scenes: Of n images.
        ends: (4, n, choices) float32, row and column of the tail and of the head.
        slots: (n,), where they go; all dashes after are absent.
        previous: (n,), the dashes that they continue.
    """
    kind, here = scenes.kind, np.arange(len(slots))
    free = _is_inside(kind, ends)
    if previous is not None:
        last = slots >= 2 * kind.contour_length - 2
        free &= last[:, None] | _can_turn(kind, ends, scenes.margins[:, None])
    apart, room = _room(kind, scenes.margins)
    earlier = scenes.dashes[..., : slots.max(initial=0)]
    near = free[..., None] & _are_near(_middles(ends), _middles(earlier), apart + kind.dash_length)
    if previous is not None:
        near[here, :, previous] = False
    row, choice, other = np.nonzero(near)
    squares = _squared_distances(ends[:, row, choice], earlier[:, row, other], kind.dash_length)
    _strike(free, row, choice, squares < apart[row] ** 2)
    # No dash in the disc of a marker.
    tips = scenes.tips()
    near = free[..., None] & _are_near(_middles(ends), tips, room + kind.dash_length / 2)
    second = np.flatnonzero(slots < 4)  # next to the start of its contour
    near[second, :, slots[second] % 2] = False
    row, choice, tip = np.nonzero(near)
    squares = _point_to_dash(tips[:, row, tip], ends[:, row, choice], kind.dash_length)
    _strike(free, row, choice, squares < room[row] ** 2)
    # The disc at the end of a contour on no dash but its last.
    last = np.flatnonzero((slots >= 2 * kind.contour_length - 2) & (slots < 2 * kind.contour_length))
    if previous is None or not len(last):
        return free
    near = _are_near(ends[2:, last], _middles(earlier[:, last]), room[last] + kind.dash_length / 2)
    near &= free[last, :, None]
    near[np.arange(len(last)), :, previous[last]] = False
    row, choice, other = np.nonzero(near)
    row = last[row]
    squares = _point_to_dash(ends[2:, row, choice], earlier[:, row, other], kind.dash_length)
    _strike(free, row, choice, squares < room[row] ** 2)
    return free


def _middles(dashes: np.ndarray) -> np.ndarray:
    return (dashes[:2] + dashes[2:]) * np.float32(0.5)


def _are_near(points: np.ndarray, others: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return whether points, (2, n, c), are nearer than ``reach``, (n,), to others, (2, n, m): (n, c, m) boolean."""
    down = points[0][..., None] - others[0][:, None]
    right = points[1][..., None] - others[1][:, None]
    return down * down + right * right < (reach * reach)[:, None, None]


def _strike(free: np.ndarray, rows: np.ndarray, choices: np.ndarray, taken: np.ndarray) -> None:
    free[rows[taken], choices[taken]] = False


def _squared_distances(one: np.ndarray, other: np.ndarray, length: float) -> np.ndarray:
    """Squared distances of dashes, each (4, ...), that do not cross: the least of ends to dashes.

    Dashes that cross have ends that are nearer than half of a dash, which is less than any gap.
    """
    return np.minimum(
        np.minimum(_point_to_dash(one[:2], other, length), _point_to_dash(one[2:], other, length)),
        np.minimum(_point_to_dash(other[:2], one, length), _point_to_dash(other[2:], one, length)),
    )


def _point_to_dash(point: np.ndarray, dash: np.ndarray, length: float) -> np.ndarray:
    """Squared distances of points, (2, ...), from dashes, (4, ...), all of one length."""
    down, right = dash[2] - dash[0], dash[3] - dash[1]
    row, column = point[0] - dash[0], point[1] - dash[1]
    along = ((row * down + column * right) * np.float32(1 / length**2)).clip(0, 1)
    row, column = row - along * down, column - along * right
    return row * row + column * column


def _distract(scenes: _Scenes, rng: np.random.Generator) -> None:
    """Add distractors wherever there is room."""
    kind = scenes.kind
    for number in range(kind.num_distractors):
        start = 2 * kind.contour_length + number * kind.distractor_length
        missing = np.arange(len(scenes.margins))
        for _ in range(_DISTRACTOR_TRIES):
            found = _try_distractor(scenes, missing, start, rng)
            missing = missing[~found]
            scenes.remove(missing, np.full(len(missing), start))


def _try_distractor(scenes: _Scenes, rows: np.ndarray, start: int, rng: np.random.Generator) -> np.ndarray:
    kind, count = scenes.kind, len(rows)
    tails = rng.uniform(0, kind.side, (2, count, _PLACES)).astype(np.float32)
    headings = rng.integers(0, 360, (count, _PLACES))
    ends = np.concatenate([tails, tails + kind.dash_length * _direction(headings)])
    free = _is_free(scenes.take(rows), ends, np.full(count, start), None)
    found, taken, here = np.asarray(free.any(axis=1)), free.argmax(axis=1), np.arange(count)
    scenes.dashes[:, rows, start], scenes.headings[rows, start] = ends[:, here, taken], headings[here, taken]
    for slot in range(start + 1, start + kind.distractor_length):
        left = np.flatnonzero(found)
        found[left] = _extend(scenes, rows[left], np.full(len(left), slot), np.full(len(left), slot - 1), rng)
    return found


def _finish(kind: Kind, scenes: _Scenes, labels: np.ndarray) -> Drawings:
    count, rows = len(labels), np.arange(len(labels))
    tips = scenes.tips().transpose(1, 2, 0)
    first, _ = _choose_markers(scenes)
    last = np.where(labels == 1, first, 1 - first)
    long = 2 * kind.contour_length
    order = np.concatenate([np.arange(0, long, 2), np.arange(1, long, 2), np.arange(long, scenes.dashes.shape[2])])
    dashes = scenes.dashes.transpose(1, 2, 0)[:, order].reshape(count, -1, 2, 2)
    distractors = np.repeat(np.arange(kind.num_distractors), kind.distractor_length)
    return Drawings(
        kind=kind,
        labels=labels,
        margins=scenes.margins,
        dashes=np.where(dashes == _FAR, np.float32(np.nan), dashes),
        contours=np.concatenate([np.repeat([0, 1], kind.contour_length), 2 + distractors]),
        markers=np.stack([tips[rows, first], tips[rows, 2 + last]], axis=1),
    )


def _render(drawings: Drawings) -> np.ndarray:
    kind, count = drawings.kind, len(drawings.labels)
    image = np.zeros((count, kind.side, kind.side), np.float32)
    contrasts = np.where(drawings.contours < 2, kind.contour_contrast, kind.distractor_contrast).astype(np.float32)
    places, dashes = np.nonzero(~np.isnan(drawings.dashes[:, :, 0, 0]))
    ends = drawings.dashes[places, dashes].reshape(-1, 4).T
    _paint(image, places, ends, kind.thickness / 2, kind.dash_length / 2 + kind.thickness, contrasts[dashes], kind)
    places = np.repeat(np.arange(count), 2)
    centres = drawings.markers.reshape(-1, 2).T
    discs = np.concatenate([centres, centres])
    _paint(image, places, discs, kind.marker_radius, kind.marker_radius, np.ones(len(places), np.float32), kind)
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _paint(
    image: np.ndarray, places: np.ndarray, ends: np.ndarray, radius: float, reach: float, contrasts: np.ndarray,
    kind: Kind,
) -> None:  # fmt: skip
    """Lay strokes with round ends into images; where several lie on a pixel, the brightest counts.

    Args:
        image: (n, side, side) float32.
        places: (strokes,) the image of each.
        ends: (4, strokes), row and column of both ends.
        radius: Half of their thickness.
        reach: How far their ink can be from their middle.
        contrasts: (strokes,) their brightness.
        kind: Parameters.
    """
    size = 2 * int(np.ceil(reach)) + 2
    corner = np.floor((ends[:2] + ends[2:]) / 2).astype(np.int64) - size // 2 + 1
    points = (np.arange(size * kind.antialias, dtype=np.float32) + 0.5) / kind.antialias
    rows = corner[0][:, None, None] + points[:, None]
    columns = corner[1][:, None, None] + points
    squares = _point_to_stroke(rows, columns, ends[..., None, None])
    ink = ((np.float32(radius) - np.sqrt(squares)) * kind.antialias + np.float32(0.5)).clip(0, 1)
    ink = ink.reshape(-1, size, kind.antialias, size, kind.antialias).mean(axis=(2, 4)) * contrasts[:, None, None]
    rows, columns = corner[0][:, None, None] + np.arange(size)[:, None], corner[1][:, None, None] + np.arange(size)
    stroke, row, column = np.nonzero(
        (ink > 0) & (rows >= 0) & (rows < kind.side) & (columns >= 0) & (columns < kind.side)
    )
    target = (places[stroke], corner[0][stroke] + row, corner[1][stroke] + column)
    np.maximum.at(image, target, ink[stroke, row, column])


def _point_to_stroke(rows: np.ndarray, columns: np.ndarray, ends: np.ndarray) -> np.ndarray:
    down, right = ends[2] - ends[0], ends[3] - ends[1]
    squared = down * down + right * right
    rows, columns = rows - ends[0], columns - ends[1]
    along = ((rows * down + columns * right) / np.where(squared > 0, squared, 1)).clip(0, 1)
    rows, columns = rows - along * down, columns - along * right
    return rows * rows + columns * columns
