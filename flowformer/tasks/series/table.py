"""Table of series: what a reader of files returns, before preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

# Models compute in float32.
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class SeriesTable:
    """Series as read from a file, before preprocessing.

    Attributes:
        origin: the file, for messages.
        series: n arrays of shape (length, channels), float64, NaN where missing.
        labels: n labels as written; empty strings where the source has none.
        names: what the source calls each series; "0", "1", ... where it names none.
        channel_names: where the source names its channels, else None.
        locate: gives the line of series i in the file, for messages.
    """

    origin: str
    series: list[np.ndarray]
    labels: list[str]
    names: tuple[str, ...]
    channel_names: tuple[str, ...] | None = None
    locate: Callable[[int], int] | None = None

    def where(self, index: int) -> str:
        """Return the location of series `index`: the file, and the line if known."""
        return f"{self.origin}, " + (f"line {self.locate(index)}" if self.locate else f"series {index}")

    def describe_channel(self, channel: int) -> str:
        """Return what a channel is called in messages: its name, or its number from 1."""
        return f"channel {self.channel_names[channel]!r}" if self.channel_names else f"channel {channel + 1}"

    def select_channels(self, names: tuple[str, ...]) -> SeriesTable:
        """Return the table with its channels in the order of `names`, a permutation of its `channel_names`."""
        order = [list(self.channel_names or ()).index(name) for name in names]
        return replace(self, series=[one[:, order] for one in self.series], channel_names=names)


def find_excess(values: np.ndarray) -> tuple[int, int] | None:
    """Return row and column of the first value that is infinite or beyond float32; ``None`` if there is none.

    Args:
        values: (rows, columns) float64, NaN where missing.
    """
    # fmin and fmax leave NaN out.
    if not values.size or not (np.fmax.reduce(values, None) > LARGEST or np.fmin.reduce(values, None) < -LARGEST):
        return None
    row, column = np.argwhere(np.abs(values) > LARGEST)[0]
    return int(row), int(column)


def describe_excess(text: str) -> str:
    """Return what an error says about a value that `find_excess` found, as written."""
    return f"{text!r} is beyond the range of float32, which is +-{LARGEST:.4g}"
