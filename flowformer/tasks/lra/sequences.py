"""Sequences of tokens with classes, in memory or in files."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset

from flowformer.tasks.fingerprint import hash_values
from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.token_cache import open_tokens, write_tokens

Data = TypeVar("Data", bound="_Labelled")


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Sequences, or pairs of them, as places in one array or file of tokens, with class indices."""

    tokens: np.ndarray | StoredTokens
    starts: np.ndarray
    stops: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        raise NotImplementedError

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sequence, int64 of the shape of ``starts``."""
        return self.stops - self.starts

    def subset(self: Data, indices: Sequence[int] | np.ndarray) -> Data:
        """Return the items at ``indices``, in that order; the tokens are shared, not copied."""
        rows = np.asarray(indices, dtype=np.int64)
        return replace(self, starts=self.starts[rows], stops=self.stops[rows], labels=self.labels[rows])

    def fingerprint(self) -> str:
        """Return a hash of the items and their classes."""
        return hash_values([self.lengths, self.labels, *(self[index][0] for index in range(len(self)))])

    def _between(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.tokens[int(start) : int(stop)])


@dataclass(frozen=True, eq=False)
class TokenSequences(_Labelled, Dataset[tuple[np.ndarray, int]]):
    """Sequences of tokens with class indices; a map-style PyTorch data set.

    Attributes:
        tokens: (total,) unsigned integers, an array or a file of all sequences.
        starts: (n,) int64, where each sequence starts in ``tokens``.
        stops: (n,) int64, where it ends.
        labels: (n,) int64, indices of classes.
    """

    @classmethod
    def joined(cls, tokens: np.ndarray | StoredTokens, lengths: np.ndarray, labels: np.ndarray) -> TokenSequences:
        """Make a data set of sequences that follow each other in ``tokens``, given their lengths, (n,) integers."""
        stops = np.cumsum(lengths, dtype=np.int64)
        return cls(tokens, stops - lengths, stops, labels.astype(np.int64))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._between(self.starts[index], self.stops[index]), int(self.labels[index])


@dataclass(frozen=True, eq=False)
class TokenPairs(_Labelled, Dataset[tuple[tuple[np.ndarray, np.ndarray], int]]):
    """Pairs of sequences of tokens with class indices; a map-style PyTorch data set.

    A sequence that is part of several pairs is stored once.

    Attributes:
        tokens: (total,) unsigned integers, an array or a file of all sequences.
        starts: (n, 2) int64, where the two sequences of each pair start in ``tokens``.
        stops: (n, 2) int64, where they end.
        labels: (n,) int64, indices of classes.
    """

    def __getitem__(self, index: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        first, second = (self._between(*place) for place in zip(self.starts[index], self.stops[index], strict=True))
        return (first, second), int(self.labels[index])


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: TokenSequences
    validation: TokenSequences
    test: TokenSequences


def write_sequences(folder: Path, name: str, sequences: Iterable[tuple[np.ndarray, int]], dtype: Any) -> int:
    """Write sequences of tokens and their classes as they come to three ``.npy`` files; returns how many there were.

    Args:
        folder: For the files ``<name>.npy``, ``<name>-lengths.npy`` and ``<name>-labels.npy``.
        name: Of the part.
        sequences: Tokens, (length,) integers, and the index of the class.
        dtype: Of the tokens in the file.
    """
    lengths, labels = array("q"), array("q")

    def pieces() -> Iterator[np.ndarray]:
        for tokens, label in sequences:
            lengths.append(len(tokens))
            labels.append(label)
            yield tokens

    write_tokens(folder / f"{name}.npy", pieces(), np.dtype(dtype))
    np.save(folder / f"{name}-lengths.npy", np.array(lengths))
    np.save(folder / f"{name}-labels.npy", np.array(labels))
    return len(labels)


def open_sequences(folder: Path, name: str) -> TokenSequences:
    """Open what :func:`write_sequences` wrote; tokens stay in their file until they are asked for."""
    lengths, labels = (np.load(folder / f"{name}-{what}.npy") for what in ("lengths", "labels"))
    return TokenSequences.joined(open_tokens(folder / f"{name}.npy"), lengths, labels)


def open_splits(folder: Path) -> Splits:
    """Open the parts ``train``, ``validation`` and ``test`` that :func:`write_sequences` wrote."""
    return Splits(*(open_sequences(folder, name) for name in Splits._fields))
