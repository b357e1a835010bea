"""Classification of labelled time series: data sets, loss and metric.

The preprocessing is that of the published Flowformer experiments on the UEA archive: missing values are interpolated in
time, each channel is standardised with the statistics of the training part, series are clipped or zero padded to the
longest training series.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from flowformer.common.errors import DataError
from flowformer.tasks.classes import find_class, order_classes
from flowformer.tasks.metric import ACCURACY, Metric
from flowformer.tasks.series.dataset import SeriesSet
from flowformer.tasks.series.files import read_table
from flowformer.tasks.series.format import (
    SeriesFormat,
    check_scale,
    check_series,
    fill_missing,
    match_channels,
    warn_of_empty_channels,
)
from flowformer.tasks.series.table import SeriesTable
from flowformer.tasks.splits import find_classes, stratify


@dataclass(frozen=True, eq=False)
class SeriesTask:
    """A classification problem on series.

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
        return ACCURACY

    @property
    def evaluated(self) -> dict[str, SeriesSet]:
        """The evaluation sets used during training: test set and validation set, if not empty."""
        sets = {"test": self.test, "validation": self.validation}
        return {name: part for name, part in sets.items() if part is not None and len(part)}

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch, and return mean cross-entropy "loss", and right answers as "accuracy"."""
        logits = model(batch["x"], batch["mask"])
        loss = nn.functional.cross_entropy(logits.float(), batch["y"])
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["y"]).sum()}

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of series in a batch."""
        return len(batch["y"])

    def split_validation(self, fraction: float, seed: int) -> SeriesTask:
        """Hold out a stratified part of the training series for validation.

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

    def using(self, form: SeriesFormat) -> SeriesTask:
        """Return the task prepared as the model of a run expects it: with its classes, statistics and length.

        Raises:
            DataError: for a class that the run does not have, or other channels.
        """
        if form.channels != self.format.channels:
            raise DataError(f"{self.source}: {self.format.channels} channels, but the run has {form.channels}")
        index = find_classes(self.format.classes, form.classes, self.source)

        def renumber(part: SeriesSet | None) -> SeriesSet | None:
            return part and replace(part, labels=index[part.labels])

        return replace(
            self, format=form, **{name: renumber(getattr(self, name)) for name in ("train", "test", "validation")}
        )


def build_task(
    train: SeriesTable,
    test: SeriesTable,
    *,
    name: str,
    published: Mapping[str, float] | None = None,
    licence: str = "",
    source: str = "",
) -> SeriesTask:
    """Check two tables against each other, and fill missing values.

    Raises:
        DataError: an empty part, a series without time steps, channels that differ, fewer than two classes in the
            training part, or a test label that the training part does not have.
    """
    for table in (train, test):
        check_series(table)
    training = f"the training data {train.origin}"
    test = match_channels(test, train.series[0].shape[1], train.channel_names, training)
    warn_of_empty_channels(train)
    classes = order_classes(train.labels)
    if len(classes) < 2:
        raise DataError(
            f"{train.origin}: classification needs at least two classes, all labels are {train.labels[0]!r}"
        )
    index = {label: number for number, label in enumerate(classes)}
    numbers = {label: find_class(label, index) for label in set(train.labels) | set(test.labels)}
    for row, label in enumerate(test.labels):
        if numbers[label] is None:
            raise DataError(f"{test.where(row)}: label {label!r} does not occur in {training}{_list_classes(classes)}")
    parts = [
        SeriesSet([fill_missing(one) for one in table.series], np.array([numbers[label] for label in table.labels]))
        for table in (train, test)
    ]
    form = SeriesFormat.fit(parts[0], classes, channel_names=train.channel_names)
    check_scale(test, form, training)
    return SeriesTask(
        name=name,
        train=parts[0],
        test=parts[1],
        format=form,
        published=dict(published or {}),
        licence=licence,
        source=source or f"{train.origin} and {test.origin}",
    )


def _list_classes(classes: tuple[str, ...]) -> str:
    some = ", ".join(map(repr, classes[:20]))
    return f", which has {some}{', ...' if len(classes) > 20 else ''}"


def load_pair(train_path: str | Path, test_path: str | Path, *, name: str = "own") -> SeriesTask:
    """Make a task from a training and a test file, each .ts, .ts.gz, .csv or .csv.gz.

    Raises:
        DataError: a file cannot be read (see `read_ts`, `read_csv`), or the two do not fit (see `build_task`).
    """
    return build_task(
        read_table(train_path), read_table(test_path), name=name, licence="the user's own data; terms not known"
    )
