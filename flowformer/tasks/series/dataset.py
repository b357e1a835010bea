"""Labelled series as a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False)
class SeriesSet(Dataset[tuple[np.ndarray, int]]):
    """Series with their class indices; a map-style PyTorch data set as it is.

    Attributes:
        series: n arrays of shape (length, channels), missing values filled; lengths may differ.
        labels: (n,) int64, indices of classes.
    """

    series: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.series[index], int(self.labels[index])

    @property
    def lengths(self) -> np.ndarray:
        """Time steps of each series: (n,) int64."""
        return np.array([len(one) for one in self.series], dtype=np.int64)

    def subset(self, indices: Sequence[int] | np.ndarray) -> SeriesSet:
        """Return the series at `indices`, in that order; the arrays are shared, not copied."""
        rows = np.asarray(indices, dtype=np.int64)
        return SeriesSet([self.series[row] for row in rows], self.labels[rows])
