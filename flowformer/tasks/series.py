"""Classification of labelled time series: filling, standardising, batching, loss and metric.

The preprocessing is that of the published Flowformer experiments on the UEA archive: missing values are interpolated in
time, each channel is standardised with the statistics of the training part, series are clipped or zero padded to the
longest training series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowformer.common.errors import DataError
from flowformer.tasks.metric import Metric
from flowformer.tasks.series_files import SeriesTable, read_table
from flowformer.tasks.splits import stratify


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


@dataclass(frozen=True, eq=False)
class SeriesScaler:
    """Standardisation per channel: subtract `mean`, divide by `std`, both (channels,) float64."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, series: Sequence[np.ndarray]) -> SeriesScaler:
        """Take the statistics of every channel over all time steps of all series.

        Missing values (NaN, +-inf) are left out; the standard deviation divides by count - 1, as pandas does and the
        published code with it. A constant channel gets std 1; a channel that is missing everywhere mean 0 and std 1.

        Args:
            series: arrays of shape (length, channels).

        Raises:
            ValueError: no series, or series of different channel counts.
        """
        if len({one.shape[1:] for one in series}) != 1:
            raise ValueError(f"want series of one channel count, got {sorted({one.shape[1:] for one in series})}")
        count = np.sum([np.isfinite(one).sum(axis=0) for one in series], axis=0)
        mean = np.sum([_replace_missing(one, 0.0).sum(axis=0) for one in series], axis=0) / np.maximum(count, 1)
        low = np.min([_replace_missing(one, np.inf).min(axis=0, initial=np.inf) for one in series], axis=0)
        high = np.max([_replace_missing(one, -np.inf).max(axis=0, initial=-np.inf) for one in series], axis=0)
        # By the extremes, not by std == 0: rounding of the mean gives a constant channel a std of about 1e-17.
        constant = low >= high
        mean = np.where(constant, np.where(count > 0, low, 0.0), mean)
        squares = np.sum([np.square(_replace_missing(one, mean) - mean).sum(axis=0) for one in series], axis=0)
        std = np.sqrt(squares / np.maximum(count - 1, 1))
        return cls(mean, np.where(constant | (std == 0), 1.0, std))

    def __call__(self, series: np.ndarray) -> np.ndarray:
        """Standardise (length, channels) to float32; what is still missing becomes 0, the mean of the training part.

        Raises:
            ValueError: the channel count is not the scaler's.
        """
        self._check_channels(series)
        return ((_replace_missing(series, self.mean) - self.mean) / self.std).astype(np.float32)

    def _check_channels(self, series: np.ndarray) -> None:
        if series.ndim != 2 or series.shape[1] != len(self.mean):
            raise ValueError(f"want a series of shape (length, {len(self.mean)}), got {series.shape}")


def _replace_missing(series: np.ndarray, value: float | np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(series), series, value).astype(np.float64, copy=False)


def fill_missing(series: np.ndarray) -> np.ndarray:
    """Interpolate missing values (NaN, +-inf) linearly in time, channel by channel; both ends are held.

    A channel that is missing altogether stays NaN, for `SeriesScaler` to set to the mean of the training part.

    Args:
        series: (length, channels), any real type.

    Returns:
        (length, channels) float64; the input itself when it is float64 and complete.

    Raises:
        ValueError: not two-dimensional.
    """
    if series.ndim != 2:
        raise ValueError(f"want a series of shape (length, channels), got {series.shape}")
    known = np.isfinite(series)
    if known.all():
        return series.astype(np.float64, copy=False)
    filled = np.where(known, series, np.nan).astype(np.float64, copy=False)
    steps = np.arange(len(series))
    for channel in np.flatnonzero(known.any(axis=0) & ~known.all(axis=0)):
        at = known[:, channel]
        filled[:, channel] = np.interp(steps, steps[at], filled[at, channel])
    return filled


