"""Checkpoints of a run: what is kept after each round, and how Lightning writes and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from flowformer.training.callbacks import History
from flowformer.training.folder import RunFolder, read_plain, save_plain, save_weights


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and reads nothing but tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        save_plain(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU; Lightning moves what belongs elsewhere."""
        return read_plain(Path(path))


class Checkpoints(Checkpoint):
    """Keep the last round with everything needed to resume, and the weights of the best evaluations.

    Which round was the best is known from the records, which are part of the checkpoint: a folder that was moved, or a
    metrics file that was lost, changes nothing.

    Args:
        folder: Where to write.
        history: The records.
        splits: The evaluation sets whose best round is kept.
    """

    def __init__(self, folder: RunFolder, history: History, splits: Sequence[str]) -> None:
        super().__init__()
        self.folder, self.history, self.splits = folder, history, splits
        self.written = False

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write the checkpoints of the round."""
        for split in self.splits:
            if self.history.is_best(split):
                self._save(trainer, pl_module, f"best-{split}")
        trainer.save_checkpoint(self.folder.resume_state)  # by all processes of a run on several devices
        self._save(trainer, pl_module, "last")
        self.written = True

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write the weights of a run that was killed before it could, and had no round left to train."""
        if not self.written:
            self._save(trainer, pl_module, "last")

    def _save(self, trainer: lightning.Trainer, pl_module: Any, name: str) -> None:
        if trainer.is_global_zero:
            told = {name: value for name, value in self.history.records[-1].items() if name != "seconds"}
            save_weights(pl_module.model, self.folder.checkpoints / f"{name}.safetensors", told)
