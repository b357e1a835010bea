"""Linear attention of features, forward and backward: what every mechanism of this family runs on.

    out_i = a_i phi(q_i) . sum_j gamma(i, j) w_j phi(k_j) v_j^T

with weights w of sources and scales a of sinks, each or none; or divided by the sums of weights

    T_i = phi(q_i) . sum_j gamma(i, j) phi(k_j)        a_i = 1 / (T_i + eps)

over the token and the earlier ones, or over all tokens: then without a decay from sums of all of them, and with one in
two passes, over the token and the earlier ones and over the later ones. T may also be a result beside outputs that are
not divided by it, for mechanisms that divide in another way.

The gradient of phi(q_i) . phi(k_j) gamma(i, j) is a_i (g_i . w_j v_j) + t_i, where g is the gradient of outputs, and
t_i that of T_i: given, or -a_i (g_i . out_i). So the gradients of features are the same sums with other vectors.

In half precision g_i . out_i is computed again: where gradients cancel, the rounding of outputs would show in them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.kernels.triton import launch
from flowformer.kernels.triton.decays import add_up, between_segments, by_tokens
from flowformer.kernels.triton.launch import Dots, Pairs, Sequences, Sums, chunk_of, dots_of
from flowformer.kernels.triton.parts import Part, parts_of, settle, wide


class Inputs(NamedTuple):
    """What attention is given.

    Attributes:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        key_mask: (batch, S), True = real token.
        query_mask: (batch, L), likewise.
        log_decay: (heads,) or (batch, L, heads).
        weight: Of sources, (batch, S, heads), float32.
        scale: Of sinks, (batch, L, heads), float32; not zero.
        feature_map: Of queries and keys, by its number in device.py.
        eps: Added to sums of weights; ``None`` where nothing is divided by them.
        undivided: Whether sums of weights are results of their own; then ``eps`` is ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    query_mask: Tensor | None
    log_decay: Tensor | None
    weight: Tensor | None
    scale: Tensor | None
    feature_map: int
    eps: float | None
    undivided: bool = False

    @property
    def sums(self) -> bool:
        """Whether sums of weights are wanted."""
        return self.undivided or self.eps is not None

    @property
    def dots(self) -> Dots:
        """How to multiply: there are no flows, whose products would need more digits."""
        _, values, gradients = dots_of(self.q.dtype, "given")
        return Dots(values, values, gradients)


class State(NamedTuple):
    """Sums over the tokens so far, or their gradients; ``None`` where there are none.

    Attributes:
        keys: Of features of keys, (batch, heads, K), where sums of weights are wanted.
        memory: Of their products with values, (batch, heads, K, V).
    """

    keys: Tensor | None
    memory: Tensor | None

    def by_heads(self) -> State:
        """(batch * heads, ...), in float64."""
        return State(*(None if x is None else x.double().flatten(0, 1) for x in self))


