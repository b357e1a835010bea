"""Softmax attention by PyTorch's fused implementation, the baseline of all comparisons.

Source: Vaswani et al., "Attention is all you need", 2017: out_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j.

With a decay, exp(q_i . k_j / sqrt(K)) is multiplied by gamma(i, j), which shrinks with distance: its logarithm is added
to the scores. With one gamma for each head that is ALiBi (Press et al., 2022), with decays that depend on the token the
Forgetting Transformer (Lin et al., 2025). See :mod:`flowformer.core.decay`. With rotary positions (Su et al., 2021,
"RoFormer"), queries and keys are rotated by angles in proportion to their positions, so that their products depend on
distances.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowformer.core.checks import HEADS, check_flag, check_fresh_state, check_state, check_step
from flowformer.core.decay import clip_log_decay
from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Given, check_inputs, run
from flowformer.mechanisms.decay import (
    DECAYING,
    DecayedAttention,
    check_given,
    default_decay,
    log_gammas,
    of_sequence,
    resolve_decay,
)
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of

__all__ = ["SoftmaxAttention", "SoftmaxState", "init_softmax_state", "softmax_attention", "softmax_attention_step"]

ROTARY_BASE = 10_000.0  # Su et al., 2021


class SoftmaxState(NamedTuple):
    """State of causal softmax attention: all keys and values so far, one token more after each step.

    Attributes:
        key: (batch, tokens, heads, K).
        value: (batch, tokens, heads, V).
        mask: Which of them are real tokens, (batch, tokens), boolean.
        log_decay: Of each of them, (batch, tokens, heads); (batch, tokens, 0) without decay.
    """

    key: Tensor
    value: Tensor
    mask: Tensor
    log_decay: Tensor


def init_softmax_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    decay: bool = False,
) -> SoftmaxState:
    """Return the state before the first token, for inputs of ``dtype``, with or without decay."""
    check_fresh_state(
        "init_softmax_state", batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels
    )
    empty = torch.empty(batch, 0, heads, key_channels, dtype=dtype, device=device)
    return SoftmaxState(
        empty,
        empty.new_empty(batch, 0, heads, value_channels),
        empty.new_empty(batch, 0, dtype=torch.bool),
        empty.new_empty(batch, 0, heads if decay else 0),
    )


def _state_of(*sizes_and_learned: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> SoftmaxState:
    """Return :func:`init_softmax_state` for the registry, which passes learned tensors and options too."""
    decay = options.get("decay") is not None or any(part is not None for part in sizes_and_learned[4:])
    return init_softmax_state(*sizes_and_learned[:4], dtype=dtype, device=device, decay=decay)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: SoftmaxState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    decay: str | None = None,
    rotary: bool = False,
) -> Tensor | tuple[Tensor, SoftmaxState]:
    """Softmax attention, quadratic in length, scaled by 1 / sqrt(K).

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        log_decay: Logarithm of gamma, the factor by which exponentials of scores shrink at each token of distance:
            (heads,), or (batch, L, heads) where it depends on the token. Values above 0 count as 0, and padding does
            not decay. Absent for no decay. Not in cross-attention.
        causal: Output t sees positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.
        decay: Where ``log_decay`` is absent: ``"fixed"`` for :func:`flowformer.core.decay.default_log_decay`.
        rotary: Rotary positions, counted over real tokens; for even K.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "softmax_attention"
    if return_state and cu_seqlens is not None:
        raise ValueError(f"{op}: the states of a packed batch differ in length: run its sequences one by one")

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    if log_decay is not None or decay is not None:
        log_decay = resolve_decay(op, log_decay, decay, given)
        log_decay = log_decay.expand(*q.shape[:3]) if initial_state is not None or return_state else log_decay
    of_tokens = (log_decay,) if log_decay is not None and log_decay.ndim == 3 else ()
    if rotary:
        check_inputs(op, given)
    check_rotary(op, rotary, q.shape[-1] if rotary else 0)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Any, query: Any, state: Any, *by_token: Tensor) -> Any:
        decays = by_token[0] if by_token else log_decay
        return _dense(q, k, v, key, query, decays, causal, state, return_state, rotary)

    return run(
        op, given, dense, layout=HEADS if log_decay is None else DECAYING,
        init_state=lambda batch: _fresh(q, v, batch, log_decay is not None),
        of_tokens=of_tokens,
    )  # fmt: skip


