"""AFT-simple: AFT without position biases. See :mod:`flowformer.mechanisms.aft` for the equations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.backends import TORCH, choose, implementation
from flowformer.core.checks import CHANNELS, check_fresh_state
from flowformer.core.masks import close_up_if, spread
from flowformer.core.precision import LOG_ZERO, state_dtype
from flowformer.core.run import Given
from flowformer.core.tracing import log_add
from flowformer.mechanisms.aft.means import Past, summarise
from flowformer.mechanisms.aft.run import finish_step, run_gated, start_step
from flowformer.mechanisms.aft.windows import BLOCK, CHUNK, Windows, causal_means


class AFTSimpleState(NamedTuple):
    """State of causal AFT-simple, in float64.

    Attributes:
        log_weight: log sum exp(k), (batch, channels).
        mean: sum exp(k) v / sum exp(k), (batch, channels).
    """

    log_weight: Tensor
    mean: Tensor


def init_aft_simple_state(
    batch: int, channels: int, *, dtype: torch.dtype = torch.float32, device: Any = None
) -> AFTSimpleState:
    """Return the state before the first token, in float64 for inputs of any ``dtype``."""
    check_fresh_state("init_aft_simple_state", batch, dtype, channels=channels)
    device = torch.device("cpu") if device is None else torch.device(device)
    mean = torch.zeros(batch, channels, dtype=state_dtype(device), device=device)
    return AFTSimpleState(torch.full_like(mean, LOG_ZERO), mean)


def aft_simple(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: AFTSimpleState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AFTSimpleState]:
    """AFT-simple: each channel is the mean of its values weighted by exp(k), gated by its query.

    Args:
        q: Queries (batch, L, channels).
        k: Keys (batch, S, channels).
        v: Values (batch, S, channels).
        causal: Output t depends on positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"``, ``"native"`` (C++ kernels: float32 and bfloat16 on the CPU), ``"triton"`` on a GPU, or
            ``"torch"``. See :func:`flowformer.ops.explain`.

    Returns:
        Output (batch, L, channels) in the dtype of q, zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """

    def dense(q: Tensor, K: Tensor, V: Tensor, key: Any, query: Any, state: Any) -> tuple[Tensor, Any]:
        if not causal:
            past = summarise(K, V.unsqueeze(-1))
            return past.mean.to(K.dtype).squeeze(-1).unsqueeze(1).expand(-1, q.shape[1], -1), None
        length = K.shape[1]
        (K, V), real, places = close_up_if((K, V), key)
        w = _triangle(CHUNK, K)[None, None]
        past, V = Past(state.log_weight, state.mean.unsqueeze(-1)), V.unsqueeze(-1)
        nothing = (state.mean[:, None][:, :0], past.mean[:, None][:, :0])
        windows = Windows(CHUNK, CHUNK, 1, False, BLOCK)
        mean, past, _ = causal_means(w, K, V, nothing, past, real, windows)
        mean = mean.squeeze(-1) if places is None else spread(mean.squeeze(-1), places, length)
        return mean, AFTSimpleState(past.log_weight, past.mean.squeeze(-1))

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run_gated(
        "aft_simple", given, dense, CHANNELS, lambda batch: init_aft_simple_state(batch, v.shape[-1], device=v.device)
    )


def _triangle(size: int, like: Tensor) -> Tensor:
    """No bias up to each query's own place, nothing to see beyond, (size, size)."""
    return torch.full((size, size), LOG_ZERO, dtype=like.dtype, device=like.device).triu(1)


def aft_simple_step(
    q: Tensor, k: Tensor, v: Tensor, state: AFTSimpleState, *, backend: str = "auto"
) -> tuple[Tensor, AFTSimpleState]:
    """Compute one token of causal AFT-simple.

    Args:
        q: Query (batch, channels).
        k: Key (batch, channels).
        v: Value (batch, channels).
        state: State before the token; not changed.
        backend: ``"auto"``, ``"torch"``, or ``"triton"`` on a GPU; ``"native"`` is plain PyTorch too.

    Returns:
        Output (batch, channels) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "aft_simple_step"
    start_step(
        op, q, k, v, state, AFTSimpleState,
        lambda batch: init_aft_simple_state(batch, v.shape[-1], device=v.device), CHANNELS,
    )  # fmt: skip
    chosen = choose(op, backend, q, everywhere=True)
    compute = step_in_torch if chosen == TORCH.name else implementation(op, chosen)
    return compute(q, k, v, state)


def step_in_torch(q: Tensor, k: Tensor, v: Tensor, state: AFTSimpleState) -> tuple[Tensor, AFTSimpleState]:
    """:func:`aft_simple_step` in plain PyTorch, on checked arguments."""
    wide = state.mean.dtype
    log_weight = log_add(state.log_weight, k.to(wide))
    mean = state.mean + (k.to(wide) - log_weight).exp() * (v.to(wide) - state.mean)
    return finish_step(q, mean), AFTSimpleState(log_weight, mean)
