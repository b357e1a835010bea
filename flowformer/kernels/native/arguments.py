"""Checks of the raw operators ``torch.ops.flowformer``: kernels trust every address, size and stride they are given.

They run in the operators themselves and in their fakes, where only values of ``cu_seqlens`` are unknown. The operations
of :mod:`flowformer.ops` have checked their arguments before, and say more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowformer.core.checks import describe
from flowformer.kernels.native.kernels import DTYPES

_AXES = {
    4: "(batch, length, heads, channels)",
    3: "(batch, heads, channels), or (batch, length, channels) for AFT",
}
_DEVICES = ("cpu", "meta")


def check_inputs(op: str, q: Tensor, k: Tensor, v: Tensor, rank: int, *, same_length: bool) -> None:
    """Check q, k and v: (batch, length, heads, channels), or without heads or length.

    Args:
        op: Name of the operator, for messages.
        q: Queries.
        k: Keys.
        v: Values.
        rank: Number of axes.
        same_length: Whether the second axis of q and k must agree.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device.
    """
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(f"flowformer::{op}: q, k and v must all be float32 or all bfloat16, {_shown(q, k, v)}")
    if not q.device == k.device == v.device or q.device.type not in _DEVICES:
        raise ValueError(f"flowformer::{op}: q, k and v must be on the CPU, {_shown(q, k, v)}")
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if not len(of_q) == len(of_k) == len(of_v) == rank:
        raise ValueError(f"flowformer::{op}: q, k and v must be {_AXES[rank]}, {_shown(q, k, v)}")
    if 0 in of_q[1:] or 0 in of_k[1:] or 0 in of_v[1:]:
        raise ValueError(f"flowformer::{op}: only the batch may be empty, {_shown(q, k, v)}")
    same = 2 if same_length else 1
    if of_q[:same] != of_k[:same] or of_q[2:] != of_k[2:] or of_k[:-1] != of_v[:-1]:
        raise ValueError(f"flowformer::{op}: the shapes of q, k and v do not fit together, {_shown(q, k, v)}")


def _shown(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"got q {describe(q)}, k {describe(k)}, v {describe(v)}"


def check_channels(op: str, q: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q and v have as many channels, as AFT requires."""
    if q.shape[-1] != v.shape[-1]:
        raise ValueError(f"flowformer::{op}: q and v must have as many channels, got {describe(q)}, {describe(v)}")


def check_part(
    op: str, name: str, part: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> None:
    """Check the shape, dtype and device of a further tensor, if it is given.

    Args:
        op: Name of the operator, for messages.
        name: Name of the argument.
        part: The tensor.
        shape: What its shape must be.
        dtype: What its dtype must be.
        like: A tensor on the right device.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device.
    """
    if part is None:
        return
    if part.dtype != dtype:
        raise TypeError(f"flowformer::{op}: {name} must be {str(dtype).removeprefix('torch.')}, got {describe(part)}")
    if part.device != like.device:
        raise ValueError(f"flowformer::{op}: {name} must be on {like.device} like q, got {describe(part)}")
    if part.shape != shape:
        raise ValueError(f"flowformer::{op}: {name} must have shape {tuple(shape)}, got {describe(part)}")


def check_whole(op: str, **parts: Tensor | None) -> None:
    """Raise ValueError if some parts of a state are given and others are not."""
    missing = [name for name, part in parts.items() if part is None]
    if missing and len(missing) < len(parts):
        raise ValueError(f"flowformer::{op}: a state is given whole or not at all, got no {', '.join(missing)}")


def check_packing(op: str, cu_seqlens: Tensor | None, q: Tensor, k: Tensor, *masks: Tensor | None) -> None:
    """Check the boundaries of a packed batch, if they are given; their values too where they have any.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device, values that are no boundaries, or masks beside them.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"flowformer::{op}: cu_seqlens must be int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.device != q.device or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"flowformer::{op}: cu_seqlens must be (N + 1,) on {q.device}, got {describe(cu_seqlens)}")
    if q.shape[0] != 1 or q.shape[1] != k.shape[1] or any(mask is not None for mask in masks):
        raise ValueError(
            f"flowformer::{op}: a packed batch has batch 1, as many queries as keys and no masks, got q {describe(q)},"
            f" k {describe(k)}, {sum(mask is not None for mask in masks)} masks"
        )


def check_log_decay(op: str, log_decay: Tensor | None, q: Tensor) -> None:
    """Check log-decays, if they are given: float32, (heads,) or q's axes but the channels.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device.
    """
    if log_decay is not None:
        shape = q.shape[-2:-1] if log_decay.ndim == 1 else q.shape[:-1]
        check_part(op, "log_decay", log_decay, shape, torch.float32, q)


def check_one_side(
    op: str, log_decay: Tensor | None, q: Tensor, k: Tensor, key_mask: Tensor | None, query_mask: Tensor | None
) -> None:
    """Raise ValueError if there is decay, and q and k are not of the same tokens, as far as shapes and masks tell."""
    if log_decay is not None and (q.shape[1] != k.shape[1] or (key_mask is None) != (query_mask is None)):
        raise ValueError(
            f"flowformer::{op}: with log_decay, q and k must be of the same tokens with one mask, got q {describe(q)},"
            f" k {describe(k)}, {sum(mask is not None for mask in (key_mask, query_mask))} masks"
        )


def check_one_mask(op: str, log_decay: Tensor | None, key_mask: Tensor | None, query_mask: Tensor | None) -> None:
    """Raise ValueError if there is decay, and the values of two masks differ."""
    if log_decay is None or key_mask is None or query_mask is None:
        return  # one that is absent beside another is found by check_one_side
    if key_mask is not query_mask and not torch.equal(key_mask, query_mask):
        raise ValueError(f"flowformer::{op}: with log_decay, key_mask and query_mask must be equal, got different ones")


def check_bounds(op: str, cu_seqlens: Tensor | None, total: int) -> None:
    """Raise ValueError unless the values of ``cu_seqlens``, if it is given, rise from 0 to the total length."""
    if cu_seqlens is None:
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != total or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(f"flowformer::{op}: cu_seqlens must rise from 0 to the total length {total}")