@dataclass(frozen=True, eq=False)
class SeriesFormat:
    """How series are prepared for a model: all that is needed to use a trained one on new series.

    Attributes:
        classes: the labels as written in the source; class index i means `classes[i]`.
        max_length: time steps of the longest training series; batches are clipped to it.
        scaler: the statistics of the training part.
        trim: pad batches to their longest series; False pads to `max_length`.
        channel_names: of the training data, in the model's order; None where its source names none.
    """

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
        """Take length and statistics from a training part."""
        return cls(classes, int(part.lengths.max()), SeriesScaler.fit(part.series), trim, channel_names)

    @property
    def channels(self) -> int:
        """Channels per time step."""
        return len(self.scaler.mean)

    def collate(self, items: Sequence[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
        """Make a batch: standardise, clip longer series to `max_length`, pad shorter ones with zeros on the right.

        Args:
            items: (series, label) pairs, each series (length, channels) with missing values filled.

        Returns:
            "x": (batch, length, channels) float32; "mask": (batch, length) bool, True = real; "y": (batch,) int64.

        Raises:
            ValueError: no items, or a series with another number of channels.
        """
        if not items:
            raise ValueError("want at least one series in a batch, got none")
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
        """The format as plain values."""
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
        """The format that `to_json` wrote."""
        scaler = SeriesScaler(*(np.array(values[name], dtype=np.float64) for name in ("mean", "std")))
        names = values["channel_names"]
        return cls(tuple(values["classes"]), values["max_length"], scaler, values["trim"], names and tuple(names))


def classify(model: nn.Module, form: SeriesFormat, series: Sequence[np.ndarray], *, batch_size: int = 64) -> np.ndarray:
    """Class probabilities of series, by a trained model.

    Args:
        model: from (batch, length, channels) and a padding mask to logits (batch, classes), in evaluation mode.
        form: how the model's series are prepared.
        series: n arrays of shape (length, channels); missing values are filled here.
        batch_size: series at a time.

    Returns:
        (n, classes) float64.
    """
    items = [(fill_missing(one), 0) for one in series]
    device = next(model.parameters()).device
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            batch = form.collate(items[start : start + batch_size])
            logits = model(batch["x"].to(device), batch["mask"].to(device))
            pieces.append(logits.double().softmax(-1).cpu().numpy())
    return np.concatenate(pieces)


def classify_tables(model: nn.Module, form: SeriesFormat, paths: Sequence[Path]) -> tuple[list[str], np.ndarray]:
    """Class probabilities of the series in files, by a trained model.

    Args:
        model: as `classify` takes it.
        form: likewise.
        paths: files as `read_table` takes them; labels are not needed.

    Returns:
        Names of the series, and (n, classes) float64.

    Raises:
        DataError: as `read_table` and `match_format`.
    """
    tables = [read_table(path, labelled=False) for path in paths]
    probabilities = [classify(model, form, match_format(table, form)) for table in tables]
    return [name for table in tables for name in table.names], np.concatenate(probabilities)


@dataclass(frozen=True, eq=False)
class SeriesTask:
    """A classification problem on series, ready to train on.

    Attributes:
        name: of the problem.
        train: the training part.
        test: the test part.
        format: how series are prepared; its statistics are those of `train`.
        published: accuracy in percent by method name; empty for a user's own data.
        licence: what is known about the terms of the data.
        source: where the data came from.
        validation: a part to choose the epoch by; `None` for none.
    """

    name: str
    train: SeriesSet
    test: SeriesSet
    format: SeriesFormat
    published: Mapping[str, float] = field(default_factory=dict)
    licence: str = ""
    source: str = ""
    validation: SeriesSet | None = None

    @property
    def metric(self) -> Metric:
        """The figure of merit."""
        return Metric("accuracy", "accuracy", "percent", lambda share: 100 * share)

    @property
    def evaluated(self) -> dict[str, SeriesSet]:
        """The sets evaluated during training: the test part, and the validation part; none that is empty."""
        sets = {"test": self.test, "validation": self.validation}
        return {name: part for name, part in sets.items() if part is not None and len(part)}

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch; means over it of the cross-entropy, "loss", and the "accuracy"."""
        logits = model(batch["x"], batch["mask"])
        loss = nn.functional.cross_entropy(logits.float(), batch["y"])
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["y"]).float().mean()}

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Series in a batch."""
        return len(batch["y"])

    def split_validation(self, fraction: float, seed: int) -> SeriesTask:
        """Set a stratified part of the training series aside.

        Statistics and `max_length` are taken anew from the series that stay: nothing of the validation part leaks into
        training.

        Args:
            fraction: of each class to set aside, in (0, 1); at least one series of each class is set aside, and at
                least one stays.
            seed: decides which.

        Returns:
            The task with its training part reduced, and a validation part.

        Raises:
            ValueError: `fraction` is out of range, or a class has fewer than two training series.
        """
        kept, held = stratify(self.train.labels, self.format.classes, fraction, seed)
        train = self.train.subset(kept)
        form = SeriesFormat.fit(
            train, self.format.classes, trim=self.format.trim, channel_names=self.format.channel_names
        )
        return replace(self, train=train, format=form, validation=self.train.subset(held))


def build_task(
    train: SeriesTable,
    test: SeriesTable,
    *,
    name: str,
    published: Mapping[str, float] | None = None,
    licence: str = "",
    source: str = "",
) -> SeriesTask:
    """Check two tables against each other and fill what is missing.

    Raises:
        DataError: an empty part, a series without time steps, channels that differ, fewer than two classes in the
            training part, or a test label that the training part does not have.
    """
    for table in (train, test):
        _check_series(table)
    training = f"the training data {train.origin}"
    test = _match_channels(test, train.series[0].shape[1], train.channel_names, training)
    classes = tuple(sorted(set(train.labels)))
    if len(classes) < 2:
        raise DataError(
            f"{train.origin}: classification needs at least two classes, all labels are {train.labels[0]!r}"
        )
    index = {label: number for number, label in enumerate(classes)}
    for row, label in enumerate(test.labels):
        if label not in index:
            raise DataError(f"{test.where(row)}: label {label!r} does not occur in {training}")
    parts = [
        SeriesSet([fill_missing(one) for one in table.series], np.array([index[label] for label in table.labels]))
        for table in (train, test)
    ]
    return SeriesTask(
        name=name,
        train=parts[0],
        test=parts[1],
        format=SeriesFormat.fit(parts[0], classes, channel_names=train.channel_names),
        published=dict(published or {}),
        licence=licence,
        source=source or f"{train.origin} and {test.origin}",
    )


def _check_series(table: SeriesTable) -> None:
    if not table.series:
        raise DataError(f"{table.origin}: holds no series")
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
    _check_series(table)
    return _match_channels(table, form.channels, form.channel_names, "the training data").series


def _match_channels(table: SeriesTable, count: int, names: tuple[str, ...] | None, training: str) -> SeriesTable:
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


def load_pair(train_path: str | Path, test_path: str | Path, *, name: str = "own") -> SeriesTask:
    """Make a task of a user's own two files, each .ts, .ts.gz, .csv or .csv.gz.

    Raises:
        DataError: a file cannot be read (see `read_ts`, `read_csv`), or the two do not fit (see `build_task`).
    """
    return build_task(
        read_table(train_path), read_table(test_path), name=name, licence="the user's own data; terms not known"
    )
