"""Random convolutional kernels and a ridge classifier: ROCKET."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flowformer.models.classical.fitted import (
    FittedModel,
    check_finite,
    check_integers,
    check_not_empty,
    check_shape,
    chosen,
    same_threads,
)

_LENGTHS = (7, 9, 11)  # of kernels: Dempster, Petitjean and Webb, 2020, section 3.1
# The kernels as aeon keeps them, in its order: of those of float32, values, and of the others, integers.
_KERNELS = ("weights", "kernel_lengths", "biases", "dilations", "paddings", "channel_counts", "channel_indices")
_FLOATS = ("weights", "biases")
_RIDGE = ("scale", "coefficients", "intercepts")


class RocketClassifier(FittedModel):
    """ROCKET (Dempster, Petitjean and Webb, 2020): random convolutional kernels of aeon, ridge of scikit-learn.

    Each kernel gives two features of a series, the maximum of its outputs and their proportion of positive values. The
    ridge classifier chooses its penalty among 10 from 1e-3 to 1e3 by leave-one-out, and features are divided by their
    standard deviations, as in ``aeon.classification.convolution_based.RocketClassifier``.

    Kernels need series of equal length: values are taken as they were before standardisation, and series are padded at
    the end with zeros to the longest training series (to 11 steps, the longest kernel, if that is shorter). Then aeon
    standardises each channel of each series by itself, padding included.

    Args:
        mean: (channels,) of the training set, which inputs were standardised with.
        std: Likewise, their standard deviations.
        num_classes: Number of classes.
        max_length: Longest series.
        num_kernels: Number of kernels.
        threads: Threads of aeon.
    """

    library: ClassVar[str] = "aeon"

    weights: Tensor
    kernel_lengths: Tensor
    biases: Tensor
    dilations: Tensor
    paddings: Tensor
    channel_counts: Tensor
    channel_indices: Tensor
    scale: Tensor
    coefficients: Tensor
    intercepts: Tensor

    def __init__(
        self,
        mean: np.ndarray,
        std: np.ndarray,
        num_classes: int,
        max_length: int,
        *,
        num_kernels: int = 10_000,
        threads: int = 1,
    ) -> None:
        super().__init__()
        self.mean, self.std, self.num_classes = mean, std, num_classes
        self.in_chans, self.num_kernels, self.threads = len(mean), num_kernels, threads
        self.length = max(max_length, max(_LENGTHS))
        for name in _KERNELS:
            dtype = torch.float32 if name in _FLOATS else torch.int32
            self.register_buffer(name, torch.empty(0, dtype=dtype))
        for name in _RIDGE:
            shape = (0, 0) if name == "coefficients" else (0,)
            self.register_buffer(name, torch.empty(shape, dtype=torch.float64))

    @same_threads()
    def fit(self, x: Tensor, y: Tensor, mask: Tensor, *, seed: int) -> None:
        """Draw kernels, and fit the ridge classifier to their features."""
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.preprocessing import StandardScaler

        series = self._prepare(x, mask)
        transform = self._transform(seed)
        transform.fit(series)
        for name, value in zip(_KERNELS, transform.kernels, strict=True):
            setattr(self, name, torch.from_numpy(value))
        scaler = StandardScaler(with_mean=False)
        ridge: Any = RidgeClassifierCV(alphas=np.logspace(-3, 3, 10))
        ridge.fit(scaler.fit_transform(transform.transform(series)), y.numpy())
        learned = (scaler.scale_, np.atleast_2d(ridge.coef_), np.atleast_1d(ridge.intercept_))
        for name, value in zip(_RIDGE, learned, strict=True):
            setattr(self, name, torch.from_numpy(np.asarray(value, dtype=np.float64)))

    def check_fitted(self) -> None:
        """Check buffers that were loaded: aeon reads at the places that they say, whatever these are."""
        check_not_empty("coefficients", self.coefficients)
        kernels, rows = self.num_kernels, self.num_classes if self.num_classes > 2 else 1
        for name in ("kernel_lengths", "biases", "dilations", "paddings", "channel_counts"):
            check_shape(name, getattr(self, name), kernels)
        check_integers("kernel_lengths", self.kernel_lengths, 1, max(_LENGTHS))
        check_integers("channel_counts", self.channel_counts, 1, self.in_chans)
        sizes = self.kernel_lengths.long() * self.channel_counts.long()
        check_shape("weights", self.weights, int(sizes.sum()))
        check_shape("channel_indices", self.channel_indices, int(self.channel_counts.sum()))
        check_integers("channel_indices", self.channel_indices, 0, self.in_chans - 1)
        check_integers("dilations", self.dilations, 1, self.length)
        check_integers("paddings", self.paddings, 0, max(_LENGTHS) * self.length)
        reach = (self.kernel_lengths.long() - 1) * self.dilations
        if bool((self.length + 2 * self.paddings.long() - reach < 1).any()):
            raise ValueError(f"a kernel does not fit into {self.length} steps")
        check_shape("scale", self.scale, 2 * kernels)
        check_shape("coefficients", self.coefficients, rows, 2 * kernels)
        check_shape("intercepts", self.intercepts, rows)
        for name in (*_FLOATS, *_RIDGE):
            check_finite(name, getattr(self, name))

    @same_threads()
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return log-probabilities of classes, those of a choice."""
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        transform = self._transform(0)
        series = self._prepare(x, real)
        transform.fit(series[:1])  # aeon transforms nothing before that; its kernels give way to those of the model
        transform.kernels = tuple(getattr(self, name).cpu().numpy() for name in _KERNELS)
        features = torch.from_numpy(transform.transform(series)).to(self.scale.device).double()
        scores = features / self.scale @ self.coefficients.T + self.intercepts
        classes = scores.argmax(1) if self.num_classes > 2 else (scores[:, 0] > 0).long()
        return chosen(classes, self.num_classes)

    def _transform(self, seed: int) -> Any:
        from aeon.transformations.collection.convolution_based import Rocket  # takes seconds

        return Rocket(self.num_kernels, n_jobs=self.threads, random_state=seed)

    def _prepare(self, x: Tensor, mask: Tensor) -> np.ndarray:
        """Series as aeon takes them: (series, channels, length), padded with zeros."""
        found = np.zeros((len(x), self.in_chans, self.length))
        for row, one, length in zip(found, x, mask.sum(1).tolist(), strict=True):
            row[:, :length] = (one[:length].double().cpu().numpy() * self.std + self.mean).T
        return found
