"""Causal Flow-Attention by Triton kernels, forward and backward; ``operation.py`` above has the equations.

No program walks a sequence: each kernel sums over chunks, a carry of the sums gives the state before each chunk, and
the next kernel has each chunk for itself. The order is that of the equations: sums of keys and queries, flows, sums of
both divided by flows, conserved flows, the matrix, outputs. What is a number of each token, logits, weights and gates,
is computed in PyTorch.

The backward pass has the same order reversed, with sums over later tokens. With A = Q K^T, s = n / I and o = n / O, the
gradient of A_ij gamma(i, j) is

    gate_i (g_i . C_j v_j) + dI_i + o_j dI^_i / n_i    from the sink i that reads the source j
    dO_j + s_i dO^_j / n_j                              from the source j that reads the sink i

each for i >= j where the reader is the later one. The numbers dI ... dO^ come first, and one kernel for each side then
adds up the gradients of queries and of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import LOG_ZERO
from flowformer.core.tracing import log_add, log_cumsum
from flowformer.kernels.triton import launch
from flowformer.kernels.triton.decays import between_segments, by_tokens
from flowformer.kernels.triton.launch import Pairs
from flowformer.mechanisms.flow.equations import Learned
from flowformer.mechanisms.flow.options import KernelOptions
from flowformer.mechanisms.flow.state import FlowState
from flowformer.mechanisms.flow.triton.gates import of_temperatures
from flowformer.mechanisms.flow.triton.setting import Flows, Setting, between_sums, set_up, through_heads


class Found(NamedTuple):
    """What the forward pass has found of each token, (batch * heads, length)."""

    flows: Flows
    n: Tensor
    logits: Tensor
    log_normaliser: Tensor | None
    weight: Tensor | None
    gate: Tensor


def _tokens_so_far(setting: Setting, count: Tensor) -> tuple[Tensor, Tensor]:
    """The count n of each token, at least 1, and that after the last, both decayed."""
    of, mask = setting.of, setting.mask
    if of.total is None:
        steps = torch.ones(1, of.length, device=count.device) if mask is None else mask
        n = count.view(-1, 1) + steps.cumsum(-1, dtype=torch.float64)
        after = n[:, -1].clone()
        return n.clamp(min=1).float(), after
    ones = torch.ones(of.heads, of.length, device=count.device) if mask is None else mask.float()
    n, after = launch.scan_scalars(of, ones, count.view(-1, 1))
    return setting.open(n), after


def _find_flows(
    setting: Setting, q: Tensor, k: Tensor, sums: Tensor, weights: Tensor | None, last: bool
) -> tuple[Tensor, Tensor | None]:
    """Incoming and outgoing flows, (2, batch * heads, length), less flow_eps; and their sums after the last token."""
    of, eps = setting.of, setting.options.eps
    of_keys, of_queries = (None, None) if weights is None else weights.split(1)
    states = launch.sums(of, k, q, of_keys, of_queries)
    after = launch.carry(of, states, sums, last=last)
    found = launch.flows(of, q, k, states, weights, eps_sink=eps, constant=eps, dot=setting.dots.flows)
    return found, after


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, learned: Learned, state: FlowState, options: KernelOptions
) -> tuple[Tensor, FlowState, Flows]:
    """Return the output, the state after it, and the flows."""
    setting = set_up(q, v, mask, learned, options)
    of, heads = setting.of, setting.of.heads
    sums = state.sums.reshape(heads, 4, -1)
    n, count = _tokens_so_far(setting, state.tokens)
    found, first = _find_flows(setting, q, k, sums[:, :2].contiguous(), None, True)
    incoming, outgoing = setting.open(found + options.flow_eps)
    weights = torch.stack([n / outgoing, n / incoming])
    found, second = _find_flows(setting, q, k, sums[:, 2:].contiguous(), weights, True)
    flows = Flows(incoming, outgoing, *(found / n + options.flow_eps))
    past = state.log_normaliser.reshape(heads).clone()
    known = _weigh(setting, flows, n, past)
    matrices = launch.memory(of, k, v, known.weight, dot=setting.dots.values)
    after = launch.carry(of, matrices, state.memory.reshape(heads, *matrices.shape[2:]), step=of.per, last=True)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    launch.attend(of, q, k, v, matrices, out, known.gate, known.weight, dot=setting.dots.values)
    if known.log_normaliser is not None:
        past = known.log_normaliser[:, -1].clone()
    assert first is not None
    assert second is not None
    assert after is not None
    sums = torch.cat([first, second], 1)
    parts = (count.expand(heads).contiguous(), sums, past, after)
    return out, FlowState(*(new.reshape(old.shape) for new, old in zip(parts, state, strict=True))), flows


def _weigh(setting: Setting, flows: Flows, n: Tensor, past: Tensor) -> Found:
    """Weights of sources and gates of sinks from the flows."""
    options = setting.options
    logits = setting.gates.logits(flows.conserved_out)
    weight, normaliser = None, None
    if options.competition == "heads":
        weight = n * setting.by_heads(logits).softmax(1).view_as(logits)
    elif options.competition == "sequence":
        flat = logits.double() if setting.mask is None else logits.double().masked_fill(~setting.mask, LOG_ZERO)
        normaliser = _log_normalise(setting, flat, past)
        weight = n * (flat - normaliser).exp().float()
    gate = 1 / flows.incoming
    if options.allocation:
        gate = gate * setting.gates.allocation(flows.conserved_in)
    return Found(flows, n, logits, normaliser, weight, gate)


def _log_normalise(setting: Setting, logits: Tensor, past: Tensor) -> Tensor:
    """Log sum_{j<=t} gamma(t, j) exp(logit_j), (batch * heads, length), in float64."""
    total = setting.log_decays()
    return log_add(log_cumsum(logits - total), past.unsqueeze(-1)) + total


class Gradients(NamedTuple):
    """Gradients of the inputs: of log-decays (batch, length, heads), of temperatures (3, heads)."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: FlowState
    log_decay: Tensor | None
    temperatures: Tensor | None


