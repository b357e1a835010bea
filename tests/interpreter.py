"""Triton's interpreter, as tests run it: with less work that it does again and again."""

# Of Triton's own objects, which have no types.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter

from flowformer.kernels.triton import launch


def interpret_faster() -> None:
    """Let the interpreter keep what it finds more than once: results are the same, in half of the time.

    Of infinity, and of NaN from it, which kernels drop, it does not warn, as a GPU does not.
    """
    np.seterr(over="ignore", invalid="ignore")
    launch.SEGMENT = 64  # sequences are short: some have several segments all the same
    _replace_language_once()
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    core.block_type.__init__ = _remembering(
        core.block_type.__init__, lambda element, shape: (element.name, *_sizes(shape))
    )
    core.tensor.__init__ = _make_tensor


def _replace_language_once() -> None:
    """Let Triton's language stay replaced by the interpreter's, which would replace it at each call of a function."""
    replace: Callable[[Any], Any] = interpreter._patch_lang
    done = set()

    def once(function: Any) -> SimpleNamespace:
        if function not in done:
            done.add(function)
            replace(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once


def _by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of a type of Triton that remembers results by the type's name: types of blocks have no hash."""
    found: dict[str, Any] = {}

    def remembering(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    return remembering


def _sizes(shape: Any) -> tuple[Any, ...]:
    """A shape whose sizes may be of Triton's constants."""
    return tuple(getattr(size, "value", size) for size in shape)


def _remembering(make: Callable[..., None], key_of: Callable[..., Any]) -> Callable[..., None]:
    """A constructor that gives equal arguments the attributes found for the first of them."""
    found: dict[Any, dict[str, Any]] = {}

    def remembering(self: Any, *arguments: Any) -> None:
        key = key_of(*arguments)
        if key not in found:
            make(self, *arguments)
            found[key] = dict(self.__dict__)
        self.__dict__.update(found[key])

    return remembering


@functools.cache
def _constants(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    shaped = SimpleNamespace(shape=sizes, scalar=None, is_block=lambda: True)
    first = core.tensor.__new__(core.tensor)
    _first_constructor(first, None, shaped)
    return first.shape, first.numel


_first_constructor = core.tensor.__init__


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    """``triton.language.tensor.__init__``, with the constants of a shape kept."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _constants(_sizes(type.shape) if type.is_block() else ())
