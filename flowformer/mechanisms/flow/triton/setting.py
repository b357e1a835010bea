"""What the forms of Flow-Attention by Triton kernels share: their setting, and parts of their backward passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import LOG_ZERO
from flowformer.kernels.triton.decays import add_up
from flowformer.kernels.triton.launch import Dots, Sequences, chunk_of, dots_of
from flowformer.mechanisms.flow.equations import FEATURE_MAPS, Learned
from flowformer.mechanisms.flow.options import KernelOptions
from flowformer.mechanisms.flow.triton.gates import Gates


class Flows(NamedTuple):
    """Flows of each token, (batch * heads, length): 1 at padding where they are divided by."""

    incoming: Tensor
    outgoing: Tensor
    conserved_in: Tensor
    conserved_out: Tensor


class Setting(NamedTuple):
    """What both passes have: the sequences, the mask by heads, how to compute, and gates."""

    of: Sequences
    mask: Tensor | None
    options: KernelOptions
    dots: Dots
    gates: Gates

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
    learned: Learned,
    options: KernelOptions,
    *,
    backward: bool = False,
) -> Setting:
    """Return the setting of either pass for q and v (batch, length, heads, channels)."""
    total = None if learned.log_decay is None else add_up(learned.log_decay, mask, q)
    by_heads = None if mask is None else mask.repeat_interleave(q.shape[2], 0)
    dots = dots_of(q.dtype, options.feature_map)
    chunk = chunk_of(dots, q.shape[-1], v.shape[-1], backward=backward)
    of = Sequences(q, mask, total, chunk, FEATURE_MAPS[options.feature_map])
    return Setting(of, by_heads, options, dots, Gates(options, q.shape[2], learned.temperatures))


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
