"""Rows of AFT's forms: with what weights a query takes its mean. See :mod:`flowformer.ops.maps`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowformer.ops.aft import conv as _conv
from flowformer.ops.aft import local as _local
from flowformer.ops.aft.run import PositionBias, check_bias, check_places
from flowformer.ops.maps import Rows, check_pair, check_rows, seen_keys, softmax_over, wide
from flowformer.ops.masking import CHANNELS, LOG_ZERO, Masks, describe, fill, state_dtype


def aft_full_rows(
    q: Tensor,
    k: Tensor,
    rows: Rows,
    position_bias: PositionBias,
    *,
    heads: int | None = None,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """Rows of :func:`flowformer.ops.aft_full`, whose channels are weighed each on its own.

    Args:
        q: Queries (batch, L, channels); only their number matters.
        k: Keys (batch, S, channels).
        rows: Places of the queries in question.
        position_bias: As the operation takes it.
        heads: Average over so many groups of neighbouring channels; each channel by itself if absent.
        causal: Which form.
        key_padding_mask: Padding of keys.
        query_padding_mask: Padding of queries.

    Returns:
        Weights (batch, heads or channels, rows, S); zeros from padded queries, and to padded keys.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    op = "aft_full_rows"
    masks = check_pair(op, q, k, causal, key_padding_mask, query_padding_mask, CHANNELS)
    w, _ = _position_bias(op, position_bias, q, k, rows, masks)
    return _aft_rows(op, q, k, rows, w, heads, causal, masks)


