"""Base class of classifiers that a library fits at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn


class FittedModel(nn.Module, ABC):
    """Classifier that is fitted to a whole training set at once, rather than by steps along gradients.

    What it has learned is in its buffers, which are empty before :meth:`fit`: a fitted model is saved and loaded like
    any other, as tensors, and nothing is unpickled.

    Attributes:
        library: The module that fits it.
    """

    library: ClassVar[str]

    @abstractmethod
    def fit(self, x: Tensor, y: Tensor, mask: Tensor, *, seed: int) -> None:
        """Fit the model.

        Args:
            x: All training series, (series, length, channels), padded on the right.
            y: (series,) int64, their classes.
            mask: (series, length) boolean, True = real time step.
            seed: Seed of all random numbers.

        Raises:
            ValueError: for data that cannot be fitted.
        """

    @abstractmethod
    def check_fitted(self) -> None:
        """Check buffers that were loaded.

        Raises:
            ValueError: if the model was not fitted, or if no fit can have given these values.
        """

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return log-probabilities of classes, (series, classes).

        A method without probabilities gives 1 to the class that it chooses, and 0 (minus infinity) to the others.

        Args:
            x: (series, length, channels), padded on the right.
            mask: (series, length) boolean, True = real time step.
        """

    def resize_buffers(self, state: Mapping[str, Tensor]) -> None:
        """Give the buffers the shapes of those in a state dict, where their numbers of dimensions agree."""
        for name, own in list(self.named_buffers()):
            if name in state and state[name].ndim == own.ndim:
                parent, _, last = name.rpartition(".")
                setattr(self.get_submodule(parent), last, own.new_empty(state[name].shape))


@contextmanager
def same_threads() -> Iterator[None]:
    """Give PyTorch back its number of threads: numba, in which aeon computes, sets that of the OpenMP runtime."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def chosen(classes: Tensor, num_classes: int) -> Tensor:
    """Return log-probabilities of choices without probabilities: 0 for the class, minus infinity for the others.

    Args:
        classes: (series,) int64.
        num_classes: Number of classes.

    Returns:
        (series, num_classes) float32.
    """
    return nn.functional.one_hot(classes, num_classes).float().log()


def check_shape(name: str, value: Tensor, *shape: int) -> None:
    """Check the shape of a buffer.

    Raises:
        ValueError: for another shape, which is that of another model or of none.
    """
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")


def check_integers(name: str, value: Tensor, least: int, most: int) -> None:
    """Check the range of a buffer of integers.

    Raises:
        ValueError: if a value is out of it.
    """
    if value.numel() and not least <= int(value.min()) <= int(value.max()) <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {int(value.min())} to {int(value.max())}")


def check_finite(name: str, value: Tensor) -> None:
    """Check that a buffer of numbers has neither NaN nor infinities.

    Raises:
        ValueError: if it has.
    """
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has values that are not finite")


def check_not_empty(name: str, value: Tensor) -> None:
    """Check that a fit has filled a buffer.

    Raises:
        ValueError: if it is empty.
    """
    if not value.numel():
        raise ValueError(f"the model has not been fitted: {name} is empty")
