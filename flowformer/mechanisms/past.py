"""The state of causal mechanisms that meet all earlier tokens again: those tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import check_fresh_state, check_state, check_step
from flowformer.core.masks import fill

__all__ = ["PastState", "init_past_state"]


class PastState(NamedTuple):
    """All tokens so far, one more after each step.

    Attributes:
        query: (batch, tokens, heads, K); (batch, tokens, heads, 0) where outputs do not depend on earlier queries.
        key: (batch, tokens, heads, K).
        value: (batch, tokens, heads, V).
        mask: Which of them are real tokens, (batch, tokens), boolean.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor


def init_past_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    queries: bool = True,
) -> PastState:
    """Return the state before the first token, for inputs of ``dtype``, with or without their queries."""
    check_fresh_state(
        "init_past_state", batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels
    )
    empty = torch.empty(batch, 0, heads, key_channels, dtype=dtype, device=device)
    return PastState(
        empty if queries else empty[..., :0],
        empty,
        empty.new_empty(batch, 0, heads, value_channels),
        empty.new_empty(batch, 0, dtype=torch.bool),
    )


def fresh(q: Tensor, v: Tensor, queries: bool = True) -> Callable[[int], PastState]:
    """Return :func:`init_past_state` for the sizes of q (..., heads, K) and v (..., heads, V), by batch."""

    def init(batch: int) -> PastState:
        sizes = (q.shape[-2], q.shape[-1], v.shape[-1])
        return init_past_state(batch, *sizes, dtype=q.dtype, device=q.device, queries=queries)

    return init


def check_no_packed_state(op: str, cu_seqlens: Any, return_state: bool) -> None:
    """Raise where a packed batch is to have a state."""
    if return_state and cu_seqlens is not None:
        raise ValueError(f"{op}: the states of a packed batch differ in length: run its sequences one by one")


def recall(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    state: PastState | None,
    return_state: bool,
) -> tuple[Tensor, PastState | None]:
    """Run a causal operation on the tokens of a state and those after them.

    Args:
        attend: ``attend(q, k, v, mask)`` on a padded batch: outputs of the tokens that have queries, the last ones.
        tokens: q, k and v of the new tokens.
        mask: (batch, L), which of them are real.
        state: Tokens before them; ``None`` if the operation is not causal.
        return_state: Whether the state after them is wanted.

    Returns:
        Outputs of the new tokens, and where wanted the state after them.
    """
    if state is None or (not return_state and not state.key.shape[1]):
        return attend(*tokens, mask), None
    q, k, v = (fill(x, mask) for x in tokens)
    real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
    kept = q if state.query.shape[-1] else q[..., :0]
    past, length = state.key.shape[1], q.shape[1]
    after = PastState(*(torch.cat(pair, 1) for pair in zip(state, (kept, k, v, real), strict=True)))
    queries = after.query if after.query.shape[-1] else q
    out = attend(queries, after.key, after.value, after.mask if past or mask is not None else None)
    return out[:, out.shape[1] - length :], after


def step_of(operation: Callable[..., Any], queries: bool = True) -> Callable[..., tuple[Tensor, PastState]]:
    """Return one token of a causal operation with this state, for a row of the registry.

    It takes ``(q, k, v, state, *tensors, **options)`` with q, k and v (batch, heads, channels), and returns the output
    (batch, heads, V) and the state after the token, in time that grows with the number of tokens before it.
    """
    op = f"{operation.__name__}_step"

    def step(q: Tensor, k: Tensor, v: Tensor, state: PastState, *tensors: Any, **options: Any) -> Any:
        check_step(op, q, k, v, state, PastState)
        check_state(op, state, fresh(q, v, queries)(q.shape[0]))
        of_token = (x.unsqueeze(1) for x in (q, k, v))
        out, after = operation(*of_token, *tensors, causal=True, initial_state=state, return_state=True, **options)
        return out.squeeze(1), after

    return step
