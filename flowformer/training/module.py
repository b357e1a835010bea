"""Lightning module that trains a model on a task with the settings of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowformer.common.interrupts import check_signals
from flowformer.training.draws import Draws
from flowformer.training.recipe import GradientRecipe, Task
from flowformer.training.schedules import learning_rate_factor

_COUNT = "#"  # ends the names under which counts are logged


class TaskModule(lightning.LightningModule):
    """Lightning module that trains ``model`` on ``task`` with the settings of ``recipe``.

    Randomness is a function of the seed and the round alone, so that a run resumed at any round continues as if it had
    never stopped.

    Args:
        recipe: How to train.
        task: Data, loss and metric.
        model: What to train.
        evaluated: The sets to evaluate on, by name; those that the task evaluates during training if absent.
        draws: Where random numbers come from; PyTorch's global generators if absent.
    """

    def __init__(
        self,
        recipe: GradientRecipe,
        task: Task,
        model: nn.Module,
        evaluated: Mapping[str, Any] | None = None,
        draws: Draws | None = None,
    ) -> None:
        super().__init__()
        self.draws = draws
        self.recipe, self.task, self.model = recipe, task, model
        self.evaluated = task.evaluated if evaluated is None else evaluated

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its learning rate schedule."""
        classes = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        recipe = self.recipe
        betas = (recipe.beta1, recipe.beta2)
        options: dict[str, Any] = {"lr": recipe.learning_rate, "betas": betas, "eps": recipe.optimizer_eps}
        if recipe.optimizer != "radam" and self.device.type in ("cpu", "cuda") and recipe.used_precision == "32-true":
            # One pass, and no copy of a large embedding beside it. Lightning does not clip with it in mixed precision.
            options["fused"] = True
        optimizer = classes[recipe.optimizer](self._parameter_groups(), **options)
        steps = self._count_steps()
        warmup_steps = recipe.count_warmup_steps(steps)
        if recipe.schedule == "constant" and not warmup_steps:
            return optimizer
        first, last = (rate / recipe.learning_rate for rate in (recipe.warmup_learning_rate, recipe.min_learning_rate))
        factor = learning_rate_factor(recipe.schedule, warmup_steps, steps, first=first, last=last)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decay, parameters = self.recipe.weight_decay, list(self.parameters())
        if self.recipe.decayed == "all" or not decay:
            return [{"params": parameters, "weight_decay": decay}]
        decayed = self._decayed()
        return [
            {"params": [one for one in parameters if id(one) in decayed], "weight_decay": decay},
            {"params": [one for one in parameters if id(one) not in decayed], "weight_decay": 0.0},
        ]

    def _decayed(self) -> set[int]:
        """Which parameters weight decay acts on, by identity."""
        if self.recipe.decayed == "linear":
            return {id(module.weight) for module in self.modules() if isinstance(module, nn.Linear)}
        spared = getattr(self.model, "no_weight_decay", set)()
        return {id(one) for name, one in self.model.named_parameters() if one.ndim > 1 and name not in spared}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training set, in a new order each round."""
        sampler = self._sampler()
        # Lightning does so too, but in a resumed run only after workers have started on the sampler's order.
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        sampler.set_epoch(progress.processed)
        return self._loader(self.task.train, sampler)

    def _sampler(self) -> Any:
        return self.recipe.sampler(self.task.train, self.trainer.world_size, self.trainer.global_rank)

    def _count_steps(self) -> int:
        """Steps of the run. Lightning's estimate would start the loader before it knows the round to resume at."""
        batches = -(-len(self._sampler()) // self.recipe.batch_size)
        return self.recipe.rounds * -(-batches // self.recipe.batches_of_a_step)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each evaluation set, in order."""
        return [self._loader(data) for data in self.evaluated.values()]

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
            # From pinned memory a batch moves to the GPU while Python goes on.
            pin_memory=self.device.type == "cuda",
        )

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Any]:
        """Add the size of a batch while it is on the CPU: counting on a GPU would wait for it."""
        return {**batch, "size": self.task.size(batch)}

    def on_train_epoch_start(self) -> None:
        """Seed random numbers from seed, round and device, and set whether this round ends with an evaluation."""
        seed = self.recipe.seed * 1_000_003 + self.current_epoch + 7_368_787 * self.global_rank
        torch.manual_seed(seed) if self.draws is None else self.draws.seed(seed)
        due = self.current_epoch + 1 in self.recipe.evaluated_rounds
        self.trainer.check_val_every_n_epoch = 1 if due else self.current_epoch + 2  # which does not divide epoch + 1

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step("train", batch)["loss"]

    def validation_step(self, batch: dict[str, Any], index: int, dataloader_idx: int = 0) -> None:
        """Log loss and metric of a batch of an evaluation set."""
        self._step(list(self.evaluated)[dataloader_idx], batch)

    def _step(self, split: str, batch: dict[str, Any]) -> dict[str, Tensor]:
        check_signals()
        values = self.task.step(self.model, batch)
        common: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "add_dataloader_idx": False}
        counted = {name: value.float() for name, value in values.items() if not value.is_floating_point()}
        means = {f"{split}/{name}": value for name, value in values.items() if name not in counted}
        self.log_dict(means, batch_size=batch["size"], **common)
        if counted:  # as sums, which are exact in float32 where means are not
            sums = {f"{split}/{name}{_COUNT}": value for name, value in counted.items()}
            sums[f"{split}{_COUNT}"] = torch.tensor(float(batch["size"]))
            self.log_dict(sums, batch_size=batch["size"], reduce_fx="sum", **common)
        return values


def total(value: Tensor, size: int) -> float:
    """Return the sum over a batch of what :meth:`flowformer.tasks.protocols.Task.step` returns.

    Args:
        value: A mean, or an integer, which is a sum.
        size: Examples of the batch.
    """
    return float(value) * size if value.is_floating_point() else int(value)


def read_metrics(trainer: lightning.Trainer) -> dict[str, float]:
    """Return what :class:`TaskModule` has logged: means, those that are counted as the exact quotient."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    counts = {name.removesuffix(_COUNT): values.pop(name) for name in list(values) if name.endswith(_COUNT)}
    shares = {name: count / counts[name.split("/")[0]] for name, count in counts.items() if "/" in name}
    return {**values, **shares}
