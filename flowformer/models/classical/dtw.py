"""The nearest training series under dynamic time warping."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flowformer.core.masks import fill
from flowformer.models.classical.fitted import (
    FittedModel,
    check_finite,
    check_integers,
    check_not_empty,
    check_shape,
    chosen,
    same_threads,
)

Scaling = Literal["none", "training", "series"]


class DTWClassifier(FittedModel):
    """The class of the nearest training series under dynamic time warping, computed by aeon.

    One path warps all channels together (dependent DTW), and a step of it costs the squared Euclidean distance of the
    two time steps. Series of different lengths are compared as they are, without their padding. The model is its
    training set, and a comparison costs the product of two lengths.

    Args:
        mean: (channels,) of the training set, which inputs were standardised with.
        std: Likewise, their standard deviations.
        num_classes: Number of classes.
        scaling: What is compared: values as they were before standardisation (``"none"``), standardised with the
            statistics of the training set (``"training"``), or with those of each series (``"series"``).
        window: Sakoe-Chiba band, as a fraction of the length; ``None`` for no band.
        threads: Threads of aeon.

    Raises:
        ValueError: for an unknown scaling.
    """

    library: ClassVar[str] = "aeon"

    x: Tensor
    lengths: Tensor
    y: Tensor

    def __init__(
        self,
        mean: np.ndarray,
        std: np.ndarray,
        num_classes: int,
        *,
        scaling: Scaling = "none",
        window: float | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__()
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}")
        self.mean, self.std, self.num_classes = mean, std, num_classes
        self.scaling, self.window, self.threads = scaling, window, threads
        self.register_buffer("x", torch.empty(0, 0, 0))
        self.register_buffer("lengths", torch.empty(0, dtype=torch.int64))
        self.register_buffer("y", torch.empty(0, dtype=torch.int64))

    def fit(self, x: Tensor, y: Tensor, mask: Tensor, *, seed: int) -> None:
        """Keep the training series."""
        self.x, self.lengths, self.y = fill(x, mask), mask.sum(1), y.clone()

    def check_fitted(self) -> None:
        """Check buffers that were loaded."""
        check_not_empty("x", self.x)
        series, length, _ = self.x.shape
        check_shape("x", self.x, series, length, len(self.mean))
        check_shape("lengths", self.lengths, series)
        check_shape("y", self.y, series)
        check_finite("x", self.x)
        check_integers("lengths", self.lengths, 1, length)
        check_integers("y", self.y, 0, self.num_classes - 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return log-probabilities of classes, those of a choice."""
        lengths = torch.full((len(x),), x.shape[1]) if mask is None else mask.sum(1)
        series: Any = self._prepare(x, lengths), self._prepare(self.x, self.lengths)  # lists, against their type
        with same_threads(), warnings.catch_warnings():
            from aeon.distances import pairwise_distance  # takes seconds

            # numba, of aeon's own code, when it compiles it
            warnings.filterwarnings("ignore", ".*unsafe cast from uint64 to int64.*")
            distances = pairwise_distance(*series, method="dtw", window=self.window, n_jobs=self.threads)
        nearest = torch.from_numpy(distances.argmin(1)).to(self.y.device)
        return chosen(self.y[nearest], self.num_classes)

    def _prepare(self, x: Tensor, lengths: Tensor) -> list[np.ndarray]:
        """Series as aeon takes them: (channels, length) each."""
        series = [one[:length].double().cpu().numpy() for one, length in zip(x, lengths.tolist(), strict=True)]
        if self.scaling == "none":
            series = [one * self.std + self.mean for one in series]
        elif self.scaling == "series":
            series = [_standardize(one) for one in series]
        return [np.ascontiguousarray(one.T) for one in series]


def _standardize(series: np.ndarray) -> np.ndarray:
    """Standardise each channel of a series (length, channels) by itself; constant channels become 0."""
    std = series.std(0)
    return (series - series.mean(0)) / np.where(std == 0, 1, std)
