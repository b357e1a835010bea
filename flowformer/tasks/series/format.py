"""Series format: how series are preprocessed for a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.common.errors import DataError
from flowformer.common.fields import option
from flowformer.common.values import read_flag, read_integer, read_numbers, read_texts
from flowformer.models.timeseries import SeriesClassifier
from flowformer.tasks.scenes import Scene, View, find_mechanisms, line_strips
from flowformer.tasks.series.dataset import SeriesSet
from flowformer.tasks.series.files import read_table
from flowformer.tasks.series.table import SeriesTable

logger = logging.getLogger(__name__)

MOST_DEVIATIONS = 1e18  # their squares, which norms are made of, are in the range of float32


@dataclass(frozen=True, eq=False)
class SeriesScaler:
    """Standardisation per channel with `mean` and `std`, both (channels,) float64."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, series: Sequence[np.ndarray]) -> SeriesScaler:
        """Compute the statistics of every channel over all time steps of all series.

        Missing values (NaN, +-inf) are left out; the standard deviation divides by count - 1, as pandas does and the
        published code with it. A constant channel gets std 1; a channel that is missing everywhere mean 0 and std 1.

        Args:
            series: arrays of shape (length, channels).

        Raises:
            ValueError: no series, series of different channel counts, or values whose squares are beyond float64.
        """
        if len({one.shape[1:] for one in series}) != 1:
            raise ValueError(
                f"series must have the same number of channels, got {sorted({one.shape[1:] for one in series})}"
            )
        count = np.sum([np.isfinite(one).sum(axis=0) for one in series], axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            mean = np.sum([_replace_missing(one, 0.0).sum(axis=0) for one in series], axis=0) / np.maximum(count, 1)
        low = np.min([_replace_missing(one, np.inf).min(axis=0, initial=np.inf) for one in series], axis=0)
        high = np.max([_replace_missing(one, -np.inf).max(axis=0, initial=-np.inf) for one in series], axis=0)
        # By the extremes, not by std == 0: rounding of the mean gives a constant channel a std of about 1e-17.
        constant = low >= high
        mean = np.where(constant, np.where(count > 0, low, 0.0), mean)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.sum([np.square(_replace_missing(one, mean) - mean).sum(axis=0) for one in series], axis=0)
            std = np.sqrt(squares / np.maximum(count - 1, 1))
        if not (std < np.inf).all():
            channel = int(np.argmin(std < np.inf))
            raise ValueError(
                f"channel {channel} has values from {low[channel]:g} to {high[channel]:g}, whose standard deviation is "
                "beyond float64; scale them first"
            )
        return cls(mean, np.where(constant | (std == 0), 1.0, std))

    def __call__(self, series: np.ndarray) -> np.ndarray:
        """Standardise (length, channels) to float32; remaining missing values become 0, the mean of the training set.

        Raises:
            ValueError: the channel count is not the scaler's, or a scaled value is beyond float32.
        """
        self._check_channels(series)
        with np.errstate(over="ignore"):
            scaled = ((_replace_missing(series, self.mean) - self.mean) / self.std).astype(np.float32)
        if not np.isfinite(scaled).all():
            step, channel = map(int, np.argwhere(~np.isfinite(scaled))[0])
            raise ValueError(
                f"the value {series[step, channel]:g} of channel {channel}, time step {step}, is beyond float32 when "
                f"it is scaled by mean {self.mean[channel]:g} and standard deviation {self.std[channel]:g}"
            )
        return scaled

    def _check_channels(self, series: np.ndarray) -> None:
        if series.ndim != 2 or series.shape[1] != len(self.mean):
            raise ValueError(f"expected a series of shape (length, {len(self.mean)}), got {series.shape}")


def _replace_missing(series: np.ndarray, value: float | np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(series), series, value).astype(np.float64, copy=False)


def fill_missing(series: np.ndarray) -> np.ndarray:
    """Interpolate missing values (NaN, +-inf) linearly in time per channel; constant at both ends.

    A channel that is missing altogether stays NaN, for `SeriesScaler` to set to the mean of the training part.

    Args:
        series: (length, channels), any real type.

    Returns:
        (length, channels) float64; the input itself when it is float64 and complete.

    Raises:
        ValueError: not two-dimensional.
    """
    if series.ndim != 2:
        raise ValueError(f"expected a series of shape (length, channels), got {series.shape}")
    known = np.isfinite(series)
    if known.all():
        return series.astype(np.float64, copy=False)
    filled = np.where(known, series, np.nan).astype(np.float64, copy=False)
    steps = np.arange(len(series))
    for channel in np.flatnonzero(known.any(axis=0) & ~known.all(axis=0)):
        at = known[:, channel]
        filled[:, channel] = np.interp(steps, steps[at], filled[at, channel])
    return filled


@dataclass(frozen=True, kw_only=True)
class SeriesChoice:
    """Selection of a series in a file."""

    index: int = option(0, "index of the series in the file, from 0", at_least=0)


@dataclass(frozen=True, eq=False)
class SeriesFormat:
    """Series format: everything needed to use a trained model on new series.

    Attributes:
        classes: the labels as written in the source; class index i means `classes[i]`.
        max_length: time steps of the longest training series; batches are clipped to it.
        scaler: the statistics of the training part.
        trim: pad batches to their longest series; False pads to `max_length`.
        channel_names: of the training data, in the model's order; None where its source names none.
    """

    kind: ClassVar[str] = "series"
    item: ClassVar[str] = "series"
    files: ClassVar[str] = "series as .ts, or as .csv in long form, with or without labels"
    show_options: ClassVar[type] = SeriesChoice

    classes: tuple[str, ...]
    max_length: int
    scaler: SeriesScaler
    trim: bool = True
    channel_names: tuple[str, ...] | None = None

    @classmethod
    def fit(
        cls,
        part: SeriesSet,
        classes: tuple[str, ...],
        *,
        trim: bool = True,
        channel_names: tuple[str, ...] | None = None,
    ) -> SeriesFormat:
        """Compute length and statistics from a training set."""
        return cls(classes, int(part.lengths.max()), SeriesScaler.fit(part.series), trim, channel_names)

    @property
    def channels(self) -> int:
        """Channels per time step."""
        return len(self.scaler.mean)

    def collate(self, items: Sequence[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
        """Make a batch: standardise, truncate series to `max_length`, and pad shorter ones with zeros on the right.

        Args:
            items: (series, label) pairs, each series (length, channels) with missing values filled.

        Returns:
            "x": (batch, length, channels) float32; "mask": (batch, length) bool, True = real; "y": (batch,) int64.

        Raises:
            ValueError: no items, or a series with another number of channels.
        """
        if not items:
            raise ValueError("a batch must contain at least one series, got none")
        scaled = [self.scaler(series[: self.max_length]) for series, _ in items]
        lengths = np.array([len(series) for series in scaled])
        width = int(lengths.max()) if self.trim else self.max_length
        x = np.zeros((len(items), width, self.channels), dtype=np.float32)
        for row, series in zip(x, scaled, strict=True):
            row[: len(series)] = series
        mask = np.arange(width) < lengths[:, None]
        y = np.array([label for _, label in items], dtype=np.int64)
        return {"x": torch.from_numpy(x), "mask": torch.from_numpy(mask), "y": torch.from_numpy(y)}

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        return {
            "classes": list(self.classes),
            "max_length": self.max_length,
            "mean": self.scaler.mean.tolist(),
            "std": self.scaler.std.tolist(),
            "trim": self.trim,
            "channel_names": self.channel_names and list(self.channel_names),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SeriesFormat:
        """Read a format that ``to_json`` wrote.

        Raises:
            ValueError: for values of another kind, or that do not fit each other.
        """
        mean, std = read_numbers(values, "mean"), read_numbers(values, "std", above=0)
        names = None if values.get("channel_names") is None else read_texts(values, "channel_names")
        if not len(mean) == len(std) == len(names or mean):
            raise ValueError(f"{len(mean)} means, {len(std)} deviations and {len(names or mean)} names of channels")
        scaler = SeriesScaler(np.array(mean), np.array(std))
        trim = read_flag(values, "trim")
        classes = read_texts(values, "classes", distinct=True)
        return cls(classes, read_integer(values, "max_length"), scaler, trim, names)

    def classify_files(self, model: nn.Module, paths: Sequence[Path]) -> tuple[list[str], np.ndarray]:
        """Return class probabilities of the series in files by a trained model.

        Args:
            model: As `classify` takes it.
            paths: Files as `read_table` takes them; labels are not needed.

        Returns:
            Names of the series, and (n, classes) float64.

        Raises:
            DataError: as `read_table` and `match_format`.
        """
        tables = [read_table(path, labelled=False) for path in paths]
        probabilities = [_classify_table(model, self, table) for table in tables]
        return [name for table in tables for name in table.names], np.concatenate(probabilities)

    def show(self, model: SeriesClassifier, file: Path | None, options: SeriesChoice, view: View) -> Scene:
        """Return the attention maps of a classifier for a series in a file.

        Raises:
            ValueError: for a series that is not there, and as :meth:`scene`.
            DataError: as `read_table` and `match_format`.
        """
        if file is None:
            raise ValueError(f"a file is required: {self.files}")
        series = match_format(read_table(file, labelled=False), self)
        if not 0 <= options.index < len(series):
            raise ValueError(
                f"{file} has {len(series)} series, from 0 to {len(series) - 1}; got --index {options.index}"
            )
        return self.scene(model, series[options.index], view)

    def scene(self, model: SeriesClassifier, series: np.ndarray, view: View) -> Scene:
        """Return the attention maps of a classifier for a series.

        Args:
            model: The model, in evaluation mode.
            series: (length, channels), missing values filled or not.
            view: What to show.

        Raises:
            ValueError: for a query, layer or head that is not there, and for a model without attention.
        """
        if not find_mechanisms(model):
            raise ValueError(f"{type(model).__name__} has no attention to show")
        batch = self.collate([(fill_missing(series), 0)])
        length = int(batch["mask"].sum()) if model.mask_padding else batch["x"].shape[1]
        strips = line_strips(
            model, (batch["x"], batch["mask"]), length, view, default=0.5, name=lambda position: f"step {position}"
        )
        return Scene(", ".join(find_mechanisms(model)), strips, series=batch["x"][0, :length].numpy())


def classify(model: nn.Module, form: SeriesFormat, series: Sequence[np.ndarray], *, batch_size: int = 64) -> np.ndarray:
    """Return class probabilities of series by a trained model.

    Args:
        model: from (batch, length, channels) and a padding mask to logits (batch, classes), in evaluation mode.
        form: how the model's series are prepared.
        series: n arrays of shape (length, channels); missing values are filled here.
        batch_size: series at a time.

    Returns:
        (n, classes) float64.
    """
    items = [(fill_missing(one), 0) for one in series]
    device = next(chain(model.parameters(), model.buffers())).device
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            batch = form.collate(items[start : start + batch_size])
            logits = model(batch["x"].to(device), batch["mask"].to(device))
            pieces.append(logits.double().softmax(-1).cpu().numpy())
    return np.concatenate(pieces)


def _classify_table(model: nn.Module, form: SeriesFormat, table: SeriesTable) -> np.ndarray:
    series = match_format(table, form)
    warn_of_empty_channels(table)
    probabilities = classify(model, form, series)
    bad = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if len(bad):
        raise DataError(f"{table.where(int(bad[0]))}: the model gives no finite probabilities for this series")
    return probabilities


def check_scale(table: SeriesTable, form: SeriesFormat, training: str) -> None:
    """Raise for a value so far from the training data that a model cannot compute with it.

    Args:
        table: The series, their channels in the model's order.
        form: The format with the statistics of the training data.
        training: What the training data is called in messages.

    Raises:
        DataError: naming the place.
    """
    most, least = (form.scaler.mean + sign * MOST_DEVIATIONS * form.scaler.std for sign in (1, -1))
    for row, series in enumerate(table.series):
        # fmin and fmax leave NaN out.
        if (np.fmax.reduce(series) <= most).all() and (np.fmin.reduce(series) >= least).all():
            continue
        with np.errstate(over="ignore"):
            scaled = np.abs((series - form.scaler.mean) / form.scaler.std)
        if not (excess := scaled > MOST_DEVIATIONS).any():
            continue  # a channel without any value
        step, channel = map(int, np.argwhere(excess)[0])
        raise DataError(
            f"{table.where(row)}: {table.describe_channel(channel)}, time step {step + 1}: {series[step, channel]:g} "
            f"is {scaled[step, channel]:.2g} standard deviations from the mean of {training}; expected at most "
            f"{MOST_DEVIATIONS:g}"
        )


def warn_of_empty_channels(table: SeriesTable) -> None:
    """Log the channels that have no value in any series."""
    known = np.any([np.isfinite(one).any(axis=0) for one in table.series], axis=0)
    if empty := [table.describe_channel(channel) for channel in np.flatnonzero(~known)]:
        logger.warning("%s: %s without any value, set to 0", table.origin, ", ".join(empty))


def check_series(table: SeriesTable) -> None:
    """Raise for a table without series, with empty series, or with different numbers of channels.

    Raises:
        DataError: naming the place.
    """
    if not table.series:
        raise DataError(f"{table.origin}: contains no series")
    channels = table.series[0].shape[1]
    for row, one in enumerate(table.series):
        if len(one) == 0:
            raise DataError(f"{table.where(row)}: a series without time steps")
        if one.shape[1] != channels:
            raise DataError(f"{table.where(row)}: {one.shape[1]} channels, but the first series has {channels}")


def match_format(table: SeriesTable, form: SeriesFormat) -> list[np.ndarray]:
    """Check new series against the format of a trained model.

    Returns:
        The series of the table, their channels in the model's order, ready for `classify`.

    Raises:
        DataError: no series, a series without time steps, or channels other than those of the training data, by name
            where both sides name them, by number elsewhere.
    """
    check_series(table)
    matched = match_channels(table, form.channels, form.channel_names, "the training data")
    check_scale(matched, form, "the training data")
    return matched.series


def match_channels(table: SeriesTable, count: int, names: tuple[str, ...] | None, training: str) -> SeriesTable:
    """Return the table with its channels in the order of the training data.

    Args:
        table: The series.
        count: Channels of the training data.
        names: Their names, where it has any.
        training: What the training data is called in messages.

    Raises:
        DataError: for other channels than those of the training data.
    """
    if names is not None and table.channel_names is not None:
        _check_names(table, table.channel_names, names, training)
        return table if table.channel_names == names else table.select_channels(names)
    channels = table.series[0].shape[1]
    if channels != count:
        raise DataError(f"{table.origin}: {channels} channels, but {training} has {count}")
    return table


def _check_names(table: SeriesTable, names: tuple[str, ...], wanted: tuple[str, ...], training: str) -> None:
    missing = [name for name in wanted if name not in names]
    unknown = [name for name in names if name not in wanted]
    causes = [f"channels {unknown} do not occur in {training}"] * bool(unknown)
    causes += [f"channels {missing} of {training} are missing"] * bool(missing)
    if causes:
        raise DataError(f"{table.origin}, line 1: {'; '.join(causes)}")
