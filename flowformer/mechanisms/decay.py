"""Decay in mechanisms: a module's log-decays, and factors of decay in float64 for references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.core.checks import HEADS
from flowformer.core.decay import check_decay, check_log_decay, clip_log_decay, decaying_heads, default_log_decay
from flowformer.core.precision import LOG_ZERO, sum_dtype
from flowformer.core.run import Given, check_inputs
from flowformer.mechanisms.base import Attention, set_values
from flowformer.mechanisms.weights import lower

DECAYING = HEADS._replace(self_only="weights decay with the distance of tokens")
ROWS = 128  # tokens whose factors a reference makes at a time


def resolve_decay(op: str, log_decay: Tensor | None, decay: str | None, given: Given) -> Tensor:
    """Check the arguments of an operation with decay, and return the log-decays, or the default of a fixed decay.

    Raises:
        TypeError, ValueError: for arguments that do not fit, log-decays that are needed and absent, or cross-attention.
    """
    check_inputs(op, given, DECAYING)
    return check_given(op, log_decay, decay, given.q)


def check_given(op: str, log_decay: Tensor | None, decay: str | None, q: Tensor, *, step: bool = False) -> Tensor:
    """The same for queries (batch, length, heads, K), or of one token (batch, heads, K), that have been checked."""
    check_decay(decay)
    if log_decay is None and decay != "fixed":
        raise TypeError(f"{op}: log_decay must be a tensor with decay={decay!r}, got None")
    found = default_decay(log_decay, "fixed", q)
    check_log_decay(op, found, q, step=step)
    assert found is not None  # checked
    return found


def default_decay(log_decay: Tensor | None, decay: str | None, q: Tensor) -> Tensor | None:
    """Return log-decays for queries (..., heads, K): the given ones, or the default where there is a decay."""
    if log_decay is not None or decay is None:
        return log_decay
    return default_log_decay(q.shape[-2], q.device, sum_dtype(q.dtype))


def log_gammas(log_decay: Tensor, length: int, places: Tensor) -> Tensor:
    """Return log gamma(i, j) = -|g_1 + ... + g_i - (g_1 + ... + g_j)|, (heads, rows, length), of one sequence.

    Args:
        log_decay: g, (heads,) or (length, heads).
        length: Tokens j.
        places: Tokens i.
    """
    so_far = clip_log_decay(log_decay).expand(length, -1).cumsum(0).T
    return -(so_far[:, places].unsqueeze(-1) - so_far.unsqueeze(1)).abs()


def decayed(x: Tensor, log_decay: Tensor, causal: bool) -> Tensor:
    """Return sum_j gamma(i, j) x_j of one sequence x (length, heads, ...), over j <= i where causal; in linear time."""
    there = _accumulate(x, log_decay)
    return there if causal else there + _accumulate(x.flip(0), _reversed(log_decay)).flip(0) - x


def log_decayed(x: Tensor, log_decay: Tensor, causal: bool) -> Tensor:
    """Return log sum_j gamma(i, j) exp(x_j) of one sequence x (length, heads), likewise."""
    there = _log_accumulate(x, log_decay)
    if causal:
        return there
    back = _log_accumulate(x.flip(0), _reversed(log_decay)).flip(0)
    largest = torch.maximum(there, back).detach()
    return largest + ((there - largest).exp() + (back - largest).exp() - (x - largest).exp()).log()


def _reversed(log_decay: Tensor) -> Tensor:
    """Log-decays for the tokens in reverse, where token i is reached from i + 1 by the decay of the latter."""
    return log_decay if log_decay.ndim == 1 else log_decay.roll(-1, 0).flip(0)  # nothing precedes the first


def _blocks(x: Tensor, log_decay: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of x, log gamma(i, j) within them, (heads, block, block), and from before them, (block, heads)."""
    log_decay = clip_log_decay(log_decay).expand(len(x), -1)
    for part, decays in zip(x.split(ROWS), log_decay.split(ROWS), strict=True):
        so_far = decays.cumsum(0)
        places = torch.arange(len(part), device=x.device)
        within = lower(log_gammas(decays, len(part), places), places, -torch.inf)
        yield part, within, so_far


def _accumulate(x: Tensor, log_decay: Tensor) -> Tensor:
    state, outs = torch.zeros_like(x[:1]), []
    for part, within, arriving in _blocks(x, log_decay):
        nearby = torch.einsum("hij,jhx->ihx", within.exp(), part.reshape(*part.shape[:2], -1)).view_as(part)
        outs.append(nearby + arriving.exp().view(*arriving.shape, *(1,) * (x.ndim - 2)) * state)
        state = outs[-1][-1:]
    return torch.cat(outs)


