r"""Rows of weights of the forms of AFT, in float64: softmax_j(k_j + w_ij), channel by channel.

See :mod:`flowformer.mechanisms.aft` for the equations. The gate sigmoid(q_i) is no part of a row: it scales all of a
row alike, and rows add up to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import CHANNELS, describe
from flowformer.mechanisms.aft.blocks import Bias
from flowformer.mechanisms.aft.conv import LAYOUT as CONV_LAYOUT
from flowformer.mechanisms.aft.conv import check_filters, match_filters
from flowformer.mechanisms.aft.local import check_window
from flowformer.mechanisms.aft.run import PositionBias, check_bias, check_places
from flowformer.mechanisms.weights import Places, Rows, lower, rows_of, truth_of

BiasOf = Callable[[Tensor, int], Tensor]  # w of the queries at some places and the first keys, (groups or 1, rows, S)


def full_weights(q: Tensor, k: Tensor, position_bias: PositionBias, *, causal: bool = False) -> Rows:
    """Rows of AFT-full: w is a table, or the product of two factors."""
    w = check_bias("aft_full", position_bias, k)
    check_places("aft_full", w, max(len(q), len(k)))
    return _softmax_rows(k, lambda places, keys: _table(w, places, keys)[None], causal)


def local_weights(
    q: Tensor, k: Tensor, position_bias: PositionBias, window: int, *, hard: bool = False, causal: bool = False
) -> Rows:
    r"""Rows of AFT-local: w where \|t - j\| < window; elsewhere 0, or minus infinity with ``hard``."""
    check_window("aft_local", window)
    w = check_bias("aft_local", position_bias, k)
    check_places("aft_local", w, len(k))

    def bias(places: Tensor, keys: int) -> Tensor:
        outside = (torch.arange(keys, device=k.device) - places[:, None]).abs() >= window
        return _table(w, places, keys).masked_fill(outside, -torch.inf if hard else 0.0)[None]

    return _softmax_rows(k, bias, causal)


def simple_weights(q: Tensor, k: Tensor, *, causal: bool = False) -> Rows:
    """Rows of AFT-simple: w = 0."""
    return _softmax_rows(k, lambda places, keys: k.new_zeros(1, len(places), keys), causal)


def conv_weights(q: Tensor, k: Tensor, filters: Tensor, *, hard: bool = False, causal: bool = False) -> Rows:
    """Rows of AFT-conv along a sequence: w by distance, for keys (S, heads)."""
    if filters.ndim != 2:
        raise ValueError(f"aft_conv: filters of sequences must be (heads, taps), got {describe(filters)}")
    check_filters("aft_conv", filters, causal)
    match_filters("aft_conv", filters, k)
    taps = filters.shape[1]
    middle = taps - 1 if causal else taps // 2

    def bias(places: Tensor, keys: int) -> Tensor:
        tap = torch.arange(keys, device=k.device) - places[:, None] + middle
        return _taps(filters, tap, (tap < 0) | (tap >= taps), hard)

    return _softmax_rows(k, bias, causal)


def image_weights(q: Tensor, k_and_grid: Tensor, filters: Tensor, *, hard: bool = False, causal: bool = False) -> Rows:
    """Rows of AFT-conv over an image, for keys and places of pixels side by side, (pixels, heads + 2)."""
    k, grid = k_and_grid[:, :-2], k_and_grid[:, -2:].long()
    rows, columns = filters.shape[1:]

    def bias(places: Tensor, keys: int) -> Tensor:
        apart = grid - grid[places][:, None]  # of keys from queries, (rows, S, 2)
        down, across = apart[..., 0] + rows // 2, apart[..., 1] + columns // 2
        far = (down < 0) | (down >= rows) | (across < 0) | (across >= columns)
        return _taps(filters.flatten(1), down * columns + across, far, hard)

    return _softmax_rows(k, bias, causal)


def _softmax_rows(k: Tensor, bias: BiasOf, causal: bool) -> Rows:
    def rows(places: Tensor) -> Tensor:
        logits = k.T[:, None] + bias(places, len(k))
        return (lower(logits, places, -torch.inf) if causal else logits).softmax(-1)

    return rows


def _table(w: Bias, places: Tensor, keys: int) -> Tensor:
    """The position bias of the queries at some places and the first keys."""
    if len(w) == 1:
        return w[0][places, :keys]
    return w[0][places] @ w[1][:keys].T


def _taps(filters: Tensor, tap: Tensor, outside: Tensor, hard: bool) -> Tensor:
    """Taps by number, (heads, rows, S); 0 outside, or minus infinity with ``hard``."""
    return filters[:, tap.masked_fill(outside, 0)].masked_fill(outside, -torch.inf if hard else 0.0)


# --------------------------------------------------------------------------- AFT-conv, along sequences and over images

_truths = {2: truth_of(conv_weights, gate=torch.sigmoid), 3: truth_of(image_weights, gate=torch.sigmoid)}
_rows = {2: rows_of("aft_conv", conv_weights, CONV_LAYOUT), 3: rows_of("aft_conv", image_weights, CHANNELS)}


def conv_truth(q: Tensor, k: Tensor, v: Tensor, filters: Tensor, *, mask: Tensor | None = None, **given: Any) -> Tensor:
    """Float64 reference of :func:`flowformer.ops.aft_conv`, along a sequence or over an image."""
    if filters.ndim == 2:
        return _truths[2](q, k, v, filters, mask=mask, **given)
    flat_q, flat_v, flat_mask = (None if x is None else x.flatten(1, 2) for x in (q, v, mask))
    out = _truths[3](flat_q, _with_grid(k.double()), flat_v, filters, mask=flat_mask, **given)
    return out.unflatten(1, q.shape[1:3])


def conv_rows(
    q: Tensor, k: Tensor, places: Places, filters: Tensor, *, mask: Tensor | None = None, **given: Any
) -> Tensor:
    """Return rows of weights of a batch; in images (batch, height, width, heads), positions are counted row by row."""
    if filters.ndim == 2:
        return _rows[2](q, k, places, filters, mask=mask, **given)
    if given.get("causal"):
        raise ValueError(f"aft_conv: filters of a causal form must be (heads, taps), got {describe(filters)}")
    if k.ndim != 4:
        raise ValueError(
            f"aft_conv: with filters for images, k must be (batch, height, width, heads), got {describe(k)}"
        )
    k = _with_grid(k.double())
    return _rows[3](k, k, places, filters, mask=None if mask is None else mask.flatten(1), **given)


def _with_grid(k: Tensor) -> Tensor:
    """Keys of pixels (batch, height, width, heads) with row and column of each, (batch, pixels, heads + 2)."""
    grid = torch.cartesian_prod(*(torch.arange(size, device=k.device) for size in k.shape[1:3]))
    return torch.cat([k.flatten(1, 2), grid.to(k).expand(len(k), -1, -1)], -1)
