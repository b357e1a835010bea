"""Steps of decoding with AFT, heads side by side.

A position bias is given by its factors: a free one, of as many rows and columns as there are tokens, is out of the
question after a long context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer import ops
from flowformer.bench.aft import FACTOR_CHANNELS, TRUTHS, WINDOW, make_factors, make_filters, unavailable
from flowformer.bench.contenders import Taken, cache_bytes, count_bytes
from flowformer.bench.operations import Token, prefill
from flowformer.bench.registry import Contender, Function, Shape, add_contender, reference


class Steps(NamedTuple):
    """A form of AFT that decodes.

    Attributes:
        whole: The operation on sequences, which makes the state.
        step: The operation on one token.
        truth: The reference.
        learned: ``(tokens, heads) -> `` the arguments after q, k and v.
        shared_keys: Whether a head has one key for all its channels.
    """

    whole: Function
    step: Function
    truth: Function
    learned: Callable[[int, int], tuple[Any, ...]]
    shared_keys: bool = False

    def arrange(self, tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (..., heads, channels) with heads side by side."""
        q, k, v = tensors
        return q.flatten(-2), k[..., 0] if self.shared_keys else k.flatten(-2), v.flatten(-2)


def _take_step(form: Steps, given: Token) -> Taken:
    learned = form.learned(given.length + 1, given.q.shape[1])
    state = prefill(form.whole, map(form.arrange, given.pieces()), *learned)

    def take(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return form.step(*form.arrange((q, k, v)), state, *learned)[0].view_as(v)

    return take, count_bytes(state)


def _truth(form: Steps, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    return form.truth(*form.arrange((q, k, v)), *form.learned(*q.shape[1:3]), causal=causal).view_as(v)


def _keep(q: Tensor, k: Tensor, v: Tensor, *_: Any, initial_state: Any, **__: Any) -> tuple[None, Any]:
    """The state of AFT-full is keys and values: outputs of the context would take time quadratic in its length."""
    more = ops.AFTFullState(k, v, torch.ones(k.shape[:2], dtype=torch.bool))
    if initial_state is None:
        return None, more
    return None, ops.AFTFullState(*(torch.cat(pair, 1) for pair in zip(initial_state, more, strict=True)))


def _factor_bytes(shape: Shape) -> float:
    return 4.0 * 2 * shape.length * FACTOR_CHANNELS


def _full_bytes(shape: Shape) -> float:
    """The pieces, the state, the longer copy that a step makes, and the factors."""
    return 3.5 * cache_bytes(shape) + _factor_bytes(shape)


def _add_steps() -> None:
    simple = Steps(ops.aft_simple, ops.aft_simple_step, reference.aft_simple, lambda tokens, heads: ())
    local = Steps(
        ops.aft_local, ops.aft_local_step, reference.aft_local, lambda tokens, heads: (make_factors(tokens), WINDOW)
    )
    full = Steps(_keep, ops.aft_full_step, reference.aft_full, lambda tokens, heads: (make_factors(tokens),))
    conv = Steps(
        ops.aft_conv, ops.aft_conv_step, reference.aft_conv, lambda tokens, heads: (make_filters(heads),), True
    )
    for name, form, needs_bytes in (
        ("simple", simple, lambda shape: 0.0),
        (f"local-{WINDOW}", local, _factor_bytes),
        ("full-factors", full, _full_bytes),
        ("conv", conv, lambda shape: 0.0),
    ):
        add_contender(
            Contender(
                f"aft-{name}", "step", partial(_take_step, form), partial(_truth, form), f"ops.{form.step.__name__}",
                ours=True, unavailable=unavailable, needs_bytes=needs_bytes,
            )
        )  # fmt: skip


if TRUTHS:
    _add_steps()
