"""Bidirectional Flow-Attention with decay by Triton kernels; ``operation.py`` above has the equations.

Every sum is one over the token and the earlier ones plus one over the later ones. The kernels are those of the causal
form (``causal.py``, which has the gradients too), in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import LOG_ZERO
from flowformer.core.tracing import log_cumsum
from flowformer.kernels.triton import launch
from flowformer.kernels.triton.decays import between_segments, by_tokens
from flowformer.kernels.triton.launch import Pairs
from flowformer.kernels.triton.parts import Part, parts_of, settle, wide
from flowformer.mechanisms.flow.equations import Learned
from flowformer.mechanisms.flow.options import KernelOptions
from flowformer.mechanisms.flow.triton.gates import of_temperatures
from flowformer.mechanisms.flow.triton.setting import Flows, between_sums, set_up, through_heads

DIRECTIONS = (False, True)  # whether over later tokens


class _Competition(NamedTuple):
    """Sums E of exp(O^) over the tokens in reach, and the weights, (batch * heads, length).

    Attributes:
        logits: O^, far below zero at padding; float64.
        sums: log of the sum over the token and those on one side, for either side; float64.
        total: log E; float64.
        weight: Of sources.
    """

    logits: Tensor
    sums: tuple[Tensor, Tensor]
    total: Tensor
    weight: Tensor


class _Form:
    """Both passes for one set of inputs."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, learned: Learned, options: KernelOptions, *,
        backward: bool = False,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.options = q, k, v, options
        self.setting = setting = set_up(q, v, mask, learned, options, backward=backward)
        self.of = of = setting.of
        self.total = setting.log_decays()
        ones = torch.ones(of.heads, of.length, device=q.device) if setting.mask is None else setting.mask.float()
        self.counts = self.scan(ones)
        self.n = setting.open(torch.add(*self.counts))

    def scan(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Decayed sums of numbers over the token and the earlier ones, and over the later ones."""
        before, behind = (launch.scan_scalars(self.of, x, reverse=back, strict=back)[0] for back in DIRECTIONS)
        return before, behind

    def states(self, x: Tensor, weights: Tensor | None, shift: float, back: bool) -> Tensor:
        """States of queries or keys before chunks, or behind them: (batch * heads, chunks, vectors, channels)."""
        states = launch.sums(self.of, x, None, weights, shift=(shift, 0.0), reverse=back)
        launch.carry(self.of, states, reverse=back)
        return states

    def flows(self, weights: Tensor | None, eps_sink: float, eps_source: float) -> Tensor:
        """Flows of queries and keys, (2, batch * heads, length), in both directions together."""
        of_keys, of_queries = (None, None) if weights is None else weights.split(1)
        found = []
        for back in DIRECTIONS:
            states = launch.sums(
                self.of, self.k, self.q, of_keys, of_queries, shift=(eps_source, eps_source), reverse=back
            )
            launch.carry(self.of, states, reverse=back)
            found.append(
                launch.flows(
                    self.of, self.q, self.k, states, weights, eps_sink=eps_sink, eps_source=eps_source,
                    constant=0.0 if back else eps_sink, dot=self.setting.dots.flows, reverse=back, strict=back,
                )
            )  # fmt: skip
        return found[0] + found[1]

    def compete(self, conserved_out: Tensor) -> _Competition | None:
        """Competition along the sequence."""
        if self.options.competition != "sequence":
            return None
        logits = self.setting.gates.logits(conserved_out).double()
        if self.setting.mask is not None:
            logits = logits.masked_fill(~self.setting.mask, LOG_ZERO)
        before = log_cumsum(logits - self.total) + self.total
        behind = log_cumsum((logits + self.total).flip(-1)).flip(-1) - self.total
        largest = torch.maximum(before, behind)
        total = largest + ((before - largest).exp() + (behind - largest).exp() - (logits - largest).exp()).log()
        return _Competition(logits, (before, behind), total, self.n * (logits - total).exp().float())

    def weight(self, flows: Flows, competition: _Competition | None) -> Tensor | None:
        """Weights of sources."""
        if self.options.competition == "heads":
            logits = self.setting.by_heads(self.setting.gates.logits(flows.conserved_out))
            return self.n * logits.softmax(1).view_as(self.n)
        return None if competition is None else competition.weight

    def gate(self, flows: Flows) -> Tensor:
        """Gates of sinks."""
        gate = 1 / flows.incoming
        return gate * self.setting.gates.allocation(flows.conserved_in) if self.options.allocation else gate

    def matrices(self, x: Tensor, values: Tensor, weight: Tensor | None, dot: int) -> tuple[Tensor, Tensor]:
        """Matrices before segments, and behind them."""
        found = []
        for back in DIRECTIONS:
            states = launch.memory(self.of, x, values, weight, dot=dot, reverse=back)
            launch.carry(self.of, states, step=self.of.per, reverse=back)
            found.append(states)
        return found[0], found[1]


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: Tensor | None, learned: Learned, options: KernelOptions
) -> tuple[Tensor, Tensor]:
    """Return the output, and the flows in one tensor."""
    batch, length, heads = q.shape[:3]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    flows = q.new_empty(4, batch, heads, length, dtype=torch.float32)
    for part in parts_of(q, heads_together=options.competition == "heads"):
        given = part.of_tokens(q), part.of_tokens(k), part.of_tokens(v), part.of_mask(mask), _part_of(learned, part)
        _forward(_Form(*given, options), part.of_tokens(out), part.of_numbers(flows))
    return out, flows.flatten()


def _part_of(learned: Learned, part: Part) -> Learned:
    log_decay, temperatures, _ = learned
    assert log_decay is not None
    return Learned(part.of_decays(log_decay), None if temperatures is None else temperatures[:, part.heads])


def _forward(form: _Form, out: Tensor, found: Tensor) -> None:
    """Write the output (batch, length, heads, channels), and the flows (4, batch, heads, length)."""
    options = form.options
    incoming, outgoing = form.setting.open(form.flows(None, options.eps, 0.0) + options.flow_eps)
    conserved = form.flows(torch.stack([1 / outgoing, 1 / incoming]), options.eps, 0.0) + options.flow_eps
    flows = Flows(incoming, outgoing, *conserved)
    weight, gate, dot = (
        form.weight(flows, form.compete(flows.conserved_out)),
        form.gate(flows),
        form.setting.dots.values,
    )
    q, k, v = form.q, form.k, form.v
    total = wide(out)
    for back, matrices in zip(DIRECTIONS, form.matrices(k, v, weight, dot), strict=True):
        launch.attend(form.of, q, k, v, matrices, total, gate, weight, add=back, dot=dot, reverse=back, strict=back)
    settle(out, total)
    for flow, to in zip(flows, found, strict=True):
        to.copy_(form.setting.by_heads(flow))


class _Read(NamedTuple):
    """What exp(O^) has in the sums that later tokens read (with ``back`` earlier ones), (batch * heads, length).

    Attributes:
        share: exp(O^_j) times its gradient by these sums; of the token itself too, but not with ``back``.
        found: The same by E_j, the sum over j and those on its other side.
        given: What each token reads.
        total: Logarithms of the factors between sums, added up.
    """

    share: Tensor
    found: Tensor
    given: Tensor
    total: Tensor


class _Gradients(NamedTuple):
    """Gradients of logits and of counts, (batch * heads, length); and what is read, where there is competition."""

    logits: Tensor
    n: Tensor
    read: tuple[_Read, _Read] | None


def backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: Tensor | None, learned: Learned, options: KernelOptions,
    out: Tensor, flows: Tensor, grad_out: Tensor, of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of q, k, v, of log-decays by token, and of temperatures."""
    batch, length, heads = q.shape[:3]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    decays = q.new_empty(batch, length, heads, dtype=torch.float64) if of_decay else None
    temperatures = None if learned.temperatures is None else torch.zeros_like(learned.temperatures)
    for part in parts_of(q, heads_together=options.competition == "heads"):
        given = part.of_tokens(q), part.of_tokens(k), part.of_tokens(v), part.of_mask(mask), _part_of(learned, part)
        form = _Form(*given, options, backward=True)
        these = Flows(*part.of_numbers(flows.view(4, batch, heads, length)).reshape(4, form.of.heads, length))
        to = [part.of_tokens(grad) for grad in grads]
        of_part = _Backward(form, these, part.of_tokens(grad_out), to).run(part.of_tokens(out), of_decay)
        if decays is not None and of_part[0] is not None:
            part.of_tokens(decays).copy_(of_part[0])
        if temperatures is not None and of_part[1] is not None:
            temperatures[:, part.heads] += of_part[1]
    return grads[0], grads[1], grads[2], decays, temperatures


class _Backward:
    """The backward pass, part by part.

    Args:
        form: The inputs.
        flows: Of the forward pass.
        grad_out: Gradient of the output.
        grads: Where gradients of q, k and v are written.
    """

    def __init__(self, form: _Form, flows: Flows, grad_out: Tensor, grads: Sequence[Tensor]) -> None:
        self.form, self.flows, self.grad_out, self.of, self.grads = form, flows, grad_out, form.of, grads
        self.competition = form.compete(flows.conserved_out)
        self.weight, self.gate = form.weight(flows, self.competition), form.gate(flows)
        self.dot = form.setting.dots.gradients

    def run(self, out: Tensor, of_decay: bool) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of q, k and v; return those of log-decays by token, and of temperatures."""
        form, flows, options = self.form, self.flows, self.form.options
        gates = form.setting.gates
        others = form.matrices(form.q, self.grad_out, self.gate, self.dot)
        of_weight = self._values(others)
        matrices = form.matrices(form.k, form.v, self.weight, self.dot)
        reads = self._reads(out, matrices)
        of_in, of_allocation = gates.of_incoming(flows.conserved_in, reads)
        found = self._compete(of_weight)
        of_out, of_competition = gates.of_outgoing(flows.conserved_out, found.logits)
        of_sinks, of_sources = form.flows(torch.stack([of_out, of_in]), 0.0, options.eps)
        incoming = -(reads + of_sinks / flows.incoming) / flows.incoming
        outgoing = -of_sources / flows.outgoing**2
        one = torch.ones_like(reads)
        sums = _Vectors(form, torch.stack([one, 1 / flows.outgoing]), torch.stack([one, 1 / flows.incoming]),
                        torch.stack([incoming, of_in]), torch.stack([outgoing, of_out]))  # fmt: skip
        parts_q = self._side(True, matrices, sums, of_decay)
        parts_k = self._side(False, others, sums, of_decay)
        decays = self._decays(parts_q + parts_k, matrices, others, sums, found) if of_decay else None
        return decays, of_temperatures(of_competition, of_allocation)

    def _reads(self, out: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
        """Products of outputs and their gradients, (batch * heads, length).

        In half precision of outputs computed again: where gradients cancel, their rounding would show.
        """
        if out.dtype == torch.float32:
            return launch.dots(self.of, self.grad_out, out)
        form, scratch, total = self.form, torch.empty_like(out), torch.zeros_like(self.gate)
        for back, before in zip(DIRECTIONS, matrices, strict=True):
            found = launch.attend(
                self.of, form.q, form.k, form.v, before, scratch, None, self.weight, self.grad_out, dot=self.dot,
                reverse=back, strict=back,
            )  # fmt: skip
            assert found is not None
            total += found
        return self.gate * total

    def _values(self, others: tuple[Tensor, Tensor]) -> Tensor:
        """Write the gradient of values, and return that of weights."""
        form = self.form
        grad_v, of_weight = wide(self.grads[2]), []
        for back, matrices in zip(DIRECTIONS, others, strict=True):
            of_weight.append(
                launch.attend(
                    self.of, form.k, form.q, self.grad_out, matrices, grad_v, self.weight, self.gate, form.v, add=back,
                    dot=self.dot, reverse=back, strict=back,
                )
            )  # fmt: skip
        settle(self.grads[2], grad_v)
        return of_weight[0] + of_weight[1]

    def _compete(self, of_weight: Tensor) -> _Gradients:
        """Gradients of logits and of counts."""
        form = self.form
        if self.weight is None:
            return _Gradients(torch.zeros_like(of_weight), torch.zeros_like(of_weight), None)
        parts = self.weight * of_weight
        if self.competition is None:
            return _Gradients(through_heads(parts, self.weight / form.n, self.of), parts / form.n, None)
        # A later sum over earlier tokens has a factor of the sum at an earlier token, and the reverse: decays.
        read = self._read(self.competition, parts, False), self._read(self.competition, parts, True)
        return _Gradients(parts + read[0].share + read[1].share, parts / form.n, read)

    def _read(self, competition: _Competition, parts: Tensor, back: bool) -> _Read:
        sums = competition.sums[back]
        total = self.form.total + sums if back else self.form.total - sums
        of, total = between_sums(self.form.q, self.of, total, sums)
        given = -parts * (sums - competition.total).exp().float()
        found, _ = launch.scan_scalars(of, given, reverse=not back, strict=back)
        share = (competition.logits - sums).exp().float() * found
        share = share if self.form.setting.mask is None else share.masked_fill(~self.form.setting.mask, 0)
        return _Read(share, found, given, total)

    def _side(self, of_sinks: bool, states: tuple[Tensor, Tensor], sums: _Vectors, of_decay: bool) -> Tensor:
        """Write the gradient of queries or keys; return what they have with earlier tokens less what with later ones.

        Of a token with itself, queries have what keys lack: it has no distance.
        """
        form, eps, one = self.form, self.form.options.eps, torch.ones_like(self.gate)
        if of_sinks:
            given, scale, weight = (form.q, form.k, self.grad_out, form.v), self.gate, self.weight
        else:
            given, scale = (form.k, form.q, form.v, self.grad_out), one if self.weight is None else self.weight
            weight = self.gate
        goal = self.grads[0 if of_sinks else 1]
        out, parts = wide(goal), torch.zeros_like(one)
        for back in DIRECTIONS:
            strict = back == of_sinks
            if of_sinks:
                past = Pairs(sums.of_sinks, sums.sources, sums.states("sources", back), 0.0, eps)
                future = Pairs(sums.sinks, sums.of_sources, sums.states("of_sources", not back), eps, 0.0, not strict)
            else:
                past = Pairs(sums.sources, sums.of_sinks, sums.states("of_sinks", back), eps, 0.0)
                future = Pairs(sums.of_sources, sums.sinks, sums.states("sinks", not back), 0.0, eps, not strict)
            found = launch.gradient(
                self.of, *given, states[back], scale, out, weight, past, future, add=back, last=back, products=of_decay,
                dot=self.dot, reverse=back, strict=strict,
            )  # fmt: skip
            if found is not None:
                parts = parts - found if back else parts + found
        settle(goal, out)
        return parts

    def _decays(
        self, parts: Tensor, matrices: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], sums: _Vectors,
        found: _Gradients,
    ) -> Tensor:  # fmt: skip
        """The gradient of log-decays, (batch, length, heads).

        That of g_u is the sum of x_ij dx_ij over tokens i and j on either side of u. At the start of a segment it is a
        product of sums on either side; from there, a token's part is what it has with earlier tokens less what it has
        with later ones.
        """
        form, of = self.form, self.of
        before, behind = form.scan(found.n)
        parts = parts.double() + (form.counts[0] - form.counts[1]) * found.n + (before - found.n) - (behind + found.n)
        parts = parts if form.setting.mask is None else parts.masked_fill(~form.setting.mask, 0)
        first = of.per * of.chunk * torch.arange(1, of.segments, device=parts.device)
        last = first - 1
        starts = parts.new_zeros(of.heads, of.segments - 1)
        for ours, theirs, step in (
            (matrices, others, 1),
            ((sums.states("sources", False), sums.states("sources", True)),
             (sums.states("of_sinks", False), sums.states("of_sinks", True)), of.per),
            ((sums.states("sinks", False), sums.states("sinks", True)),
             (sums.states("of_sources", False), sums.states("of_sources", True)), of.per),
        ):  # fmt: skip
            for one, other in ((ours[0], theirs[1]), (theirs[0], ours[1])):
                starts += between_segments(of, one, other, step)
        factor = (form.total[:, first] - form.total[:, last]).exp()
        starts += form.counts[0][:, last] * factor * (behind + found.n)[:, first]
        starts += form.counts[1][:, last] * before[:, last]
        if found.read is not None:
            assert self.competition is not None
            later, earlier = found.read
            parts = parts + (later.given - later.share)
            parts = parts - (
                earlier.given * (1 - (self.competition.logits - self.competition.sums[1]).exp()) - earlier.share
            )
            starts += later.found[:, first] * (later.total[:, first] - later.total[:, last]).exp()
            own = (self.competition.logits - self.competition.sums[1]).exp()[:, last]
            starts += (earlier.found + earlier.given)[:, last] * (1 - own)
        return by_tokens(of, torch.nn.functional.pad(starts, (1, 1)), parts)


class _Vectors:
    """Weights of keys and queries in flows, and gradients of flows: (2, batch * heads, length) each; and their sums.

    Attributes:
        sources: 1 and o, weights of keys.
        sinks: 1 and s, weights of queries.
        of_sinks: Gradients of I and I^, with queries.
        of_sources: Gradients of O and O^, with keys.
    """

    def __init__(self, form: _Form, sources: Tensor, sinks: Tensor, of_sinks: Tensor, of_sources: Tensor) -> None:
        self.form = form
        self.sources, self.sinks, self.of_sinks, self.of_sources = sources, sinks, of_sinks, of_sources
        self._states: dict[tuple[str, bool], Tensor] = {}

    def states(self, name: str, back: bool) -> Tensor:
        """Their sums before chunks, or behind them, (batch * heads, chunks, 2, channels)."""
        if (name, back) not in self._states:
            x = self.form.k if name in ("sources", "of_sources") else self.form.q
            shift = self.form.options.eps if name.startswith("of_") else 0.0
            self._states[name, back] = self.form.states(x, getattr(self, name), shift, back)
        return self._states[name, back]