class Gradients(NamedTuple):
    """Gradients of inputs in their shapes, ``None`` of those that are absent; of log-decays (batch, L, heads)."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    weight: Tensor | None
    scale: Tensor | None
    state: State | None


def _by_heads(x: Tensor | None) -> Tensor | None:
    """(batch, length, heads) as (batch * heads, length)."""
    return None if x is None else x.transpose(1, 2).reshape(-1, x.shape[1]).float().contiguous()


def _by_tokens(x: Tensor | None, of: Sequences) -> Tensor | None:
    """(batch * heads, length) as (batch, length, heads), zero at padding."""
    if x is None:
        return None
    x = x.view(of.batch, of.per_sequence, -1).transpose(1, 2)
    return x.contiguous() if of.mask is None else x.masked_fill(~of.mask.unsqueeze(-1), 0)


class OfResults(NamedTuple):
    """Gradients of the output, and of sums of weights that are a result too, (batch * heads, length)."""

    out: Tensor
    sums: Tensor | None = None


class _Backward(NamedTuple):
    """Numbers of each token that the backward pass has, (batch * heads, length): a, w, t, and the gradient of a."""

    scale: Tensor | None
    weight: Tensor | None
    of_sums: Tensor | None
    of_scale: Tensor | None


def _start_backward(
    given: Inputs, of: Sequences, out: Tensor, totals: Tensor, grads: OfResults, again: Callable[[], Tensor]
) -> _Backward:
    """Find the numbers of tokens; ``again`` computes g_i . out_i / a_i from the inputs."""
    weight, scale = _by_heads(given.weight), _by_heads(given.scale)
    if given.eps is None and scale is None:
        return _Backward(None, weight, grads.sums, None)
    scale = 1 / (totals + (given.eps or 0.0)) if scale is None else scale
    reads = launch.dots(of, grads.out, out) / scale if out.dtype == torch.float32 else again()
    if given.eps is None:
        return _Backward(scale, weight, grads.sums, reads)
    return _Backward(scale, weight, -scale.square() * reads, None)


# ---------------------------------------------------------------------------------- with an order of tokens, or a decay


class _Local:
    """Both passes where gamma(i, j) depends on the tokens: causal, or with ``both`` bidirectional with a decay.

    Sums over earlier tokens are those of direction False, sums over later ones those of True. Of two directions, one
    has the token itself: for sinks the first, for sources the second.
    """

    def __init__(self, given: Inputs, state: State | None, *, backward: bool = False) -> None:
        self.given, self.dots = given, given.dots
        q, mask = given.q, given.key_mask
        total = None if given.log_decay is None else add_up(given.log_decay, mask, q)
        chunk = chunk_of(self.dots, q.shape[-1], given.v.shape[-1], backward=backward)
        self.of = Sequences(q, mask, total, chunk, given.feature_map)
        self.before = state and state.by_heads()
        both = state is None
        self.sinks = ((False, False), (True, True)) if both else ((False, False),)  # direction, and whether strict
        self.sources = ((True, False), (False, True)) if both else ((True, False),)
        self.after: dict[str, Tensor] = {}

    def sums(self, x: Tensor, weights: Tensor | None, back: bool, first: Tensor | None, name: str) -> Tensor:
        """Sums of features before chunks, or behind them, (batch * heads, chunks, 1, channels)."""
        found = launch.sums(self.of, x, None, None if weights is None else weights[None], reverse=back)
        first = None if first is None else first.unsqueeze(1).contiguous()
        return self._carry(found, first, 1, back, name)

    def matrices(self, x: Tensor, y: Tensor, weights: Tensor | None, back: bool, first: Tensor | None, name: str,
                 dot: int) -> Tensor:  # fmt: skip
        """Sums of products before segments, or behind them, (batch * heads, segments, channels of x, of y)."""
        found = launch.memory(self.of, x, y, weights, dot=dot, reverse=back)
        return self._carry(found, first, self.of.per, back, name)

    def _carry(self, states: Tensor, first: Tensor | None, step: int, back: bool, name: str) -> Tensor:
        after = launch.carry(self.of, states, first, step=step, last=self.before is not None, reverse=back)
        if after is not None:
            self.after[name] = after
        return states

    def forward(self, goal: Tensor) -> tuple[Tensor | None, State | None]:
        """Write outputs; return sums of weights (batch * heads, length), and the state after."""
        (q, k, v, *_), of, eps = self.given, self.of, self.given.eps
        weight, scale = _by_heads(self.given.weight), _by_heads(self.given.scale)
        several = len(self.sinks) > 1
        out = wide(goal) if several else goal
        totals = None
        for back, strict in self.sinks:
            matrices = self.matrices(k, v, weight, back, self.before and self.before.memory, "memory", self.dots.values)
            by = None
            if self.given.sums:
                keys = self.sums(k, None, back, self.before and self.before.keys, "keys")
                divide = eps is not None and (back or not several)
                by = Sums(keys, of.numbers(of.length), totals, divide, eps or 0.0)
                totals = by.found
            launch.attend(
                of, q, k, v, matrices, out, scale, weight, totals=by, add=back, dot=self.dots.values, reverse=back,
                strict=strict,
            )  # fmt: skip
        after = None
        if self.before is not None:
            after = State(self.after["keys"].squeeze(1) if self.given.sums else None, self.after["memory"])
        settle(goal, out)
        return totals, after

    def backward(
        self, goals: Sequence[Tensor], out: Tensor, totals: Tensor, of_results: OfResults, grad_state: State | None,
        of_decay: bool,
    ) -> Gradients:  # fmt: skip
        """Write the gradients of q, k and v to ``goals``; return those of all inputs."""
        (q, k, v, *_), of, grad_out = self.given, self.of, of_results.out
        states = _States(self, grad_out, grad_state)
        again = functools.partial(self._reads, grad_out, states)
        known = states.known = _start_backward(self.given, of, out, totals, of_results, again)
        dot, several = self.dots.gradients, len(self.sinks) > 1
        one = torch.ones(of.heads, of.length, device=q.device)
        parts = torch.zeros_like(one, dtype=torch.float64) if of_decay else None
        of_weight = torch.zeros_like(one)

        def gather(found: Tensor | None, back: bool) -> None:
            if found is not None and parts is not None:
                parts.add_(found, alpha=-1 if back else 1)

        grad = wide(goals[0]) if several else goals[0]
        for turn, (back, strict) in enumerate(self.sinks):
            options: dict[str, Any] = {"add": turn > 0, "reverse": back, "strict": strict}
            options["last"] = turn == len(self.sinks) - 1
            pairs = None if known.of_sums is None else Pairs(known.of_sums[None], one[None], states.keys(back))
            found = launch.gradient(
                of, q, k, grad_out, v, states.ours(back), one if known.scale is None else known.scale, grad,
                known.weight, pairs, products=of_decay, dot=dot, **options,
            )  # fmt: skip
            gather(found, back)
        settle(goals[0], grad)
        grad, grad_v = (wide(goal) if several else goal for goal in goals[1:])
        for turn, (back, strict) in enumerate(self.sources):
            options = {"add": turn > 0, "reverse": back, "strict": strict, "last": turn == len(self.sources) - 1}
            pairs = None if known.of_sums is None else Pairs(one[None], known.of_sums[None], states.queries(back))
            found = launch.gradient(
                of, k, q, v, grad_out, states.theirs(back), one if known.weight is None else known.weight, grad,
                known.scale, pairs, products=of_decay, dot=dot, **options,
            )  # fmt: skip
            gather(found, back)
            weighed = launch.attend(
                of, k, q, grad_out, states.theirs(back), grad_v, known.weight, known.scale,
                None if known.weight is None else v, add=turn > 0, dot=dot, reverse=back, strict=strict,
            )  # fmt: skip
            of_weight = of_weight if weighed is None else of_weight + weighed
        settle(goals[1], grad)
        settle(goals[2], grad_v)
        before = states.before()
        decays = None if parts is None else by_tokens(of, states.starts(before), parts)
        of_q, of_k, of_v = goals
        return Gradients(
            of_q, of_k, of_v, decays,
            None if known.weight is None else _by_tokens(of_weight, of), _by_tokens(known.of_scale, of), before,
        )  # fmt: skip

    def _reads(self, grad_out: Tensor, states: _States) -> Tensor:
        """Products g_i . out_i / a_i of outputs that are computed again, (batch * heads, length)."""
        (q, k, v, *_), of = self.given, self.of
        out, found = torch.empty_like(grad_out), torch.zeros(of.heads, of.length, device=q.device)
        for back, strict in self.sinks:
            given = q, k, v, states.ours(back), out, None, states.weight, grad_out
            one = launch.attend(of, *given, dot=self.dots.gradients, reverse=back, strict=strict)
            assert one is not None
            found += one
        return found


class _States:
    """Sums before and behind tokens that the backward pass reads: found when they are asked for, once."""

    known: _Backward  # set where all but sums of keys and values is asked for

    def __init__(self, form: _Local, grad_out: Tensor, grads: State | None) -> None:
        self.form, self.grad_out, self.weight = form, grad_out, _by_heads(form.given.weight)
        self.grads = grads and grads.by_heads()
        self._found: dict[tuple[str, bool], Tensor] = {}  # a cache of methods would be a cycle, which keeps memory

    def _once(self, name: str, back: bool, find: Callable[..., Tensor], *given: Any) -> Tensor:
        if (name, back) not in self._found:
            self._found[name, back] = find(*given)
        return self._found[name, back]

    def ours(self, back: bool) -> Tensor:
        """Sums of w phi(k) v^T."""
        form = self.form
        first = form.before and form.before.memory
        given = form.given.k, form.given.v, self.weight, back, first, "memory", form.dots.gradients
        return self._once("memory", back, form.matrices, *given)

    def theirs(self, back: bool) -> Tensor:
        """Sums of a phi(q) g^T."""
        form = self.form
        first = self.grads and self.grads.memory
        given = form.given.q, self.grad_out, self.known.scale, back, first, "of memory", form.dots.gradients
        return self._once("of memory", back, form.matrices, *given)

    def keys(self, back: bool) -> Tensor:
        """Sums of phi(k)."""
        form = self.form
        first = form.before and form.before.keys
        return self._once("keys", back, form.sums, form.given.k, None, back, first, "keys")

    def queries(self, back: bool) -> Tensor:
        """Sums of t phi(q)."""
        first = self.grads and self.grads.keys
        given = self.form.given.q, self.known.of_sums, back, first, "of keys"
        return self._once("of keys", back, self.form.sums, *given)

    def before(self) -> State | None:
        """Gradients of the state before."""
        form = self.form
        if form.before is None:
            return None
        of_keys = form.after.get("of keys")
        return State(None if of_keys is None else of_keys.squeeze(1), form.after["of memory"])

    def starts(self, before: State | None) -> Tensor:
        """Gradients of log-decays at the first tokens of segments, and behind the last: (batch * heads, ...)."""
        form, of = self.form, self.form.of
        found = torch.zeros(of.heads, of.segments - 1, dtype=torch.float64, device=self.grad_out.device)
        for back, _ in form.sinks:
            # Both turn the same way: what stands before a token, and its gradient from behind it.
            one, other = (self.theirs, self.ours) if back else (self.ours, self.theirs)
            found += between_segments(of, one(False), other(True), 1)
            if self.known.of_sums is not None:
                one, other = (self.queries, self.keys) if back else (self.keys, self.queries)
                found += between_segments(of, one(False), other(True), of.per)
        if before is None or form.before is None:
            return torch.nn.functional.pad(found, (1, 1))
        after = State(form.after.get("keys"), form.after["memory"])
        ends = [_product(form.before, before, found), _product(after, self.grads or State(None, None), found)]
        return torch.cat([ends[0], found, ends[1]], 1)


def _product(states: State, grads: State, like: Tensor) -> Tensor:
    """Sums over a state of its elements times their gradients, (batch * heads, 1)."""
    found = like.new_zeros(like.shape[0], 1)
    for state, grad in zip(states, grads, strict=True):
        if state is not None and grad is not None:
            found += (state.flatten(1) * grad.flatten(1)).sum(1, keepdim=True)
    return found


# ------------------------------------------------------------------------------------------------ all tokens at once


class _Global:
    """Both passes where every sink sees every source alike: bidirectional and cross-attention without a decay."""

    def __init__(self, given: Inputs) -> None:
        self.given, self.dots = given, given.dots
        chunk = chunk_of(self.dots, given.q.shape[-1], given.v.shape[-1])
        self.sinks = Sequences(given.q, given.query_mask, None, chunk, given.feature_map)
        self.sources = Sequences(given.k, given.key_mask, None, chunk, given.feature_map)

    def matrix(self, of: Sequences, x: Tensor, y: Tensor, weight: Tensor | None, dot: int) -> Tensor:
        """Sum of w phi(x) y^T, (batch * heads, channels of x, of y)."""
        return launch.memory(of, x, y, weight, dot=dot).sum(1, dtype=torch.float64).float()

    def sum(self, of: Sequences, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum of w phi(x), (batch * heads, 1, channels)."""
        found = launch.sums(of, x, None, None if weights is None else weights[None])
        return found.sum(1, dtype=torch.float64).float()

    def forward(self) -> tuple[Tensor, Tensor | None, None]:
        """Return outputs and sums of weights (batch * heads, length)."""
        q, k, v = self.given[:3]
        dot, eps = self.dots.values, self.given.eps
        out = v.new_empty(*q.shape[:3], v.shape[3])
        by = None
        if self.given.sums:
            divide = eps is not None
            by = Sums(self.sum(self.sources, k), self.sinks.numbers(self.sinks.length), None, divide, eps or 0.0)
        matrix = self.matrix(self.sources, k, v, _by_heads(self.given.weight), dot)
        launch.attend(
            self.sinks, q, q, out, matrix, out, _by_heads(self.given.scale), totals=by, local=False, dot=dot
        )  # fmt: skip
        return out, None if by is None else by.found, None

    def backward(self, out: Tensor, totals: Tensor, of_results: OfResults) -> Gradients:
        """Return the gradients of all inputs."""
        (q, k, v, *_), dot, grad_out = self.given, self.dots.gradients, of_results.out
        ours = self.matrix(self.sources, k, v, _by_heads(self.given.weight), dot)

        def again() -> Any:
            options = {"other": grad_out, "local": False, "dot": dot}
            return launch.attend(self.sinks, q, q, out, ours, torch.empty_like(out), **options)

        known = _start_backward(self.given, self.sinks, out, totals, of_results, again)
        theirs = self.matrix(self.sinks, q, grad_out, known.scale, dot)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        of_weight = launch.attend(
            self.sources, k, k, v, theirs, grads[2], known.weight, other=None if known.weight is None else v,
            local=False, dot=dot,
        )  # fmt: skip
        one, other = (torch.ones(of.heads, of.length, device=q.device) for of in (self.sinks, self.sources))
        past = future = None
        if known.of_sums is not None:
            past = Pairs(known.of_sums[None], None, self.sum(self.sources, k))
            future = Pairs(other[None], None, self.sum(self.sinks, q, known.of_sums))
        scale, weight = one if known.scale is None else known.scale, other if known.weight is None else known.weight
        options = {"local": False, "dot": dot}
        launch.gradient(self.sinks, q, q, grad_out, grad_out, ours, scale, grads[0], None, past, **options)
        launch.gradient(self.sources, k, k, v, v, theirs, weight, grads[1], None, future, **options)
        of_scale = _by_tokens(known.of_scale, self.sinks)
        of_q, of_k, of_v = grads
        return Gradients(of_q, of_k, of_v, None, _by_tokens(of_weight, self.sources), of_scale, None)


