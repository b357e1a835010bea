"""Logits of competition and gates of allocation from conserved flows, and their gradients.

With learned temperatures the logit of a source is t (O^ - 1), and the gate of a sink sigmoid(b (I^ - 1) + a). All of it
is numbers of each token, in PyTorch between the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.mechanisms.flow.equations import allocate, contend
from flowformer.mechanisms.flow.options import KernelOptions


class Gates(NamedTuple):
    """Functions of conserved flows, (batch * heads, length), zero gradients at padding.

    Attributes:
        options: Of the mechanism.
        heads: Of a sequence.
        temperatures: t, b and a, (3, heads), or ``None``.
    """

    options: KernelOptions
    heads: int
    temperatures: Tensor | None

    def _by_heads(self, flow: Tensor) -> Tensor:
        return flow.view(-1, self.heads, flow.shape[-1])

    def logits(self, conserved: Tensor) -> Tensor:
        """Logits of competition from conserved outgoing flows."""
        return contend(self._by_heads(conserved), self.temperatures, self.options).view_as(conserved)

    def allocation(self, conserved: Tensor) -> Tensor:
        """Gates of allocation from conserved incoming flows."""
        return allocate(self._by_heads(conserved), self.temperatures).view_as(conserved)

    def of_outgoing(self, conserved: Tensor, of_logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of conserved outgoing flows, and of the temperature of competition, (heads,) in float64.

        Args:
            conserved: The flows.
            of_logits: Gradients of logits.
        """
        clamp = self.options.clamp
        if clamp is not None:
            free = self._replace(options=self.options._replace(clamp=None)).logits(conserved)
            of_logits = of_logits * (free.abs() <= clamp)
        if self.temperatures is None:
            return of_logits, None
        return self._scale(of_logits, 0), self._add_up(of_logits * (conserved - 1))

    def of_incoming(self, conserved: Tensor, reads: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of conserved incoming flows, and of the temperature and offset of allocation, (2, heads).

        Args:
            conserved: The flows.
            reads: Gates of outputs times their gradients.
        """
        if not self.options.allocation:
            nothing = self.temperatures is None
            return torch.zeros_like(reads), None if nothing else reads.new_zeros(2, self.heads, dtype=torch.float64)
        found = reads * (1 - self.allocation(conserved))
        if self.temperatures is None:
            return found, None
        learned = torch.stack([self._add_up(found * (conserved - 1)), self._add_up(found)])
        return self._scale(found, 1), learned

    def _scale(self, x: Tensor, which: int) -> Tensor:
        assert self.temperatures is not None
        return (self._by_heads(x) * self.temperatures[which].unsqueeze(-1)).view_as(x)

    def _add_up(self, x: Tensor) -> Tensor:
        return self._by_heads(x).sum((0, 2), dtype=torch.float64)


def of_temperatures(of_outgoing: Tensor | None, of_incoming: Tensor | None) -> Tensor | None:
    """Join the gradients of temperatures, (3, heads) in float32; ``None`` where there are none."""
    if of_outgoing is None or of_incoming is None:
        return None
    return torch.cat([of_outgoing.unsqueeze(0), of_incoming]).float()
