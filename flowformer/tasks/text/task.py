"""Language modelling: blocks of text, loss and metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowformer.tasks.fingerprint import hash_values
from flowformer.tasks.metric import Metric
from flowformer.tasks.protocols import SupportsLoss
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.format import IGNORED, TextFormat
from flowformer.tasks.text.tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenBlocks(Dataset[tuple[np.ndarray, np.ndarray]]):
    """A text cut into blocks with context: (seen, targets), two arrays of the same length.

    Every token of the text is a target once. With a ``context``, a block has up to that many more tokens before it,
    which are seen and do not count: fairseq's ``--context-window``. The first token is predicted from ``start``.

    Attributes:
        tokens: The text, (n,).
        length: Tokens that a model sees at most.
        context: How many of them are there for the others' sake only.
        start: Token before the first.
        whole: Leave out a last block that is not full, if there is another.
    """

    tokens: np.ndarray
    length: int
    context: int = 0
    start: int = 0
    whole: bool = False

    def __post_init__(self) -> None:
        """Raise for invalid sizes."""
        if not 0 <= self.context < self.length:
            raise ValueError(
                f"context must be at least 0 and below length, got context {self.context} and length {self.length}"
            )

    @property
    def stride(self) -> int:
        """Number of targets of a block."""
        return self.length - self.context

    def fingerprint(self) -> str:
        """Return a hash of the text and of how it is cut."""
        return hash_values([self.length, self.context, self.start, int(self.whole), self.tokens])

    def __len__(self) -> int:
        full = len(self.tokens) // self.stride
        return full if self.whole and full else -(-len(self.tokens) // self.stride)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * self.stride
        first, end = max(begin - self.context, 0), min(begin + self.stride, len(self.tokens))
        targets = self.tokens[first:end].astype(np.int64)
        before = self.start if first == 0 else int(self.tokens[first - 1])
        seen = np.concatenate(([before], targets[:-1]))
        targets[: begin - first] = IGNORED
        return seen, targets


# The figure that is usual for each kind of token.
_METRICS: Mapping[str, Metric] = {
    "bytes": Metric("bits per byte", "loss", shown=lambda nats: nats / math.log(2), higher_is_better=False, digits=4),
    "characters": Metric(
        "bits per character", "loss", shown=lambda nats: nats / math.log(2), higher_is_better=False, digits=4
    ),
}
PERPLEXITY = Metric("perplexity", "loss", shown=lambda nats: math.exp(min(nats, 700.0)), higher_is_better=False)


@dataclass(frozen=True, eq=False)
class TextTask:
    """Language modelling of a text.

    Attributes:
        name: Of the task.
        train: Blocks to train on.
        test: Blocks to test on.
        validation: Blocks to choose the round by; with it, the test is made once, when training is over. ``None``: the
            test blocks are evaluated during training.
        format: How text is prepared.
        published: Published values of the metric, by method.
        licence: What is known of the terms of the data.
        source: Where the data came from.
    """

    name: str
    train: Any
    test: Any
    format: TextFormat
    validation: Any = None
    published: Mapping[str, float] = field(default_factory=dict)
    licence: str = ""
    source: str = ""

    @property
    def metric(self) -> Metric:
        """Bits per byte or character; perplexity where tokens are anything else."""
        return _METRICS.get(self.format.tokenizer.kind, PERPLEXITY)

    @property
    def evaluated(self) -> dict[str, Any]:
        """The evaluation sets used during training."""
        return {"test": self.test} if self.validation is None else {"validation": self.validation}

    def step(self, model: nn.Module | SupportsLoss, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean loss of the targets of a batch, in nats."""
        return {"loss": model.loss(batch["tokens"], batch["targets"], batch.get("mask"), ignore_index=IGNORED)}  # pyright: ignore[reportCallIssue] - nn.Module hides what it offers

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of targets of a batch, without ignored ones."""
        return int((batch["targets"] != IGNORED).sum())


def build_task(
    corpus: Corpus,
    length: int,
    *,
    context: int = 0,
    validation_context: int = 0,
    start: int | None = None,
    published: Mapping[str, float] | None = None,
) -> TextTask:
    """Cut a corpus into blocks.

    Args:
        corpus: The text.
        length: Tokens that a model sees at most.
        context: Tokens of a test block that are seen and do not count.
        validation_context: Likewise, in the validation part.
        start: Token before the first; a new line if absent, or whatever the first token is where there is none.
        published: Published values of the metric, by method.

    Raises:
        ValueError: for a corpus without a text to test with, an empty one, or invalid sizes.
    """
    parts = {"training": corpus.train, "test": corpus.test}
    for what, tokens in parts.items():
        if tokens is None or not len(tokens):
            raise ValueError(f"{corpus.name}: the {what} text is empty")
    if len(corpus.train) < length:
        raise ValueError(
            f"{corpus.name}: the training text has {len(corpus.train):,} tokens, fewer than a sequence of length "
            f"{length:,}"
        )
    if start is None:
        start = _new_line(corpus.tokenizer, int(corpus.train[0]))

    def cut(tokens: Any, context: int, *, whole: bool = False) -> TokenBlocks:
        return TokenBlocks(tokens, length, context, start, whole)

    return TextTask(
        name=corpus.name,
        train=cut(corpus.train, 0, whole=True),
        test=cut(corpus.test, context),
        validation=None if corpus.validation is None else cut(corpus.validation, validation_context),
        format=TextFormat(corpus.tokenizer, length),
        published=dict(published or {}),
        licence=corpus.licence,
        source=corpus.source,
    )


def _new_line(tokenizer: Tokenizer, otherwise: int) -> int:
    try:
        tokens = tokenizer.encode("\n")
    except ValueError:  # a vocabulary without one
        return otherwise
    return int(tokens[0]) if len(tokens) == 1 else otherwise
