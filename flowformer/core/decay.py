r"""Decay with distance: sums over the past in which each token's part shrinks by a factor at every later token.

With the log-decay g_t <= 0 of token t, token j counts at token i >= j with weight

    gamma(i, j) = exp(g_{j+1} + ... + g_i)

so that S_t = sum_{j<=t} gamma(t, j) x_j is the recurrence S_t = exp(g_t) S_{t-1} + x_t. A constant g = log gamma gives
gamma^(i-j) (RetNet, Sun et al., 2023); one that depends on the token is a forget gate (Gated Linear Attention, Yang et
al., 2024). Every factor is computed from the sum of the log-decays between the two tokens, never as a quotient of two
cumulative products, which underflow: gamma^1000 = 4.6e-46 for gamma = 0.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import check_dense, describe
from flowformer.core.chunks import pad_to_chunks
from flowformer.core.masks import fill
from flowformer.core.precision import FLOAT_DTYPES, LOG_ZERO
from flowformer.core.tracing import log_add, log_cumsum, shift


class Decay(NamedTuple):
    """Factors of a block of tokens in chunks. Axes that are the same for all sequences or chunks may have size 1.

    Attributes:
        within: gamma(i, j) of the tokens of a chunk, (batch, heads, chunks, chunk, chunk); zero for j > i.
        arriving: From before the chunk to each token, (batch, heads, chunks, chunk).
        leaving: From each token to the end of its chunk, likewise.
        chunks: gamma of whole chunks, (batch, heads, chunks, chunks): from the end of chunk j to that of chunk i.
        past: From before the block to the end of each chunk, (batch, heads, chunks).
        total: Log-decay from before the block to each of its tokens, (batch, heads, chunks * chunk), float64.
    """

    within: Tensor
    arriving: Tensor
    leaving: Tensor
    chunks: Tensor
    past: Tensor
    total: Tensor

    def halves(self, capacity: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is left of the capacities Q K^T of a chunk from sources to later sinks, and the reverse."""
        return capacity * self.within, capacity * self.within.transpose(-1, -2)


LEAST = -10_000.0  # exp of it is 0 in any dtype; differences of sums of lower ones would lose the others


def clip_log_decay(log_decay: Tensor) -> Tensor:
    """Return log-decays with 0 for values above it, and :data:`LEAST` for values below it, -inf among them.

    At 0 there is a gradient, other than that of ``clamp``; NaN stays NaN.
    """
    return log_decay.masked_fill(log_decay > 0, 0).clamp(min=LEAST)


def between(log_decay: Tensor) -> Tensor:
    """Return exp(g_{j+1} + ... + g_i) for log-decays (..., n) as (..., i, j); zero for j > i."""
    count = log_decay.shape[-1]
    ones = torch.ones(count, count, dtype=torch.bool, device=log_decay.device)
    steps = log_decay.unsqueeze(-1).masked_fill(ones.triu(), 0)  # g_s in row s, for the columns j < s
    return steps.cumsum(-2).masked_fill(ones.triu(1), -torch.inf).exp()


def decay_of(log_decay: Tensor, chunks: int, wide: torch.dtype, *, alike: bool = False) -> Decay:
    """Return the factors of a block.

    Args:
        log_decay: (batch or 1, heads, chunks * chunk); zero at padding, which does not decay.
        chunks: Number of chunks.
        wide: The dtype of ``total``.
        alike: Whether all chunks are alike.
    """
    parts = log_decay.unflatten(-1, (chunks, -1))
    of_chunks = parts.sum(-1)
    parts = parts[:, :, :1] if alike else parts
    within = between(parts)
    return Decay(
        within,
        parts.cumsum(-1).exp(),
        within[..., -1, :],
        between(of_chunks),
        of_chunks.cumsum(-1).exp(),
        log_decay.to(wide).cumsum(-1),
    )


def block_decay(
    log_decay: Tensor,
    mask: Tensor | None,
    length: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    wide: torch.dtype,
) -> Decay:
    """The factors of a block.

    Args:
        log_decay: (heads,), or (batch, length, heads).
        mask: (batch, chunks * chunk) of the padded block; padding does not decay.
        length: Tokens of the block before it was padded.
        shape: Chunks, and tokens of each.
        dtype: In which to compute.
        wide: The dtype of states.
    """
    chunks, chunk = shape
    log_decay = clip_log_decay(log_decay.to(dtype))
    alike = log_decay.ndim == 1 and mask is None
    if log_decay.ndim == 1:
        log_decay = log_decay.view(1, 1, -1).expand(1 if mask is None else len(mask), chunks * chunk, -1)
    elif length != chunks * chunk:
        (log_decay,), _ = pad_to_chunks((log_decay,), mask, chunk)
    return decay_of(fill(log_decay, mask).transpose(1, 2), chunks, wide, alike=alike)


