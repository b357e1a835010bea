"""Classification of token sequences: data sets, loss and metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from flowformer.tasks.lra.format import PairFormat, SequenceFormat
from flowformer.tasks.metric import ACCURACY, Metric
from flowformer.tasks.splits import stratify

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
# Wu et al., ICML 2022: the table of Long Range Arena; baselines but cosformer are those of its leaderboard.
_ACCURACIES: Mapping[str, tuple[float, ...]] = {
    "local": (15.82, 52.98, 53.39, 41.46, 66.63),
    "linear": (16.13, 65.90, 53.09, 42.34, 75.30),
    "reformer": (37.27, 56.10, 53.40, 38.07, 68.50),
    "sparse": (17.07, 63.58, 59.59, 44.24, 71.71),
    "sinkhorn": (33.67, 61.20, 53.83, 41.23, 67.45),
    "linformer": (35.70, 53.94, 52.27, 38.56, 76.34),
    "performer": (18.01, 65.40, 53.82, 42.77, 77.05),
    "synthesizer": (36.99, 61.68, 54.67, 41.61, 69.45),
    "longformer": (35.63, 62.85, 56.89, 42.22, 69.71),
    "softmax": (36.37, 64.27, 57.46, 42.44, 71.40),
    "bigbird": (36.05, 64.02, 59.29, 40.83, 74.87),
    "cosformer": (37.90, 63.41, 61.36, 43.17, 70.33),
    "flow-no-competition": (36.80, 63.48, 61.66, 42.39, 71.90),
    "flow-no-allocation": (37.00, 63.78, 61.33, 42.52, 73.26),
    "flow": (38.70, 64.29, 62.24, 43.20, 73.95),
}
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    name: {row: values[index] for row, values in _ACCURACIES.items()} for index, name in enumerate(TASKS)
}  # accuracy in percent by task and method


@dataclass(frozen=True, eq=False)
class SequenceTask:
    """A classification problem on sequences, or on pairs of them.

    Attributes:
        name: Of the problem.
        train: The training set.
        test: The test set.
        format: How sequences are prepared.
        published: Accuracy in percent by method.
        source: Where the data came from.
        licence: What is known of its terms.
        validation: A set to choose the round by; ``None`` for none.
        tested_in_training: Whether the published protocol evaluates the test set during training. Otherwise it is
            tested once, in the round that is best on the validation set.
    """

    name: str
    train: Any
    test: Any
    format: SequenceFormat | PairFormat
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    validation: Any = None
    tested_in_training: bool = False

    @property
    def metric(self) -> Metric:
        """The figure of merit."""
        return ACCURACY

    @property
    def evaluated(self) -> dict[str, Any]:
        """The evaluation sets used during training, if not empty; the test set where there is no other."""
        sets = {"test": self.test, "validation": self.validation}
        found = {name: part for name, part in sets.items() if part is not None and len(part)}
        if not self.tested_in_training and "validation" in found:
            found.pop("test", None)
        return found

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch, and return mean cross-entropy "loss", and right answers as "accuracy"."""
        logits = model(batch["tokens"], batch["mask"])
        loss = nn.functional.cross_entropy(logits.float(), batch["y"])
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["y"]).sum()}

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of sequences, or pairs, in a batch."""
        return len(batch["y"])

    def split_validation(self, fraction: float, seed: int) -> SequenceTask:
        """Hold out a stratified part of the training set for validation.

        Raises:
            ValueError: as :func:`flowformer.tasks.splits.stratify`.
        """
        kept, held = stratify(self.train.labels, self.format.classes, fraction, seed)
        return replace(self, train=self.train.subset(kept), validation=self.train.subset(held))
