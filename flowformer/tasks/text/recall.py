"""Multi-query associative recall (MQAR): key-value pairs, and later keys whose values are to be recalled.

Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023 (arXiv 2312.04927),
and its code, HazyResearch/zoology, zoology/data/multiquery_ar.py. One rule differs: the random tokens between the
queries are never keys of the sequence, so that each key is in it exactly twice and each answer is certain. With the
published vocabulary of 8,192 tokens that is nearly always so; with a small one it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from flowformer.tasks.fingerprint import hash_values
from flowformer.tasks.text.format import IGNORED, TextFormat
from flowformer.tasks.text.task import TextTask
from flowformer.tasks.text.tokenizers import END_OF_LINE, WordTokenizer
from flowformer.tasks.text.toys import LICENCE, ToyTask

_POWER = 0.01  # power_a of zoology: the chance of a gap falls as gap ** (power_a - 1)
_BLOCK = 1_024  # sequences that are drawn at a time


@dataclass(frozen=True, eq=False)
class Sequences(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Sequences with queries: (seen, targets), where targets are ignored except at queries.

    Attributes:
        tokens: (n, length) integers.
        targets: (n, length) integers: at a query the value of its key, elsewhere -100.
    """

    tokens: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def fingerprint(self) -> str:
        """Return a hash of the sequences and their targets."""
        return hash_values([self.tokens, self.targets])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[index].astype(np.int64), self.targets[index].astype(np.int64)


@dataclass(frozen=True, eq=False)
class RecallTask(ToyTask):
    """Associative recall; the metric is the fraction of queries that are answered right."""

    def score(self, right: Tensor, asked: Tensor) -> Tensor:
        """Count queries whose likeliest token is the value; arguments as :meth:`ToyTask.score`."""
        return (right & asked).sum()

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of queries in a batch."""
        return TextTask.size(self, batch)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a sequence.

    Attributes:
        pairs: Key-value pairs at the start, and queries after them, one of each key.
        length: Tokens.
        vocab_size: Token 0, keys up to half of this number, and values.

    Raises:
        ValueError: for sizes that do not fit each other.
    """

    pairs: int
    length: int
    vocab_size: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}")
        if self.length < 4 * self.pairs:
            raise ValueError(
                f"length must be at least {4 * self.pairs} for {self.pairs} pairs (2 tokens for each pair, and 2 for "
                f"each query), got {self.length}"
            )
        if self.vocab_size % 2 or self.vocab_size < 2 * (self.pairs + 1):
            raise ValueError(
                f"vocab_size must be even and at least {2 * (self.pairs + 1)} for {self.pairs} pairs (half of it are "
                f"values, and the others keys and one more), got {self.vocab_size}"
            )


def recall(
    pairs: int = 8,
    length: int = 64,
    vocab_size: int = 128,
    *,
    train_examples: int = 100_000,
    test_examples: int = 1_000,
    seed: int = 0,
) -> RecallTask:
    """Sequences that start with key-value pairs and later contain each key once more, where its value is predicted.

    ``k3 v70 k9 v65 k9 v80 k3 v91`` has two pairs; v65 is the target at the second k9, v70 at the second k3. As in the
    source, keys and values are drawn without repetition, a query is at an even distance from the pairs, distances have
    a power law (most queries are near the pairs), and the tokens between are random: the answer does not follow in the
    sequence.

    Args:
        pairs: Key-value pairs of a sequence, and queries.
        length: Tokens of a sequence, at least 4 for each pair. Published: 64 to 512.
        vocab_size: Half of the tokens are values, the others keys and token 0. Published: 8,192.
        train_examples: Sequences to train on. Published: 100,000.
        test_examples: Sequences to test with, all different from each other and from those to train on.
        seed: Decides the sequences. Those of the test set do not depend on ``train_examples``.

    Raises:
        ValueError: for sizes that do not fit each other, no example, or more examples than there are sequences.
    """
    sizes = Sizes(pairs, length, vocab_size)
    half = vocab_size // 2
    words = [END_OF_LINE, *(f"k{key}" for key in range(1, half)), *(f"v{value}" for value in range(half, vocab_size))]
    form = TextFormat(WordTokenizer(words), length)
    rng, taken = np.random.default_rng(seed), set()
    test = _collect(rng, sizes, test_examples, taken, form.tokenizer.dtype)
    train = _collect(rng, sizes, train_examples, taken, form.tokenizer.dtype)
    return RecallTask(
        name="recall",
        train=train,
        test=test,
        format=form,
        licence=LICENCE,
        source=f"{train_examples} sequences to train on, {test_examples} others to test with",
    )


def _collect(rng: np.random.Generator, sizes: Sizes, count: int, taken: set[bytes], dtype: np.dtype) -> Sequences:
    """Draw sequences that are not taken, and take them."""
    if count < 1:
        raise ValueError(f"the number of examples must be at least 1, got {count}")
    wanted = len(taken) + count
    tokens, targets = [], []
    while len(taken) < wanted:
        rows, answers = _draw(rng, sizes, _BLOCK)
        rows = rows.astype(dtype)
        new = _take(rows, taken, wanted - len(taken))
        if not new:
            raise ValueError(
                f"{wanted} examples must differ from each other, but only {len(taken)} different sequences were found "
                f"with pairs {sizes.pairs}, length {sizes.length} and vocab_size {sizes.vocab_size}"
            )
        tokens.append(rows[new])
        targets.append(answers[new].astype(np.int32))
    return Sequences(np.concatenate(tokens), np.concatenate(targets))


def _take(rows: np.ndarray, taken: set[bytes], most: int) -> list[int]:
    """Add rows to those that are taken, ``most`` of them at most, and return the numbers of those that were not."""
    new = []
    for number, row in enumerate(rows):
        if len(new) < most and (key := row.tobytes()) not in taken:
            taken.add(key)
            new.append(number)
    return new


def _draw(rng: np.random.Generator, sizes: Sizes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw sequences and their targets, (count, length) each."""
    half, context = sizes.vocab_size // 2, 2 * sizes.pairs
    keys = values = np.empty((count, 0), np.int64)
    for _ in range(sizes.pairs):
        keys = np.hstack((keys, _draw_others(rng, 1, half, keys, 1)))
        values = np.hstack((values, _draw_others(rng, half, sizes.vocab_size, values, 1)))
    rows = _draw_others(rng, 0, sizes.vocab_size, keys, sizes.length)
    rows[:, 0:context:2], rows[:, 1:context:2] = keys, values
    # The largest sums of log p and Gumbel noise are a draw without replacement by p.
    gaps = np.arange(1, (sizes.length - context) // 2 + 1)
    scores = (_POWER - 1) * np.log(gaps) + rng.gumbel(size=(count, len(gaps)))
    places = context + 2 * np.argsort(-scores, 1)[:, : sizes.pairs]
    targets = np.full_like(rows, IGNORED)
    np.put_along_axis(rows, places, keys, 1)
    np.put_along_axis(targets, places, values, 1)
    return rows, targets


def _draw_others(rng: np.random.Generator, low: int, high: int, known: np.ndarray, count: int) -> np.ndarray:
    """Draw ``count`` integers from low to high - 1 for each row, none of them among the known ones of the row."""
    drawn = rng.integers(low, high, (len(known), count))
    while (again := (known.T[:, :, None] == drawn).any(0)).any():
        drawn[again] = rng.integers(low, high, int(again.sum()))
    return drawn
