"""Pickles of arrays: what is read, and what was made to harm."""

import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from flowformer.tasks.images.array_pickles import load_arrays

ARRAY = np.arange(6, dtype=np.uint8).reshape(2, 3)
RECONSTRUCT = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01bt R".replace(b" ", b"")


def of_type(name: bytes, shape: bytes, content: bytes) -> bytes:
    """A pickle of Python 2 with an array of this type, shape (a tuple's opcodes) and content."""
    dtype = (
        b"cnumpy\ndtype\n(U"
        + bytes([len(name)])
        + name
        + b"K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return RECONSTRUCT + b"(K\x01(" + shape + b"t" + dtype + b"\x89U" + bytes([len(content)]) + content + b"tb."


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", [ARRAY, np.asfortranarray(ARRAY), ARRAY.astype(">f8"), ARRAY[:0]])
def test_arrays_are_read_as_they_were(protocol, array):
    found = load_arrays(pickle.dumps({b"data": array, b"labels": [1, 2]}, protocol))
    assert np.array_equal(found[b"data"], array)
    assert found[b"data"].dtype == array.dtype
    assert found[b"labels"] == [1, 2]


def test_arrays_of_python_2_are_read():
    found = load_arrays(of_type(b"u1", b"K\x02K\x03", bytes(range(6))))
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert load_arrays(of_type(b"i2", b"K\x02", b"\x01\x00\x02\x00")).tolist() == [1, 2]


HOSTILE = {
    "code": b"cos\nsystem\n(S'true'\ntR.",
    "an array without content": b"\x80\x02cnumpy\nndarray\n(\x8a\x06\x00\x00\x00\x00\x00\x01\x85tR.",
    "a shape of terabytes": of_type(b"u1", b"\x8a\x06\x00\x00\x00\x00\x00\x01", b"abc"),
    "a negative shape": of_type(b"u1", b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff", b"abc"),
    "a shape that is no number": of_type(b"u1", b"U\x01a", b"abc"),
    "objects": of_type(b"O8", b"K\x01", bytes(8)),
    "a type that is none": of_type(b"zz", b"K\x01", bytes(8)),
    "an unknown codec": b"\x80\x02c_codecs\nencode\nX\x04\x00\x00\x00testX\x06\x00\x00\x00zlib_c\x86R.",
    "a codec with other letters": b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00\xd0\x96X\x06\x00\x00\x00latin1\x86R.",
    "a string of terabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**42) + b"abc.",
    "an array of bytes of terabytes": b"\x80\x05\x96" + struct.pack("<Q", 2**42) + b"abc.",
    "a frame of terabytes": b"\x80\x04\x95" + struct.pack("<Q", 2**42) + b"N.",
    "a memory of billions": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a memory of billions in text": b"Np4000000000\n.",
    "a number of many digits": b"I" + b"9" * 10_000 + b"\n.",
    "a state for a function": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x0c__defaults__)s\x86b.",
    "a state for a type": b"\x80\x02cnumpy\ndtype\n}b.",
    "something persistent": b"Pname\n.",
    "nothing": b"",
    "no end": b"\x80\x02]",
    "no pickle": b"<!doctype html>",
    "a stack that is empty": b"\x80\x02R.",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_was_made_to_harm_is_refused_in_little_memory(what):
    tracemalloc.start()
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - of any type, see load_arrays
            load_arrays(HOSTILE[what])
        assert not isinstance(caught.value, MemoryError)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_bytes_are_not_multiplied():
    """A string of a megabyte is encoded a thousand times, and each result kept."""
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
    call = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    with pytest.raises(pickle.UnpicklingError, match="more bytes than the pickle has"):
        load_arrays(b"\x80\x02" + text + b"q\x000]" + b"(" + call * 1000 + b"e.")


def test_values_are_not_without_number(monkeypatch):
    monkeypatch.setattr("flowformer.tasks.images.array_pickles.MOST_OPCODES", 100)
    with pytest.raises(pickle.UnpicklingError, match="more than 100 values"):
        load_arrays(b"\x80\x02" + b"N0" * 100 + b"N.")
