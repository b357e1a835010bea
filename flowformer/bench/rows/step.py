"""One token of decoding after a context, by every registered mechanism that has a state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowformer.bench import registry
from flowformer.bench.rows.attention import unavailable
from flowformer.bench.rows.forms import (
    Form,
    Sequences,
    as_form,
    by_backend,
    cache_bytes,
    count_bytes,
    draw_learned,
    has_heads,
    learned_bytes,
    mechanisms,
    name_of,
    truth_of,
)
from flowformer.bench.rows.variants import Variant, variants_of
from flowformer.mechanisms import Mechanism

CONTEXTS = (10, 1000, 100_000, 1_000_000)
CHECK_LENGTH = 1000
PERIOD = 4096  # tokens after which the context repeats: a million distinct ones would fill the memory
PREFILL = 65_536  # tokens of context at a time
Taken = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]


# ----------------------------------------------------------------------------------------------------------- operation


class Token(NamedTuple):
    """What a step is made from.

    Attributes:
        q: Query of the token, (batch, heads, K).
        k: Key of the token, (batch, heads, K).
        v: Value of the token, (batch, heads, V).
        context: q, k and v of up to :data:`PERIOD` tokens, (batch, tokens, heads, channels), which repeat.
        length: Tokens of context.
        states: States of fixed size after the context, made before by contenders that start from the same.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    context: tuple[Tensor, Tensor, Tensor]
    length: int
    states: dict[str, Any]

    def pieces(self, size: int = PREFILL) -> list[list[Tensor]]:
        """The context as tensors (batch, up to ``size`` tokens, heads, channels)."""
        counts = [min(size, self.length - start) for start in range(0, self.length, size)]
        # All but the last are whole periods, so each piece starts where a period does.
        return [[_repeat(tensor, count) for tensor in self.context] for count in counts]