def forward(given: Inputs, state: State | None, causal: bool) -> tuple[Tensor, Tensor | None, State | None]:
    """Return outputs, sums of weights (batch * heads, L) where they are wanted, and the state after (causal)."""
    if not causal and given.log_decay is None:
        return _Global(given).forward()
    out = torch.empty(given.v.shape, dtype=given.v.dtype, device=given.v.device)
    if causal:
        return out, *_Local(given, state).forward(out)
    return out, _forward_in_parts(given, out), None


def backward(
    given: Inputs, state: State | None, causal: bool, out: Tensor, totals: Tensor, of_results: OfResults,
    grad_state: State | None, of_decay: bool,
) -> Gradients:  # fmt: skip
    """Return the gradients of all inputs; of log-decays where they are wanted.

    Args:
        given: The inputs.
        state: The state before (causal).
        causal: Which form.
        out: Of the forward pass.
        totals: Likewise.
        of_results: Gradients of the output, and of sums of weights that are a result too.
        grad_state: Gradients of the state after, each or none.
        of_decay: Whether the gradient of log-decays is wanted.
    """
    if not causal and given.log_decay is None:
        return _Global(given).backward(out, totals, of_results)
    goals = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given[:3]]
    if causal:
        return _Local(given, state, backward=True).backward(goals, out, totals, of_results, grad_state, of_decay)
    return _backward_in_parts(given, goals, out, totals, of_results, of_decay)


