"""Argument checks of attention operations; each error states the expected value and the one passed.

An operation calls :func:`check` once. After that it may trust shapes, dtypes and devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.core.precision import FLOAT_DTYPES, dtype_and_device
from flowformer.core.tracing import is_traced

LARGEST_INTEGER = 2**63 - 1  # that PyTorch takes
LARGEST_SIZE = 2**31 - 1  # of one axis; PyTorch counts elements in 64 bits, and a tensor has two axes of a size or more


class Masks(NamedTuple):
    """Masks of real tokens: ``key`` (batch, S) and ``query`` (batch, L), boolean; ``None`` if all tokens are real."""

    key: Tensor | None
    query: Tensor | None


def describe(tensor: Any) -> str:
    """Describe a value in an error message: shape, dtype and device of a tensor, else its type."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_bidirectional(op: str, causal: Any, reason: str) -> None:
    """Raise a ValueError where the causal form is asked for of an operation that has none, for a reason."""
    if causal is True:
        raise ValueError(f"{op}: there is no causal form, since {reason}: pass causal=False")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError for an option that is none of the given strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(name: str, value: Any) -> None:
    """Raise a TypeError for an option that is no whole number."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_number(name: str, value: Any, at_least: float | None = None, at_most: float | None = None) -> None:
    """Raise a TypeError for an option that is no number, a ValueError for one that is not finite or out of range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if value != value or value in (float("inf"), -float("inf")):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(
            f"{name} must be at most {LARGEST_INTEGER} where it is an integer, got {value.bit_length()} bits"
        )
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got {value!r}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be at most {at_most:g}, got {value!r}")


def check_probability(name: str, value: Any) -> None:
    """Raise a TypeError for an option that is no number, a ValueError for one that is not at least 0 and below 1."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")


def check_sizes(**sizes: Any) -> None:
    """Raise a TypeError for a size that is no whole number, a ValueError for one out of range."""
    for name, size in sizes.items():
        check_integer(name, size)
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
        if size > LARGEST_SIZE:
            raise ValueError(f"{name} must be at most {LARGEST_SIZE}, got {size}")


def check_optional_sizes(**sizes: Any) -> None:
    """As :func:`check_sizes`, for sizes that may be ``None``."""
    check_sizes(**{name: size for name, size in sizes.items() if size is not None})


def check_flag(name: str, value: Any) -> None:
    """Raise a TypeError for an option that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_tokens_of(what: str, x: Any, axes: str, channels: int) -> None:
    """Raise unless ``x`` is a tensor (axes, channels) of a supported floating-point dtype; ``what`` names it.

    Raises:
        TypeError: for anything but such a tensor.
        ValueError: for another rank or number of channels, or a sequence without a token.
    """
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{what} must be a tensor of dtype float16, bfloat16, float32 or float64, got {describe(x)}")
    if x.ndim != axes.count(",") + 2 or x.shape[-1] != channels:
        raise ValueError(f"{what} must be ({axes}, {channels}), got {describe(x)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{what} must have at least one token, got {describe(x)}")


def check_fresh_state(what: str, batch: Any, dtype: torch.dtype = torch.float32, **sizes: Any) -> None:
    """Raise unless a fresh state can have these sizes: whole numbers, 0 or more sequences and 1 or more of the rest."""
    check_dtype(what, dtype)
    for name, size in {"batch": batch, **sizes}.items():
        if isinstance(size, (torch.SymInt, Tensor)):
            continue  # of a graph that is traced
        check_integer(f"{what}: {name}", size)
        least = 0 if name == "batch" else 1
        if size < least:
            raise ValueError(f"{what}: {name} must be at least {least}, got {size}")


