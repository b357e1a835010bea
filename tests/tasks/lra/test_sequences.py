"""Sequences of tokens with classes."""

from __future__ import annotations

import numpy as np

from flowformer.tasks.lra.sequences import TokenSequences
from flowformer.tasks.token_cache import open_tokens, write_tokens


def sequences() -> TokenSequences:
    return TokenSequences.joined(np.arange(10, dtype=np.uint8), np.array([3, 0, 5, 2]), np.array([1, 0, 2, 1]))


def test_items_and_lengths():
    found = sequences()
    assert len(found) == 4
    assert [(tokens.tolist(), label) for tokens, label in (found[index] for index in range(4))] == [
        ([0, 1, 2], 1), ([], 0), ([3, 4, 5, 6, 7], 2), ([8, 9], 1),
    ]  # fmt: skip
    assert found.lengths.tolist() == [3, 0, 5, 2]


def test_a_subset_shares_its_tokens():
    part = sequences().subset([3, 0])
    assert [part[index][0].tolist() for index in range(2)] == [[8, 9], [0, 1, 2]]
    assert part.labels.tolist() == [1, 1]
    assert np.shares_memory(part[0][0], part.tokens)


def test_a_file_gives_the_same_and_fingerprints_tell_contents(tmp_path):
    whole = sequences()
    write_tokens(tmp_path / "tokens.npy", [whole.tokens], np.dtype(np.uint8))
    stored = TokenSequences(open_tokens(tmp_path / "tokens.npy"), whole.starts, whole.stops, whole.labels)
    assert stored[2][0].tolist() == [3, 4, 5, 6, 7]
    assert stored.fingerprint() == whole.fingerprint()
    others = (whole.subset([1, 0, 2, 3]), TokenSequences(whole.tokens, whole.starts, whole.stops, 2 - whole.labels))
    assert whole.fingerprint() not in {other.fingerprint() for other in others}
