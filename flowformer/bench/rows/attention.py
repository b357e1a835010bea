"""Attention on whole sequences, forward and with backward, by every registered mechanism.

A mechanism on (batch, length, heads, channels) is timed in ``causal``, ``bidirectional`` and their training. AFT, on
(batch, length, channels), has operations of its own: the heads of a shape lie side by side there. Training takes the
gradients of learned tensors too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.bench import registry
from flowformer.bench.rows.forms import (
    Form,
    Sequences,
    as_form,
    by_backend,
    has_heads,
    mechanisms,
    name_of,
    refusal,
    width_refusal,
)
from flowformer.bench.rows.variants import Kind, Variant, variants_of
from flowformer.core.checks import CHANNELS, HEADS, Layout
from flowformer.mechanisms import Mechanism

Tolerances = Mapping[torch.dtype, float]


# ---------------------------------------------------------------------------------------------------------- operations


def sequences(shape: registry.Shape, dtype: torch.dtype, layout: str) -> registry.Inputs:
    """The inputs of a point: one :class:`Sequences`."""
    return (Sequences(shape, dtype, layout),)


def bind(
    function: registry.Function, inputs: registry.Inputs, *, causal: bool, training: bool = False,
    layout: Layout = HEADS, double: bool = False,
) -> registry.Call:  # fmt: skip
    """A call of a :class:`Form`, or of ``function(q, k, v, causal=...)``; with ``training`` its gradients too."""
    given: Sequences = inputs[0]
    function, tensors = as_form(function, layout).prepare(given)
    if double:
        tensors = tuple(x.double() for x in tensors)
    if not training:
        return _forward(function, tensors, causal)
    return _backward(function, tensors, given.upstream.double() if double else given.upstream, causal)


def _forward(function: registry.Function, tensors: Sequence[Tensor], causal: bool) -> registry.Call:
    @torch.no_grad()
    def run() -> registry.Outputs:
        return _as_outputs(function(*tensors, causal=causal))

    return registry.Call(run)


def _backward(function: registry.Function, tensors: Sequence[Tensor], upstream: Tensor, causal: bool) -> registry.Call:
    """Outputs, and the gradients of all tensors; ``upstream`` is the gradient of each output."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def run() -> registry.Outputs:
        outs = _as_outputs(function(*leaves, causal=causal))
        grads = torch.autograd.grad(outs, leaves, [upstream.view_as(out) for out in outs], allow_unused=True)
        # A gradient that is missing makes the number of outputs differ from that of the truth.
        return (*(out.detach() for out in outs), *(grad for grad in grads if grad is not None))

    return registry.Call(run)


def _as_outputs(result: Tensor | registry.Outputs) -> registry.Outputs:
    return (result,) if isinstance(result, Tensor) else result


def truth(reference: registry.Function, inputs: registry.Inputs, **kind: Any) -> registry.Outputs:
    """Outputs, and where training gradients, of the reference in float64."""
    return bind(reference, inputs, **kind, double=True).run()


def count_tokens(shape: registry.Shape) -> int:
    """Tokens of a call on whole sequences."""
    return shape.batch * shape.length


class Family(NamedTuple):
    """The operations on one layout.

    Attributes:
        prefix: Of the operations' names.
        about: What they are.
        layout: The axes of q, k and v.
        first: The mechanism that others are compared with.
        lengths: As in :class:`Operation`.
        check_length: As in :class:`Operation`.
        tolerances: As in :class:`Operation`.
        gradient_tolerances: The same where gradients are checked.
        dtypes: dtypes in which the preferred backend of a mechanism that has several is timed besides float32.
    """

    prefix: str
    about: str
    layout: Layout
    first: str
    lengths: tuple[int, ...]
    check_length: int
    tolerances: Tolerances
    gradient_tolerances: Tolerances
    dtypes: Mapping[str, torch.dtype]

    def operations(self) -> Iterator[tuple[str, Kind]]:
        """Their names and kinds."""
        for name, causal in (("causal", True), ("bidirectional", False)):
            yield f"{self.prefix}{name}", Kind(causal, training=False)
            yield f"{self.prefix}{name}-training", Kind(causal, training=True)


