"""Chunked scan for causal mechanisms whose state is a sum of outer products.

Computed token by token, causal linear attention is a recurrence over a K x V matrix; computed for all tokens at once
with cumulative sums it needs L such matrices. The scan takes a middle way: within a chunk the tokens meet in a
chunk x chunk product, and only one matrix per chunk carries the past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.decay import Decay, carry_decayed
from flowformer.core.precision import without_autocast
from flowformer.core.tracing import is_exporting, is_transformed, shift

BLOCK = 512  # tokens whose intermediate values exist at a time; backward recomputes block by block

Step = Callable[..., tuple[Tensor, Any]]


def scan(
    step: Step,
    tokens: Sequence[Tensor | None],
    state: Any,
    learned: Sequence[Tensor | None] = (),
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Any]:
    """Run a causal recurrence over blocks of tokens; forward and backward take memory linear in length.

    Autograd sees one node: it keeps the inputs and the state before each block, and recomputes a block when it comes to
    differentiate it. Gradients of gradients are refused. While a graph is traced (compile, export), under torch.func
    and under forward-mode differentiation, the blocks are plain operations.

    Args:
        step: ``step(tokens of a block, state, *learned) -> (output of the block, state after it)``, pure.
        tokens: Tensors (batch, L, ...), or ``None``.
        state: A NamedTuple of tensors; integer ones take no gradient.
        learned: What is the same for all tokens: tensors, or ``None``.
        block: Tokens in a block.

    Returns:
        Output (batch, L, ...) and the state after the last token.
    """
    if is_exporting():
        return step(tokens, state, *learned)  # a loop over blocks would bind the graph to the length of the example
    if torch.compiler.is_compiling() or is_transformed():
        pieces = []
        for start in range(0, _length(tokens), block):
            piece, state = step(_cut(tokens, start, block), state, *learned)
            pieces.append(piece)
        return torch.cat(pieces, 1), state
    tensors = [t for t in (*tokens, *learned, *state) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        layout = _Layout(step, block, [t is not None for t in (*tokens, *learned)], len(tokens), type(state))
        out, *parts = _Scan.apply(layout, *tensors)
        return out, type(state)(*parts)
    return _run(step, tokens, state, learned, block)


def _run(
    step: Step,
    tokens: Sequence[Tensor | None],
    state: Any,
    learned: Sequence[Tensor | None],
    block: int,
    starts: list[Any] | None = None,
) -> tuple[Tensor, Any]:
    """The output, and the state after the last token; the states before each block are added to ``starts``."""
    length, out = _length(tokens), None
    for start in range(0, length, block):
        if starts is not None:
            starts.append(state)
        piece, state = step(_cut(tokens, start, block), state, *learned)
        if out is None:
            out = piece.new_empty(piece.shape[0], length, *piece.shape[2:])
        out[:, start : start + block] = piece
    assert out is not None  # there is at least one token
    return out, state


class _Layout(NamedTuple):
    """What a flat list of tensors means to :class:`_Scan`."""

    step: Step
    block: int
    given: list[bool]  # which of tokens and learned are tensors, which None
    tokens: int  # how many of them are tokens
    state_type: Any

    @property
    def counts(self) -> tuple[int, int]:
        """How many tensors are of tokens, and how many learned."""
        of_tokens = sum(self.given[: self.tokens])
        return of_tokens, sum(self.given) - of_tokens

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None], Any]:
        """Tokens, learned and state."""
        rest = iter(tensors)
        parts = [next(rest) if given else None for given in self.given]
        return parts[: self.tokens], parts[self.tokens :], self.state_type(*rest)


def _length(tokens: Sequence[Tensor | None]) -> int:
    return next(t.shape[1] for t in tokens if t is not None)


def _cut(tokens: Sequence[Tensor | None], start: int, block: int) -> list[Tensor | None]:
    return [t if t is None else t[:, start : start + block] for t in tokens]


class _Scan(torch.autograd.Function):
    """The scan as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, learned, first = layout.split(tensors)
        starts: list[Any] = []
        out, last = _run(layout.step, tokens, first, learned, layout.block, starts)
        ctx.layout, ctx.blocks = layout, len(starts)
        ctx.save_for_backward(*tensors, *(part for state in starts[1:] for part in state))
        ctx.mark_non_differentiable(*(part for part in last if not part.is_floating_point()))
        return out, *last

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # once_differentiable would drop them in silence where grads_out is a constant.
            raise RuntimeError(
                "causal and decaying operations do not support second-order gradients: omit create_graph=True"
            )
        grad_out, *grad_state = grads_out
        layout, saved = ctx.layout, ctx.saved_tensors
        of_tokens, of_learned = layout.counts
        tokens, learned, first, later = _split(saved, (of_tokens, of_learned, len(grad_state)))
        wanted = ctx.needs_input_grad[1 : 1 + of_tokens]
        sought = ctx.needs_input_grad[1 + of_tokens : 1 + of_tokens + of_learned]
        grads = [torch.empty_like(t) if want else None for t, want in zip(tokens, wanted, strict=True)]
        gathered = [torch.zeros_like(t) if want else None for t, want in zip(learned, sought, strict=True)]
        learned = [t.detach().requires_grad_(want) for t, want in zip(learned, sought, strict=True)]
        carried = [g for g, part in zip(grad_state, first, strict=True) if part.is_floating_point()]
        for index in reversed(range(ctx.blocks)):
            start = index * layout.block
            state = first if index == 0 else later[(index - 1) * len(first) : index * len(first)]
            window = slice(start, start + layout.block)
            pieces = [t[:, window].detach().requires_grad_(w) for t, w in zip(tokens, wanted, strict=True)]
            state = [part.detach().requires_grad_(part.is_floating_point()) for part in state]
            with torch.enable_grad():
                given, constant, before = layout.split([*pieces, *learned, *state])
                out, after = layout.step(given, before, *constant)
            outputs = [out, *(part for part in after if part.requires_grad)]
            flowing = [g for g, part in zip(carried, _floating(after), strict=True) if part.requires_grad]
            leaves = [t for t in (*pieces, *learned, *state) if t.requires_grad]
            results = list(torch.autograd.grad(outputs, leaves, [grad_out[:, window], *flowing], allow_unused=True))
            results = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, results, strict=True)]
            of_pieces, of_constants, carried = _split(results, (sum(wanted), sum(sought)))
            for grad, found in zip(_present(grads), of_pieces, strict=True):
                grad[:, window] = found
            for grad, found in zip(_present(gathered), of_constants, strict=True):
                grad += found
        of_state = iter(carried)
        of_first = (next(of_state) if part.is_floating_point() else None for part in first)
        return None, *grads, *gathered, *of_first