class _OfFlows(NamedTuple):
    """Gradients of numbers of each token, (batch * heads, length): those conserved before the division by n."""

    incoming: Tensor
    outgoing: Tensor
    conserved_in: Tensor
    conserved_out: Tensor


def backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, learned: Learned, state: FlowState,
    options: KernelOptions, out: Tensor, flows: Flows, grad_out: Tensor, grad_state: Sequence[Tensor | None],
    of_decay: bool,
) -> Gradients:  # fmt: skip
    """Return the gradients of all inputs.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: (batch, length).
        learned: Log-decays and temperatures.
        state: The state before.
        options: Of the mechanism.
        out: The output.
        flows: Of the forward pass.
        grad_out: Gradient of the output.
        grad_state: Gradients of the parts of the state after, or ``None``.
        of_decay: Whether the gradient of log-decays, and of the count before, is wanted.
    """
    setting = set_up(q, v, mask, learned, options, backward=True)
    return _Backward(setting, q, k, v, state, flows, grad_state).run(out, grad_out, of_decay)


class _OfSums(NamedTuple):
    """Gradients of sums E of exp(O^), times what they are of, (batch * heads, length).

    Attributes:
        reads: Of each sum, E_t dE_t by its token alone.
        writes: Of each exp(O^).
        found: E_t dE_t by its token and the later ones.
        total: Logarithms of the factors from sum to sum, added up.
    """

    reads: Tensor
    writes: Tensor
    found: Tensor
    total: Tensor


class _Sides(NamedTuple):
    """Gradients of queries, of keys, of the sums before; and what those of decays need.

    Attributes:
        q: (batch, length, heads, channels).
        k: Likewise.
        sums: (batch * heads, 4, channels).
        parts: What tokens read less what they write, (batch * heads, length).
        states: States before chunks, with those behind them, and how many of them a segment has.
        last: Product of the sums after the last token and their gradients, (batch * heads,).
    """

    q: Tensor
    k: Tensor
    sums: Tensor
    parts: Tensor | None
    states: tuple[tuple[Tensor, Tensor, int], ...]
    last: Tensor | None


