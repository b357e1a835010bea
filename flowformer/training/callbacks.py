"""What happens around training: the metrics file and the progress bar."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowformer.training.files import RunError, write_whole


class History(Callback):
    """Keeps one record of metrics per epoch, and writes them as JSON lines.

    Args:
        path: The file; ``None`` to keep the records in memory only.
        metric: The metric to follow.

    Attributes:
        records: One dictionary per epoch: ``epoch`` (0 is before training), ``seconds``, and the metrics.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._start = 0.0

    def load(self) -> None:
        """Read the records of a run that is about to go on."""
        if self.path is not None and self.path.exists():
            self.records = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget epochs that the checkpoint does not know of: they will be run again."""
        self.records = [record for record in self.records if record["epoch"] <= trainer.current_epoch]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Record the epoch. Evaluations older than it are left out: they stand in their own records."""
        evaluated = trainer.current_epoch + 1 in pl_module.recipe.evaluation_epochs()
        values = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if evaluated or name.startswith("train/")
        }
        if not all(math.isfinite(value) for value in values.values()):
            raise RunError(f"training diverged in epoch {trainer.current_epoch + 1}: {values}")
        self.add(trainer, {"epoch": trainer.current_epoch + 1, "seconds": time.perf_counter() - self._start, **values})

    def add(self, trainer: lightning.Trainer, record: dict[str, Any]) -> None:
        """Append a record and write the file."""
        self.records.append(record)
        if self.path is not None and trainer.is_global_zero:
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in self.records))


class RunProgress(Callback):
    """A bar over the whole run with loss, metric and time left; one line an epoch where there is no terminal.

    Args:
        console: Where to draw.
        metric: The metric to show.
    """

    def __init__(self, console: Console, metric: str) -> None:
        self.console, self.metric = console, metric
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
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
        self._first = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the bar, advanced by what an earlier part of the run has done."""
        batches = int(trainer.num_training_batches)
        self._first, self._start = trainer.current_epoch, time.perf_counter()
        self.progress.start()
        self._bar = self.progress.add_task(
            "", total=batches * (trainer.max_epochs or 0), completed=batches * self._first, epoch="", values=""
        )

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the epoch."""
        self.progress.update(self._bar, epoch=f"{trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance; now and then, for it makes a GPU wait, show the batch's loss before the last epoch's figures."""
        self.progress.update(self._bar, advance=1)
        if self.console.is_terminal and time.perf_counter() - self._shown > 0.5:
            self._shown = time.perf_counter()
            values = f"batch loss {float(outputs['loss']):.3f}  {self._values(trainer)}"
            self.progress.update(self._bar, values=values)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the epoch's figures; without a terminal print them, every few seconds at most."""
        self.progress.update(self._bar, values=self._values(trainer))
        now, done = time.perf_counter(), trainer.current_epoch + 1
        if self.console.is_terminal or (now - self._shown < 5 and done < (trainer.max_epochs or 0)):
            return
        self._shown = now
        left = (now - self._start) / (done - self._first) * ((trainer.max_epochs or 0) - done)
        self.console.print(f"epoch {done}/{trainer.max_epochs}  {self._values(trainer)}  {left:.0f} s left")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the bar away."""
        self.progress.stop()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Put the bar away."""
        self.progress.stop()

    def _values(self, trainer: lightning.Trainer) -> str:
        names = {
            "loss": "train/loss",
            self.metric: f"train/{self.metric}",
            f"test {self.metric}": f"test/{self.metric}",
        }
        metrics = trainer.callback_metrics
        return "  ".join(f"{short} {float(metrics[name]):.3f}" for short, name in names.items() if name in metrics)
