"""This library's own contenders: Flow-Attention with each backend, dtype and layout, and other mechanisms with heads.

Backends come from :func:`flowformer.core.backends.list_backends`, best first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flowformer import ops
from flowformer.bench.operations import Token, flow_state, prefill
from flowformer.bench.registry import BACKENDS, Contender, Function, Inputs, Shape, add_contender, reference

HAS_MOBILE = hasattr(ops, "mobile_attention")  # an old commit, to be compared with, may not
Taken = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]


def unavailable(op: str, backend: str, causal: bool, inputs: Inputs) -> str | None:
    """Why a backend does not run an operation here, or ``None``."""
    try:
        ops.explain(op, *inputs[:3], causal=causal, backend=backend)
    except ValueError as error:
        return str(error)
    return None


def count_bytes(state: Any) -> int:
    """Bytes of the tensors of a state."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def _flow_step(given: Token, **arguments: Any) -> Taken:
    state = flow_state(given)
    return lambda q, k, v: ops.flow_attention_step(q, k, v, state, **arguments)[0], count_bytes(state)


def _take_step(whole: Function, step: Function, given: Token) -> Taken:
    state = prefill(whole, given.pieces())
    return lambda q, k, v: step(q, k, v, state)[0], count_bytes(state)


def cache_bytes(shape: Shape) -> float:
    """Bytes of the float32 keys and values of a whole context."""
    return 4.0 * shape.batch * shape.length * shape.heads * (shape.channels + shape.value_channels)


def _softmax_step(given: Token) -> Taken:
    key, value = (torch.cat(pieces, 1) for pieces in list(zip(*given.pieces(), strict=True))[1:])
    state = ops.SoftmaxState(key, value, torch.ones(key.shape[:2], dtype=torch.bool))
    return lambda q, k, v: ops.softmax_attention_step(q, k, v, state)[0], count_bytes(state)


def _add_sequences(operation: str, causal: bool) -> None:
    best = BACKENDS[0]
    variants: list[tuple[str, str, dict[str, Any]]] = [(f"flow-{name}", name, {}) for name in BACKENDS]
    variants.append((f"flow-{best}-bf16", best, {"dtype": torch.bfloat16}))
    if operation == "causal":
        variants.append((f"flow-{best}-heads-first", best, {"layout": "heads-first"}))
    for name, backend, fields in variants:
        add_contender(
            Contender(
                name, operation, partial(ops.flow_attention, backend=backend), reference.flow_attention,
                f"ops.flow_attention, backend {backend}", ours=True,
                unavailable=partial(unavailable, "flow_attention", backend, causal), **fields,
            )
        )  # fmt: skip
    add_contender(
        Contender(
            "linear", operation, ops.linear_attention, reference.linear_attention,
            "ops.linear_attention, the Linear Transformer",
        )
    )  # fmt: skip
    if HAS_MOBILE:
        add_contender(
            Contender(
                "mobile", operation, ops.mobile_attention, reference.mobile_attention, "ops.mobile_attention",
                ours=True,
            )
        )  # fmt: skip


def _step_unavailable(backend: str, inputs: Inputs) -> str | None:
    tokens = tuple(x.unsqueeze(1) for x in inputs[0][:3])
    return unavailable("flow_attention", backend, True, tokens)


def _add_steps() -> None:
    # A step without the keyword has one implementation only, that of plain PyTorch.
    chooses = "backend" in inspect.signature(ops.flow_attention_step).parameters
    for backend in BACKENDS if chooses else ("torch",):
        arguments = {"backend": backend} if chooses else {}
        add_contender(
            Contender(
                f"flow-{backend}", "step", partial(_flow_step, **arguments), reference.flow_attention,
                f"ops.flow_attention_step, backend {backend}", ours=True,
                unavailable=partial(_step_unavailable, backend),
            )
        )  # fmt: skip
    linear = partial(_take_step, ops.linear_attention, ops.linear_attention_step)
    add_contender(Contender("linear", "step", linear, reference.linear_attention, "ops.linear_attention_step"))
    if HAS_MOBILE:
        mobile = partial(_take_step, ops.mobile_attention, ops.mobile_attention_step)
        about = "ops.mobile_attention_step"
        add_contender(Contender("mobile", "step", mobile, reference.mobile_attention, about, ours=True))
    add_contender(
        Contender(
            "softmax", "step", _softmax_step, reference.softmax_attention,
            "ops.softmax_attention_step, which copies its keys and values into a state one longer",
            # The pieces, the keys and values joined, and the longer copy that a step makes.
            needs_bytes=lambda shape: 3.5 * cache_bytes(shape),
        )
    )  # fmt: skip


for _operation in ("causal", "causal-training", "bidirectional", "bidirectional-training"):
    _add_sequences(_operation, _operation.startswith("causal"))
_add_steps()
