r"""AFT-conv: a position bias that depends on distance, one filter for each head, in one and two dimensions.

Source: Zhai et al., "An Attention Free Transformer", 2021. Keys have one channel for each head; a head's
channels of q and v share it. With w a filter around each query, 0 outside:

    y_t = sigmoid(q_t) * sum_j exp(k_j + w_{j - t}) v_j / sum_j exp(k_j + w_{j - t})

The paper writes each sum as a convolution with exp(w) - 1 plus a sum over all keys. Where a filter is very negative and
the window holds most of the mass, that is a small difference of large numbers. Here the sum over the window takes
exp(w) itself, in a matrix product with the filter's Toeplitz matrix, and what is outside of the window is summed by
itself: before it and behind it, in two dimensions rows above and below it too. Nothing is subtracted.

In two dimensions the sum over the window is a convolution with exp(w): :mod:`flowformer.mechanisms.aft.images`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import CHANNELS, check_dense, check_flag, check_fresh_state, describe
from flowformer.core.masks import close_up_if, spread
from flowformer.core.precision import LOG_ZERO, sum_dtype
from flowformer.core.run import Given
from flowformer.core.tracing import is_exporting
from flowformer.mechanisms.aft.images import image_means
from flowformer.mechanisms.aft.means import Past
from flowformer.mechanisms.aft.run import finish_step, run_gated, start_step
from flowformer.mechanisms.aft.simple import init_aft_simple_state
from flowformer.mechanisms.aft.windows import BLOCK, CHUNK, Windows, causal_means, step_window, two_sided_means

LAYOUT = CHANNELS._replace(self_only="a filter requires queries and keys at the same positions", heads=True)


class AFTConvState(NamedTuple):
    """State of causal AFT-conv, in float64.

    Attributes:
        log_weight: log sum exp(k) of all tokens but the last ``taps - 1``, (batch, heads).
        mean: Their mean value under exp(k), (batch, channels).
        key: The last ``taps - 1`` keys, (batch, taps - 1, heads); next to minus infinity before the first.
        value: Their values, (batch, taps - 1, channels); zeros before the first.
    """

    log_weight: Tensor
    mean: Tensor
    key: Tensor
    value: Tensor


def init_aft_conv_state(
    batch: int, heads: int, channels: int, taps: int, *, dtype: torch.dtype = torch.float32, device: Any = None
) -> AFTConvState:
    """Return the state before the first token, in float64 for inputs of any ``dtype``."""
    check_fresh_state("init_aft_conv_state", batch, dtype, heads=heads, channels=channels, taps=taps)
    log_weight, _ = init_aft_simple_state(batch, heads, dtype=dtype, device=device)
    mean = log_weight.new_zeros(batch, channels)
    key = log_weight.new_full((batch, taps - 1, heads), LOG_ZERO)
    return AFTConvState(log_weight, mean, key, mean.new_zeros(batch, taps - 1, channels))


def aft_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    filters: Tensor,
    *,
    hard: bool = False,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: AFTConvState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AFTConvState]:
    """AFT-conv: AFT with filters, along a sequence or over an image.

    Args:
        q: Queries (batch, L, channels); of images (batch, height, width, channels).
        k: Keys (batch, L, heads) or (batch, height, width, heads); heads divide the channels.
        v: Values, like q.
        filters: Position bias w, (heads, taps) or (heads, rows, columns). Bidirectional: odd sizes, with the token
            itself in the middle. Causal: the last tap is the token itself, the one before it the token before.
        hard: See nothing outside of the filter's window, an ablation.
        causal: Output t depends on positions up to t only; for sequences.
        mask: (batch, L) or (batch, height, width) boolean, True = real. In sequences, distance counts real tokens only;
            in images, places stay.
        context_mask: Refused: this is self-attention only. Here so that mechanisms are exchangeable.
        cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1; for sequences.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.

    Returns:
        Output, shaped like q and in its dtype, zeros at padding; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "aft_conv"
    check_flag(f"{op}: causal", causal)
    check_flag(f"{op}: hard", hard)
    check_filters(op, filters, causal)
    if filters.ndim == 3 and not causal:
        if cu_seqlens is not None or initial_state is not None or return_state:
            raise ValueError(
                f"{op}: packing and states require filters (heads, taps); they are not supported for images"
            )
        return _images(op, q, k, v, filters, hard, {"mask": mask, "context_mask": context_mask}, backend)

    def dense(q: Tensor, K: Tensor, V: Tensor, key: Any, query: Any, state: Any) -> tuple[Tensor, Any]:
        w, length = match_filters(op, filters, K), K.shape[1]
        (K, V), real, places = close_up_if((K, V), key)
        V = V.unflatten(-1, (K.shape[-1], -1))
        if causal:
            mean, state = _causal(w, hard, K, V, real, state)
        else:
            # Taps that reach beyond the sequence weigh nothing.
            back = w.shape[1] // 2 if is_exporting() else min(w.shape[1] // 2, K.shape[1] - 1)
            windows = Windows(CHUNK, CHUNK + 2 * back + -2 * back % CHUNK, None, True, BLOCK)
            w = _toeplitz(w, windows, back, w.shape[1] // 2, hard)
            mean = two_sided_means(w, K, V, back, windows, hard=hard)
        mean = mean.flatten(2)
        return (mean if places is None else spread(mean, places, length)), state

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run_gated(op, given, dense, LAYOUT, lambda batch: _fresh(op, batch, k, v, filters))


def _fresh(op: str, batch: int, k: Tensor, v: Tensor, filters: Tensor) -> AFTConvState:
    """The state before the first token."""
    check_filters(op, filters, causal=True)
    if filters.ndim != 2:
        raise ValueError(f"{op}: filters of a causal form must be (heads, taps), got {describe(filters)}")
    return init_aft_conv_state(batch, k.shape[-1], v.shape[-1], filters.shape[1], device=v.device)


def check_filters(op: str, filters: Any, causal: bool) -> None:
    """Raise unless filters are a tensor of valid shape, with odd sizes in the bidirectional form."""
    wanted = f"{op}: filters must be a tensor (heads, taps), or (heads, rows, columns) for images"
    check_dense(f"{op}: filters", filters)
    if not isinstance(filters, Tensor) or not filters.is_floating_point():
        raise TypeError(f"{wanted}, of floating-point dtype, got {describe(filters)}")
    if filters.ndim not in (2, 3) or 0 in filters.shape:
        raise ValueError(f"{wanted}, got {describe(filters)}")
    if not causal and any(size % 2 == 0 for size in filters.shape[1:]):
        raise ValueError(f"{op}: bidirectional filters must have odd sizes, got {describe(filters)}")


def match_filters(op: str, filters: Tensor, k: Tensor) -> Tensor:
    """Check that there is one filter per head, and cast filters to the dtype of sums."""
    if len(filters) != k.shape[-1]:
        raise ValueError(f"{op}: there must be one filter for each of {k.shape[-1]} heads, got {describe(filters)}")
    if filters.device != k.device:
        raise ValueError(f"{op}: filters must be on {k.device} like k, got {describe(filters)}")
    return filters.to(sum_dtype(k.dtype))


def _causal(
    w: Tensor, hard: bool, K: Tensor, V: Tensor, real: Tensor | None, state: AFTConvState
) -> tuple[Tensor, AFTConvState]:
    """Means (batch, L, heads, e), for real tokens in front, and the state after them."""
    heads, taps = w.shape
    windows = Windows(CHUNK, CHUNK + taps - 1, taps, True, BLOCK)
    w = _toeplitz(w, windows, taps - 1, taps - 1, hard)
    past = Past(state.log_weight, state.mean.unflatten(-1, (heads, -1)))
    buffer = (state.key, state.value.unflatten(-1, (heads, -1)))
    mean, past, (key, value) = causal_means(w, K, V, buffer, past, real, windows, hard=hard)
    return mean, AFTConvState(past.log_weight, past.mean.flatten(1), key, value.flatten(2))


def _toeplitz(w: Tensor, windows: Windows, back: int, middle: int, hard: bool) -> Tensor:
    """Bias within windows, (heads, chunk, width), for filters (heads, taps) whose tap ``middle`` is the query's own."""
    taps = w.shape[1]
    apart = torch.arange(windows.width, device=w.device) - back
    apart = apart - torch.arange(windows.chunk, device=w.device).unsqueeze(1)
    index = apart + middle
    index = index.masked_fill((index < 0) | (index >= taps), taps)
    if windows.first is not None:
        index = index.masked_fill(apart > 0, taps + 1)
    return _look_up(w, index, hard)


def _look_up(w: Tensor, index: Tensor, hard: bool) -> Tensor:
    """Taps by number, (heads, *index.shape); beyond the last is what is outside, and beyond that what is not seen."""
    outside = w.new_tensor([LOG_ZERO if hard else 0.0, LOG_ZERO]).expand(len(w), -1)
    return torch.cat([w, outside], 1).index_select(1, index.flatten()).unflatten(1, index.shape)


def _images(
    op: str, q: Tensor, k: Tensor, v: Tensor, filters: Tensor, hard: bool, masks: dict[str, Any], backend: str
) -> Tensor:
    """The bidirectional form on (batch, height, width, ...)."""
    for name, x in (("q", q), ("k", k), ("v", v), *masks.items()):
        check_dense(f"{op}: {name}", x)
        rank = 3 if name in masks else 4
        if isinstance(x, Tensor) and (x.ndim != rank or x.shape[:3] != q.shape[:3]):
            axes = "batch, height, width" + ("" if name in masks else ", channels")
            raise ValueError(f"{op}: with filters for images, {name} must be ({axes}) like q, got {describe(x)}")
    height, width = q.shape[1:3] if isinstance(q, Tensor) else (0, 0)

    def dense(q: Tensor, K: Tensor, V: Tensor, key: Any, query: Any, state: Any) -> tuple[Tensor, None]:
        w = match_filters(op, filters, K)
        K, V = (x.unflatten(1, (height, width)) for x in (K, V))
        mean = image_means(w, K, V.unflatten(3, (len(w), -1)), hard=hard)
        return mean.flatten(3).flatten(1, 2), None

    q, k, v, mask, context_mask = (
        x.flatten(1, 2) if isinstance(x, Tensor) else x for x in (q, k, v, masks["mask"], masks["context_mask"])
    )
    given = Given(q, k, v, mask=mask, context_mask=context_mask, backend=backend)
    out = run_gated(op, given, dense, LAYOUT, lambda batch: None)
    return out.unflatten(1, (height, width))


def aft_conv_step(
    q: Tensor, k: Tensor, v: Tensor, state: AFTConvState, filters: Tensor, *, hard: bool = False
) -> tuple[Tensor, AFTConvState]:
    """Compute one token of causal AFT-conv, in time and memory proportional to the filter size.

    Args:
        q: Query (batch, channels).
        k: Key (batch, heads).
        v: Value (batch, channels).
        state: State before the token; not changed.
        filters: (heads, taps), as :func:`aft_conv` takes them.
        hard: Likewise.

    Returns:
        Output (batch, channels) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "aft_conv_step"
    start_step(op, q, k, v, state, AFTConvState, lambda batch: _fresh(op, batch, k, v, filters), LAYOUT)
    w = match_filters(op, filters, k).mT.unsqueeze(0)
    mean, past, key, value = step_window(w, k, v, state, hard=hard)
    return finish_step(q, mean), AFTConvState(*past, key, value)
