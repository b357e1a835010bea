"""Nested list operations, small: an expression, and the digit that it gives.

Source of the operations and of how expressions are drawn: Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent
Tree Learning", 2018 (nyu-mll/spinn, python/spinn/data/listops/make_data.py), and Tay et al., "Long Range Arena", 2020
(lra_benchmarks/data/listops.py), whose expressions have 500 to 2,000 tokens. Sizes are smaller here, and all digits
are equally frequent answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from flowformer.tasks.fingerprint import hash_values
from flowformer.tasks.list_operations import END, OPERATIONS
from flowformer.tasks.text.format import IGNORED, TextFormat
from flowformer.tasks.text.tokenizers import END_OF_LINE, WordTokenizer
from flowformer.tasks.text.toys import DIGITS, LICENCE, ToyTask

_WORDS = [*DIGITS, *OPERATIONS, END, "=", END_OF_LINE]
_TOKENS = {word: token for token, word in enumerate(_WORDS)}
_NESTED = 0.25  # chance that an argument is an operation (VALUE_P of both sources)
_MOST_ARGUMENTS = 5  # MAX_ARGS of ListOps; Long Range Arena has 10
_MOST_FAILURES = 50_000  # draws in succession that give nothing new


@dataclass(frozen=True, eq=False)
class Expressions(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Expressions and their answers: (seen, targets), where only the last target is not ignored.

    Attributes:
        rows: Tokens of each expression, "=", and the answer.
    """

    rows: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Return a hash of the expressions."""
        return hash_values(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        row = self.rows[index].astype(np.int64)
        targets = np.full(len(row) - 1, IGNORED)
        targets[-1] = row[-1]
        return row[:-1], targets


def check_sizes(depth: int, length: int) -> None:
    """Check that an expression of this depth can have this length.

    Raises:
        ValueError: if not.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    shortest = 5 if depth == 1 else 8
    if length < shortest:
        example = "[MIN 1 2 ] =" if depth == 1 else "[MIN [MAX 1 2 ] 3 ] ="
        raise ValueError(f"length must be at least {shortest} for depth {depth} ({example}), got {length}")


def brackets(
    depth: int = 4,
    length: int = 128,
    *,
    train_examples: int = 50_000,
    test_examples: int = 2_000,
    seed: int = 0,
) -> ToyTask:
    """Expressions such as ``[MAX 4 3 [MIN 2 3 ] 1 0 ] =`` and their values: the token to predict after ``=``.

    Operations are MIN, MAX, MED (median) and SM (sum modulo 10) of 2 to 5 arguments, a quarter of which are operations
    themselves down to ``depth``; at least one is, unless ``depth`` is 1. Each digit is the answer of a tenth of the
    examples, so that chance, and the most frequent answer, are right in 10 %.

    Args:
        depth: Largest number of operations within each other.
        length: Largest number of tokens, ``=`` included.
        train_examples: Expressions to train on.
        test_examples: Expressions to test with, all different from each other and from those to train on.
        seed: Decides the expressions. Those of the test set do not depend on ``train_examples``.

    Raises:
        ValueError: for sizes that do not fit each other, no example, or more examples than there are expressions.
    """
    check_sizes(depth, length)
    rng, taken = random.Random(seed), set()
    test = _collect(rng, depth, length, test_examples, taken)
    train = _collect(rng, depth, length, train_examples, taken)
    return ToyTask(
        name="brackets",
        train=train,
        test=test,
        format=TextFormat(WordTokenizer(_WORDS), length),
        licence=LICENCE,
        source=f"{train_examples} expressions to train on, {test_examples} others to test with",
    )


def _collect(rng: random.Random, depth: int, length: int, count: int, taken: set[tuple[int, ...]]) -> Expressions:
    """Draw expressions that are not taken, the same number for each answer, and take them."""
    if count < 1:
        raise ValueError(f"the number of examples must be at least 1, got {count}")
    wanted = [count // 10 + (digit < count % 10) for digit in range(10)]
    rows: list[np.ndarray] = []
    failures = 0
    while len(rows) < count:
        row, answer = _draw(rng, depth)
        if len(row) >= length or _is_shallow(row, depth) or not wanted[answer] or (key := tuple(row)) in taken:
            failures += 1
            if failures == _MOST_FAILURES:
                raise ValueError(
                    f"{count} expressions must differ from each other, but only {len(rows)} were found with depth "
                    f"{depth}, length {length} and as many for each answer"
                )
            continue
        failures = 0
        wanted[answer] -= 1
        taken.add(key)
        rows.append(np.array([*row, _TOKENS["="], answer], np.uint8))
    return Expressions(rows)


def _is_shallow(row: list[int], depth: int) -> bool:
    """Whether an expression is a single operation where more are allowed."""
    return depth > 1 and row.count(_TOKENS[END]) == 1


def _draw(rng: random.Random, depth: int) -> tuple[list[int], int]:
    """Draw an operation with arguments down to ``depth``: its tokens and its value."""
    name = rng.choice(list(OPERATIONS))
    tokens, values = [_TOKENS[name]], []
    for _ in range(rng.randint(2, _MOST_ARGUMENTS)):
        if depth > 1 and rng.random() < _NESTED:
            inner, value = _draw(rng, depth - 1)
        else:
            value = rng.randrange(10)
            inner = [value]  # tokens 0 to 9 are the digits
        tokens += inner
        values.append(value)
    return [*tokens, _TOKENS[END]], OPERATIONS[name](values)