def _split(items: Sequence[Any], counts: Sequence[int]) -> list[Sequence[Any]]:
    """The first items, so many at a time; and the rest."""
    parts, start = [], 0
    for count in counts:
        parts.append(items[start : start + count])
        start += count
    return [*parts, items[start:]]


def _present(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


def _floating(state: Sequence[Tensor]) -> list[Tensor]:
    return [part for part in state if part.is_floating_point()]


def carry(sums: Tensor, past: Tensor, decay: Decay | None = None) -> tuple[Tensor, Tensor]:
    """Return the sums before each chunk and after the last one.

    Args:
        sums: One sum per chunk, (batch, heads, chunks, ...); with a decay, what is left of it at the chunk's end.
        past: The sum of all before, (batch, heads, ...), in the dtype of states.
        decay: See :mod:`flowformer.core.decay`.

    Returns:
        Sum before each chunk, shape and dtype of ``sums``; sum after the last chunk, shape and dtype of ``past``.
    """
    if decay is not None:
        return carry_decayed(sums, past, decay)
    running = sums.cumsum(2)
    before = shift(running, 0.0) + past.to(sums.dtype).unsqueeze(2)
    return before, past + running[:, :, -1].to(past.dtype)


def causal_product(
    scores: Tensor, Q: Tensor, K: Tensor, V: Tensor, memory: Tensor, decay: Decay | None = None
) -> tuple[Tensor, Tensor]:
    """Return sum_{j <= i} (Q_i . K_j) V_j, computed in chunks; with a decay, each term times gamma(i, j).

    Args:
        scores: Q K^T within each chunk, lower triangle, (batch, heads, chunks, chunk, chunk), decayed.
        Q: (batch, heads, chunks, chunk, K).
        K: (batch, heads, chunks, chunk, K).
        V: (batch, heads, chunks, chunk, V).
        memory: sum of K_j V_j^T over the past, (batch, heads, K, V).
        decay: See :mod:`flowformer.core.decay`.

    Returns:
        The products (batch, heads, chunks, chunk, V) and the memory after the last chunk.
    """
    if decay is not None:
        K, Q = K * decay.leaving.unsqueeze(-1), Q * decay.arriving.unsqueeze(-1)
    before, memory = carry(K.transpose(-1, -2) @ V, memory, decay)
    return scores @ V + Q @ before, memory
