"""Lightning callbacks: metrics file and progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowformer.common.errors import RunError
from flowformer.common.files import write_whole
from flowformer.tasks.metric import Metric
from flowformer.training.module import read_metrics
from flowformer.training.recipe import GradientRecipe


class History(Callback):
    """Record the metrics of each round, and write them as JSON lines.

    Args:
        recipe: The recipe, which knows how rounds are counted.
        metric: The metric of the task.
        path: The file; ``None`` to keep the records in memory only.

    Attributes:
        started: Whether training has started, after everything of a checkpoint was restored.
        records: One dictionary per round: ``epoch`` or ``step``, whichever the recipe counts in (0 is before training),
            ``seconds``, and the metrics.
    """

    def __init__(self, recipe: GradientRecipe, metric: Metric, path: Path | None = None) -> None:
        self.recipe, self.metric, self.path = recipe, metric, path
        self.records: list[dict[str, Any]] = []
        self.started = False
        self._start = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the records, which are part of every checkpoint."""
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the records of the checkpoint that is resumed: rounds after it are run again."""
        self.records = state_dict["records"]

    def is_best(self, split: str) -> bool:
        """Return whether the last round is the best one on a set. The model before training has no checkpoint."""
        evaluated = [record for record in self.records if record[self.recipe.unit] and self._key(split) in record]
        return self._key(split) in self.records[-1] and self.metric.best(evaluated, split) is self.records[-1]

    def _key(self, split: str) -> str:
        return f"{split}/{self.metric.key}"

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check that a resumed run has its records.

        Raises:
            RunError: for a checkpoint of an earlier version.
        """
        self.started = True
        if trainer.current_epoch and not self.records:
            raise RunError(
                "the checkpoint was written by an earlier version of flowformer and cannot be resumed; "
                "`flowformer evaluate` and the other commands read it"
            )

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Record the round. Metrics of earlier evaluations are left out, since they have their own records."""
        ended = trainer.current_epoch + 1
        evaluated = ended in self.recipe.evaluated_rounds
        values = {
            name: value for name, value in read_metrics(trainer).items() if evaluated or name.startswith("train/")
        }
        if not all(math.isfinite(value) for value in values.values()):
            raise RunError(f"training diverged in {self.recipe.unit} {self.recipe.count(ended)}: {values}")
        self.add(trainer, ended, values, seconds=time.perf_counter() - self._start)

    def add(
        self, trainer: lightning.Trainer, round_: int, values: Mapping[str, float], *, seconds: float = 0.0
    ) -> None:
        """Append the record of a round and write the file."""
        self.records.append({self.recipe.unit: self.recipe.count(round_), "seconds": seconds, **values})
        self.write(trainer)

    def write(self, trainer: lightning.Trainer) -> None:
        """Write the file, all records of it."""
        if self.path is not None and trainer.is_global_zero:
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in self.records))


class RunProgress(Callback):
    """A progress bar with loss, metric and remaining time; without a terminal, one line per round.

    Args:
        console: Where to draw.
        recipe: The recipe, which knows how rounds are counted.
        metric: The metric to show.
    """

    def __init__(self, console: Console, recipe: GradientRecipe, metric: Metric) -> None:
        self.console, self.recipe, self.metric = console, recipe, metric
        self.progress = Progress(
            TextColumn("{task.fields[reached]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar: Any = None
        self._start = self._shown = 0.0
        self._first = 0  # round that the clock counts from
        self._warm = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the bar, starting from the progress of the resumed run."""
        batches = int(trainer.num_training_batches)
        self._first, self._start = trainer.current_epoch, time.perf_counter()
        if self.recipe.compile:
            self.console.print("The first steps compile the model")
        self.progress.start()
        self._bar = self.progress.add_task(
            "", total=batches * (trainer.max_epochs or 0), completed=batches * self._first, reached="", values=""
        )

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the round."""
        self.progress.update(self._bar, reached=self._reached(trainer.current_epoch + 1))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar; occasionally, since it synchronises a GPU, show the batch's loss."""
        self.progress.update(self._bar, advance=1)
        if self.console.is_terminal and time.perf_counter() - self._shown > 0.5:
            self._shown = time.perf_counter()
            values = f"batch loss {float(outputs['loss']):.3f}  {self._values(trainer)}"
            self.progress.update(self._bar, values=values)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the metrics of the round; without a terminal, print them every few seconds at most."""
        self.progress.update(self._bar, values=self._values(trainer))
        now, done = time.perf_counter(), trainer.current_epoch + 1
        left = (now - self._start) / (done - self._first) * ((trainer.max_epochs or 0) - done)
        if self.recipe.compile and not self._warm:
            self._start, self._first, self._warm = now, done, True  # later rounds do not compile
        if self.console.is_terminal or (now - self._shown < 5 and done < (trainer.max_epochs or 0)):
            return
        self._shown = now
        self.console.print(f"{self._reached(done)}  {self._values(trainer)}  {left:.0f} s left")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remove the bar."""
        self.progress.stop()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the bar."""
        self.progress.stop()

    def _reached(self, round_: int) -> str:
        return f"{self.recipe.unit} {self.recipe.count(round_)}/{self.recipe.count(self.recipe.rounds)}"

    def _values(self, trainer: lightning.Trainer) -> str:
        metric, metrics = self.metric, read_metrics(trainer)
        values = {"loss": f"{metrics['train/loss']:.3f}"} if "train/loss" in metrics else {}
        for split in ("train", "validation", "test"):
            if f"{split}/{metric.key}" in metrics:
                shown = metric.shown(metrics[f"{split}/{metric.key}"])
                values[metric.name if split == "train" else f"{split} {metric.name}"] = f"{shown:.{metric.digits}f}"
        return "  ".join(f"{name} {value}" for name, value in values.items())
