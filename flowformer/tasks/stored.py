"""Tokens in a file, read where they are asked for."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

import numpy as np

from flowformer.common.errors import DataError

PIECE_TOKENS = 2**20
_POSITION = threading.Lock()


class StoredTokens(np.lib.mixins.NDArrayOperatorsMixin):
    """Tokens in a file: behaves like a read-only array with one axis, and takes no memory.

    Slices are arrays; operators and functions of NumPy read all tokens.

    It is no memory map: reading a mapped file that has become shorter ends the process (SIGBUS); here it is an error. A
    file that is removed or replaced while it is open stays readable. Can be pickled: the copy opens the file again.

    Args:
        path: The file.
        dtype: Of the tokens.
        start: First byte of the tokens in the file.
        count: Number of tokens.

    Raises:
        DataError: where the file is shorter.
        OSError: where it cannot be opened.
    """

    ndim = 1

    def __init__(self, path: Path, dtype: Any, start: int, count: int) -> None:
        self.path, self.dtype, self.start, self.count = path, np.dtype(dtype), start, count
        self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._file)
        whole, wanted = os.fstat(self._file).st_size, self.start + self.nbytes
        if whole < wanted:
            raise DataError(f"{self.path} is too short: {whole:,} bytes, {wanted:,} expected")

    def __getstate__(self) -> tuple[Any, ...]:
        return self.path, self.dtype, self.start, self.count

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.path, self.dtype, self.start, self.count = state
        self._open()

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int]:
        """The number of tokens."""
        return (self.count,)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens in the file."""
        return self.count * self.dtype.itemsize

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> np.ndarray: ...
    def __getitem__(self, place: int | slice) -> Any:
        """Return the token at a place, or those of a slice as an array that cannot be written to.

        Raises:
            IndexError: for a place that is not there.
            DataError: where the file has become shorter.
        """
        if not isinstance(place, slice):
            index = range(self.count)[place]
            return self._read(index, index + 1)[0]
        begin, end, step = place.indices(self.count)
        if step == 1:
            return self._read(begin, max(begin, end))
        rows = range(begin, end, step)
        if not rows:
            return self._read(0, 0)
        first = min(rows[0], rows[-1])
        return self._read(first, max(rows[0], rows[-1]) + 1)[rows[0] - first :: step]

    def __iter__(self) -> Iterator[Any]:
        for begin in range(0, self.count, PIECE_TOKENS):
            yield from self[begin : begin + PIECE_TOKENS]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("tokens in a file cannot become an array without being copied")
        return self[:].astype(dtype or self.dtype)

    def __array_ufunc__(self, function: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [np.asarray(one) if isinstance(one, StoredTokens) else one for one in inputs]
        return getattr(function, method)(*arrays, **options)

    def __bytes__(self) -> bytes:
        return self[:].tobytes()

    def _read(self, begin: int, end: int) -> np.ndarray:
        wanted = (end - begin) * self.dtype.itemsize
        place = self.start + begin * self.dtype.itemsize
        data = _pread(self._file, wanted, place)
        while 0 < len(data) < wanted:  # the system reads at most 2 GB at a time
            more = _pread(self._file, wanted - len(data), place + len(data))
            if not more:
                break
            data += more
        if len(data) < wanted:
            whole = os.fstat(self._file).st_size
            raise DataError(
                f"{self.path} has become shorter while it was in use: {whole:,} bytes, {self.start + self.nbytes:,} "
                "expected"
            )
        return np.frombuffer(data, self.dtype)


def _pread(file: int, size: int, place: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, size, place)
    with _POSITION:  # Windows
        os.lseek(file, place, os.SEEK_SET)
        return os.read(file, size)
