"""Base classes of recipes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.data import DistributedSampler

from flowformer.common.fields import check_fields, option, plain_fields
from flowformer.tasks.protocols import Task
from flowformer.training.order import RoundSampler

Optimizer = Literal["radam", "adam", "adamw"]
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]  # weights stay float32
Schedule = Literal["constant", "inverse-sqrt", "cosine", "linear"]
Decayed = Literal["all", "linear", "weights"]
DataState = Literal["here", "absent", "unknown"]  # absent: it can be fetched; unknown: an option has to name its path


MOST_ROUNDS = 1_000_000  # of a run: each is recorded


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Base class of recipes: how an experiment is run. Every field is an option of the command line.

    Models are trained step by step (:class:`GradientRecipe`), or fitted at once by a library (:class:`FitRecipe`).

    Two protocols are reported for each run, the paper's and an honest one, which chooses nothing on test data: see
    :func:`flowformer.training.fit.protocols`.
    """

    unit: ClassVar[str]  # what the length of a run is counted in
    # Which round the paper tests, where the test set is not evaluated during training: the one that is best on the
    # validation set, or the last.
    paper_round: ClassVar[Literal["best", "last"]] = "best"

    name: str = ""  # of the experiment
    seed: int = option(
        0, "random seed of all random numbers: initialization, data order, dropout", group="optimisation", at_least=0,
        largest=2**32 - 1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every field, and convert paths and numbers.

        Raises:
            ValueError: for a value that a field does not take, or values that do not fit each other.
        """
        check_fields(self)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values: the ``recipe.json`` that :func:`flowformer.recipes.read_recipe` reads."""
        return plain_fields(self)

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others: what is wrong, by field.

        They are refused where a user gives them: see :func:`flowformer.recipes.registry.check_given`. A published value
        may stand beside any others.
        """
        return {}

    @property
    @abstractmethod
    def label(self) -> str:
        """Default name of the run's folder, which distinguishes it from other runs of the experiment."""

    @abstractmethod
    def build_task(self, form: Any = None) -> Task:
        """Read the data.

        Args:
            form: The format of a run, to prepare the data for its model: with its classes, statistics and vocabulary.
                ``None`` derives the format from the training set.

        Raises:
            DataError: for data that cannot be read, or does not fit the format.
        """

    @abstractmethod
    def read_format(self, values: dict[str, Any]) -> Any:
        """Read the format that :meth:`Format.to_json` wrote."""

    @abstractmethod
    def build_model(self, form: Any) -> nn.Module:
        """Build the model for a format of data."""

    @property
    def row(self) -> str:
        """The name of this model in the published table; "" if it is not in it."""
        return ""

    def published(self, task: Task) -> float | None:
        """Return the published value of the metric for this recipe and task; ``None`` if there is none."""
        return task.published.get(self.row)

    @property
    def published_note(self) -> str:
        """What a reader of the published value of :attr:`row` should know; "" for nothing."""
        return ""

    def published_table(self) -> tuple[str, Mapping[str, float]] | None:
        """Return the published values of this experiment: the name of the metric, and its value by method."""
        return None

    @property
    def data_state(self) -> DataState:
        """Whether the data is on this machine, if that is known without reading it."""
        return "here"


@dataclass(frozen=True, kw_only=True)
class GradientRecipe(Recipe):
    """Base class of recipes of models that Lightning trains.

    A run is a number of rounds; each ends in a record of metrics and a checkpoint to resume from. A
    round is an epoch (:class:`EpochRecipe`) or a number of steps (:class:`StepRecipe`).
    """

    batch_size: int = option(16, "batch size per device", group="optimisation", at_least=1, largest=1_000_000)
    accumulate: int | None = option(
        1, "batches per step (gradient accumulation); null for 1", group="optimisation", at_least=1, largest=1_000_000
    )
    optimizer: Optimizer = option("radam", "optimizer", group="optimisation")
    learning_rate: float = option(1e-3, "peak learning rate", group="optimisation", above=0, largest=100)
    schedule: Schedule = option("constant", "learning rate schedule after warm-up", group="optimisation")
    min_learning_rate: float = option(
        0.0, "final learning rate of the schedules cosine and linear", group="optimisation", at_least=0, largest=100
    )
    warmup_steps: int = option(0, "warm-up steps", group="optimisation", at_least=0, largest=1_000_000_000)
    warmup_learning_rate: float = option(
        0.0, "learning rate at the start of warm-up", group="optimisation", at_least=0, largest=100
    )
    beta1: float = option(0.9, "decay rate of the optimizer's first moment", group="optimisation", at_least=0, below=1)
    beta2: float = option(
        0.999, "decay rate of the optimizer's second moment", group="optimisation", at_least=0, below=1
    )
    optimizer_eps: float = option(
        1e-8,
        "number that the optimizer adds to the root of the second moment",
        group="optimisation",
        above=0,
        largest=1,
    )
    weight_decay: float = option(0.0, "weight decay", group="optimisation", at_least=0, largest=100)
    decayed: Decayed = option(
        "all",
        "parameters with weight decay: all; weights of linear layers (linear); all but biases, norms, "
        "positions and class token (weights)",
        group="optimisation",
    )
    clip_grad_norm: float | None = option(
        4.0, "maximum gradient norm; null for no clipping", group="optimisation", above=0, largest=1_000_000_000
    )
    precision: Precision = option(
        "32-true", "training precision; auto: 16-mixed on a GPU, else 32-true", group="machine"
    )
    accelerator: str = option(
        "auto", "auto, cpu, gpu or another accelerator of Lightning", group="machine", neutral=True
    )
    compile: bool = option(
        False,
        "compile the model with torch.compile: minutes at the start, and faster steps on a GPU",
        group="machine",
        neutral=True,
    )
    devices: int = option(1, "number of devices", group="machine", at_least=1, largest=100_000)
    workers: int = option(
        0,
        "worker processes for data loading; 0 for the main process",
        group="machine",
        neutral=True,
        at_least=0,
        largest=1_000,
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        for name in ("min_learning_rate", "warmup_learning_rate"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(
                    f"{name} must be at most learning_rate {self.learning_rate}, got {getattr(self, name)}"
                )
        if self.schedule == "inverse-sqrt" and not self.warmup_steps:
            raise ValueError(f"warmup_steps must be positive with the schedule inverse-sqrt, got {self.warmup_steps}")

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        found = super().misfits()
        if self.schedule not in ("cosine", "linear"):
            found["min_learning_rate"] = f"min_learning_rate has no effect with the schedule {self.schedule}"
        if not self.count_warmup_steps(1_000_000):
            found["warmup_learning_rate"] = "warmup_learning_rate has no effect without warm-up steps"
        if not self.weight_decay:
            found["decayed"] = "decayed has no effect without weight_decay"
        return found

    @property
    def used_precision(self) -> str:
        """The precision on this machine, with ``"auto"`` resolved."""
        if self.precision != "auto":
            return self.precision
        on_gpu = self.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
        return "16-mixed" if on_gpu else "32-true"

    @property
    def batches_of_a_step(self) -> int:
        """Batches per device and step (gradient accumulation)."""
        return self.accumulate or 1

    def count_warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of so many optimizer steps."""
        return self.warmup_steps

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
        """Return the length of the run up to the end of a round, in its ``unit``."""

    @abstractmethod
    def sampler(self, data: Any, world: int, rank: int) -> Any:
        """Return the sampler of device ``rank`` of ``world``, which ``set_epoch(round)`` reorders."""

    def training_task(self, task: Task) -> Task:
        """Return what Lightning trains the model on: the task itself, unless training has an objective of its own."""
        return task


@dataclass(frozen=True, kw_only=True)
class EpochRecipe(GradientRecipe):
    """Base class of recipes whose length is given in epochs: a round is an epoch."""

    unit: ClassVar[str] = "epoch"

    epochs: int = option(100, "number of epochs", group="optimisation", at_least=1, largest=MOST_ROUNDS)
    eval_every: int = option(
        2,
        "epochs between evaluations, in addition to those before training and after the first epoch",
        group="optimisation",
        at_least=1,
        largest=1_000_000,
    )
    validation_fraction: float | None = option(
        None,
        "fraction of the training set held out to select the best epoch; null for none",
        group="data",
        above=0,
        below=1,
    )
    warmup_epochs: int = option(
        0, "warm-up epochs, in addition to warmup_steps", group="optimisation", at_least=0, largest=1_000_000
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs must be at most epochs {self.epochs}, got {self.warmup_epochs}")

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        found = super().misfits()
        if self.eval_every > self.epochs:
            found["eval_every"] = f"eval_every must be at most epochs {self.epochs}, got {self.eval_every}"
        return found

    def count_warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of so many optimizer steps."""
        return self.warmup_steps + round(steps * self.warmup_epochs / self.epochs)

    @property
    def rounds(self) -> int:
        """Rounds of training."""
        return self.epochs

    @property
    def evaluated_rounds(self) -> list[int]:
        """Before training (0), after the first epoch, at regular intervals, at the end."""
        regular = range(self.eval_every, self.epochs + 1, self.eval_every)
        return sorted({0, 1, *regular, self.epochs})

    def count(self, round_: int) -> int:
        """Return the number of epochs up to the end of a round."""
        return round_

    def sampler(self, data: Any, world: int, rank: int) -> DistributedSampler[Any]:
        """Return a sampler with a new order each epoch."""
        return DistributedSampler(data, world, rank, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class StepRecipe(GradientRecipe):
    """Base class of recipes whose length is given in optimizer steps: a round lies between two evaluations."""

    unit: ClassVar[str] = "step"

    steps: int = option(10_000, "number of optimizer steps", group="optimisation", at_least=1, largest=1_000_000_000)
    eval_every: int = option(
        1_000,
        "steps between evaluations and checkpoints; must divide steps",
        group="optimisation",
        at_least=1,
        largest=1_000_000_000,
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.steps > self.eval_every and self.steps % self.eval_every:
            raise ValueError(f"eval_every must divide steps, got eval_every {self.eval_every} and steps {self.steps}")
        if self.rounds > MOST_ROUNDS:
            least = -(-self.steps // MOST_ROUNDS)
            raise ValueError(f"eval_every must be at least {least} for {self.steps} steps, got {self.eval_every}")

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        found = super().misfits()
        for name in ("eval_every", "warmup_steps"):
            if getattr(self, name) > self.steps:
                found[name] = f"{name} must be at most steps {self.steps}, got {getattr(self, name)}"
        return found

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
        """All rounds, and before training."""
        return list(range(self.rounds + 1))

    def count(self, round_: int) -> int:
        """Return the number of steps up to the end of a round."""
        return round_ * self.steps_of_a_round

    def sampler(self, data: Any, world: int, rank: int) -> RoundSampler:
        """Return a sampler over repeated permutations of the training set, cut to the steps of a round."""
        length = self.steps_of_a_round * self.batches_of_a_step * self.batch_size
        return RoundSampler(len(data), length, world=world, rank=rank, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class FitRecipe(Recipe):
    """Base class of recipes of models that a library fits at once: a run has one fit and one evaluation."""

    unit: ClassVar[str] = "fit"
