"""Toy projects of the GPT-style module: adding numbers and sorting, as sequences of digits.

Source: thuml/Flowformer, Flowformer_TorchModule/projects (adder) and its demonstration of sorting, which are minGPT's.
A problem is a row of digits, the question before the answer; only the answer is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowformer.tasks.fingerprint import hash_values
from flowformer.tasks.metric import ACCURACY, Metric
from flowformer.tasks.text.format import IGNORED, TextFormat
from flowformer.tasks.text.task import TextTask
from flowformer.tasks.text.tokenizers import CharacterTokenizer

DIGITS = "0123456789"
LICENCE = "made here, by rule; no terms"


@dataclass(frozen=True, eq=False)
class Problems(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Questions and answers: (seen, targets), where targets before the answer are ignored.

    Attributes:
        digits: (n, question + answer) integers.
        question: Digits of a question.
    """

    digits: np.ndarray
    question: int

    def __len__(self) -> int:
        return len(self.digits)

    def fingerprint(self) -> str:
        """Return a hash of the problems."""
        return hash_values([self.question, self.digits])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        row = self.digits[index].astype(np.int64)
        targets = row[1:].copy()
        targets[: self.question - 1] = IGNORED
        return row[:-1], targets


@dataclass(frozen=True, eq=False)
class ToyTask(TextTask):
    """Toy problems; the metric is the fraction of answers that are entirely right.

    Where each digit is the likeliest after the right ones before it, decoding without them gives the same answer, and
    where one is not, decoding goes wrong at the first such: no decoding is needed to tell.
    """

    @property
    def metric(self) -> Metric:
        """Right answers in percent."""
        return ACCURACY

    def step(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean loss of the tokens of answers, and the number of right answers."""
        answers = batch["targets"]
        logits = model(batch["tokens"], batch.get("mask"))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), answers.flatten(), ignore_index=IGNORED)
        return {"loss": loss, "accuracy": self.score(logits.argmax(-1) == answers, answers != IGNORED)}

    def score(self, right: Tensor, asked: Tensor) -> Tensor:
        """Count right answers.

        Args:
            right: (batch, length) boolean, whether the likeliest token is the target.
            asked: (batch, length) boolean, where the targets are tokens of answers.
        """
        return (right | ~asked).all(-1).sum()

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of problems in a batch."""
        return len(batch["targets"])


def adder(digits: int = 2, seed: int = 1337) -> ToyTask:
    """All sums of two numbers of ``digits`` digits, with leading zeros; the sum is written from its last digit on.

    12 + 34 = 046 is 1234640. A fifth of the sums, but at most 500, is the test set.

    Args:
        digits: Digits of a number.
        seed: Decides which sums are set aside. 1337 as in the source; the random numbers are not the same.

    Raises:
        ValueError: for no digit, or more sums than fit.
    """
    if not 1 <= digits <= 3:
        raise ValueError(f"digits must be from 1 to 3, got {digits}")
    count = 10**digits
    first, second = np.divmod(np.arange(count**2), count)
    columns = [*_split(first, digits), *_split(second, digits), *reversed(_split(first + second, digits + 1))]
    rows = np.stack(columns, 1)
    order = np.random.default_rng(seed).permutation(len(rows))
    tested = min(len(rows) // 5, 500)
    return _build("adder", rows[order[tested:]], rows[order[:tested]], question=2 * digits)


def sorter(length: int = 6, digits: int = 3, seed: int = 3407) -> ToyTask:
    """Lists of ``length`` digits below ``digits``, and the same lists sorted.

    A quarter of all rows is the test set, as in the source, which takes those whose hash is divisible by 4.

    Args:
        length: Digits of a row.
        digits: Kinds of digits.
        seed: Decides which rows are set aside.

    Raises:
        ValueError: for sizes out of range.
    """
    if not (1 <= length <= 8 and 2 <= digits <= 10 and digits**length <= 2_000_000):
        raise ValueError(f"length must be from 1 to 8 and digits from 2 to 10, got {length} and {digits}")
    rows = np.stack(np.unravel_index(np.arange(digits**length), (digits,) * length), 1)
    rows = np.concatenate((rows, np.sort(rows, 1)), 1)
    order = np.random.default_rng(seed).permutation(len(rows))
    tested = len(rows) // 4
    return _build("sort", rows[order[tested:]], rows[order[:tested]], question=length)


def _split(numbers: np.ndarray, digits: int) -> list[np.ndarray]:
    """Decimal digits, the highest first."""
    return [numbers // 10**place % 10 for place in reversed(range(digits))]


def _build(name: str, train: np.ndarray, test: np.ndarray, *, question: int) -> ToyTask:
    form = TextFormat(CharacterTokenizer(DIGITS), train.shape[1] - 1)
    return ToyTask(
        name=name,
        train=Problems(train, question),
        test=Problems(test, question),
        format=form,
        licence=LICENCE,
        source=f"{len(train)} problems to train on, {len(test)} others to test with",
    )