class _Backward:
    """The backward pass, part by part."""

    def __init__(
        self, setting: Setting, q: Tensor, k: Tensor, v: Tensor, state: FlowState, flows: Flows,
        grad_state: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        self.setting, self.of, self.options = setting, setting.of, setting.options
        self.q, self.k, self.v, self.state = q, k, v, state
        heads = self.of.heads
        self.sums = state.sums.reshape(heads, 4, -1)
        self.grads = FlowState(
            *(part if part is None else part.double().reshape(heads, *part.shape[2:]) for part in grad_state)  # type: ignore[arg-type]
        )
        n, self.count = _tokens_so_far(setting, state.tokens)
        self.known = _weigh(setting, flows, n, state.log_normaliser.reshape(heads))

    def run(self, out: Tensor, grad_out: Tensor, of_decay: bool) -> Gradients:
        """Return all gradients."""
        grad_v, of_weights, later, grad_memory = self._values(grad_out)
        before = self._matrices()
        reads = self._reads(out, grad_out, before[0])
        grads, dn, of_sums, grad_past, learned = self._flows(reads, of_weights)
        sides = self._sides(grad_out, later, before, grads, of_decay)
        before = FlowState(torch.zeros_like(grad_past), sides.sums, grad_past, grad_memory)
        decays = None
        if of_decay:
            counts, first = self._scan_counts(dn)
            before = before._replace(tokens=first)
            decays = self._decays(sides, before, counts, dn, of_sums)
        shaped = (new.reshape(old.shape) for new, old in zip(before, self.state, strict=True))
        return Gradients(sides.q, sides.k, grad_v, FlowState(*shaped), decays, learned)

    def _values(self, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of values and of weights, the matrices behind segments, and the gradient of the first."""
        of, known, dot = self.of, self.known, self.setting.dots.gradients
        later = launch.memory(of, self.q, grad_out, known.gate, dot=dot, reverse=True)
        first = launch.carry(of, later, self.grads.memory, step=of.per, last=True, reverse=True)
        grad_v = torch.empty_like(self.v, memory_format=torch.contiguous_format)
        of_weights = launch.attend(
            of, self.k, self.q, grad_out, later, grad_v, known.weight, known.gate, self.v, dot=dot, reverse=True,
        )  # fmt: skip
        assert of_weights is not None
        assert first is not None
        return grad_v, of_weights, later, first

    def _matrices(self) -> tuple[Tensor, Tensor | None]:
        """Sums of keys and values before segments, and after the last."""
        of, k, v = self.of, self.k, self.v
        matrices = launch.memory(of, k, v, self.known.weight, dot=self.setting.dots.gradients)
        first = self.state.memory.reshape(of.heads, *matrices.shape[2:])
        return matrices, launch.carry(of, matrices, first, step=of.per, last=True)

    def _reads(self, out: Tensor, grad_out: Tensor, matrices: Tensor) -> Tensor:
        """Products of outputs and their gradients, (batch * heads, length).

        In half precision of outputs computed again: where gradients cancel, their rounding would show.
        """
        if out.dtype == torch.float32:
            return launch.dots(self.of, grad_out, out)
        found = launch.attend(
            self.of, self.q, self.k, self.v, matrices, torch.empty_like(out), None, self.known.weight, grad_out,
            dot=self.setting.dots.gradients,
        )  # fmt: skip
        assert found is not None
        return self.known.gate * found

    def _flows(
        self, reads: Tensor, of_weights: Tensor
    ) -> tuple[_OfFlows, Tensor, _OfSums | None, Tensor, Tensor | None]:
        """Gradients of flows, of counts, of sums of exp(O^), of the first such sum, and of temperatures."""
        known, options, flows, gates = self.known, self.options, self.known.flows, self.setting.gates
        of_in, of_allocation = gates.of_incoming(flows.conserved_in, reads)
        of_logits, dn, of_sums, grad_past = self._competition(of_weights)
        of_out, of_competition = gates.of_outgoing(flows.conserved_out, of_logits)
        of_in, of_out = of_in / known.n, of_out / known.n
        dn = dn - of_in * (flows.conserved_in - options.flow_eps) - of_out * (flows.conserved_out - options.flow_eps)
        of_sinks, of_sources = self._scales(of_in, of_out)
        incoming = -(reads + of_sinks * known.n / flows.incoming) / flows.incoming
        outgoing = -of_sources * known.n / flows.outgoing**2
        dn = dn + of_sinks / flows.incoming + of_sources / flows.outgoing
        learned = of_temperatures(of_competition, of_allocation)
        return _OfFlows(incoming, outgoing, of_in, of_out), dn, of_sums, grad_past, learned

    def _competition(self, of_weights: Tensor) -> tuple[Tensor, Tensor, _OfSums | None, Tensor]:
        """Gradients of logits, of counts, of sums of exp(O^), and of the first such sum."""
        known, setting, given = self.known, self.setting, self.grads.log_normaliser
        zero = torch.zeros_like(of_weights)
        past = self.count.new_zeros(self.of.heads) if given is None else given
        if known.weight is None:
            return zero, zero, None, past
        parts = known.weight * of_weights
        if self.options.competition == "heads":
            return through_heads(parts, known.weight / known.n, setting.of), parts / known.n, None, past
        assert known.log_normaliser is not None
        # A later sum of exp(O^) has exp(total_t - total_j) of the sum at j: a decay.
        decays = self.setting.log_decays()
        sums = known.log_normaliser
        of, total = between_sums(self.q, setting.of, decays - sums, sums)
        found, _ = launch.scan_scalars(of, -parts, None if given is None else given.view(-1, 1), reverse=True)
        logits = known.logits.double()
        logits = logits if setting.mask is None else logits.masked_fill(~setting.mask, LOG_ZERO)
        shares = (logits - sums).exp().float() * found
        shares = shares if setting.mask is None else shares.masked_fill(~setting.mask, 0)
        start = self.state.log_normaliser.reshape(-1)
        past = found[:, 0] * (start + decays[:, 0] - sums[:, 0]).exp()
        past = past.masked_fill(start < LOG_ZERO / 2, 0)
        return parts + shares, parts / known.n, _OfSums(-parts, shares, found, total), past

    def _scales(self, conserved_in: Tensor, conserved_out: Tensor) -> Tensor:
        """Gradients of s and o, the weights of sinks and sources in conserved flows, (2, batch * heads, length)."""
        eps = self.options.eps
        states = launch.sums(
            self.of, self.k, self.q, conserved_out[None], conserved_in[None], shift=(eps, eps), reverse=True
        )
        given = self.grads.sums
        launch.carry(self.of, states, None if given is None else given[:, [3, 2]].contiguous(), reverse=True)
        return launch.flows(
            self.of, self.q, self.k, states, torch.stack([conserved_out, conserved_in]), eps_source=eps,
            dot=self.setting.dots.flows, reverse=True,
        )  # fmt: skip

    def _sides(
        self, grad_out: Tensor, later: Tensor, before: tuple[Tensor, Tensor | None], grads: _OfFlows, of_decay: bool
    ) -> _Sides:
        """Gradients of queries, keys and the sums before, and what there is of decays."""
        of, known, eps, given = self.of, self.known, self.options.eps, self.grads.sums
        dot = self.setting.dots.gradients
        one = torch.ones_like(grads.incoming)
        of_sinks = torch.stack([grads.incoming, grads.conserved_in])
        of_sources = torch.stack([grads.outgoing, grads.conserved_out])
        sources = torch.stack([one, known.n / known.flows.outgoing])
        sinks = torch.stack([one, known.n / known.flows.incoming])
        matrices, memory = before
        keys, after_k = self._states(self.k, sources, self.sums[:, [0, 2]], 0.0, False)
        queries, after_q = self._states(self.q, sinks, self.sums[:, [1, 3]], 0.0, False)
        later_queries, first_q = self._states(self.q, of_sinks, None if given is None else given[:, [0, 2]], eps, True)
        later_keys, first_k = self._states(self.k, of_sources, None if given is None else given[:, [1, 3]], eps, True)
        grad_q = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        grad_k = torch.empty_like(self.k, memory_format=torch.contiguous_format)
        mine = launch.gradient(
            of, self.q, self.k, grad_out, self.v, matrices, known.gate, grad_q, known.weight,
            Pairs(of_sinks, sources, keys, constant=eps), Pairs(sinks, of_sources, later_keys, shift=eps),
            products=of_decay, dot=dot,
        )  # fmt: skip
        theirs = launch.gradient(
            of, self.k, self.q, self.v, grad_out, later, one if known.weight is None else known.weight, grad_k,
            known.gate, Pairs(sources, of_sinks, later_queries, shift=eps),
            Pairs(of_sources, sinks, queries, constant=eps), products=of_decay, dot=dot, reverse=True,
        )  # fmt: skip
        sums = torch.stack([first_q[:, 0], first_k[:, 0], first_q[:, 1], first_k[:, 1]], 1)
        if mine is None or theirs is None:
            return _Sides(grad_q, grad_k, sums, None, (), None)
        states = ((matrices, later, 1), (keys, later_queries, of.per), (queries, later_keys, of.per))
        last = self.count.new_zeros(of.heads)
        if self.grads.memory is not None and memory is not None:
            last = last + (memory * self.grads.memory).flatten(1).sum(1)
        if given is not None:
            last = last + (after_k * given[:, [0, 2]] + after_q * given[:, [1, 3]]).flatten(1).sum(1)
        return _Sides(grad_q, grad_k, sums, mine - theirs, states, last)

    def _states(
        self, x: Tensor, weights: Tensor, first: Tensor | None, shift: float, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """States of a side before chunks, or with ``reverse`` behind them, and that at the other end."""
        states = launch.sums(self.of, x, None, weights, shift=(shift, 0.0), reverse=reverse)
        first = None if first is None else first.contiguous()
        after = launch.carry(self.of, states, first, last=True, reverse=reverse)
        assert after is not None
        return states, after

    def _scan_counts(self, dn: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the ones that counts are sums of, and of the count before."""
        given = self.grads.tokens
        return launch.scan_scalars(self.of, dn, None if given is None else given.view(-1, 1), reverse=True)

    def _decays(self, sides: _Sides, before: FlowState, counts: Tensor, dn: Tensor, of_sums: _OfSums | None) -> Tensor:
        """The gradient of log-decays, (batch, length, heads).

        That of g_u is the sum of x_ij dx_ij over i >= u > j for all that is carried from j to i. It is known at the
        start of each segment, as the product of the sums before and the gradients of sums behind it. From there, a
        token's part is what it reads less what is read of it later.
        """
        of, known = self.of, self.known
        real = 1.0 if self.setting.mask is None else self.setting.mask
        assert sides.parts is not None
        parts = sides.parts.double() + dn * known.n - counts * real
        first = known.n.new_zeros(of.heads, dtype=torch.float64)
        for state, grad in zip(self.state, before, strict=True):
            if state is not self.state.log_normaliser:
                first = first + (state.reshape(of.heads, -1) * grad.reshape(of.heads, -1)).sum(1)
        if of_sums is not None:
            parts = parts + of_sums.reads - of_sums.writes
            first = first + before.log_normaliser
        assert sides.last is not None
        last = sides.last
        if self.grads.tokens is not None:
            last = last + self.count * self.grads.tokens
        if of_sums is not None and self.grads.log_normaliser is not None:
            last = last + self.grads.log_normaliser
        starts = [first.unsqueeze(1), self._at_segments(sides, counts, of_sums), last.unsqueeze(1)]
        return by_tokens(of, torch.cat(starts, 1), parts)

    def _at_segments(self, sides: _Sides, counts: Tensor, of_sums: _OfSums | None) -> Tensor:
        """The gradients of the log-decays of the first tokens of all segments but the first, (batch * heads, ...)."""
        of = self.of
        found = self.count.new_zeros(of.heads, of.segments - 1)
        for before, behind, step in sides.states:
            found += between_segments(of, before, behind, step)
        first = of.per * of.chunk * torch.arange(1, of.segments, device=found.device)
        decays = self.setting.log_decays()
        factor = (decays[:, first] - decays[:, first - 1]).exp()
        found += counts[:, first] * factor * self.known.n.expand(of.heads, -1)[:, first - 1]
        if of_sums is not None:
            found += of_sums.found[:, first] * (of_sums.total[:, first] - of_sums.total[:, first - 1]).exp()
        return found
