"""Padding, packing and every check on what comes in.

All attention operations share one vocabulary:

* tensors are ``(batch, length, heads, channels)``, or ``(batch, length, channels)`` for AFT, see :class:`Layout`;
* a mask is boolean, ``True`` marks a real token;
* a packed batch has batch 1, all sequences end to end, and ``cu_seqlens``, the N + 1 boundaries of N sequences.

An operation calls :func:`check` once. After that it may trust shapes, dtypes and devices.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Stands for the logarithm of zero. Finite, because -inf minus -inf is NaN, in a gradient too.
LOG_ZERO = -1e30


class Masks(NamedTuple):
    """Which tokens are real: ``key`` (batch, S) and ``query`` (batch, L), boolean; ``None`` where all of them are."""

    key: Tensor | None
    query: Tensor | None


def describe(tensor: Any) -> str:
    """What a value is, for an error message: shape, dtype and device of a tensor, else its type."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_dtype(what: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that is not a supported floating one."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{what} must be float16, bfloat16, float32 or float64, got {dtype}")


class Layout(NamedTuple):
    """What an operation takes.

    Attributes:
        axes: Names of the axes of q, k and v.
        paired: What is self-attention, with as many queries as keys, in the bidirectional form too; ``""`` for nothing.
        heads: Whether the keys of (batch, length, channels) have one channel for each head, into which q and v split.
    """

    axes: str = "batch, length, heads, channels"
    paired: str = ""
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
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Masks:
    """Check everything an attention operation is given and resolve its masks.

    Args:
        op: Name of the operation, for messages.
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        layout: The axes, where they are others, and whether L == S.
        causal: Whether output t may depend on positions up to t only; wants L == S.
        key_padding_mask: (batch, S). Says the queries' padding too when L == S and no ``query_padding_mask`` is given.
        query_padding_mask: (batch, L).
        cu_seqlens: (N + 1,) boundaries of a packed batch; wants batch 1, L == S and no masks.

    Returns:
        The masks of keys and of queries.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device or combination.
    """
    _check_tensors(op, q, k, v, layout)
    batch, length, source_length = q.shape[0], q.shape[1], k.shape[1]
    paired = layout.paired or ("causal attention" if causal else "")
    if length != source_length and paired:
        raise ValueError(f"{op}: {paired} wants as many queries as keys, got {length} and {source_length}")
    for name, mask, size in (
        ("key_padding_mask", key_padding_mask, source_length),
        ("query_padding_mask", query_padding_mask, length),
    ):
        if mask is not None:
            _check_mask(op, name, mask, (batch, size), q.device)
    if paired and query_padding_mask is not None:
        raise ValueError(f"{op}: {paired} is self-attention: key_padding_mask says both, drop query_padding_mask")
    if cu_seqlens is not None:
        if key_padding_mask is not None or query_padding_mask is not None:
            raise ValueError(f"{op}: a packed batch has no padding: give cu_seqlens or padding masks, not both")
        _check_packing(op, cu_seqlens, q, k, layout)
    if query_padding_mask is None and length == source_length:
        query_padding_mask = key_padding_mask
    return Masks(key_padding_mask, query_padding_mask)


