"""Reader of pickles that contain arrays and plain values, as CIFAR-10 in its Python form.

A pickle is a program: read as usual, it may call anything, and ask for any amount of memory. Here it calls only the
functions of this file, and gets no more memory than a few times its own size.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Opcodes that store what was made under a number: the table of numbers grows up to the largest.
_STORES = ("PUT", "BINPUT", "LONG_BINPUT")
MOST_OPCODES = 5_000_000  # a batch of CIFAR-10 has about 50,000
_KINDS = "biuf"  # of numbers


def load_arrays(data: bytes) -> Any:
    """Unpickle arrays of numbers, dictionaries, lists, tuples, numbers and strings.

    Args:
        data: The pickle. Strings of Python 2 become bytes.

    Raises:
        Exception: for a damaged pickle, or one that contains anything else; of many types.
    """
    _check_sizes(data)
    return _unwrap(_Unpickler(data).load())


def _check_sizes(data: bytes) -> None:
    """Raise for a pickle that claims to be larger than it is. pickletools reads no more than there is."""
    for count, (opcode, argument, place) in enumerate(pickletools.genops(data)):
        if count > MOST_OPCODES:
            raise pickle.UnpicklingError(f"more than {MOST_OPCODES:,} values")
        if opcode.name in _STORES and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"byte {place}: number {argument} in a pickle of {len(data)} bytes")
        if opcode.name == "FRAME" and int(argument or 0) > len(data) - (place or 0):
            raise pickle.UnpicklingError(f"byte {place}: a frame of {argument} bytes in a pickle of {len(data)} bytes")


def _unwrap(value: Any) -> Any:
    """Replace the arrays in a dictionary, and an array itself."""
    if isinstance(value, dict):
        return {key: one.array if isinstance(one, _Array) else one for key, one in value.items()}
    return value.array if isinstance(value, _Array) else value


class _Function:
    """A function that a pickle may call, and may not change."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = len(data)  # bytes that strings may still become

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _Function(self._encode)
        if (module, name) not in _MADE:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of arrays")
        return _MADE[module, name]

    def _encode(self, text: str, codec: str) -> bytes:
        """Bytes, as Python 3 writes them for Python 2."""
        if codec not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"codec {codec!r}, expected latin1")
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("more bytes than the pickle has")
        return text.encode("latin1")


class _Array:
    """An array in the making. NumPy's would be of any size that the pickle states, whatever bytes it has."""

    array: np.ndarray = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _build(content, dtype, shape, "F" if fortran else "C")


class _DType:
    """A type of numbers in the making."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.dtype = np.dtype(name.decode("ascii") if isinstance(name, bytes) else str(name))
        if self.dtype.kind not in _KINDS:
            raise pickle.UnpicklingError(f"an array of {self.dtype}, expected numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order: Any = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.dtype = self.dtype.newbyteorder(order)


def _build(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError("an array without bytes or type")
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise pickle.UnpicklingError("an array of impossible shape")
    wanted = math.prod(shape) * dtype.dtype.itemsize
    if len(content) != wanted:
        raise pickle.UnpicklingError(f"an array of {wanted} bytes, of which there are {len(content)}")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _rebuild(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.array = _build(content, dtype, shape, order)
    return made


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


_MADE: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Function(_reconstruct),  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _Function(_reconstruct),  # NumPy 2
    ("numpy.core.numeric", "_frombuffer"): _Function(_rebuild),  # protocol 5
    ("numpy._core.numeric", "_frombuffer"): _Function(_rebuild),
    ("__builtin__", "bytes"): _Function(lambda: b""),  # no bytes, for Python 2
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
}
