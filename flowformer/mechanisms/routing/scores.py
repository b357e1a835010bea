"""What all forms of routing attention share: options, keys and weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import check_flag, check_sizes
from flowformer.mechanisms.routing.clusters import unit

WINDOW = 64
ITSELF = -5e4  # score of a token with itself where queries are keys, of routing-transformer


def check_options(op: str, window: Any, shared_qk: Any, sees_future: Any, causal: Any) -> None:
    """Raise for options of another type or out of range, or that the form does not have."""
    check_sizes(**{f"{op}: window": window})
    check_flag(f"{op}: shared_qk", shared_qk)
    check_flag(f"{op}: sees_future", sees_future)
    if sees_future and causal is False:
        raise ValueError(f"{op}: sees_future is of the causal form: it must be False with causal=False, got True")


def check_causal_options(op: str, window: Any, shared_qk: Any, sees_future: Any) -> None:
    """Likewise for a form with a state."""
    check_options(op, window, shared_qk, sees_future, True)
    if sees_future:
        raise ValueError(f"{op}: sees_future must be False with a state, since later tokens change earlier outputs")


def keys_as(k: Tensor, shared_qk: bool) -> Tensor:
    """Return keys as scores take them: of unit length where they are the queries, and divided by sqrt(K)."""
    return (unit(k) if shared_qk else k) / k.shape[-1] ** 0.5


def weigh(scores: Tensor, hidden: Tensor, itself: Tensor | None) -> Tensor:
    """Return weights of scores, zeros where nothing is seen.

    Args:
        scores: (..., queries, keys).
        hidden: Which keys are not seen.
        itself: Where query and key are the same token, to which it attends where it sees nothing else.
    """
    if itself is not None:
        scores = scores.masked_fill(itself, ITSELF)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0)
