"""AFT-full: a position bias for each pair of positions. See :mod:`flowformer.mechanisms.aft` for the equations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import CHANNELS, check_fresh_state
from flowformer.core.masks import close_up_if, fill, spread
from flowformer.core.precision import LOG_ZERO
from flowformer.core.run import Given
from flowformer.core.tracing import may_look
from flowformer.mechanisms.aft.blocks import Blocks, block_means
from flowformer.mechanisms.aft.run import (
    PositionBias,
    check_bias,
    check_places,
    find_start,
    run_gated,
    start_step,
)

# Queries that are worked on at a time: as many as make large products, fewer where half of a block is masked.
ROWS, CAUSAL_ROWS = 512, 256


class AFTFullState(NamedTuple):
    """State of causal AFT-full: all keys and values so far, in the dtype of the inputs.

    Attributes:
        key: (batch, tokens, channels).
        value: (batch, tokens, channels).
        mask: Which of them are real tokens, (batch, tokens), boolean.
    """

    key: Tensor
    value: Tensor
    mask: Tensor


def init_aft_full_state(
    batch: int, channels: int, *, dtype: torch.dtype = torch.float32, device: Any = None
) -> AFTFullState:
    """Return the state before the first token, for inputs of ``dtype``."""
    check_fresh_state("init_aft_full_state", batch, dtype, channels=channels)
    empty = torch.empty(batch, 0, channels, dtype=dtype, device=device)
    return AFTFullState(empty, empty.clone(), empty.new_empty(batch, 0, dtype=torch.bool))


def aft_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: PositionBias,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: AFTFullState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AFTFullState]:
    """AFT-full: AFT with a position bias for each pair of positions.

    Args:
        q: Queries (batch, L, channels).
        k: Keys (batch, S, channels).
        v: Values (batch, S, channels).
        position_bias: (T, T), or two factors (T, d') each, of w = u v^T, with T at least as long as any sequence. Rows
            are places of queries, columns of keys. Factors are never multiplied out: memory stays linear in T.
        causal: Output t depends on positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``. Positions count real tokens only.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.

    Returns:
        Output (batch, L, channels) in the dtype of q, zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "aft_full"
    if return_state and cu_seqlens is not None:
        raise ValueError(f"{op}: the states of a packed batch differ in length: run its sequences one by one")

    def dense(q: Tensor, K: Tensor, V: Tensor, key: Any, query: Any, state: Any) -> tuple[Tensor, Any]:
        bias, length = check_bias(op, position_bias, q), q.shape[1]
        counts = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
        if causal:
            counts = state.mask.sum(1)
            state = _extend(state, K, V, key)
            K, V, key, query = state.key.to(K.dtype), state.value.to(V.dtype), state.mask, key
            K = fill(K, key, LOG_ZERO)
            key = None if may_look(key) and bool(key.all()) else key
        (K, V), _, _ = close_up_if((K, V), key)
        _, real, places = close_up_if((), query)
        queries = length if real is None else real.shape[1]
        start, least = find_start(op, bias, counts, queries, fresh=initial_state is None)
        check_places(op, bias, K.shape[1])
        # No block of w is more than twice as large as the keys.
        rows = min(CAUSAL_ROWS if causal else ROWS, 2 * K.shape[-1])
        mean = block_means(bias, K, V, queries, Blocks(causal, start, least, rows))
        mean = mean if places is None else spread(mean, places, length)
        # The unused state of a packed batch differs in length from others.
        return mean, state if return_state else None

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run_gated(
        op, given, dense, CHANNELS,
        lambda batch: init_aft_full_state(batch, v.shape[-1], dtype=v.dtype, device=v.device),
    )  # fmt: skip


def _extend(state: AFTFullState, K: Tensor, V: Tensor, mask: Tensor | None) -> AFTFullState:
    """The state with further tokens, zeros where they are padding."""
    if mask is None:
        mask = torch.ones(K.shape[:2], dtype=torch.bool, device=K.device)
    more = AFTFullState(fill(K, mask).to(state.key.dtype), V.to(state.value.dtype), mask)
    return AFTFullState(*(torch.cat(pair, 1) for pair in zip(state, more, strict=True)))


def aft_full_step(
    q: Tensor, k: Tensor, v: Tensor, state: AFTFullState, position_bias: PositionBias
) -> tuple[Tensor, AFTFullState]:
    """Compute one token of causal AFT-full, in time and memory linear in the number of tokens before it.

    Args:
        q: Query (batch, channels).
        k: Key (batch, channels).
        v: Value (batch, channels).
        state: State before the token; not changed.
        position_bias: As :func:`aft_full` takes it.

    Returns:
        Output (batch, channels) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    start_step(
        "aft_full_step", q, k, v, state, AFTFullState,
        lambda batch: init_aft_full_state(batch, v.shape[-1], dtype=v.dtype, device=v.device), CHANNELS,
    )  # fmt: skip
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    out, after = aft_full(q, k, v, position_bias, causal=True, initial_state=state, return_state=True)
    return out.squeeze(1), after  # pyright: ignore[reportReturnType]
