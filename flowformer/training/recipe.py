"""What a recipe and a task must offer to be trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


def option(default: Any, help: str, *, neutral: bool = False) -> Any:
    """Declare a field of a recipe.

    Args:
        default: Its default.
        help: What ``--help`` says of it.
        neutral: Whether it leaves the result as it is, and may change when a run is resumed.
    """
    return field(default=default, metadata={"help": help, "neutral": neutral})


class Task(Protocol):
    """Data, loss and metric of a benchmark."""

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        ...

    @property
    def metric(self) -> str:
        """Name of the figure of merit, a share, the higher the better."""
        ...

    @property
    def published(self) -> Mapping[str, float]:
        """Published values of the metric by attention, in percent."""
        ...

    @property
    def source(self) -> str:
        """Where the data came from."""
        ...

    @property
    def licence(self) -> str:
        """What is known of the terms of the data."""
        ...

    @property
    def format(self) -> Format:
        """How data is prepared for a model."""
        ...

    @property
    def train(self) -> Any:
        """The training set, a map-style dataset."""
        ...

    @property
    def test(self) -> Any:
        """The test set."""
        ...

    def split_validation(self, fraction: float, seed: int) -> tuple[Task, Any]:
        """The task with a part of its training set taken out, and that part."""
        ...

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch; means over it of ``"loss"`` and of the metric."""
        ...

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """How many examples a batch holds."""
        ...


class Format(Protocol):
    """How data is prepared for a model: all that is needed to use a trained one on new data."""

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Make a batch."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The format as plain values."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How an experiment is run. Every field is an option of the command line.

    Two protocols are reported for each run. The paper's is the best value on the test set over all evaluations. The
    honest one chooses nothing on test data: it takes the last epoch, or, with ``validation_fraction``, the epoch that
    is best on a part of the training set held out for that.
    """

    name: str = option("", "name of the experiment")
    seed: int = option(0, "seed of initial weights, order of data and dropout")
    epochs: int = option(100, "passes over the training set")
    batch_size: int = option(16, "examples in a batch")
    optimizer: str = option("radam", "radam, adam or adamw")
    learning_rate: float = option(1e-3, "constant learning rate")
    weight_decay: float = option(0.0, "weight decay of the optimizer")
    clip_grad_norm: float = option(4.0, "gradients are scaled down to this norm; 0 for no clipping")
    eval_every: int = option(2, "epochs between evaluations, besides those before training and after the first epoch")
    validation_fraction: float = option(0.0, "part of the training set held out to choose the epoch by; 0 for none")
    precision: str = option("32-true", "32-true, bf16-mixed or 16-mixed")
    accelerator: str = option("auto", "auto, cpu, gpu or another that Lightning knows")
    devices: int = option(1, "number of devices")
    workers: int = option(0, "processes that prepare batches; 0 for none besides the main one", neutral=True)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("epochs", "batch_size", "eval_every", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {self.validation_fraction}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    @property
    @abstractmethod
    def label(self) -> str:
        """What tells this run from others of the same experiment: the default name of its folder."""

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

    def evaluation_epochs(self) -> list[int]:
        """Epochs after which the model is evaluated: before training (0), after the first, regularly, at the end."""
        regular = range(self.eval_every, self.epochs + 1, self.eval_every)
        return sorted({0, 1, *regular, self.epochs})


OPTIMIZERS = ("radam", "adam", "adamw")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # weights stay float32