def _fresh(q: Tensor, v: Tensor, batch: int, decay: bool) -> SoftmaxState:
    return init_softmax_state(batch, q.shape[-2], q.shape[-1], v.shape[-1], dtype=q.dtype, device=q.device, decay=decay)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    log_decay: Tensor | None,
    causal: bool,
    state: SoftmaxState | None,
    return_state: bool,
    rotary: bool,
) -> tuple[Tensor, SoftmaxState | None]:
    """Outputs of a padded batch, and where asked for the state after them."""
    q, k, v = fill(q, query_mask), fill(k, key_mask), fill(v, key_mask)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = clip_log_decay(fill(log_decay, key_mask))
    past, after = 0, None
    if state is not None and (return_state or state.key.shape[1]):
        past = state.key.shape[1]
        real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        decays = state.log_decay.new_empty(*k.shape[:2], 0) if log_decay is None else log_decay.to(k.dtype)
        after = SoftmaxState(*(torch.cat(pair, 1) for pair in zip(state, (k, v, real, decays), strict=True)))
        k, v, real, decays = after
        key_mask = real if past else key_mask
        log_decay = None if log_decay is None else decays
    dtype = q.dtype
    if rotary:
        (q, k), v = _rotate(q, k, query_mask, key_mask, causal), v.to(sum_dtype(dtype))
    mask = _attention_mask(q.shape[1], k.shape[1], key_mask, causal, past)
    if log_decay is not None:
        mask = _decay_mask(q.shape[1], k, log_decay, key_mask, mask, causal)
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    with no_autocast(q.device):
        out = scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=causal and mask is None)
    out = out.transpose(1, 2)
    alive = query_mask
    if key_mask is not None and not causal:
        some = key_mask.any(-1, keepdim=True).expand(q.shape[:2])
        alive = some if query_mask is None else query_mask & some
    return fill(out, alive).to(dtype).contiguous(), after


def check_rotary(op: str, rotary: Any, channels: int) -> None:
    """Raise for an option that is no flag, or channels that do not make pairs."""
    check_flag(f"{op}: rotary", rotary)
    if channels % 2:
        raise ValueError(
            f"{op}: rotary positions require an even number of channels of queries and keys, got {channels}"
        )


