"""Softmax attention by PyTorch's fused implementation, the baseline of all comparisons.

Source: Vaswani et al., "Attention is all you need", 2017: out_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowformer.core.checks import check_fresh_state, check_state, check_step
from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast
from flowformer.core.run import Given, run
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of

__all__ = ["SoftmaxAttention", "SoftmaxState", "init_softmax_state", "softmax_attention", "softmax_attention_step"]


class SoftmaxState(NamedTuple):
    """State of causal softmax attention: all keys and values so far, one token more after each step.

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
    """Return the state before the first token, for inputs of ``dtype``."""
    check_fresh_state(
        "init_softmax_state", batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels
    )
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
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
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
        causal: Output t sees positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "softmax_attention"
    if return_state and cu_seqlens is not None:
        raise ValueError(f"{op}: the states of a packed batch differ in length: run its sequences one by one")

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Any, query: Any, state: Any) -> Any:
        return _dense(q, k, v, key, query, causal, state, return_state)

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run(op, given, dense, init_state=lambda batch: _fresh(q, v, batch))


def _fresh(q: Tensor, v: Tensor, batch: int) -> SoftmaxState:
    return init_softmax_state(batch, q.shape[-2], q.shape[-1], v.shape[-1], dtype=q.dtype, device=q.device)


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
    """Outputs of a padded batch, and where asked for the state after them."""
    q, k, v = fill(q, query_mask), fill(k, key_mask), fill(v, key_mask)
    past, after = 0, None
    if state is not None and (return_state or state.key.shape[1]):
        past = state.key.shape[1]
        real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        k, v, real = (torch.cat(pair, 1) for pair in zip(state, (k, v, real), strict=True))
        key_mask = real if past else key_mask
        after = SoftmaxState(k, v, real)
    mask = _attention_mask(q.shape[1], k.shape[1], key_mask, causal, past)
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    with no_autocast(q.device):
        out = scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=causal and mask is None)
    out = out.transpose(1, 2)
    alive = query_mask
    if key_mask is not None and not causal:
        some = key_mask.any(-1, keepdim=True).expand(q.shape[:2])
        alive = some if query_mask is None else query_mask & some
    return fill(out, alive).contiguous(), after


def _attention_mask(length: int, sources: int, key_mask: Tensor | None, causal: bool, past: int) -> Tensor | None:
    """Return the mask (batch, 1, L, S), True = visible; ``None`` if the fused kernel's causal mask suffices."""
    if key_mask is None:
        return None
    mask = key_mask[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        place = torch.arange(sources, device=key_mask.device)
        mask = mask & (place <= place[:length, None] + past)
    # A row without a real key sees all, since a softmax over nothing is NaN. Its output is set to zero in the end.
    return mask | ~mask.any(-1, keepdim=True)


def softmax_attention_step(q: Tensor, k: Tensor, v: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
    """Compute one token of causal softmax attention, in time and memory linear in the number of tokens before it.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "softmax_attention_step"
    check_step(op, q, k, v, state, SoftmaxState)
    check_state(op, state, _fresh(q, v, q.shape[0]))
    out, after = _dense(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), None, None, True, state, True)
    assert after is not None  # asked for
    return out.squeeze(1), after


def softmax_weights(q: Tensor, k: Tensor, *, causal: bool = False) -> Rows:
    """Return rows softmax_j(q_i . k_j / sqrt(K)) of one sequence, in float64."""

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", q[places], k) / q.shape[-1] ** 0.5
        return (lower(scores, places, -torch.inf) if causal else scores).softmax(-1)

    return rows


@register(
    "softmax",
    operation=softmax_attention,
    truth=truth_of(softmax_weights),
    rows=rows_of("softmax_attention", softmax_weights),
    step=softmax_attention_step,
    init_state=by_sizes(init_softmax_state),
    source="Vaswani et al., Attention is all you need, NeurIPS 2017",
    cost="L^2 (K + V)",
    cannot={
        "linear time": "every query meets every key",
        "linear memory": "PyTorch's implementations may build the matrix of scores",
        "fixed state": "it remembers every key and value",
    },
)
class SoftmaxAttention(Attention):
    """Softmax attention (Vaswani et al., 2017) by PyTorch's fused implementation.

    The attention weights themselves are not dropped; ``dropout`` follows the output projection. Arguments are those of
    :class:`flowformer.mechanisms.Attention`.
    """
