"""Sequences of tokens with classes, in memory or in files."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from flowformer.tasks.fingerprint import hash_values
from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.token_cache import open_tokens, write_tokens


@dataclass(frozen=True, eq=False)
class TokenSequences(Dataset[tuple[np.ndarray, int]]):
    """Sequences of tokens with class indices; a map-style PyTorch data set.

    Attributes:
        tokens: (total,) unsigned integers, an array or a file of all sequences.
        starts: (n,) int64, where each sequence starts in ``tokens``.
        stops: (n,) int64, where it ends.
        labels: (n,) int64, indices of classes.
    """

    tokens: np.ndarray | StoredTokens
    starts: np.ndarray
    stops: np.ndarray
    labels: np.ndarray

    @classmethod
    def joined(cls, tokens: np.ndarray | StoredTokens, lengths: np.ndarray, labels: np.ndarray) -> TokenSequences:
        """Make a data set of sequences that follow each other in ``tokens``, given their lengths, (n,) integers."""
        stops = np.cumsum(lengths, dtype=np.int64)
        return cls(tokens, stops - lengths, stops, labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.asarray(self.tokens[int(self.starts[index]) : int(self.stops[index])]), int(self.labels[index])

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sequence: (n,) int64."""
        return self.stops - self.starts

    def subset(self, indices: Sequence[int] | np.ndarray) -> TokenSequences:
        """Return the sequences at ``indices``, in that order; the tokens are shared, not copied."""
        rows = np.asarray(indices, dtype=np.int64)
        return TokenSequences(self.tokens, self.starts[rows], self.stops[rows], self.labels[rows])

    def fingerprint(self) -> str:
        """Return a hash of the sequences and their classes."""
        return hash_values([self.lengths, self.labels, *(self[index][0] for index in range(len(self)))])


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
