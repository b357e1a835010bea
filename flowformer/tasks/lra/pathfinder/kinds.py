"""Published parameters of Pathfinder images, by their size and difficulty."""

from __future__ import annotations

from dataclasses import dataclass

from flowformer.common.errors import DataError
from flowformer.common.names import nearest

CLASSES = ("different", "connected")


@dataclass(frozen=True)
class Kind:
    """Parameters of Pathfinder images. Lengths are in pixels.

    Attributes:
        side: Height and width of the image.
        contour_length: Dashes of each of the two long contours.
        distractors: Dashes of all distractors together, at most; each has a third of ``contour_length``.
        dash_length: From end to end.
        thickness: Of a dash.
        margins: Half of the gap between two dashes of a contour; each image takes one of them.
        padding: Nothing is drawn so near to the border.
        seed_distance: Between the first ends of the two long contours.
        marker_radius: Of the discs.
        continuity: How straight contours are: a contour turns by an angle ``a`` with a probability in proportion to the
            square of cos(continuity * a), and never by more than a right angle over ``continuity``.
        contour_contrast: Brightness of the long contours, relative to the markers'.
        distractor_contrast: That of the distractors.
        antialias: Each pixel is the mean of as many points along each axis.
    """

    side: int
    contour_length: int
    distractors: int
    dash_length: int
    thickness: float
    margins: tuple[int, ...]
    padding: int
    seed_distance: int
    marker_radius: float
    continuity: float
    contour_contrast: float
    distractor_contrast: float
    antialias: int = 2

    @property
    def distractor_length(self) -> int:
        """Dashes of one distractor."""
        return self.contour_length // 3

    @property
    def num_distractors(self) -> int:
        """Number of distractors, if all find room."""
        return self.distractors // self.distractor_length


def _kind_32(contour_length: int) -> Kind:
    # lra_benchmarks/data/pathfinder.py, Pathfinder32. The generator gives long contours the contrast of snakes times
    # that of paddles (2 * 0.75), distractors that of snakes alone (2).
    return Kind(
        side=32, contour_length=contour_length, distractors=20, dash_length=2, thickness=0.5, margins=(1,), padding=1,
        seed_distance=7, marker_radius=1.5, continuity=1.0, contour_contrast=1.5, distractor_contrast=2.0,
    )  # fmt: skip


def _kind_128(contour_length: int) -> Kind:
    # lra_benchmarks/data/pathfinder.py, Pathfinder128; the length of a dash is the default of snakes2_wrapper.py.
    return Kind(
        side=128, contour_length=contour_length, distractors=35, dash_length=5, thickness=1.5, margins=(2, 3),
        padding=1, seed_distance=20, marker_radius=3, continuity=1.8, contour_contrast=0.9, distractor_contrast=0.9,
    )  # fmt: skip


DIFFICULTIES = {"easy": 6, "intermediate": 9, "hard": 14}  # dashes of a long contour
SIDES = {32: _kind_32, 128: _kind_128}


def find_kind(side: int = 32, difficulty: str = "hard") -> Kind:
    """Return the published parameters of images of a size and a difficulty. Path-X is 128 x 128 pixels, "hard".

    Raises:
        DataError: for a size or difficulty that is not published.
    """
    if difficulty not in DIFFICULTIES:
        hint = nearest(difficulty, DIFFICULTIES) or f"; known are {', '.join(DIFFICULTIES)}"
        raise DataError(f"unknown difficulty of Pathfinder {difficulty!r}{hint}")
    if side not in SIDES:
        raise DataError(f"Pathfinder images have a side of {' or '.join(map(str, SIDES))} pixels, got {side!r}")
    return SIDES[side](DIFFICULTIES[difficulty])
