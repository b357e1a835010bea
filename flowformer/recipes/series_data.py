"""Where the series of a recipe come from: a subset of the UEA archive, or your own files."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowformer.common.fields import option
from flowformer.tasks.series import uea
from flowformer.tasks.series.format import SeriesFormat
from flowformer.tasks.series.task import SeriesTask, load_pair
from flowformer.training.recipe import DataState, Recipe


@dataclass(frozen=True, kw_only=True)
class SeriesData(Recipe):
    """Base class of recipes on series."""

    @abstractmethod
    def read_series(self) -> SeriesTask:
        """Read training and test series.

        Raises:
            DataError: for series that cannot be read.
            ValueError: if a file is not named.
        """

    def prepare(self, task: SeriesTask) -> SeriesTask:
        """Return the task as this recipe's model is to see it."""
        return task

    def build_task(self, form: SeriesFormat | None = None) -> SeriesTask:
        """Read the series, and prepare them."""
        task = self.prepare(self.read_series())
        return task if form is None else task.using(form)

    def read_format(self, values: dict[str, Any]) -> SeriesFormat:
        """Read the format saved by a run."""
        return SeriesFormat.from_json(values)


@dataclass(frozen=True, kw_only=True)
class UEAData(SeriesData):
    """One of the published UEA subsets, which the second part of the recipe's name is: ``uea/Heartbeat``."""

    data_dir: Path | None = option(
        None,
        "folder with <Subset>/<Subset>_TRAIN.ts and _TEST.ts; null for aeon's files or the cache",
        group="data",
        neutral=True,
    )

    @property
    def subset(self) -> str:
        """Name of the subset in the archive."""
        return self.name.split("/")[1]

    def read_series(self) -> SeriesTask:
        """Read the subset."""
        return uea.load(self.subset, self.data_dir)

    @property
    def data_state(self) -> DataState:
        """Return whether both files of the subset are on this machine."""
        return "here" if uea.find(self.subset, self.data_dir) else "absent"

    def published_table(self) -> tuple[str, dict[str, float]]:
        """The published accuracies on the subset."""
        return "accuracy, percent (Wu et al., ICML 2022)", uea.get_published(self.subset)


@dataclass(frozen=True, kw_only=True)
class OwnSeriesData(SeriesData):
    """Your own series, in two files."""

    train_file: Path | None = option(
        None, "training series: .ts, or .csv in long form (columns series, time, label, values)", group="data"
    )
    test_file: Path | None = option(None, "test series, in the same form", group="data")

    def read_series(self) -> SeriesTask:
        """Read the two files."""
        if self.train_file is None or self.test_file is None:
            flag = "--test-file" if self.train_file else "--train-file"
            raise ValueError(f"{self.name} requires {flag} FILE: series as .ts, or as .csv in long form")
        return load_pair(self.train_file, self.test_file)

    @property
    def data_state(self) -> DataState:
        """Unknown: the user specifies the files."""
        return "unknown"