def aft_local_rows(
    q: Tensor,
    k: Tensor,
    rows: Rows,
    position_bias: PositionBias,
    window: int,
    *,
    hard: bool = False,
    heads: int | None = None,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Rows of :func:`flowformer.ops.aft_local`. Arguments and result as those of :func:`aft_full_rows`.

    Args:
        q: Queries.
        k: Keys.
        rows: Places of the queries in question.
        position_bias: As the operation takes it.
        window: Likewise.
        hard: Likewise.
        heads: Average over so many groups of channels.
        causal: Which form.
        key_padding_mask: Padding.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    op = "aft_local_rows"
    _local.check_window(op, window)
    masks = check_pair(op, q, k, causal, key_padding_mask, None, _local.LAYOUT)
    w, apart = _position_bias(op, position_bias, q, k, rows, masks)
    w = w.masked_fill(apart.abs() >= window, LOG_ZERO if hard else 0.0)
    return _aft_rows(op, q, k, rows, w, heads, causal, masks)


def aft_simple_rows(
    q: Tensor,
    k: Tensor,
    rows: Rows,
    *,
    heads: int | None = None,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """Rows of :func:`flowformer.ops.aft_simple`. Arguments and result as those of :func:`aft_full_rows`.

    Args:
        q: Queries.
        k: Keys.
        rows: Places of the queries in question.
        heads: Average over so many groups of channels.
        causal: Which form.
        key_padding_mask: Padding of keys.
        query_padding_mask: Padding of queries.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    op = "aft_simple_rows"
    masks = check_pair(op, q, k, causal, key_padding_mask, query_padding_mask, CHANNELS)
    none = torch.zeros(1, len(rows), k.shape[1], dtype=state_dtype(k.device), device=k.device)
    return _aft_rows(op, q, k, rows, none, heads, causal, masks)


def aft_conv_rows(
    q: Tensor,
    k: Tensor,
    rows: Rows,
    filters: Tensor,
    *,
    hard: bool = False,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Rows of :func:`flowformer.ops.aft_conv`, the same for all channels of a head.

    Args:
        q: Queries (batch, L, channels), or (batch, height, width, channels) of images; only their number matters.
        k: Keys (batch, L, heads) or (batch, height, width, heads).
        rows: Places of the queries in question; those of an image are counted row by row.
        filters: As the operation takes them.
        hard: Likewise.
        causal: Which form; for sequences.
        key_padding_mask: (batch, L) or (batch, height, width) boolean, True = real.

    Returns:
        Weights (batch, heads, rows, L), L = height width for images; zeros from and to padding.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    op = "aft_conv_rows"
    images = _check_filters(op, filters, q, k, key_padding_mask, causal)
    size = q.shape[1:3]
    if images:
        q, k = q.flatten(1, 2), k.flatten(1, 2)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.flatten(1)
    masks = check_pair(op, q, k, causal, key_padding_mask, None, _conv.LAYOUT)
    places = check_rows(op, rows, q)
    taps = _taps_of_image(filters, size, places) if images else _taps_of_sequence(filters, places, q, masks, causal)
    outside = filters.new_full((len(filters), 1), LOG_ZERO if hard else 0.0)
    w = torch.cat([filters.flatten(1), outside], 1).to(state_dtype(k.device))[:, taps].transpose(0, 1)
    seen = seen_keys(places, k.shape[1], masks, causal).unsqueeze(1)
    return softmax_over(wide(fill(k, masks.key)).mT.unsqueeze(2) + w, seen)


def _check_filters(op: str, filters: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether filters are for images, if they fit what they are for."""
    if not isinstance(filters, Tensor) or filters.ndim not in ((2,) if causal else (2, 3)):
        raise ValueError(f"{op}: filters must be (heads, taps), or (heads, rows, columns), got {describe(filters)}")
    if len(filters) != k.shape[-1] or filters.device != k.device:
        raise ValueError(
            f"{op}: filters must be as many as heads, {k.shape[-1]} on {k.device}, got {describe(filters)}"
        )
    if filters.ndim == 2:
        return False
    if q.ndim != 4 or q.shape[:3] != k.shape[:3] or (mask is not None and mask.shape != q.shape[:3]):
        shown = ", ".join(describe(x) for x in (q, k) if x is not None)
        raise ValueError(f"{op}: for images q and k must be (batch, height, width, channels), masks alike, got {shown}")
    return True


def _taps_of_sequence(filters: Tensor, places: Tensor, q: Tensor, masks: Masks, causal: bool) -> Tensor:
    """Which tap of a filter weighs each key for the queries at ``places``, (batch or 1, rows, L); the last is none."""
    order, size = _order(masks.key, q), filters.shape[1]
    taps = order.unsqueeze(1) - order[:, places].unsqueeze(2) + (size - 1 if causal else size // 2)
    return taps.masked_fill((taps < 0) | (taps >= size), size)


def _taps_of_image(filters: Tensor, size: Sequence[int], places: Tensor) -> Tensor:
    """The same for pixels, (1, rows, height width)."""
    (height, width), (rows, columns) = size, filters.shape[1:]
    pixels = torch.arange(height * width, device=places.device)
    down = pixels // width - (places // width).unsqueeze(1) + rows // 2
    across = pixels % width - (places % width).unsqueeze(1) + columns // 2
    far = (down < 0) | (down >= rows) | (across < 0) | (across >= columns)
    return (down * columns + across).masked_fill(far, rows * columns).unsqueeze(0)


def _position_bias(
    op: str, position_bias: PositionBias, q: Tensor, k: Tensor, rows: Rows, masks: Masks
) -> tuple[Tensor, Tensor]:
    """Bias of some queries, and how far keys are ahead of them: (batch or 1, rows, S). Places count real tokens."""
    bias = check_bias(op, position_bias, k.new_empty(0, dtype=state_dtype(k.device)))
    queries = _order(masks.query, q)[:, check_rows(op, rows, q)]
    keys = _order(masks.key, k)
    check_places(op, bias, 1 + max(int(queries.max()), int(keys.max())))
    table, *factor = bias
    w = table[queries] @ factor[0][keys].mT if factor else table[queries.unsqueeze(2), keys.unsqueeze(1)]
    return w, keys.unsqueeze(1) - queries.unsqueeze(2)


def _aft_rows(
    op: str, q: Tensor, k: Tensor, rows: Rows, w: Tensor, heads: int | None, causal: bool, masks: Masks
) -> Tensor:
    """Means over groups of channels of softmax_j(k_j + w_ij), for w (batch or 1, rows, S)."""
    groups = k.shape[-1] if heads is None else heads
    if groups < 1 or k.shape[-1] % groups:
        raise ValueError(f"{op}: heads must divide the channels, {k.shape[-1]}, got {heads}")
    places = check_rows(op, rows, q)
    K, seen = wide(fill(k, masks.key)), seen_keys(places, k.shape[1], masks, causal)
    out = []
    for row in range(len(places)):  # one at a time, for each is as large as the keys
        weights = softmax_over((K + w[:, row].unsqueeze(2)).mT, seen[:, row].unsqueeze(1))
        out.append(weights.unflatten(1, (groups, -1)).mean(2))
    return torch.stack(out, 2)


def _order(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Place of each token (batch, length, ...) among the real ones, (batch or 1, length)."""
    if mask is None:
        return torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    return (mask.cumsum(-1) - 1).clamp(min=0)
