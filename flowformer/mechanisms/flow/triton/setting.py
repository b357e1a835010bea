"""What the forms of Flow-Attention by Triton kernels share: their setting, and parts of their backward passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.core.decay import clip_log_decay
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO
from flowformer.kernels.triton.launch import Dots, Sequences, chunk_of, dots_of
from flowformer.mechanisms.flow.equations import FEATURE_MAPS
from flowformer.mechanisms.flow.options import KernelOptions

LOWEST = -64.0  # log-decay of a token: exp(-64) = 2e-28 is nothing beside the token's own part


class Flows(NamedTuple):
    """Flows of each token, (batch * heads, length): 1 at padding where they are divided by."""

    incoming: Tensor
    outgoing: Tensor
    conserved_in: Tensor
    conserved_out: Tensor


class Setting(NamedTuple):
    """What both passes have: the sequences, the mask by heads, and how to compute."""

    of: Sequences
    mask: Tensor | None
    options: KernelOptions
    dots: Dots

    def open(self, flow: Tensor) -> Tensor:
        """Set the flow of padding to 1."""
        return flow if self.mask is None else flow.masked_fill(~self.mask, 1.0)

    def by_heads(self, x: Tensor) -> Tensor:
        """(batch * heads, length) as (batch, heads, length)."""
        return x.view(-1, self.of.per_sequence, self.of.length)

    def log_decays(self) -> Tensor:
        """Log-decays up to and with each token, (batch * heads, length); zeros (1, length) without a decay."""
        total = self.of.total
        if total is None:
            return self.of.dummy.new_zeros(1, self.of.length, dtype=torch.float64)
        return total.expand(self.of.batch, -1, -1).flatten(0, 1)


def set_up(
    q: Tensor,
    v: Tensor,
    mask: Tensor | None,
    log_decay: Tensor | None,
    options: KernelOptions,
    *,
    backward: bool = False,
) -> Setting:
    """Return the setting of either pass for q and v (batch, length, heads, channels)."""
    batch, length, heads = q.shape[:3]
    total = None
    if log_decay is not None:
        log_decay = clip_log_decay(log_decay.double()).clamp(min=LOWEST)
        if log_decay.ndim == 1:
            log_decay = log_decay.expand(1 if mask is None else batch, length, heads)
        total = fill(log_decay, mask).transpose(1, 2).cumsum(-1)
    by_heads = None if mask is None else mask.repeat_interleave(heads, 0)
    dots = dots_of(q.dtype, options.feature_map)
    chunk = chunk_of(dots, q.shape[-1], v.shape[-1], backward=backward)
    of = Sequences(q, mask, total, chunk, FEATURE_MAPS[options.feature_map])
    return Setting(of, by_heads, options, dots)


def through_heads(parts: Tensor, share: Tensor, of: Sequences) -> Tensor:
    """Return the gradient of the logits of a softmax over the heads of a token, (batch * heads, length).

    Args:
        parts: Weights times their gradients.
        share: What the softmax gave.
        of: The sequences.
    """
    whole = parts.view(-1, of.per_sequence, of.length).sum(1, keepdim=True)
    return parts - (share.view(-1, of.per_sequence, of.length) * whole).view_as(parts)


def between_sums(like: Tensor, of: Sequences, total: Tensor, sums: Tensor) -> tuple[Sequences, Tensor]:
    """Return sequences whose log-decays lie between sums of exp(O^), and these, added up, (batch * heads, length).

    Args:
        like: Queries.
        of: The sequences.
        total: The log-decays, added up.
        sums: Logarithms of the sums, far below zero where there are only paddings to add up; there is no decay there.
    """
    known = sums > LOG_ZERO / 2
    none = ~known.any(-1, keepdim=True)
    least = total.masked_fill(~known, torch.inf).amin(-1, keepdim=True).masked_fill(none, 0)
    most = total.masked_fill(~known, -torch.inf).amax(-1, keepdim=True).masked_fill(none, 0)
    total = torch.minimum(torch.maximum(total, least), most)
    by_heads = total.view(of.batch, of.per_sequence, -1)
    return Sequences(like, of.mask, by_heads, of.chunk, of.feature_map, relative=True), total


def by_tokens(of: Sequences, starts: Tensor, parts: Tensor) -> Tensor:
    """Return gradients of log-decays, (batch, length, heads).

    Args:
        of: The sequences.
        starts: The gradient at the first token of each segment, and 'behind' the last: (batch * heads, segments + 1).
        parts: How much it falls behind each token, (batch * heads, length).
    """
    size = of.per * of.chunk
    parts = torch.nn.functional.pad(parts, (0, of.segments * size - of.length)).view(of.heads, of.segments, size)
    found = starts[:, :-1, None] - (parts.cumsum(-1) - parts)
    # What rounding has left over at the end of a segment, where the gradient is known, it has gathered on the way.
    place = torch.arange(of.segments * size, device=parts.device).view(of.segments, size)
    width = (place[:, -1:].clamp(max=of.length - 1) + 1 - place[:, :1]).double()
    left = starts[:, 1:] - (found[..., -1] - parts[..., -1])
    found = found + left.unsqueeze(-1) * (place - place[:, :1]) / width
    return found.flatten(1)[:, : of.length].view(of.batch, of.per_sequence, of.length).transpose(1, 2)
