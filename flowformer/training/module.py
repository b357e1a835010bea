"""The Lightning module: it joins a model, a task and a recipe."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from flowformer.training.recipe import Recipe, Task


class TaskModule(lightning.LightningModule):
    """Trains ``model`` on ``task`` as ``recipe`` says.

    Randomness is a function of the seed and the epoch alone, so that a run resumed at any epoch goes on as if it had
    never stopped.

    Args:
        recipe: How to train.
        task: Data, loss and metric.
        model: What to train.
        validation: Set to choose the epoch by, or ``None``.
    """

    def __init__(self, recipe: Recipe, task: Task, model: nn.Module, validation: Any = None) -> None:
        super().__init__()
        self.recipe, self.task, self.model, self.held_out = recipe, task, model, validation

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        classes = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        options = {"lr": self.recipe.learning_rate, "weight_decay": self.recipe.weight_decay}
        return classes[self.recipe.optimizer](self.parameters(), **options)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training set, shuffled anew each epoch."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return self._loader(self.task.train, DistributedSampler(self.task.train, world, rank, seed=self.recipe.seed))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for each of the sets evaluated during training, in their order."""
        return [self._loader(data) for data in self.evaluated.values()]

    @property
    def evaluated(self) -> dict[str, Any]:
        """The sets evaluated during training, by name: the test set and the held-out part, those that are not empty."""
        sets = {"test": self.task.test, "validation": self.held_out}
        return {name: data for name, data in sets.items() if data is not None and len(data) > 0}

    def _loader(self, data: Any, sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(
            data,
            self.recipe.batch_size,
            sampler=sampler,
            collate_fn=self.task.format.collate,
            num_workers=self.recipe.workers,
            # Of its own: a loader draws a number whenever it starts, and would shift the dropout of what follows.
            generator=torch.Generator().manual_seed(self.recipe.seed),
            persistent_workers=self.recipe.workers > 0,
        )

    def on_train_epoch_start(self) -> None:
        """Restart the random numbers from the seed and the epoch, and say whether this epoch ends in an evaluation."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.current_epoch)
        due = self.current_epoch + 1 in self.recipe.evaluation_epochs()
        self.trainer.check_val_every_n_epoch = 1 if due else self.current_epoch + 2  # which does not divide epoch + 1

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        return self._step("train", batch)["loss"]

    def validation_step(self, batch: dict[str, Tensor], index: int, dataloader_idx: int = 0) -> None:
        """Loss and metric of a batch of a set evaluated during training."""
        self._step(list(self.evaluated)[dataloader_idx], batch)

    def _step(self, split: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        values = self.task.step(self.model, batch)
        self.log_dict(
            {f"{split}/{name}": value for name, value in values.items()},
            batch_size=self.task.size(batch),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            add_dataloader_idx=False,
        )
        return values