def _log_accumulate(x: Tensor, log_decay: Tensor) -> Tensor:
    state, outs = torch.full_like(x[:1], LOG_ZERO), []
    for part, within, arriving in _blocks(x, log_decay):
        nearby = (within + part.T.unsqueeze(1)).logsumexp(-1).T
        outs.append(torch.logaddexp(nearby, arriving + state))
        state = outs[-1][-1:]
    return torch.cat(outs)


def of_sequence(learned: Sequence[Any], row: int, places: Tensor) -> tuple[Any, ...]:
    """Return learned tensors for one sequence of a batch: log-decays by token are those of its tokens."""
    if learned and isinstance(learned[0], Tensor) and learned[0].ndim == 3:
        return learned[0][row, places], *learned[1:]
    return tuple(learned)


class LogDecay(nn.Module):
    """Log-decays for the heads of an attention module, all of which start at fixed time constants.

    Heads without decay, a quarter of them, stay without. See :mod:`flowformer.core.decay`.

    Args:
        kind: ``"fixed"``: a buffer. ``"learned"``: -exp(r) with a learned r for each head. ``"token"``: -softplus(w . x
            + b), for each head of each token.
        dim: Channels of x.
        num_heads: Heads.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    log_decay: Tensor

    def __init__(self, kind: str, dim: int, num_heads: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.kind, self.num_heads = kind, num_heads
        factory = {"device": device, "dtype": dtype}
        decaying = decaying_heads(num_heads)
        if kind == "fixed":
            self.register_buffer("log_decay", torch.empty(num_heads, **factory))
        else:
            self.bias = nn.Parameter(torch.empty(decaying, **factory))
        if kind == "token":
            self.weight = nn.Parameter(torch.empty(decaying, dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the fixed time constants."""
        fixed = default_log_decay(self.num_heads, "cpu", torch.float64)
        if self.kind == "fixed":
            set_values(self.log_decay, fixed)
            return
        rates = -fixed[: decaying_heads(self.num_heads)]
        set_values(self.bias, rates.log() if self.kind == "learned" else rates.expm1().log())
        if self.kind == "token":
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor | None) -> Tensor:
        """Return (heads,), or for ``"token"`` (..., heads) of inputs x (..., dim)."""
        if self.kind == "fixed":
            return self.log_decay
        if self.kind == "learned":
            rates = self.bias.to(sum_dtype(self.bias.dtype)).exp()
        else:
            assert x is not None  # there is no state of tokens to come
            rates = self._gate(x)
        without = rates.new_zeros(*rates.shape[:-1], self.num_heads - rates.shape[-1])
        return torch.cat([-rates, without], -1)

    def _gate(self, x: Tensor) -> Tensor:
        rates = nn.functional.linear(x, self.weight, self.bias)
        return nn.functional.softplus(rates.to(sum_dtype(rates.dtype)))

    def extra_repr(self) -> str:
        """Return the kind, for printing."""
        return f"{self.kind!r}, num_heads={self.num_heads}"


class DecayedAttention(Attention):
    """Base class of modules whose only learned tensor, if any, is the log-decay.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        decay: Whether weights decay with distance: ``None``, ``"fixed"``, ``"learned"`` or ``"token"``; see
            :class:`LogDecay`. Not in cross-attention.
        **options: As :class:`flowformer.mechanisms.Attention` takes them: ``causal``, ``bias``, ``dropout``,
            ``head_dim``, ``conv``, ``output_norm``, ``output_gate``, ``device``, ``dtype``.

    Raises:
        ValueError: for sizes that do not fit, or an unknown kind of decay.
    """

    def __init__(self, dim: int, num_heads: int, *, decay: str | None = None, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        check_decay(decay)
        self.decay = decay
        if decay is not None:
            self.log_decay = LogDecay(decay, dim, num_heads, device=options.get("device"), dtype=options.get("dtype"))

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        super().reset_parameters()
        if self.decay is not None:
            self.log_decay.reset_parameters()

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Log-decays, of the inputs x where they depend on the token."""
        if self.decay is None or (self.decay == "token" and x is None):
            return ()
        return (self.log_decay(x),)

    def arguments(self) -> dict[str, Any]:
        """The kind of decay."""
        return {} if self.decay is None else {"decay": self.decay}
