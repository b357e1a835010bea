"""Tokens in files: what is read, and files that become shorter or vanish while they are open."""

import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.text.task import TokenBlocks
from flowformer.tasks.token_cache import open_bytes, open_tokens, write_tokens

TRUTH = (np.arange(5000) * 7919 % 60_000).astype(np.uint16)


@pytest.fixture
def tokens(tmp_path):
    write_tokens(tmp_path / "tokens.npy", [TRUTH], np.dtype(np.uint16))
    return open_tokens(tmp_path / "tokens.npy")


SLICES = [
    slice(None), slice(3, 9), slice(-5, None), slice(4, 2), slice(10_000, None), slice(None, None, 7),
    slice(100, 3, -9), slice(None, None, -1), slice(8, 8, 2),
]  # fmt: skip


@pytest.mark.parametrize("place", [0, 4999, -1, -5000, *SLICES])
def test_reads_what_an_array_has(tokens, place):
    np.testing.assert_array_equal(tokens[place], TRUTH[place])
    assert tokens[place].dtype == TRUTH.dtype


def test_behaves_like_an_array(tokens, monkeypatch):
    monkeypatch.setattr("flowformer.tasks.stored.PIECE_TOKENS", 999)
    assert (len(tokens), tokens.shape, tokens.dtype, tokens.nbytes) == (5000, (5000,), np.uint16, 10_000)
    np.testing.assert_array_equal(tokens, TRUTH)
    assert list(tokens) == list(TRUTH)
    assert bytes(tokens) == TRUTH.tobytes()
    np.testing.assert_array_equal(tokens == 7, TRUTH == 7)
    assert np.asarray(tokens, np.int64).dtype == np.int64
    assert not tokens[:5].flags.writeable
    for place in (5000, -5001):
        with pytest.raises(IndexError):
            tokens[place]


def test_no_tokens(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    empty = open_bytes(tmp_path / "empty")
    assert (len(empty), empty[:].tolist(), list(empty)) == (0, [], [])


def _read_all(tokens):
    return int(np.asarray(tokens, np.int64).sum())


def test_can_be_pickled(tokens):
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokens)), TRUTH)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_goes_into_forked_processes(tokens):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read_all, [tokens] * 4) == [int(TRUTH.astype(np.int64).sum())] * 4


def test_threads_do_not_move_each_other(tokens):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: tokens[place : place + 5].tolist(), range(2000)))
    assert found == [TRUTH[place : place + 5].tolist() for place in range(2000)]


def test_a_file_that_becomes_shorter_is_an_error_that_names_it(tokens):
    blocks = TokenBlocks(tokens, 100)
    blocks[40]
    with tokens.path.open("rb+") as file:
        file.truncate(4000)
    blocks[5]
    with pytest.raises(
        DataError, match=rf"{tokens.path} has become shorter while it was in use: 4,000 bytes, 10,128 exp"
    ):
        blocks[40]
    with pytest.raises(DataError, match=rf"{tokens.path} is too short: 4,000 bytes, 10,128 expected"):
        pickle.loads(pickle.dumps(tokens))
    with pytest.raises(DataError, match="is too short"):
        open_tokens(tokens.path)


def test_a_file_that_vanishes_stays_readable_where_it_is_open(tokens):
    tokens.path.unlink()
    np.testing.assert_array_equal(tokens, TRUTH)
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(tokens))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a .npy file"),
        (b"text", "not a .npy file"),
        (np.zeros((2, 2)), "expected an array of tokens with one axis, got float64"),
        (np.array([{}, {}], dtype=object), "expected an array of tokens with one axis, got object"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "tokens.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        open_tokens(path)


def test_files_are_closed(tmp_path):
    (tmp_path / "text").write_bytes(b"0123")
    file = StoredTokens(tmp_path / "text", np.uint8, 0, 4)
    number = file._file
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
