"""Random ListOps expressions, thousands at a time.

Source of the grammar and of how expressions are drawn: Tay et al., "Long Range Arena", 2021 (lra_benchmarks/data/
listops.py), after Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", 2018.

Worker processes import this module: it needs nothing but NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Tokens are the places of words here. The published pipeline numbers them in the order of a Python set, which differs
# from run to run; its "]" is called "X", since its first tokenizer dropped what is no letter or digit.
VOCABULARY = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
_DIGIT, _OPERATION, _END = (VOCABULARY.index(word) for word in ("0", "[MIN", "]"))
_MED = VOCABULARY.index("[MED") - _OPERATION
_OPERATIONS = _END - _OPERATION
# An argument is an operation with probability 1/4 (VALUE_P in the source), a digit otherwise.
_NESTED = 2**30  # of 2**32

ROOTS = 1024  # expressions that a block begins: large enough for NumPy, small enough for a cache of the CPU


@dataclass(frozen=True)
class Grammar:
    """Which expressions there are: the flags of the published generator, with its defaults.

    Attributes:
        max_depth: Depth of the deepest digits; the outermost operation has depth 1. At least 2.
        max_args: Largest number of arguments of an operation. At least 2, which is the smallest number.
        min_length: Expressions have more tokens than this: one for a digit, two for an operation. At least 1.
        max_length: They have fewer tokens than this.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("max_depth", 2), ("max_args", 2), ("min_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_length < self.min_length + 2:
            raise ValueError(
                f"max_length must be at least min_length + 2, since lengths lie between them: got {self.max_length} "
                f"and {self.min_length}"
            )


class Block(NamedTuple):
    """Expressions, one after another.

    Attributes:
        tokens: (total,) uint8, places in :data:`VOCABULARY`.
        lengths: (n,) int64, tokens of each expression.
        labels: (n,) uint8, their values.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


class _Level(NamedTuple):
    """The nodes of one depth in all trees of a block, in the order of their parents.

    Attributes:
        operations: Places of the nodes that are operations.
        counts: The numbers of their arguments, which are the nodes of the next level.
        starts: Where their arguments begin in the next level.
        tokens: First token of each node.
        values: Value of each node.
        sizes: Number of tokens of each node.
    """

    operations: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    sizes: np.ndarray


def draw_block(grammar: Grammar, seed: int, number: int) -> Block:
    """Draw the expressions of a numbered block: those of 1,024 random trees that have a length of the grammar.

    The numbers of one seed are independent of each other, and the result is the same with any version of NumPy, which
    keeps the streams of its bit generators.

    Args:
        grammar: Which expressions there are.
        seed: Not negative.
        number: Of the block; not negative.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(number,)))
    shapes, lengths = _draw_shapes(grammar, bits)
    levels: list[_Level] = []
    for arguments in reversed(shapes):
        levels.append(_fill(arguments, levels[-1] if levels else None, bits))
    levels.reverse()
    return Block(_write(levels, lengths), lengths, levels[0].values)


def _draw(bits: np.random.PCG64, count: int, below: int = 2**32) -> np.ndarray:
    """``count`` uniform integers from 0 to ``below`` - 1, (count,) uint64."""
    words = bits.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
    return words.astype(np.uint64) * np.uint64(below) >> np.uint64(32)


def _draw_shapes(grammar: Grammar, bits: np.random.PCG64) -> tuple[list[np.ndarray], np.ndarray]:
    """Numbers of arguments of all nodes of the trees that have a length of the grammar, level by level; the lengths.

    A digit has no argument. The outermost node is always an operation: a digit alone would be too short.
    """
    lengths = np.zeros(ROOTS, np.int64)
    trees, drawn = np.arange(ROOTS, dtype=np.int32), []
    for depth in range(1, grammar.max_depth + 1):
        arguments = np.zeros(len(trees), np.uint8 if grammar.max_args < 256 else np.int64)
        lengths += np.bincount(trees, minlength=ROOTS)
        if depth < grammar.max_depth:
            nested = _draw(bits, len(trees)) < _NESTED if depth > 1 else np.ones(len(trees), bool)
            operations = np.flatnonzero(nested)
            arguments[operations] = 2 + _draw(bits, len(operations), grammar.max_args - 1)
            lengths += np.bincount(trees[operations], minlength=ROOTS)
            # Trees that are too long already do not grow.
            arguments[lengths[trees] >= grammar.max_length] = 0
        drawn.append((trees, arguments))
        trees = np.repeat(trees, arguments)
    kept = (lengths > grammar.min_length) & (lengths < grammar.max_length)
    return [arguments[kept[trees]] for trees, arguments in drawn], lengths[kept]


def _fill(arguments: np.ndarray, below: _Level | None, bits: np.random.PCG64) -> _Level:
    """Draw the digits and operations of a level, and compute the values and sizes of its nodes."""
    values = _draw(bits, len(arguments), 10).astype(np.uint8)
    tokens, sizes = values + np.uint8(_DIGIT), np.ones(len(arguments), np.int64)
    operations = np.flatnonzero(arguments)
    counts = arguments[operations].astype(np.int64)
    starts = np.cumsum(counts) - counts
    if len(operations) and below is not None:
        kinds = _draw(bits, len(operations), _OPERATIONS).astype(np.uint8)
        tokens[operations] = _OPERATION + kinds
        values[operations] = _apply(kinds, below.values, starts, counts)
        sizes[operations] = 2 + np.add.reduceat(below.sizes, starts)
    return _Level(operations, counts, starts, tokens, values, sizes)


def _apply(kinds: np.ndarray, values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The values of operations, given all their arguments one after another."""
    medians = np.zeros(len(kinds), np.uint8)
    chosen = kinds == _MED
    medians[chosen] = _medians(values[np.repeat(chosen, counts)], counts[chosen])
    sums = np.add.reduceat(values, starts, dtype=np.int64) % 10
    results = (np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts), medians, sums)
    return np.choose(kinds, results).astype(np.uint8)


def _medians(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Medians of groups of digits; the mean of the middle two is rounded down, as ``int(np.median(...))`` is."""
    starts = np.cumsum(counts) - counts
    groups = np.repeat(np.arange(len(counts)), counts)
    ordered = np.sort(groups * 16 + values) & 15
    return (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) // 2


def _write(levels: Sequence[_Level], lengths: np.ndarray) -> np.ndarray:
    """The tokens of all trees, one tree after another, each node before its arguments."""
    written = np.empty(lengths.sum(), np.uint8)
    places = np.cumsum(lengths) - lengths
    for level, below in zip(levels, [*levels[1:], None], strict=True):
        written[places] = level.tokens
        first = places[level.operations]
        written[first + level.sizes[level.operations] - 1] = _END
        if below is not None and len(first):
            before = np.cumsum(below.sizes) - below.sizes
            places = before + np.repeat(first + 1 - before[level.starts], level.counts)
        else:
            places = np.zeros(0, np.int64)
    return written