_GRADIENTS = {**registry.TOLERANCES, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# AFT's truth holds length x length x D numbers of float64, several times where gradients flow. Its outputs are means,
# whose weights are positive: no sum cancels. Gradients of keys and of learned tensors are sums of differences from the
# mean, and lose a digit more.
FAMILIES = (
    Family(
        "", "attention", HEADS, "flow", (1024, 4096, 16_384), 1024, registry.TOLERANCES, _GRADIENTS,
        {"bf16": torch.bfloat16},
    ),
    Family(
        "aft-", "AFT", CHANNELS, "aft_full", (1024, 4096), 384, {**registry.TOLERANCES, torch.float32: 2e-6},
        {**_GRADIENTS, torch.float32: 1e-5}, {},
    ),
)  # fmt: skip


def _add_operation(family: Family, name: str, kind: Kind) -> None:
    what = f"{'causal' if kind.causal else 'bidirectional'} {family.about}"
    arguments = {"layout": family.layout, **kind._asdict()}
    registry.add_operation(
        registry.Operation(
            name, f"{what}, forward{' and backward' if kind.training else ''}", "length", family.lengths, sequences,
            partial(bind, **arguments), partial(truth, **arguments), count_tokens, check_length=family.check_length,
            tolerances=family.gradient_tolerances if kind.training else family.tolerances,
        )
    )  # fmt: skip


for _family in FAMILIES:
    for _name, _kind in _family.operations():
        _add_operation(_family, _name, _kind)


# ---------------------------------------------------------------------------------------------------------- contenders


@registry.add_contenders
def registered_mechanisms() -> Iterator[registry.Contender]:
    """Every registered mechanism, in every backend that its operation has."""
    for family in FAMILIES:
        rows = [row for row in mechanisms(family.first) if has_heads(row.layout) == has_heads(family.layout)]
        for operation, kind in family.operations():
            for row in rows:
                if row.can("causal") or not kind.causal:
                    for variant in variants_of(row):
                        yield from _contenders(family, operation, kind, row, variant)


def unavailable(row: Mechanism, backend: str | None, inputs: registry.Inputs) -> str | None:
    """Why a mechanism cannot run on these inputs, or ``None``."""
    given = inputs[0]
    return width_refusal(row.layout, given.k.shape[-1], given.v.shape[-1]) or refusal(row, backend, given.q)


def _contenders(
    family: Family, operation: str, kind: Kind, row: Mechanism, variant: Variant
) -> Iterator[registry.Contender]:
    reference = Form(row.truth, row.layout, variant)
    per_kind = variant.flops
    count = None if per_kind is None else lambda shape: per_kind(shape, kind)
    forms: list[tuple[str, dict[str, Any]]] = [
        (suffix, {"dtype": dtype, "dtypes": (dtype,)}) for suffix, dtype in family.dtypes.items()
    ]
    if operation == "causal":
        forms.append(("heads-first", {"layout": "heads-first"}))
    for name, backend, words, device in by_backend(name_of(row, variant), row.operation):
        function = partial(row.operation, backend=backend) if backend else row.operation
        made = partial(
            registry.Contender, operation=operation, function=Form(function, row.layout, variant), reference=reference,
            ours=True, flops=count, needs_bytes=variant.needs_bytes,
            unavailable=partial(unavailable, row, backend), device=device,
        )  # fmt: skip
        about = f"ops.{row.operation.__name__}{words}{variant.about}"
        yield made(name=name, about=about)
        if backend and not device:
            for suffix, fields in forms:
                yield made(name=f"{name}-{suffix}", about=f"{about}, {suffix}", **fields)
            forms = []  # the preferred backend alone