def _rotate(
    q: Tensor, k: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions among real tokens; where causal, the queries are the last tokens.

    In the dtype of sums: rotated numbers are up to 1.4 times as large, and would be rounded once more.
    """
    of_keys = _positions(k, key_mask)
    of_queries = of_keys[:, k.shape[1] - q.shape[1] :] if causal else _positions(q, query_mask)
    compute = sum_dtype(q.dtype)
    return rotate(q.to(compute), of_queries), rotate(k.to(compute), of_keys)


def _positions(x: Tensor, mask: Tensor | None) -> Tensor:
    wide = state_dtype(x.device)
    if mask is None:
        return torch.arange(x.shape[1], dtype=wide, device=x.device).unsqueeze(0)
    return mask.cumsum(1).to(wide) - 1


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate x (..., length, heads, K) by positions (..., length), in pairs of channels i and i + K / 2."""
    half = x.shape[-1] // 2
    powers = torch.arange(half, dtype=positions.dtype, device=x.device) / half
    angles = (positions.unsqueeze(-1) * ROTARY_BASE**-powers).unsqueeze(-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


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


def _decay_mask(
    length: int, k: Tensor, log_decay: Tensor, key_mask: Tensor | None, mask: Tensor | None, causal: bool
) -> Tensor:
    """Return what is added to scores, (batch or 1, heads, L, S): log gamma(i, j) for the last L tokens i of S.

    Args:
        length: L.
        k: Keys (batch, S, heads, K).
        log_decay: (heads,), or (batch, S, heads) with zeros at padding.
        key_mask: (batch, S).
        mask: As :func:`_attention_mask` returns it.
        causal: Whether later keys are hidden.
    """
    sources = k.shape[1]
    if log_decay.ndim == 1:
        log_decay = clip_log_decay(log_decay).expand(1 if key_mask is None else len(k), sources, -1)
        log_decay = fill(log_decay, key_mask)
    # In the dtype of states: the difference of two long sums is to keep the digits of a short one.
    so_far = log_decay.to(state_dtype(k.device)).cumsum(1).transpose(1, 2)
    decay = -(so_far[..., sources - length :, None] - so_far[..., None, :]).abs().to(k.dtype)
    if mask is None and causal:
        place = torch.arange(sources, device=k.device)
        mask = place <= place[sources - length :, None]
    return decay if mask is None else decay.masked_fill(~mask, -torch.inf)


def softmax_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SoftmaxState,
    log_decay: Tensor | None = None,
    *,
    decay: str | None = None,
    rotary: bool = False,
) -> tuple[Tensor, SoftmaxState]:
    """Compute one token of causal softmax attention, in time and memory linear in the number of tokens before it.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        log_decay: (heads,), or (batch, heads) where it depends on the token; absent for no decay.
        decay: As in :func:`softmax_attention`.
        rotary: As in :func:`softmax_attention`.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "softmax_attention_step"
    check_step(op, q, k, v, state, SoftmaxState)
    decays = log_decay is not None or decay is not None
    check_state(op, state, _fresh(q, v, q.shape[0], decays))
    if decays:
        log_decay = check_given(op, log_decay, decay, q, step=True).expand(q.shape[:2]).unsqueeze(1)
    check_rotary(op, rotary, q.shape[-1] if rotary else 0)
    q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    out, after = _dense(q, k, v, None, None, log_decay, True, state, True, rotary)
    assert after is not None  # asked for
    return out.squeeze(1), after


def softmax_weights(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    *,
    causal: bool = False,
    decay: str | None = None,
    rotary: bool = False,
) -> Rows:
    """Return rows softmax_j(q_i . k_j / sqrt(K) + log gamma(i, j)) of one sequence, in float64."""
    log_decay = default_decay(log_decay, decay, q)
    if rotary:
        q, k = (rotate(x, torch.arange(len(x), dtype=x.dtype, device=x.device)) for x in (q, k))

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", q[places], k) / q.shape[-1] ** 0.5
        if log_decay is not None:
            scores = scores + log_gammas(log_decay, len(k), places)
        return (lower(scores, places, -torch.inf) if causal else scores).softmax(-1)

    return rows


@register(
    "softmax",
    operation=softmax_attention,
    truth=truth_of(softmax_weights, of_sequence=of_sequence),
    rows=rows_of("softmax_attention", softmax_weights, of_sequence=of_sequence),
    step=softmax_attention_step,
    init_state=_state_of,
    source="Vaswani et al., Attention is all you need, NeurIPS 2017",
    cost="L^2 (K + V)",
    cannot={
        "linear time": "every query meets every key",
        "linear memory": "PyTorch's implementations may build the matrix of scores",
        "fixed state": "it remembers every key and value",
    },
)
class SoftmaxAttention(DecayedAttention):
    """Softmax attention (Vaswani et al., 2017) by PyTorch's fused implementation.

    The attention weights themselves are not dropped; ``dropout`` follows the output projection.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        rotary: Rotary positions of queries and keys (Su et al., 2021), for an even ``head_dim``.
        **options: As :class:`flowformer.mechanisms.decay.DecayedAttention` takes them.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(self, dim: int, num_heads: int, *, rotary: bool = False, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        check_rotary("softmax attention", rotary, self.head_dim if rotary else 0)
        self.rotary = rotary

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {**super().arguments(), **({"rotary": True} if self.rotary else {})}