def _repeat(tensor: Tensor, length: int) -> Tensor:
    times = -(-length // tensor.shape[1])
    return tensor.repeat(1, times, 1, 1)[:, :length] if times > 1 else tensor[:, :length]


def token(shape: registry.Shape, dtype: torch.dtype, layout: str) -> registry.Inputs:
    """A :class:`Token` after ``shape.length`` others."""
    tokens = min(shape.length, PERIOD)
    given = Sequences(registry.Shape(**{**vars(shape), "length": tokens + 1}), dtype, layout)
    q, k, v = (x[:, -1].contiguous() for x in (given.q, given.k, given.v))
    return (Token(q, k, v, (given.q[:, :-1], given.k[:, :-1], given.v[:, :-1]), shape.length, {}),)


def step(function: registry.Function, inputs: registry.Inputs) -> registry.Call:
    """``function(token)`` makes the state and returns the step and the state's bytes; the step alone is timed."""
    (given,) = inputs
    with torch.no_grad():
        take, state_bytes = function(given)

    @torch.no_grad()
    def run() -> registry.Outputs:
        return (take(given.q, given.k, given.v),)

    return registry.Call(run, state_bytes)


def step_truth(reference: registry.Function, inputs: registry.Inputs) -> registry.Outputs:
    """Last output of the reference on context and token."""
    (given,) = inputs
    new = (given.q, given.k, given.v)
    q, k, v = (
        torch.cat([_repeat(past, given.length), x[:, None]], 1) for past, x in zip(given.context, new, strict=True)
    )
    return (as_form(reference).attend(q, k, v, causal=True)[:, -1],)


registry.add_operation(
    registry.Operation(
        "step", "one token of decoding", "context", CONTEXTS, token, step, step_truth, lambda shape: shape.batch,
        check_length=CHECK_LENGTH, measure_memory=False,
    )
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- state


def prefill(whole: registry.Function, pieces: Iterable[Iterable[Tensor]], *learned: Any, **options: Any) -> Any:
    """The state of a causal operation after a context that comes in pieces."""
    state: Any = None
    for piece in pieces:
        _, state = whole(*piece, *learned, causal=True, initial_state=state, return_state=True, **options)
    return state


def random_cache(fresh: Any, tokens: int) -> Any:
    """A state that holds each token, (batch, tokens, ...), filled with random numbers, from the fresh one of none.

    To read a long context takes such a mechanism time quadratic in its length, and a step takes the same time whatever
    is in the state.
    """
    generator = torch.Generator().manual_seed(0)

    def fill(part: Tensor) -> Tensor:
        size = (len(part), tokens, *part.shape[2:])
        if part.dtype == torch.bool:  # which tokens are real
            return part.new_ones(size)
        return torch.randn(size, generator=generator).to(part)

    return type(fresh)(*map(fill, fresh))


def state_after(row: Mechanism, variant: Variant, learned: tuple[Any, ...], given: Token) -> Any:
    """The state after the context, computed in parallel by the backend chosen by default."""
    if not row.can("fixed state") and given.length > CHECK_LENGTH:
        assert row.init_state is not None  # it has a step
        sizes = (given.k.shape[0], given.k.shape[1], given.k.shape[2], given.v.shape[2])
        placed = {"dtype": given.k.dtype, "device": given.k.device}
        return random_cache(row.init_state(*sizes, *learned, **placed, **variant.options), given.length)
    form = Form(row.operation, row.layout, variant)
    pieces = (form.arrange(*piece) for piece in given.pieces())
    return prefill(row.operation, pieces, *learned, **variant.options)


# ---------------------------------------------------------------------------------------------------------- contenders


@registry.add_contenders
def registered_mechanisms() -> Iterator[registry.Contender]:
    """Every registered mechanism that has a step, in every backend that the step has."""
    for row in mechanisms("flow"):
        for variant in variants_of(row):
            if row.step is None or not row.can("state") or not variant.decodes:
                continue
            for name, backend, words, device in by_backend(name_of(row, variant), row.step):
                yield registry.Contender(
                    name, "step", partial(_take, row, variant, backend), Form(row.truth, row.layout, variant),
                    f"ops.{row.step.__name__}{words}{variant.about}", ours=True,
                    unavailable=partial(unavailable, row, backend), needs_bytes=partial(_bytes, row, variant),
                    device=device,
                )  # fmt: skip


def _take(row: Mechanism, variant: Variant, backend: str | None, given: Token) -> Taken:
    heads, channels = given.q.shape[1:]
    learned = draw_learned(variant, given.length + 1, heads, channels, given.q.dtype, given.q.device)
    name = name_of(row, variant)
    state = given.states.get(name) or state_after(row, variant, learned, given)
    if row.can("fixed state"):
        given.states[name] = state
    assert row.step is not None  # it is timed
    one: registry.Function = partial(row.step, backend=backend) if backend else row.step
    if has_heads(row.layout) and not learned and not variant.options:
        return lambda q, k, v: one(q, k, v, state)[0], count_bytes(state)
    form = Form(one, row.layout, variant)

    def take(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return one(*form.arrange(q, k, v), state, *learned, **variant.options)[0].view_as(v)

    return take, count_bytes(state)


def _bytes(row: Mechanism, variant: Variant, shape: registry.Shape) -> float:
    """Learned tensors; and where the state holds every token, the state and the longer copy that a step makes."""
    return learned_bytes(variant, shape) + (0 if row.can("fixed state") else 2.1 * cache_bytes(shape))


def sdpa_step(given: Token) -> Taken:
    """One step on keys and values kept in place: the new ones are written behind the old ones, nothing is copied."""
    cache = []
    for tensor in given.context[1:]:
        batch, _, heads, width = tensor.shape
        room = tensor.new_empty(batch, heads, given.length + 1, width)
        for start in range(0, given.length, tensor.shape[1]):
            piece = tensor[:, : given.length - start].transpose(1, 2)
            room[:, :, start : start + piece.shape[2]] = piece
        cache.append(room)

    def take(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for room, new in zip(cache, (k, v), strict=True):
            room[:, :, -1] = new
        return scaled_dot_product_attention(q.unsqueeze(2), *cache).squeeze(2)

    return take, sum(room.numel() * room.element_size() for room in cache)


registry.add_contender(
    registry.Contender(
        "sdpa", "step", sdpa_step, truth_of("softmax"),
        "torch scaled_dot_product_attention on keys and values kept in place", needs_bytes=cache_bytes,
    )
)  # fmt: skip
