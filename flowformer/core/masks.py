"""Padding and packing: mask padded tokens, and run an operation on the sequences of a packed batch.

A mask is boolean, ``True`` marks a real token. A packed batch has batch 1, all sequences end to end, and
``cu_seqlens``, the N + 1 boundaries of N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.tracing import is_traced, may_look


def fill(x: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """Set padded positions of x (batch, length, ...) to ``value``, also where they are NaN; mask has its first axes."""
    if mask is None:
        return x
    return x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.ndim - mask.ndim)), value)


def attending(key: Tensor | None, query: Tensor | None) -> Tensor | None:
    """Return which queries have an output, (batch, L): the real ones, of rows with a real key; ``None`` for all.

    Where there is only a mask of keys the result is (batch, 1).
    """
    if key is None:
        return query
    some = key.flatten(1).any(1).view(-1, *(1,) * (key.ndim - 1))
    return some.expand(key.shape[0], 1) if query is None else query & some


def close_up_if(tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Apply :func:`close_up` if there is a mask."""
    return (list(tensors), None, None) if mask is None else close_up(tensors, mask)


class _Bucket(NamedTuple):
    """Sequences of like length out of a packed batch, as the padded batch they make."""

    rows: list[int]  # which sequences, in their order
    positions: Tensor  # (n, width) where each token lies in the packed batch; padding points at a real place
    mask: Tensor  # (n, width)


def _buckets(cu_seqlens: Tensor, apart: bool = False) -> list[_Bucket]:
    """Group sequences, longest first, while the group's padding stays below one half.

    If ``apart``, each sequence by itself, without the empty ones.
    """
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups: list[list[int]] = []
    tokens = 0
    for row in order:
        if apart and not lengths[row]:
            continue
        tokens += lengths[row]
        if apart or not groups or 2 * tokens < lengths[groups[-1][0]] * (len(groups[-1]) + 1):
            groups.append([])
            tokens = lengths[row]
        groups[-1].append(row)
    buckets = []
    for rows in map(sorted, groups):
        start = torch.tensor([bounds[row] for row in rows])
        length = torch.tensor([lengths[row] for row in rows])
        offset = torch.arange(max(1, *(lengths[row] for row in rows)))
        mask = offset < length[:, None]
        positions = (start[:, None] + offset).masked_fill(~mask, 0)
        buckets.append(_Bucket(rows, positions.to(cu_seqlens.device), mask.to(cu_seqlens.device)))
    return buckets


def run_packed(
    dense: Callable[..., tuple[Tensor, Any]], tensors: Sequence[Tensor], cu_seqlens: Tensor, initial_state: Any = None,
    *, apart: bool = False,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Run an operation on every sequence of a packed batch.

    Args:
        dense: ``dense(*tensors, mask, state) -> (out, state or None)`` on a padded batch, mask (batch, length).
        tensors: Each (1, total length, ...).
        cu_seqlens: (N + 1,), checked.
        initial_state: State of batch N, or ``None``.
        apart: Whether each sequence must be run by itself, since padding or other rows would change its output; of an
            operation without a state.

    Returns:
        Output (1, total length, ...) and the state of batch N (``None`` where the operation returns none).
    """
    if is_traced():
        if apart:
            raise ValueError("a packed batch of an operation whose outputs depend on padding cannot be traced")
        return _run_packed_in_a_graph(dense, tensors, cu_seqlens, initial_state)
    outs, places, states, rows = [], [], [], []
    for bucket in _buckets(cu_seqlens, apart):
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
    if len(outs) == 1:  # all sequences, in their order
        return outs[0].unsqueeze(0), states[0]
    out = torch.cat(outs).index_select(0, torch.cat(places).argsort()).unsqueeze(0)
    if states[0] is None:
        return out, None
    order = torch.tensor(rows, device=cu_seqlens.device).argsort()
    return out, type(states[0])(*(torch.cat(parts)[order] for parts in zip(*states, strict=True)))


def _run_packed_in_a_graph(
    dense: Callable[..., tuple[Tensor, Any]], tensors: Sequence[Tensor], cu_seqlens: Tensor, initial_state: Any
) -> tuple[Tensor, Any]:
    """The same where lengths must not be looked at: each sequence is padded to the length of the whole batch."""
    total = tensors[0].shape[1]
    place = torch.arange(total, device=cu_seqlens.device)
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    mask = place < (end - start).unsqueeze(1)
    positions = (start.unsqueeze(1) + place).masked_fill(~mask, 0)
    padded = (tensor[0].index_select(0, positions.flatten()).unflatten(0, positions.shape) for tensor in tensors)
    out, state = dense(*padded, mask, initial_state)
    row = torch.searchsorted(end, place, right=True)
    return out.flatten(0, 1).index_select(0, row * total + place - start[row]).unsqueeze(0), state


def close_up(tensors: Sequence[Tensor], mask: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Move the real tokens of each row to its start, in their order, for operations that depend on positions.

    Args:
        tensors: Each (batch, length, ...).
        mask: (batch, length), True = real token.

    Returns:
        The tensors (batch, width, ...), where width is the most real tokens of a row (the whole length on a GPU, and
        while a graph is traced), the mask of what is real in them, and for :func:`spread` where each token came from,
        (batch, width).
    """
    batch, length = mask.shape
    # Where each token goes: behind the real ones before it, and padding behind all real ones.
    goals = torch.where(mask, mask.cumsum(1) - 1, mask.sum(1, keepdim=True) + (~mask).cumsum(1) - 1)
    place = torch.arange(length, device=mask.device).expand(batch, -1)
    places = torch.zeros_like(goals).scatter(1, goals, place)
    if may_look(mask) and batch:
        places = places[:, : max(1, int(mask.sum(1).max()))]
    rows = torch.arange(batch, device=mask.device).unsqueeze(1) * length
    places = rows + places
    closed = [t.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape) for t in (*tensors, mask)]
    return closed[:-1], closed[-1], places


def spread(x: Tensor, places: Tensor, length: int) -> Tensor:
    """Move tokens (batch, width, ...) back to their positions before :func:`close_up`; zeros elsewhere."""
    whole = x.new_zeros(x.shape[0] * length, *x.shape[2:])
    return whole.index_copy(0, places.flatten(), x.flatten(0, 1)).unflatten(0, (x.shape[0], length))
