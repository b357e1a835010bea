"""Softmax attention, the mechanism that all others are compared with, by PyTorch's fused implementation.

Source: Vaswani et al., "Attention is all you need", 2017: out_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowformer.ops import backend as _backend
from flowformer.ops.masking import (
    check,
    check_dtype,
    check_state_use,
    check_step,
    describe,
    fill,
    no_autocast,
    run_packed,
)


class SoftmaxState(NamedTuple):
    """The keys and values so far: softmax attention remembers everything, and its state grows by a token each step.

    Attributes:
        key: (batch, tokens, heads, K).
        value: (batch, tokens, heads, V).
        mask: Which of them are real tokens, (batch, tokens), boolean.
    """

    key: Tensor
    value: Tensor
    mask: Tensor


def init_softmax_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> SoftmaxState:
    """The state before the first token, for inputs of ``dtype``."""
    check_dtype("init_softmax_state", dtype)
    empty = torch.empty(batch, 0, heads, key_channels, dtype=dtype, device=device)
    return SoftmaxState(
        empty, empty.new_empty(batch, 0, heads, value_channels), empty.new_empty(batch, 0, dtype=torch.bool)
    )


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: SoftmaxState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, SoftmaxState]:
    """Softmax attention, quadratic in length, scaled by 1 / sqrt(K).

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        causal: Output t sees positions up to t only. Wants L == S.
        key_padding_mask: (batch, S) boolean, True = real token. With L == S it says the queries' padding too.
        query_padding_mask: (batch, L) boolean, for cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    op = "softmax_attention"
    masks = check(
        op, q, k, v, causal=causal, key_padding_mask=key_padding_mask, query_padding_mask=query_padding_mask,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    _backend.choose(op, backend, q)
    check_state_use(op, causal, initial_state, return_state)
    if initial_state is not None:
        _check_state(op, initial_state, q, v, q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1)
    if cu_seqlens is None:
        out, state = _dense(q, k, v, masks.key, masks.query, causal, initial_state, return_state)
    else:

        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, Any]:
            return _dense(q, k, v, mask, mask, causal, state, return_state)

        if return_state:
            raise ValueError(f"{op}: the states of a packed batch differ in length: run its sequences one by one")
        out, state = run_packed(dense, (q, k, v), cu_seqlens, initial_state)
    return (out, state) if state is not None and return_state else out


def _check_state(op: str, state: Any, q: Tensor, v: Tensor, batch: int) -> None:
    if not isinstance(state, SoftmaxState):
        raise TypeError(f"{op}: the state must be a SoftmaxState, got {describe(state)}")
    tokens = state.key.shape[1] if isinstance(state.key, Tensor) and state.key.ndim == 4 else 0
    wanted = {
        "key": ((batch, tokens, *q.shape[-2:]), q.dtype),
        "value": ((batch, tokens, *v.shape[-2:]), v.dtype),
        "mask": ((batch, tokens), torch.bool),
    }
    for name, (shape, dtype) in wanted.items():
        part = getattr(state, name)
        if not isinstance(part, Tensor) or tuple(part.shape) != shape or part.dtype != dtype or part.device != q.device:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{op}: state.{name} must be {shape} {kind} on {q.device}, got {describe(part)}")


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
    state: SoftmaxState | None,
    return_state: bool,
) -> tuple[Tensor, SoftmaxState | None]:
    q, k, v = fill(q, query_mask), fill(k, key_mask), fill(v, key_mask)
    past = 0
    if causal and (state is not None or return_state):
        real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        if state is not None:
            past = state.key.shape[1]
            k, v, real = (torch.cat(pair, 1) for pair in zip(state, (k, v, real), strict=True))
            key_mask = real
        state = SoftmaxState(k, v, real)
    mask = _attention_mask(q.shape[1], k.shape[1], key_mask, causal, past)
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    with no_autocast(q.device):
        out = scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=causal and mask is None)
    out = out.transpose(1, 2)
    alive = query_mask
    if key_mask is not None and not causal:
        some = key_mask.any(-1, keepdim=True).expand(q.shape[:2])
        alive = some if query_mask is None else query_mask & some
    return fill(out, alive).contiguous(), state


def _attention_mask(length: int, sources: int, key_mask: Tensor | None, causal: bool, past: int) -> Tensor | None:
    """Who may see whom, (batch, 1, L, S), True = may; ``None`` where the fused kernel's own causal mask does."""
    if key_mask is None:
        return None
    mask = key_mask[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        place = torch.arange(sources, device=key_mask.device)
        mask = mask & (place <= place[:length, None] + past)
    # Nobody to see: let such a row see all, lest its softmax be NaN. Its output is set to zero in the end.
    return mask | ~mask.any(-1, keepdim=True)


def softmax_attention_step(q: Tensor, k: Tensor, v: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
    """One token of causal softmax attention, in time and memory that grow with the tokens before it.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    op = "softmax_attention_step"
    check_step(op, q, k, v, state, SoftmaxState)
    _check_state(op, state, q, v, q.shape[0])
    out, after = _dense(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), None, None, True, state, True)
    assert after is not None  # asked for
    return out.squeeze(1), after
