"""Bidirectional and cross Flow-Attention without decay by Triton kernels; ``operation.py`` above has the equations.

Every sum goes over all tokens of one side, so a side's tokens meet only vectors and a matrix of their head: kernels
read each side by itself, a chunk or a segment to a program, and their sums are added up in PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import LOG_ZERO
from flowformer.kernels.triton import launch
from flowformer.kernels.triton.launch import Pairs, Sequences, chunk_of, dots_of
from flowformer.mechanisms.flow.equations import FEATURE_MAPS, Learned
from flowformer.mechanisms.flow.options import KernelOptions
from flowformer.mechanisms.flow.triton.gates import Gates, of_temperatures
from flowformer.mechanisms.flow.triton.setting import through_heads


class _Side(NamedTuple):
    """Queries or keys: the tokens, what kernels are told of them, their mask by heads, and how many are real."""

    x: Tensor
    of: Sequences
    mask: Tensor | None
    number: Tensor

    def open(self, flow: Tensor, other: _Side) -> Tensor:
        """Set to 1 the flow of padding, and every flow where the other side has no token."""
        if self.mask is not None:
            flow = flow.masked_fill(~self.mask, 1.0)
        return flow if other.mask is None else flow.masked_fill(~other.mask.any(-1, keepdim=True), 1.0)

    def sum(self, weights: Tensor | None = None, shift: float = 0.0) -> Tensor:
        """Sums of features over all tokens, (batch * heads, vectors, channels), for weights (vectors, ...)."""
        found = launch.sums(self.of, self.x, None, weights, shift=(shift, 0.0))
        return found.sum(1, dtype=torch.float64)


def _side(x: Tensor, mask: Tensor | None, chunk: int, feature_map: int) -> _Side:
    by_heads = None if mask is None else mask.repeat_interleave(x.shape[2], 0)
    if by_heads is None:
        number = torch.full((1, 1), x.shape[1], dtype=torch.float32, device=x.device)
    else:
        number = by_heads.sum(1, keepdim=True).clamp(min=1).float()
    return _Side(x, Sequences(x, mask, None, chunk, feature_map), by_heads, number)


class _Found(NamedTuple):
    """Weights of sources, where they compete, and gates of sinks, (batch * heads, length)."""

    weight: Tensor | None
    gate: Tensor


class _Form:
    """Both passes for one set of inputs."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
        learned: Learned,
        options: KernelOptions,
    ) -> None:
        self.dots = dots_of(q.dtype, options.feature_map)
        chunk = chunk_of(self.dots, q.shape[-1], v.shape[-1])
        feature_map = FEATURE_MAPS[options.feature_map]
        self.q, self.k = _side(q, query_mask, chunk, feature_map), _side(k, key_mask, chunk, feature_map)
        self.options, self.gates = options, Gates(options, q.shape[2], learned.temperatures)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sum Q and sum K, (batch * heads, 1, channels)."""
        return self.q.sum(), self.k.sum()

    def scaled_sums(self, incoming: Tensor, outgoing: Tensor) -> tuple[Tensor, Tensor]:
        """Sum Q / I and sum K / O, likewise."""
        queries = self.q.sum(1 / incoming.unsqueeze(0))
        return queries, self.k.sum(1 / outgoing.unsqueeze(0))

    def flow(self, side: _Side, sums: Tensor) -> Tensor:
        """Flow of each token of a side from the sum of the other side: (X + eps) . (sum + eps) + flow_eps."""
        states = (sums + self.options.eps).float().contiguous()
        found = launch.project(side.of, side.x, states, shift=self.options.eps)
        return found[0] + self.options.flow_eps

    def weigh(self, incoming: Tensor, conserved_in: Tensor, conserved_out: Tensor) -> _Found:
        """Weights of sources, and gates of sinks."""
        options, sinks, sources = self.options, self.q.number, self.k.number
        gate = 1 / incoming
        if options.allocation:
            gate = gate * self.gates.allocation(conserved_in * (sinks / sources))
        logits = self.gates.logits(conserved_out * (sources / sinks) if options.rescale else conserved_out)
        if options.competition is None:
            return _Found(None, gate)
        if options.competition == "heads":
            by_heads = logits.view(-1, self.k.of.per_sequence, self.k.of.length)
            return _Found(sources * by_heads.softmax(1).view_as(logits), gate)
        if self.k.mask is not None:
            logits = logits.masked_fill(~self.k.mask, LOG_ZERO)
        return _Found(sources * logits.softmax(-1), gate)

    def matrix(self, side: _Side, values: Tensor, weight: Tensor | None, dot: int) -> Tensor:
        """Sum X^T w v over the tokens of a side, (batch * heads, channels of X, channels of v)."""
        found = launch.memory(side.of, side.x, values, weight, dot=dot)
        return found.sum(1, dtype=torch.float64).float()

    def read(self, side: _Side, matrix: Tensor, out: Tensor, scale: Tensor | None, **options: Any) -> Tensor | None:
        """Write X . matrix times a scale for each token of a side."""
        return launch.attend(side.of, side.x, side.x, out, matrix, out, scale, local=False, **options)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, learned: Learned,
    options: KernelOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output, and the flows of both sides in one tensor."""
    form = _Form(q, k, v, key_mask, query_mask, learned, options)
    sinks, sources = form.q, form.k
    queries, keys = form.sums()
    incoming = sinks.open(form.flow(sinks, keys), sources)
    outgoing = sources.open(form.flow(sources, queries), sinks)
    queries, keys = form.scaled_sums(incoming, outgoing)
    conserved_in, conserved_out = form.flow(sinks, keys), form.flow(sources, queries)
    found = form.weigh(incoming, conserved_in, conserved_out)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    form.read(sinks, form.matrix(sources, v, found.weight, form.dots.values), out, found.gate, dot=form.dots.values)
    return out, torch.cat([flow.flatten() for flow in (incoming, conserved_in, outgoing, conserved_out)])


def backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, learned: Learned,
    options: KernelOptions, out: Tensor, flows: Tensor, grad_out: Tensor, of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, None, Tensor | None]:  # fmt: skip
    """Return the gradients of q, k and v, none of decays, and those of temperatures."""
    form = _Form(q, k, v, key_mask, query_mask, learned, options)
    sinks, sources, eps = form.q, form.k, options.eps
    lengths = [side.of.heads * side.of.length for side in (sinks, sinks, sources, sources)]
    incoming, conserved_in, outgoing, conserved_out = (
        flow.view(side.of.heads, -1)
        for flow, side in zip(flows.split(lengths), (sinks, sinks, sources, sources), strict=True)
    )
    found = form.weigh(incoming, conserved_in, conserved_out)
    dot = form.dots.gradients

    later = form.matrix(sinks, grad_out, found.gate, dot)
    grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
    of_weight = form.read(sources, later, grad_v, found.weight, other=v, dot=dot)
    matrix = form.matrix(sources, v, found.weight, dot)
    if out.dtype == torch.float32:
        reads = launch.dots(sinks.of, grad_out, out)
    else:  # of outputs computed again: where gradients cancel, their rounding would show
        again = form.read(sinks, matrix, torch.empty_like(out), None, other=grad_out, dot=dot)
        assert again is not None
        reads = found.gate * again

    ratio = sinks.number / sources.number
    of_in, of_allocation = form.gates.of_incoming(conserved_in * ratio, reads)
    of_in = of_in * ratio
    of_out, of_competition = _of_outgoing(form, found, conserved_out, of_weight)
    scaled_queries, scaled_keys = (x.float() for x in form.scaled_sums(incoming, outgoing))
    of_scaled_queries = sources.sum(of_out.unsqueeze(0), eps).float()
    of_scaled_keys = sinks.sum(of_in.unsqueeze(0), eps).float()
    of_sinks = launch.project(sinks.of, q, of_scaled_queries)[0]
    of_sources = launch.project(sources.of, k, of_scaled_keys)[0]
    of_incoming = -(reads + of_sinks / incoming) / incoming
    of_outgoing = -of_sources / outgoing**2
    if sources.mask is not None:  # without any token on the other side, flows are constants
        of_incoming = of_incoming * sources.mask.any(-1, keepdim=True)
    if sinks.mask is not None:
        of_outgoing = of_outgoing * sinks.mask.any(-1, keepdim=True)

    queries, keys = (x.float() for x in form.sums())
    of_keys = sinks.sum(of_incoming.unsqueeze(0), eps).float()
    of_queries = sources.sum(of_outgoing.unsqueeze(0), eps).float()
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    launch.gradient(
        sinks.of, q, q, grad_out, grad_out, matrix, found.gate, grad_q, None,
        Pairs(torch.stack([of_incoming, of_in]), None, torch.cat([keys, scaled_keys], 1), constant=eps),
        Pairs(
            torch.stack([torch.ones_like(incoming), 1 / incoming]), None, torch.cat([of_queries, of_scaled_queries], 1)
        ),
        local=False, dot=dot,
    )  # fmt: skip
    launch.gradient(
        sources.of, k, k, v, v, later, torch.ones_like(outgoing) if found.weight is None else found.weight, grad_k,
        None,
        Pairs(torch.stack([of_outgoing, of_out]), None, torch.cat([queries, scaled_queries], 1), constant=eps),
        Pairs(torch.stack([torch.ones_like(outgoing), 1 / outgoing]), None, torch.cat([of_keys, of_scaled_keys], 1)),
        local=False, dot=dot,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, None, of_temperatures(of_competition, of_allocation)


def _of_outgoing(
    form: _Form, found: _Found, conserved: Tensor, of_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of conserved outgoing flows before they are rescaled, and of the temperature of competition."""
    options, sources = form.options, form.k
    ratio = sources.number / form.q.number if options.rescale else 1.0
    if found.weight is None or of_weight is None:
        return form.gates.of_outgoing(conserved, torch.zeros_like(conserved))
    parts, share = found.weight * of_weight, found.weight / sources.number
    if options.competition == "heads":
        of_logits = through_heads(parts, share, sources.of)
    else:
        of_logits = parts - share * parts.sum(-1, keepdim=True)
    of_conserved, learned = form.gates.of_outgoing(conserved * ratio, of_logits)
    return of_conserved * ratio, learned