def apply(what: str, layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)``; ``what`` names x in messages.

    Raises:
        TypeError: if the layer fails, and its parameters have another dtype or are on another device than x.
    """
    try:
        return layer(x)
    except RuntimeError as error:
        # Not earlier: hooks may move what a layer is called with, and a layer's parameters.
        own = dtype_and_device(layer)
        if x.device == own["device"] and (x.dtype == own["dtype"] or not (x.is_floating_point() or x.is_complex())):
            raise
        wanted = f"{str(own['dtype']).removeprefix('torch.')} on {own['device']}"
        raise TypeError(f"{what} must be {wanted} like the weights of the module, got {describe(x)}") from error


def check_dtype(what: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless a dtype is a supported floating-point dtype."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{what} must be float16, bfloat16, float32 or float64, got {dtype}")


def check_dense(what: str, tensor: Any) -> None:
    """Raise TypeError for a sparse, nested or otherwise not strided tensor; what is no tensor is checked elsewhere."""
    if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout != torch.strided):
        if tensor.is_nested:
            raise TypeError(f"{what} must be a dense tensor, got a nested one: pack its sequences, with cu_seqlens")
        raise TypeError(f"{what} must be a dense tensor, got layout {tensor.layout}: call to_dense()")


class Layout(NamedTuple):
    """The axes of an operation's inputs.

    Attributes:
        axes: Names of the axes of q, k and v.
        self_only: Why there must be as many queries as keys in the bidirectional form too; ``""`` where there need not.
        heads: Whether the keys of (batch, length, channels) have one channel for each head, into which q and v split.
    """

    axes: str = "batch, length, heads, channels"
    self_only: str = ""
    heads: bool = False


HEADS = Layout()
CHANNELS = Layout("batch, length, channels")


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = HEADS,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Masks:
    """Check the arguments of an attention operation and resolve its masks.

    Args:
        op: Name of the operation, for messages.
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        layout: The axes, where they are others, and whether L == S.
        causal: Whether output t may depend on positions up to t only; requires L == S.
        mask: (batch, L), of the queries; of keys and values too where L == S and there is no ``context_mask``.
        context_mask: (batch, S), of keys and values in cross-attention.
        cu_seqlens: (N + 1,) boundaries of a packed batch; requires batch 1, L == S and no masks.

    Returns:
        The masks of keys and of queries.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device or combination.
    """
    _check_tensors(op, q, k, v, layout)
    batch, length, source_length = q.shape[0], q.shape[1], k.shape[1]
    reason = layout.self_only or ("it is causal" if causal else "")
    if length != source_length and reason:
        raise ValueError(
            f"{op}: this is self-attention, since {reason}: q and k must have the same length, "
            f"got {length} and {source_length}"
        )
    for name, given, size in (("mask", mask, length), ("context_mask", context_mask, source_length)):
        if given is not None:
            check_mask(f"{op}: {name}", given, (batch, size), q.device)
    if reason and context_mask is not None:
        raise ValueError(f"{op}: this is self-attention, since {reason}: pass mask, not context_mask")
    if cu_seqlens is not None:
        if mask is not None or context_mask is not None:
            raise ValueError(f"{op}: a packed batch has no padding: pass cu_seqlens or masks, not both")
        _check_packing(op, cu_seqlens, q, k, layout)
    if length == source_length and context_mask is None:
        context_mask = mask
    return Masks(context_mask, mask)


def _check_tensors(op: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    rank = layout.axes.count(",") + 1
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {describe(tensor)}")
        check_dense(f"{op}: {name}", tensor)
        check_dtype(f"{op}: {name}", tensor.dtype)
        if tensor.ndim != rank:
            raise ValueError(f"{op}: {name} must be ({layout.axes}), got {describe(tensor)}")
        if min(tensor.shape[1:]) < 1:
            what = "token, head and channel" if rank == 4 else "token and channel"
            raise ValueError(f"{op}: {name} must have at least one {what}, got {describe(tensor)}")
    shown = f"got q {describe(q)}, k {describe(k)}, v {describe(v)}"
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{op}: q, k and v must have the same dtype, {shown}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, k and v must be on the same device, {shown}")
    if layout.axes == HEADS.axes:
        if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            raise ValueError(f"{op}: q and k must agree in batch, heads and channels, {shown}")
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(f"{op}: k and v must agree in batch, length and heads, {shown}")
        return
    if q.shape[0] != k.shape[0] or q.shape[-1] != v.shape[-1]:
        raise ValueError(f"{op}: q and k must agree in batch, q and v in channels, {shown}")
    if k.shape[:-1] != v.shape[:-1] or (not layout.heads and k.shape[-1] != v.shape[-1]):
        what = "batch and length" if layout.heads else "batch, length and channels"
        raise ValueError(f"{op}: k and v must agree in {what}, {shown}")
    if layout.heads and v.shape[-1] % k.shape[-1]:
        raise ValueError(
            f"{op}: k has one channel per head, and the number of heads must divide the channels of v, {shown}"
        )


def check_mask(what: str, mask: Any, shape: Sequence[int], device: torch.device) -> None:
    """Raise unless a mask is a boolean tensor of a shape, on a device; ``what`` names it in messages.

    Raises:
        TypeError: for anything but a boolean tensor.
        ValueError: for another shape or device.
    """
    check_dense(what, mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{what} must be a boolean tensor (True = real token), got {describe(mask)}")
    if mask.shape != torch.Size(shape):
        raise ValueError(f"{what} must have shape {tuple(shape)}, got {describe(mask)}")
    if mask.device != device:
        raise ValueError(f"{what} must be on {device} like its tokens, got {describe(mask)}")


def _check_packing(op: str, cu_seqlens: Tensor, q: Tensor, k: Tensor, layout: Layout) -> None:
    check_dense(f"{op}: cu_seqlens", cu_seqlens)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be an int32 tensor, got {describe(cu_seqlens)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{op}: cu_seqlens must hold the N + 1 boundaries of N sequences, got {describe(cu_seqlens)}")
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        axes = layout.axes.replace("batch, length", "1, total length")
        raise ValueError(f"{op}: a packed batch is ({axes}) for q, k and v alike, got q {describe(q)}, k {describe(k)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{op}: cu_seqlens must be on {q.device} like q, got {describe(cu_seqlens)}")
    if is_traced():
        return  # a graph cannot look at numbers
    bounds = _values(op, cu_seqlens)
    if bounds[0] != 0 or bounds[-1] != q.shape[1] or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to the total length {q.shape[1]}, got {bounds}")


def _values(op: str, cu_seqlens: Tensor) -> list[int]:
    if torch.compiler.is_compiling():
        return cu_seqlens.tolist()
    try:
        return cu_seqlens.tolist()
    except RuntimeError as error:  # also torch's NotImplementedError
        raise ValueError(
            f"{op}: a packed batch requires the values of cu_seqlens, which a meta or fake tensor does not have, got "
            f"{describe(cu_seqlens)}: pass a padded batch with a mask"
        ) from error


def check_table(what: str, tensor: Any, axes: str, sizes: Sequence[int | None], device: torch.device) -> None:
    """Raise unless a learned or random tensor has the given sizes, where ``None`` stands for any size above 0.

    Raises:
        TypeError: for anything but a floating-point tensor.
        ValueError: for another shape or device.
    """
    wanted = ", ".join(axis if size is None else str(size) for axis, size in zip(axes.split(", "), sizes, strict=True))
    check_dense(what, tensor)
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{what} must be a floating-point tensor ({wanted}), got {describe(tensor)}")
    fits = tensor.ndim == len(sizes) and all(
        n == size or (size is None and n > 0) for n, size in zip(tensor.shape, sizes, strict=True)
    )
    if not fits:
        raise ValueError(f"{what} must be ({wanted}), got {describe(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{what} must be on {device} like q, got {describe(tensor)}")


def check_step(op: str, q: Tensor, k: Tensor, v: Tensor, state: Any, state_type: type, layout: Layout = HEADS) -> None:
    """Check the arguments of a decoding step: q, k and v without the axis of length, and the state.

    Raises:
        TypeError: for a wrong type or dtype, the state's included.
        ValueError: for a wrong shape or device.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {describe(tensor)}")
        check_dense(f"{op}: {name}", tensor)
        axes = layout.axes.replace("length, ", "")
        if tensor.ndim != axes.count(",") + 1:
            raise ValueError(f"{op}: {name} of one step must be ({axes}), got {describe(tensor)}")
    _check_tensors(op, q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), layout)
    if not isinstance(state, state_type):
        raise TypeError(f"{op}: state must be a {state_type.__name__}, got {describe(state)}")


