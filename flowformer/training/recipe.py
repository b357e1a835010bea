"""What a recipe and a task must offer to be trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DistributedSampler

from flowformer.tasks.protocols import Task
from flowformer.training.order import RoundSampler
from flowformer.training.schedules import SCHEDULES


def option(default: Any, help: str, *, neutral: bool = False) -> Any:
    """Declare a field of a recipe.

    Args:
        default: Its default.
        help: What ``--help`` says of it.
        neutral: Whether it leaves the result as it is, and may change when a run is resumed.
    """
    return field(default=default, metadata={"help": help, "neutral": neutral})


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How an experiment is run. Every field is an option of the command line.

    A run is a number of rounds; each ends in a record of metrics and a checkpoint that training can go on from. A
    round is an epoch (:class:`EpochRecipe`) or a number of steps (:class:`StepRecipe`).

    Two protocols are reported for each run, the paper's and an honest one, which chooses nothing on test data: see
    :func:`flowformer.training.fit.protocols`.
    """

    unit: ClassVar[str]  # what the length of a run is counted in

    name: str = option("", "name of the experiment")
    seed: int = option(0, "seed of initial weights, order of data and dropout")
    batch_size: int = option(16, "examples in a batch, on each device")
    accumulate: int = option(1, "batches whose gradients make one step")
    optimizer: str = option("radam", "radam, adam or adamw")
    learning_rate: float = option(1e-3, "largest learning rate")
    schedule: str = option("constant", "learning rate after warm-up: constant, inverse-sqrt, cosine or linear")
    min_learning_rate: float = option(0.0, "learning rate at the end of the schedules cosine and linear")
    warmup_steps: int = option(0, "steps in which the learning rate rises")
    warmup_learning_rate: float = option(0.0, "learning rate that it rises from")
    beta1: float = option(0.9, "decay of the optimizer's mean of gradients")
    beta2: float = option(0.999, "decay of the optimizer's mean of squared gradients")
    weight_decay: float = option(0.0, "weight decay of the optimizer")
    decayed: str = option(
        "all",
        "what weight decay acts on: all; the weights of linear layers (linear); all but biases, norms, positions, "
        "class token (weights)",
    )
    clip_grad_norm: float = option(4.0, "gradients are scaled down to this norm; 0 for no clipping")
    precision: str = option("32-true", "32-true, bf16-mixed or 16-mixed; auto: 16-mixed on a GPU, else 32-true")
    accelerator: str = option("auto", "auto, cpu, gpu or another that Lightning knows")
    devices: int = option(1, "number of devices")
    workers: int = option(0, "processes that prepare batches; 0 for none besides the main one", neutral=True)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("batch_size", "accumulate", "devices"):
            self._want_positive(name)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("min_learning_rate", "warmup_learning_rate"):
            if not 0 <= getattr(self, name) <= self.learning_rate:
                raise ValueError(
                    f"{name} must be from 0 to learning_rate {self.learning_rate}, got {getattr(self, name)}"
                )
        if self.warmup_steps < 0 or (self.schedule == "inverse-sqrt" and not self.warmup_steps):
            least = "positive for the schedule inverse-sqrt" if self.schedule == "inverse-sqrt" else "at least 0"
            raise ValueError(f"warmup_steps must be {least}, got {self.warmup_steps}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")

    def _want_positive(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def used_precision(self) -> str:
        """The precision on this machine: what ``"auto"`` stands for, or the one that was asked for."""
        if self.precision != "auto":
            return self.precision
        on_gpu = self.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
        return "16-mixed" if on_gpu else "32-true"

    @property
    def batches_of_a_step(self) -> int:
        """Batches on each device whose gradients make one step."""
        return self.accumulate

    def count_warmup_steps(self, steps: int) -> int:
        """Steps in which the learning rate rises, in a run of so many steps of the optimizer."""
        return self.warmup_steps

    @property
    @abstractmethod
    def label(self) -> str:
        """What tells this run from others of the same experiment: the default name of its folder."""

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Rounds of training."""

    @property
    @abstractmethod
    def evaluated_rounds(self) -> list[int]:
        """Rounds after which the model is evaluated; 0 is before training."""

    @abstractmethod
    def count(self, round_: int) -> int:
        """Length of the run up to the end of a round, in its ``unit``."""

    @abstractmethod
    def sampler(self, data: Any, world: int, rank: int) -> Any:
        """The order in which device ``rank`` of ``world`` sees the training set, given anew by ``set_epoch(round)``."""

    @abstractmethod
    def build_task(self) -> Task:
        """Read the data."""

    @abstractmethod
    def read_format(self, values: dict[str, Any]) -> Any:
        """The format that :meth:`Format.to_json` wrote."""

    @abstractmethod
    def build_model(self, form: Any) -> nn.Module:
        """Build the model for a format of data."""

    def published(self, task: Task) -> float | None:
        """The published value of the metric for this recipe; ``None`` where there is none."""
        return None

    def published_table(self) -> tuple[str, Mapping[str, float]] | None:
        """What was published of this experiment, to be shown: of which figure, and its value by method."""
        return None


@dataclass(frozen=True, kw_only=True)
class EpochRecipe(Recipe):
    """A recipe that counts passes over its training set: a round is an epoch."""

    unit: ClassVar[str] = "epoch"

    epochs: int = option(100, "passes over the training set")
    eval_every: int = option(2, "epochs between evaluations, besides those before training and after the first epoch")
    validation_fraction: float = option(0.0, "part of the training set held out to choose the epoch by; 0 for none")
    warmup_epochs: int = option(0, "epochs in which the learning rate rises, before warmup_steps are counted")

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        for name in ("epochs", "eval_every"):
            self._want_positive(name)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {self.validation_fraction}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs must be from 0 to epochs {self.epochs}, got {self.warmup_epochs}")

    def count_warmup_steps(self, steps: int) -> int:
        """Steps in which the learning rate rises, in a run of so many steps of the optimizer."""
        return self.warmup_steps + round(steps * self.warmup_epochs / self.epochs)

    @property
    def rounds(self) -> int:
        """Rounds of training."""
        return self.epochs

    @property
    def evaluated_rounds(self) -> list[int]:
        """Before training (0), after the first epoch, regularly, at the end."""
        regular = range(self.eval_every, self.epochs + 1, self.eval_every)
        return sorted({0, 1, *regular, self.epochs})

    def count(self, round_: int) -> int:
        """Epochs up to the end of a round."""
        return round_

    def sampler(self, data: Any, world: int, rank: int) -> DistributedSampler[Any]:
        """The training set in a new order each epoch."""
        return DistributedSampler(data, world, rank, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class StepRecipe(Recipe):
    """A recipe that counts steps of its optimizer: a round is the steps between two evaluations."""

    unit: ClassVar[str] = "step"

    steps: int = option(10_000, "steps of the optimizer")
    eval_every: int = option(1_000, "steps between evaluations, each of which ends in a checkpoint; divides steps")

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        for name in ("steps", "eval_every"):
            self._want_positive(name)
        if self.steps > self.eval_every and self.steps % self.eval_every:
            raise ValueError(f"eval_every must divide steps, got eval_every {self.eval_every} and steps {self.steps}")

    @property
    def steps_of_a_round(self) -> int:
        """Steps between two evaluations."""
        return min(self.eval_every, self.steps)

    @property
    def rounds(self) -> int:
        """Rounds of training."""
        return self.steps // self.steps_of_a_round

    @property
    def evaluated_rounds(self) -> list[int]:
        """All, and before training."""
        return list(range(self.rounds + 1))

    def count(self, round_: int) -> int:
        """Steps up to the end of a round."""
        return round_ * self.steps_of_a_round

    def sampler(self, data: Any, world: int, rank: int) -> RoundSampler:
        """The training set in one order after another, as much of it as the steps of a round take."""
        return RoundSampler(
            len(data), self.steps_of_a_round * self.accumulate * self.batch_size, world=world, rank=rank, seed=self.seed
        )


OPTIMIZERS = ("radam", "adam", "adamw")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")  # weights stay float32
_CHOICES = {
    "optimizer": OPTIMIZERS,
    "precision": PRECISIONS,
    "schedule": tuple(SCHEDULES),
    "decayed": ("all", "linear", "weights"),
}