def _part_of(given: Inputs, part: Part) -> Inputs:
    """The part of the inputs of the bidirectional form with a decay."""
    tokens = {name: part.of_tokens(getattr(given, name)) for name in ("q", "k", "v")}
    numbers = {
        name: None if x is None else part.of_tokens(x) for name, x in zip(given._fields[6:8], given[6:8], strict=True)
    }
    masks = {"key_mask": part.of_mask(given.key_mask), "query_mask": part.of_mask(given.query_mask)}
    assert given.log_decay is not None
    return given._replace(log_decay=part.of_decays(given.log_decay), **tokens, **masks, **numbers)


def _part_of_sums(x: Any, part: Part, q: Tensor) -> Any:
    """The part of sums of weights (batch * heads, length), or of what stands for absent ones."""
    if x is None or not x.numel():
        return x
    return part.of_numbers(x.view(q.shape[0], q.shape[2], q.shape[1])).flatten(0, 1)


def _forward_in_parts(given: Inputs, out: Tensor) -> Tensor | None:
    """Write outputs; return sums of weights (batch * heads, length)."""
    batch, length, heads = given.q.shape[:3]
    totals = given.q.new_empty(batch, heads, length, dtype=torch.float32)
    for part in parts_of(given.q):
        found, _ = _Local(_part_of(given, part), None).forward(part.of_tokens(out))
        if found is not None:
            to = part.of_numbers(totals)
            to.copy_(found.view(to.shape))
    return totals.flatten(0, 1) if given.sums else None


def _backward_in_parts(
    given: Inputs, goals: Sequence[Tensor], out: Tensor, totals: Tensor, of_results: OfResults, of_decay: bool
) -> Gradients:
    batch, length, heads = given.q.shape[:3]
    grad_out = of_results.out
    decays = grad_out.new_empty(batch, length, heads, dtype=torch.float64) if of_decay else None
    weight, scale = (None if x is None else torch.empty_like(x) for x in (given.weight, given.scale))
    for part in parts_of(given.q):
        sums, grad_sums = _part_of_sums(totals, part, given.q), _part_of_sums(of_results.sums, part, given.q)
        form = _Local(_part_of(given, part), None, backward=True)
        to = [part.of_tokens(goal) for goal in goals]
        of_part = OfResults(part.of_tokens(grad_out), grad_sums)
        found = form.backward(to, part.of_tokens(out), sums, of_part, None, of_decay)
        for whole, grad in zip((decays, weight, scale), found[3:6], strict=True):
            if whole is not None and grad is not None:
                part.of_tokens(whole).copy_(grad)
        del form, found  # before the next part
    of_q, of_k, of_v = goals
    return Gradients(of_q, of_k, of_v, decays, weight, scale, None)