def _check_tensors(op: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    rank = layout.axes.count(",") + 1
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {describe(tensor)}")
        check_dtype(f"{op}: {name}", tensor.dtype)
        if tensor.ndim != rank:
            raise ValueError(f"{op}: {name} must be ({layout.axes}), got {describe(tensor)}")
        if min(tensor.shape[1:]) < 1:
            what = "token, head and channel" if rank == 4 else "token and channel"
            raise ValueError(f"{op}: {name} must have at least one {what}, got {describe(tensor)}")
    shown = f"got q {describe(q)}, k {describe(k)}, v {describe(v)}"
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{op}: q, k and v must share one dtype, {shown}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, k and v must be on one device, {shown}")
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
        raise ValueError(f"{op}: the heads, which k has one channel for, must divide the channels of v, {shown}")


def _check_mask(op: str, name: str, mask: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be a boolean tensor (True = real token), got {describe(mask)}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {describe(mask)}")
    if mask.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like q, got {describe(mask)}")


def _check_packing(op: str, cu_seqlens: Tensor, q: Tensor, k: Tensor, layout: Layout) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be an int32 tensor, got {describe(cu_seqlens)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{op}: cu_seqlens must hold the N + 1 boundaries of N sequences, got {describe(cu_seqlens)}")
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        axes = layout.axes.replace("batch, length", "1, total length")
        raise ValueError(f"{op}: a packed batch is ({axes}) for q, k and v alike, got q {describe(q)}, k {describe(k)}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1] or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to the total length {q.shape[1]}, got {bounds}")


def check_step(op: str, q: Tensor, k: Tensor, v: Tensor, state: Any, state_type: type, layout: Layout = HEADS) -> None:
    """Check one decoding step: q, k and v without the axis of length, and the state they continue.

    Raises:
        TypeError: for a wrong type or dtype, the state's included.
        ValueError: for a wrong shape or device.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {describe(tensor)}")
        axes = layout.axes.replace("length, ", "")
        if tensor.ndim != axes.count(",") + 1:
            raise ValueError(f"{op}: {name} of one step must be ({axes}), got {describe(tensor)}")
    _check_tensors(op, q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), layout)
    if not isinstance(state, state_type):
        raise TypeError(f"{op}: state must be a {state_type.__name__}, got {describe(state)}")


def check_state(op: str, state: Any, like: Any) -> None:
    """Check that ``state`` has the type, shapes, dtypes and device of ``like``, a fresh state for the same inputs."""
    if type(state) is not type(like):
        raise TypeError(f"{op}: initial_state must be a {type(like).__name__}, got {describe(state)}")
    for name, got, wanted in zip(like._fields, state, like, strict=True):
        if (
            not isinstance(got, Tensor)
            or got.shape != wanted.shape
            or got.dtype != wanted.dtype
            or got.device != wanted.device
        ):
            raise ValueError(f"{op}: initial_state.{name} must be {describe(wanted)}, got {describe(got)}")


def check_state_use(op: str, causal: bool, initial_state: Any, return_state: bool) -> None:
    """Refuse a state where there is none: bidirectional attention has no past to continue."""
    if not causal and (initial_state is not None or return_state):
        raise ValueError(f"{op}: initial_state and return_state want causal=True")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an operation computes in: float32 for half precision, else its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def state_dtype(device: torch.device) -> torch.dtype:
    """The dtype of running sums: float64, because a float32 sum of a million like terms is off by one percent.

    Adding 0.35 to a float32 sum of 300,000 rounds every addend to a multiple of 1/32. Devices without float64
    (Apple's GPUs) keep float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off: the operations choose the precision of their sums themselves."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward pass of an autograd function run without autocast, as its forward pass does."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads_out: Tensor) -> Any:
        with no_autocast(grads_out[0].device):
            return backward(ctx, *grads_out)

    return run


def fill(x: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """Put ``value`` at padded positions of x (batch, length, ...), NaN included; mask is (batch, length)."""
    if mask is None:
        return x
    return x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.ndim - 2)), value)


class _Bucket(NamedTuple):
    """Sequences of like length out of a packed batch, as the padded batch they make."""

    rows: list[int]  # which sequences
    positions: Tensor  # (n, width) where each token lies in the packed batch; padding points at a real place
    mask: Tensor  # (n, width)


def _buckets(cu_seqlens: Tensor) -> list[_Bucket]:
    """Group sequences, longest first, for as long as the group's padding stays below one half."""
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups: list[list[int]] = []
    tokens = 0
    for row in order:
        tokens += lengths[row]
        if not groups or 2 * tokens < lengths[groups[-1][0]] * (len(groups[-1]) + 1):
            groups.append([])
            tokens = lengths[row]
        groups[-1].append(row)
    buckets = []
    for rows in groups:
        start = torch.tensor([bounds[row] for row in rows])
        length = torch.tensor([lengths[row] for row in rows])
        offset = torch.arange(max(1, lengths[rows[0]]))
        mask = offset < length[:, None]
        positions = (start[:, None] + offset).masked_fill(~mask, 0)
        buckets.append(_Bucket(rows, positions.to(cu_seqlens.device), mask.to(cu_seqlens.device)))
    return buckets


def run_packed(
    dense: Callable[..., tuple[Tensor, Any]], tensors: Sequence[Tensor], cu_seqlens: Tensor, initial_state: Any = None
) -> tuple[Tensor, Any]:
    """Run an operation on every sequence of a packed batch.

    Args:
        dense: ``dense(*tensors, mask, state) -> (out, state or None)`` on a padded batch, mask (batch, length).
        tensors: Each (1, total length, ...).
        cu_seqlens: (N + 1,), checked.
        initial_state: State of batch N, or ``None``.

    Returns:
        Output (1, total length, ...) and the state of batch N (``None`` where the operation returns none).
    """
    outs, places, states, rows = [], [], [], []
    for bucket in _buckets(cu_seqlens):
        state = initial_state
        if initial_state is not None:
            index = torch.tensor(bucket.rows, device=cu_seqlens.device)
            state = type(initial_state)(*(part[index] for part in initial_state))
        shape, positions = bucket.positions.shape, bucket.positions.flatten()
        # index_select, not indexing: its gradient is added in one pass.
        padded = (tensor[0].index_select(0, positions).unflatten(0, shape) for tensor in tensors)
        out, state = dense(*padded, bucket.mask, state)
        real = bucket.mask.flatten().nonzero().squeeze(-1)
        outs.append(out.flatten(0, 1).index_select(0, real))
        places.append(positions[real])
        states.append(state)
        rows += bucket.rows
    out = torch.cat(outs).index_select(0, torch.cat(places).argsort()).unsqueeze(0)
    if states[0] is None:
        return out, None
    order = torch.tensor(rows, device=cu_seqlens.device).argsort()
    return out, type(states[0])(*(torch.cat(parts)[order] for parts in zip(*states, strict=True)))


def close_up(tensors: Sequence[Tensor], mask: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Move the real tokens of each row to its front, in their order, for what goes by their places.

    Args:
        tensors: Each (batch, length, ...).
        mask: (batch, length), True = real token.

    Returns:
        The tensors (batch, width, ...), where width is the most real tokens of a row (the whole length while a graph is
        traced), the mask of what is real in them, and for :func:`spread` where each token came from, (batch, width).
    """
    places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    if not torch.compiler.is_compiling():
        places = places[:, : max(1, int(mask.sum(1).max()))]
    rows = torch.arange(len(mask), device=mask.device).unsqueeze(1) * mask.shape[1]
    places = rows + places
    closed = [t.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape) for t in (*tensors, mask)]
    return closed[:-1], closed[-1], places


def spread(x: Tensor, places: Tensor, length: int) -> Tensor:
    """Put tokens (batch, width, ...) that :func:`close_up` moved back to their places; zeros elsewhere."""
    whole = x.new_zeros(len(x) * length, *x.shape[2:])
    return whole.index_copy(0, places.flatten(), x.flatten(0, 1)).unflatten(0, (len(x), length))