def rising_scale(scale: Tensor, past: Tensor, chunks: int) -> Decay:
    """Return the factors gamma(i, j) = exp(s_j - s_i) of sums that are kept relative to exp(s), for a rising s.

    Args:
        scale: s, (batch, heads, chunks * chunk), nowhere below the one before it.
        past: s before the block, (batch, heads).
        chunks: Number of chunks.
    """
    parts = scale.unflatten(-1, (chunks, -1))
    ends = parts[..., -1]
    starts = torch.maximum(shift(ends, LOG_ZERO), past.unsqueeze(-1))
    return Decay(
        _fallen(parts),
        (starts.unsqueeze(-1) - parts).exp(),
        (parts - ends.unsqueeze(-1)).exp(),
        _fallen(ends),
        (past.unsqueeze(-1) - ends).exp(),
        past.unsqueeze(-1) - scale,
    )


def _fallen(scale: Tensor) -> Tensor:
    """Return exp(s_j - s_i) of (..., n) as (..., i, j); zero for j > i."""
    apart = scale.unsqueeze(-2) - scale.unsqueeze(-1)
    later = torch.ones(apart.shape[-2:], dtype=torch.bool, device=scale.device).triu(1)
    return apart.masked_fill(later, -torch.inf).exp()


def carry_decayed(sums: Tensor, past: Tensor, decay: Decay) -> tuple[Tensor, Tensor]:
    """Return the decayed sums before each chunk, each at the end of the chunk before it, and after the last one.

    Args:
        sums: One sum per chunk at its end, (batch, heads, chunks, ...): parts times ``decay.leaving``.
        past: The sum of all before, (batch, heads, ...), in the dtype of states.
        decay: Of the block.

    Returns:
        Sum before each chunk, shape and dtype of ``sums``; sum after the last chunk, shape and dtype of ``past``.
    """
    shape = (*decay.past.shape, *(1,) * (sums.ndim - 3))
    running = (decay.chunks @ sums.flatten(3)).view(sums.shape) if sums.ndim > 3 else _by_chunk(decay, sums)
    whole = decay.past.view(shape)
    before = shift(running, 0.0) + shift(whole, 1.0) * past.to(sums.dtype).unsqueeze(2)
    return before, past * whole[:, :, -1].to(past.dtype) + running[:, :, -1].to(past.dtype)


def _by_chunk(decay: Decay, sums: Tensor) -> Tensor:
    return (decay.chunks @ sums.unsqueeze(-1)).squeeze(-1)


def log_sum_decayed(x: Tensor, past: Tensor, decay: Decay) -> Tensor:
    """Return log sum_{j<=t} gamma(t, j) exp(x_j), the past included.

    Args:
        x: (batch, heads, tokens), in the dtype of states.
        past: The logarithm of the sum of all before, (batch, heads).
        decay: Of the block.
    """
    so_far = log_add(log_cumsum(x - decay.total), past.unsqueeze(-1))
    return so_far + decay.total


DECAYS = ("fixed", "learned", "token")  # kinds that modules have


def check_decay(decay: Any) -> None:
    """Raise ValueError for an unknown kind of decay."""
    if decay not in (*DECAYS, None):
        raise ValueError(f"decay must be one of {', '.join(DECAYS)} or None, got {decay!r}")


def check_log_decay(op: str, log_decay: Any, q: Tensor, *, step: bool = False) -> None:
    """Raise unless log-decays are those of heads or of tokens: (heads,), or q's axes up to the heads.

    Args:
        op: Name of the operation, for messages.
        log_decay: What was given.
        q: Queries (batch, length, heads, channels), or of one step (batch, heads, channels).
        step: Whether of one step.

    Raises:
        TypeError: for anything but a tensor of floats.
        ValueError: for another shape or device.
    """
    check_dense(f"{op}: log_decay", log_decay)
    if not isinstance(log_decay, Tensor) or log_decay.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: log_decay must be a floating-point tensor, got {describe(log_decay)}")
    heads, tokens = q.shape[-2:-1], q.shape[:-1]
    if log_decay.shape not in (heads, tokens):
        axes = "(batch, heads)" if step else "(batch, length, heads)"
        raise ValueError(
            f"{op}: log_decay must be (heads,) or {axes}, {tuple(heads)} or {tuple(tokens)}, got {describe(log_decay)}"
        )
    if log_decay.device != q.device:
        raise ValueError(f"{op}: log_decay must be on {q.device} like q, got {describe(log_decay)}")


SHORTEST, LONGEST = 4.0, 64.0  # time constants in tokens


def default_log_decay(heads: int, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Return log-decays (heads,) whose time constants -1 / g are spread over scales: 4 to 64 tokens, evenly in the log.

    The last quarter of the heads, at least one of two or more, does not decay: without such heads recall is lost.
    """
    decaying = decaying_heads(heads)
    places = [place / (decaying - 1) if decaying > 1 else 0.5 for place in range(decaying)]
    decays = [-1 / (SHORTEST * (LONGEST / SHORTEST) ** place) for place in places]
    return torch.tensor(decays + [0.0] * (heads - decaying), dtype=dtype or torch.get_default_dtype(), device=device)


def decaying_heads(heads: int) -> int:
    """Return how many of so many heads decay by default, the first ones."""
    return heads - (0 if heads == 1 else max(1, heads // 4))
