"""What the forms of AFT share around their means: checks, masks, packing, states, gates and places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowformer.ops import backend as _backend
from flowformer.ops.aft.blocks import Bias
from flowformer.ops.masking import (
    LOG_ZERO,
    Layout,
    check,
    check_state,
    check_state_use,
    check_step,
    close_up,
    describe,
    fill,
    no_autocast,
    run_packed,
    sum_dtype,
)

PositionBias = Tensor | tuple[Tensor, Tensor]
Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Any], tuple[Tensor, Any]]


def run(
    op: str,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Any,
    return_state: bool,
    backend: str,
    init_state: Callable[[int], Any],
    dense: Dense,
    native: Dense | None = None,
) -> Any:
    """Check once, and run a form of AFT on a batch or on the sequences of a packed one.

    Args:
        op: Name of the operation, for messages.
        layout: Of its tensors.
        q: Like all that follow up to ``backend``, as the operation takes it.
        k: Keys.
        v: Values.
        causal: Which form.
        key_padding_mask: Padding of keys.
        query_padding_mask: Padding of queries.
        cu_seqlens: Packing.
        initial_state: State before the first token.
        return_state: Whether to return the last.
        backend: Implementation.
        init_state: The state before the first token, for a batch size.
        dense: The means for q, k, v, mask of keys, mask of queries and state (``None`` if not causal), and the state
            after them.
        native: The outputs instead, gated and zero at padding, by native kernels; given q, k and v as they are.

    Returns:
        The output, or the output and the state.
    """
    masks = check(
        op, q, k, v, layout=layout, causal=causal, key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    chosen = _backend.choose(op, backend, q)
    check_state_use(op, causal, initial_state, return_state)
    state = None
    if causal:
        fresh = init_state(q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1)
        state = fresh if initial_state is None else initial_state
        check_like(op, state, fresh)

    def gated(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        compute = sum_dtype(q.dtype)
        with no_autocast(q.device):
            K, V = fill(k.to(compute), key, LOG_ZERO), fill(v, key).to(compute)
            mean, state = dense(q, K, V, key, query, state)
            gate = fill(q, query).to(compute).sigmoid()
            return fill((gate * mean).to(q.dtype), _alive(key, query)), state

    form = gated
    if chosen == "native":
        assert native is not None  # else it would not have been chosen
        form = native
    if cu_seqlens is None:
        out, state = form(q, k, v, *masks, state)
    else:
        out, state = run_packed(
            lambda q, k, v, mask, state: form(q, k, v, mask, mask, state), (q, k, v), cu_seqlens, state
        )
    return (out, state) if return_state else out


def _alive(key: Tensor | None, query: Tensor | None) -> Tensor | None:
    """Which queries have an output: the real ones, of rows with a real key."""
    if key is None:
        return query
    some = key.flatten(1).any(1).view(-1, *(1,) * (key.ndim - 1))
    return some.expand(len(key), 1) if query is None else query & some


def check_like(op: str, state: Any, fresh: Any) -> None:
    """Check a state against a fresh one; where that has no tokens yet, (batch, 0, ...), any number of them will do."""
    if type(state) is type(fresh) and isinstance(state[0], Tensor) and state[0].ndim > 1 and not fresh[0].shape[1]:
        tokens = state[0].shape[1]
        fresh = type(fresh)(*(part.new_empty(len(part), tokens, *part.shape[2:]) for part in fresh))
    check_state(op, state, fresh)


def start_step(
    op: str, q: Tensor, k: Tensor, v: Tensor, state: Any, kind: type, fresh: Callable[[int], Any], layout: Layout
) -> None:
    """Check one step of decoding; ``fresh`` makes the state of ``kind`` before the first token, for a batch size."""
    check_step(op, q, k, v, state, kind, layout)
    check_like(op, state, fresh(len(q)))


def finish_step(q: Tensor, mean: Tensor) -> Tensor:
    """Gate the mean of one step."""
    return (q.to(mean.dtype).sigmoid() * mean).to(q.dtype)


def check_bias(op: str, position_bias: Any, like: Tensor) -> Bias:
    """The table (w,) or the factors (u, v), in the dtype that sums have.

    Raises:
        TypeError, ValueError: for anything else.
    """
    bias = tuple(position_bias) if isinstance(position_bias, (tuple, list)) else (position_bias,)
    shown = f"got {', '.join(describe(part) for part in bias)}"
    wanted = f"{op}: position_bias must be a tensor (T, T), or two factors (T, channels)"
    if len(bias) > 2 or not all(isinstance(part, Tensor) and part.is_floating_point() for part in bias):
        raise TypeError(f"{wanted}, of floating dtype, {shown}")
    if any(part.ndim != 2 for part in bias) or len({tuple(part.shape) for part in bias}) > 1 or not len(bias):
        raise ValueError(f"{wanted}, {shown}")
    if len(bias) == 1 and bias[0].shape[0] != bias[0].shape[1]:
        raise ValueError(f"{wanted}, {shown}")
    if any(part.device != like.device for part in bias):
        raise ValueError(f"{op}: position_bias must be on {like.device} like q, {shown}")
    return tuple(part.to(sum_dtype(like.dtype)) for part in bias)


def check_places(op: str, bias: Bias, places: int) -> None:
    """Refuse a sequence that is longer than the table of positions."""
    if places > len(bias[0]):
        raise ValueError(f"{op}: position_bias has {len(bias[0])} places, and there are {places} tokens")


def find_start(op: str, bias: Bias, counts: Tensor, tokens: int) -> tuple[int | Tensor, int]:
    """Places of first tokens, as one number where all sequences have the same, and the least of them.

    Raises:
        ValueError: where sequences reach beyond the table of positions.
    """
    if torch.compiler.is_compiling():
        return counts, 0
    least, most = (int(x) for x in counts.aminmax())
    check_places(op, bias, most + tokens)
    return (least if least == most else counts), least


def close_up_if(tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """:func:`flowformer.ops.masking.close_up` where there is a mask."""
    return (list(tensors), None, None) if mask is None else close_up(tensors, mask)
