"""What the kernels of Flow-Attention and of linear attention are called with: the C interface of source/call.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.kernels.native.kernels import View, address, empty_like


class Side(ctypes.Structure):
    """Which tokens the sequences of one side have: struct ``Side``."""

    _fields_ = (("rows", ctypes.c_void_p), ("places", ctypes.c_void_p))


class State(ctypes.Structure):
    """A state, or the gradient of one: struct ``State``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("count", "sums", "log_normaliser", "memory"))


_NUMBERS = (
    *((name, ctypes.c_int64) for name in ("half", "feature_map", "competition", "allocation")),
    *((name, ctypes.c_double) for name in ("clamp", "eps", "flow_eps")),
)


class FlowCall(ctypes.Structure):
    """Struct ``FlowCall``. It holds addresses: what it is made of must live until it has run."""

    _fields_ = (
        *((name, View) for name in ("q", "k", "v", "out", "log_decay")),
        *((name, View) for name in ("grad_out", "grad_q", "grad_k", "grad_v", "grad_log_decay")),
        *((name, Side) for name in ("sinks", "sources")),
        *((name, State) for name in ("before", "after", "grad_before", "grad_after")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "key_channels", "value_channels", "threads")),
        ("rescale", ctypes.c_int64),
        *_NUMBERS,
    )


class StepCall(ctypes.Structure):
    """Struct ``StepCall``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_channels", "value_channels", "threads")),
        ("decay_of_rows", ctypes.c_int64),
        *_NUMBERS,
    )


class AttendCall(ctypes.Structure):
    """Struct ``AttendCall``, likewise."""

    _fields_ = (
        ("flow", FlowCall),
        *((name, View) for name in ("weight", "scale", "grad_weight", "grad_scale")),
        ("divides", ctypes.c_int64),
    )


def state_addresses(parts: Sequence[Tensor | None]) -> State:
    """Return a state by the addresses of its parts."""
    return State(*map(address, parts))


class Tokens(NamedTuple):
    """Which tokens the sequences of one side have, as tensors."""

    rows: Tensor
    places: Tensor | None

    def side(self) -> Side:
        """Return them by their addresses."""
        return Side(address(self.rows), address(self.places))


def tokens_of(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
    """Return the real tokens of x (batch, length, ...)."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        return Tokens(torch.stack([torch.zeros_like(bounds[1:]), bounds[:-1], bounds.diff()], 1), None)
    batch = torch.arange(x.shape[0], device=x.device)  # whatever the default device is
    if mask is None:
        return Tokens(torch.stack([batch, torch.zeros_like(batch), torch.full_like(batch, x.shape[1])], 1), None)
    counts = mask.sum(1)
    rows = torch.stack([batch, counts.cumsum(0) - counts, counts], 1)
    return Tokens(rows, mask.nonzero()[:, 1].to(torch.int32))


def number_view(x: Tensor | None) -> View:
    """Return the view of numbers (heads,) or (batch, length, heads); of ``None`` one that is null."""
    if x is None:
        return View()
    *tokens, of_heads = x.stride()
    return View(x.data_ptr(), *(tokens or (0, 0)), of_heads)


def empty_out(q: Tensor, v: Tensor, zero: bool) -> Tensor:
    """Allocate an output for queries q and values v; zeros if asked for."""
    if q.shape[1] == v.shape[1]:
        return empty_like(v, zero)
    return empty_like(q[..., :1].expand(*q.shape[:3], v.shape[3]), zero)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate gradients. Those of q and k grow in several passes: they are float32 until they are done."""
    return (
        empty_like(q, zero, torch.float32),
        empty_like(k, zero, torch.float32),
        empty_like(v, zero),
    )


def empty_log_decay_gradient(log_decay: Tensor | None, q: Tensor) -> Tensor | None:
    """Allocate the gradient of log-decays, by token in any case."""
    return None if log_decay is None else q.new_zeros(q.shape[:3], dtype=torch.float32)


def like_log_decay(grad: Tensor | None, log_decay: Tensor | None, q: Tensor) -> Tensor:
    """Return the gradient in the shape of log-decays; zeros where it is not wanted, nothing where there are none."""
    if log_decay is None or grad is None:
        return q.new_zeros(0 if log_decay is None else log_decay.shape, dtype=torch.float32)
    return grad if log_decay.ndim == 3 else grad.sum((0, 1), dtype=torch.float64).float()
