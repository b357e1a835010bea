"""Shared by all forms of AFT: checks, masks, packing, states, gates and positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowformer.core.checks import Layout, check_dense, check_state, check_step, describe
from flowformer.core.masks import attending, fill
from flowformer.core.precision import LOG_ZERO, no_autocast, sum_dtype
from flowformer.core.run import Dense, Given, run
from flowformer.core.tracing import is_traced
from flowformer.mechanisms.aft.blocks import Bias

PositionBias = Tensor | tuple[Tensor, Tensor]


def run_gated(op: str, given: Given, means: Dense, layout: Layout, init_state: Callable[[int], Any]) -> Any:
    """Run a form of AFT: weighted means, gated by the queries.

    Args:
        op: Name of the operation.
        given: What the operation was given.
        means: The means for q, k, v, mask of keys, mask of queries and state (``None`` if not causal), and the state
            after them; k is next to minus infinity and v zero at padding, both in the dtype of sums.
        layout: The axes of q, k and v, and whether they must be equally long.
        init_state: The state before the first token, for a batch size.

    Returns:
        The output, or the output and the state.
    """

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        compute = sum_dtype(q.dtype)
        with no_autocast(q.device):
            K, V = fill(k.to(compute), key, LOG_ZERO), fill(v, key).to(compute)
            mean, state = means(q, K, V, key, query, state)
            gate = fill(q, query).to(compute).sigmoid()
            return fill((gate * mean).to(q.dtype), attending(key, query)), state

    return run(op, given, dense, init_state=init_state, layout=layout)


def start_step(
    op: str, q: Tensor, k: Tensor, v: Tensor, state: Any, kind: type, fresh: Callable[[int], Any], layout: Layout
) -> None:
    """Check a decoding step; ``fresh`` returns the initial state of type ``kind`` for a batch size."""
    check_step(op, q, k, v, state, kind, layout)
    check_state(op, state, fresh(q.shape[0]))


def finish_step(q: Tensor, mean: Tensor) -> Tensor:
    """Gate the mean of one step."""
    return (q.to(mean.dtype).sigmoid() * mean).to(q.dtype)


def check_bias(op: str, position_bias: Any, like: Tensor) -> Bias:
    """Return the table (w,) or the factors (u, v), in the dtype of sums.

    Raises:
        TypeError, ValueError: for anything else.
    """
    bias = tuple(position_bias) if isinstance(position_bias, (tuple, list)) else (position_bias,)
    for part in bias:
        check_dense(f"{op}: position_bias", part)
    shown = f"got {', '.join(describe(part) for part in bias)}"
    wanted = f"{op}: position_bias must be a tensor (T, T), or two factors (T, channels)"
    if len(bias) > 2 or not all(isinstance(part, Tensor) and part.is_floating_point() for part in bias):
        raise TypeError(f"{wanted}, of floating-point dtype, {shown}")
    if not bias or any(part.ndim != 2 or part.shape != bias[0].shape for part in bias):
        raise ValueError(f"{wanted}, {shown}")
    if len(bias) == 1 and bias[0].shape[0] != bias[0].shape[1]:
        raise ValueError(f"{wanted}, {shown}")
    if any(part.device != like.device for part in bias):
        raise ValueError(f"{op}: position_bias must be on {like.device} like q, {shown}")
    return tuple(part.to(sum_dtype(like.dtype)) for part in bias)


def check_places(op: str, bias: Bias, places: int) -> None:
    """Raise ValueError for a sequence that is longer than the table of positions."""
    if places > len(bias[0]):
        raise ValueError(f"{op}: position_bias has {len(bias[0])} positions, got {places} tokens")


def find_start(op: str, bias: Bias, counts: Tensor, tokens: int, *, fresh: bool) -> tuple[int | Tensor, int]:
    """Return the positions of the first tokens, one number if all sequences have the same, and their minimum.

    Args:
        op: Name of the operation.
        bias: The position bias.
        counts: Tokens before these, (batch,).
        tokens: Number of these.
        fresh: Whether there are none before, which needs no look at ``counts``.

    Raises:
        ValueError: where sequences reach beyond the table of positions.
    """
    if is_traced():
        return counts, 0
    if fresh:
        check_places(op, bias, tokens)
        return 0, 0
    least, most = (int(x) for x in counts.aminmax()) if len(counts) else (0, 0)
    check_places(op, bias, most + tokens)
    return (least if least == most else counts), least
