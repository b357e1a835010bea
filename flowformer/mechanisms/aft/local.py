"""AFT-local: a position bias within a window. See :mod:`flowformer.mechanisms.aft` for the equations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import CHANNELS, check_flag, describe
from flowformer.core.masks import close_up_if, spread
from flowformer.core.precision import LOG_ZERO, no_autocast
from flowformer.core.run import Given
from flowformer.core.tracing import count_chunks, is_exporting, may_look
from flowformer.mechanisms.aft.blocks import Bias
from flowformer.mechanisms.aft.means import Past
from flowformer.mechanisms.aft.run import (
    PositionBias,
    check_bias,
    check_places,
    find_start,
    finish_step,
    run_gated,
    start_step,
)
from flowformer.mechanisms.aft.simple import init_aft_simple_state
from flowformer.mechanisms.aft.windows import BLOCK, CHUNK, Windows, causal_means, step_window, two_sided_means

LAYOUT = CHANNELS._replace(self_only="a window requires queries and keys at the same positions")


class AFTLocalState(NamedTuple):
    """State of causal AFT-local, in float64.

    Attributes:
        length: Tokens so far, (batch,), int64.
        log_weight: log sum exp(k) of all tokens but the last ``window - 1``, (batch, channels).
        mean: Their mean value under exp(k), (batch, channels).
        key: The last ``window - 1`` keys, (batch, window - 1, channels); next to minus infinity before the first.
        value: Their values, likewise; zeros before the first.
    """

    length: Tensor
    log_weight: Tensor
    mean: Tensor
    key: Tensor
    value: Tensor


def init_aft_local_state(
    batch: int, channels: int, window: int, *, dtype: torch.dtype = torch.float32, device: Any = None
) -> AFTLocalState:
    """Return the state before the first token, in float64 for inputs of any ``dtype``."""
    check_window("init_aft_local_state", window)
    past = init_aft_simple_state(batch, channels, dtype=dtype, device=device)
    value = past.mean.new_zeros(batch, window - 1, channels)
    length = torch.zeros(batch, dtype=torch.int64, device=value.device)
    return AFTLocalState(length, *past, torch.full_like(value, LOG_ZERO), value)


def check_window(op: str, window: Any) -> None:
    """Raise unless a window is a positive integer."""
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"{op}: window must be an integer, got {describe(window)}")
    if window < 1:
        raise ValueError(f"{op}: window must be at least 1 (the token itself), got {window}")


def aft_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: PositionBias,
    window: int,
    *,
    hard: bool = False,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: AFTLocalState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AFTLocalState]:
    r"""AFT-local: AFT with a position bias within a window; keys outside of it have bias 0.

    Args:
        q: Queries (batch, L, channels).
        k: Keys (batch, L, channels).
        v: Values (batch, L, channels).
        position_bias: (T, T), or two factors (T, d') each, of w = u v^T, with T at least as long as any sequence.
        window: The bias counts where \|t - t'\| < window. 1 is the token itself.
        hard: See nothing outside of the window, an ablation.
        causal: Output t depends on positions up to t only.
        mask: (batch, L) boolean, True = real token. Positions count real tokens only.
        context_mask: Refused: this is self-attention only. Here so that mechanisms are exchangeable.
        cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.

    Returns:
        Output (batch, L, channels) in the dtype of q, zeros at padding; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "aft_local"
    check_window(op, window)
    check_flag(f"{op}: hard", hard)

    def dense(q: Tensor, K: Tensor, V: Tensor, key: Any, query: Any, state: Any) -> tuple[Tensor, Any]:
        bias, length = check_bias(op, position_bias, q), K.shape[1]
        (K, V), real, places = close_up_if((K, V), key)
        if causal:
            mean, state = _causal_local(op, bias, window, hard, K, V, real, state, initial_state is None)
        else:
            check_places(op, bias, K.shape[1])
            reach = min(window, len(bias[0]) if is_exporting() else K.shape[1])
            back = reach - 1
            windows = Windows(CHUNK, CHUNK + 2 * back + -2 * back % CHUNK, None, False, BLOCK)
            w = _band(bias, window, hard, windows, back, count_chunks(K.shape[1], CHUNK), 0)
            mean = two_sided_means(w, K, V.unsqueeze(-1), back, windows, hard=hard).squeeze(-1)
        return (mean if places is None else spread(mean, places, length)), state

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run_gated(
        op, given, dense, LAYOUT, lambda batch: init_aft_local_state(batch, v.shape[-1], window, device=v.device)
    )


def _causal_local(
    op: str,
    bias: Bias,
    window: int,
    hard: bool,
    K: Tensor,
    V: Tensor,
    real: Tensor | None,
    state: AFTLocalState,
    fresh: bool,
) -> tuple[Tensor, AFTLocalState]:
    """Means (batch, L, channels), for real tokens in front, and the state after them."""
    windows = Windows(CHUNK, CHUNK + window - 1, window, False, BLOCK)
    start, _ = find_start(op, bias, state.length, K.shape[1], fresh=fresh)
    w = _band(bias, window, hard, windows, window - 1, count_chunks(K.shape[1], CHUNK), start)
    past = Past(state.log_weight, state.mean.unsqueeze(-1))
    buffer = (state.key, state.value.unsqueeze(-1))
    mean, past, (key, value) = causal_means(w, K, V.unsqueeze(-1), buffer, past, real, windows, hard=hard)
    length = state.length + (K.shape[1] if real is None else real.sum(1))
    return mean.squeeze(-1), AFTLocalState(length, past.log_weight, past.mean.squeeze(-1), key, value.squeeze(-1))


def _band(bias: Bias, window: int, hard: bool, windows: Windows, back: int, chunks: int, start: int | Tensor) -> Tensor:
    """W within windows, (batch or 1, chunks, chunk, width); ``windows.first`` tells a causal form."""
    device, size = bias[0].device, len(bias[0])
    queries = torch.arange(windows.chunk, device=device)
    keys = torch.arange(windows.width, device=device) - back
    apart = keys - queries.unsqueeze(1)
    future = apart > 0 if windows.first is not None else torch.zeros_like(apart, dtype=torch.bool)
    inside = (apart.abs() < window) & ~future
    outside = torch.zeros(apart.shape, dtype=bias[0].dtype, device=device)
    outside = outside.masked_fill(~inside if hard else future, LOG_ZERO)
    starts = windows.chunk * torch.arange(chunks, device=device).view(1, -1, 1)
    starts = starts + (start if isinstance(start, int) else start.view(-1, 1, 1))
    # Beyond the table is padding, or outside of the window.
    rows, columns = (starts + queries).clamp(max=size - 1), (starts + keys).clamp(0, size - 1)
    if len(bias) == 1:
        table = bias[0][rows.unsqueeze(-1), columns.unsqueeze(-2)]
    else:
        table = bias[0][rows] @ bias[1][columns].mT
    return torch.where(inside, table, outside)


def aft_local_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AFTLocalState,
    position_bias: PositionBias,
    window: int,
    *,
    hard: bool = False,
) -> tuple[Tensor, AFTLocalState]:
    """Compute one token of causal AFT-local, in time and memory proportional to the window.

    Args:
        q: Query (batch, channels).
        k: Key (batch, channels).
        v: Value (batch, channels).
        state: State before the token; not changed.
        position_bias: As :func:`aft_local` takes it.
        window: Likewise.
        hard: Likewise.

    Returns:
        Output (batch, channels) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "aft_local_step"
    check_window(op, window)
    check_flag(f"{op}: hard", hard)
    start_step(
        op,
        q,
        k,
        v,
        state,
        AFTLocalState,
        lambda batch: init_aft_local_state(batch, v.shape[-1], window, device=v.device),
        LAYOUT,
    )
    with no_autocast(q.device):
        bias = check_bias(op, position_bias, q)
        rows = state.length
        if may_look(rows):  # elsewhere a table that is full has the device's own error
            start, _ = find_start(op, bias, rows, 1, fresh=False)
            rows = rows if isinstance(start, Tensor) else rows[:1]
        places = (rows.unsqueeze(1) + torch.arange(1 - window, 1, device=rows.device)).clamp(min=0)
        if len(bias) == 1:
            w = bias[0][rows.unsqueeze(1), places]
        else:
            w = (bias[1][places] @ bias[0][rows].unsqueeze(-1)).squeeze(-1)
        mean, past, key, value = step_window(w.unsqueeze(-1), k, v, state, hard=hard)
    return finish_step(q, mean), AFTLocalState(state.length + 1, *past, key, value)