def check_state(op: str, state: Any, fresh: Any) -> None:
    """Check that ``state`` has the type, shapes, dtypes and device of an initial state for the same inputs.

    Where the fresh state has no tokens yet, (batch, 0, ...), ``state`` may have any number of them.
    """
    if type(state) is not type(fresh):
        raise TypeError(f"{op}: initial_state must be a {type(fresh).__name__}, got {describe(state)}")
    for name, part in zip(fresh._fields, state, strict=True):
        check_dense(f"{op}: initial_state.{name}", part)
    if isinstance(state[0], Tensor) and state[0].ndim > 1 and not fresh[0].shape[1]:
        tokens = state[0].shape[1]
        fresh = type(fresh)(*(part.new_empty(part.shape[0], tokens, *part.shape[2:]) for part in fresh))
    for name, got, wanted in zip(fresh._fields, state, fresh, strict=True):
        if (
            not isinstance(got, Tensor)
            or got.shape != wanted.shape
            or got.dtype != wanted.dtype
            or got.device != wanted.device
        ):
            raise ValueError(f"{op}: initial_state.{name} must be {describe(wanted)}, got {describe(got)}")


def check_state_use(op: str, has_state: bool, initial_state: Any, return_state: bool) -> None:
    """Raise ValueError for a state of a bidirectional operation, or of a mechanism without state."""
    if not has_state and (initial_state is not None or return_state):
        raise ValueError(f"{op}: initial_state and return_state require causal=True and a mechanism that has a state")
