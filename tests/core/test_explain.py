"""Which implementation would run is told for every operation, from what the operation itself takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from law_cases import shapes_of, tensors_after_v, variants_of
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flowformer import ops
from flowformer.kernels.native.kernels import kernels
from flowformer.mechanisms import find_attention, list_attentions

HEADS, CHANNELS, IMAGE = (torch.randn(2, 6, 2, 4), torch.randn(2, 6, 8), torch.randn(2, 3, 4, 8))


class Call(NamedTuple):
    """Arguments of an operation, and whether it has both forms for them."""

    op: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    both: bool = True


def call_of(name: str) -> Call:
    """A call of a mechanism's operation, in its first variant."""
    row = find_attention(name)
    variant = next(iter(variants_of(row).values()))
    tensors = [torch.randn(2, 6, *shape) for shape in shapes_of(row, 2, 4, 4)]
    further = tensors_after_v(variant, torch.randn, batch=2, length=6, heads=2, channels=4)
    options = {**variant.options, **variant.for_length(6), "causal": variant.only == "causal"}
    both = row.can("causal") and not variant.only
    return Call(row.operation.__name__, (*tensors, *further), options, both)


CALLS = {
    **{name: call_of(name) for name in list_attentions()},
    "aft_full with a table": Call("aft_full", (CHANNELS, CHANNELS, CHANNELS, torch.randn(6, 6))),
    "aft_conv of images": Call("aft_conv", (IMAGE, IMAGE[..., :2], IMAGE, torch.randn(2, 3, 3)), both=False),
}
WITH_KERNELS = (
    "flow_attention", "aft_simple", "linear_attention", "mobile_attention", "performer_attention", "rfa_attention",
    "cosformer_attention",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWFORMER_BACKEND", raising=False)


def change(arguments: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, arguments)


@pytest.mark.parametrize("call", CALLS)
def test_every_operation_is_explained(call: str) -> None:
    op, arguments, options, both = CALLS[call]
    for dtype, sums in ((torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float64, "float64")):
        told = ops.explain(op, *change(arguments, dtype), **options)
        native = op in WITH_KERNELS and dtype != torch.float64 and kernels() is not None
        assert (told.op, told.backend, told.sums) == (op, "native" if native else "torch", sums)
        if op not in WITH_KERNELS:
            assert told.why == f"plain PyTorch, since {op} has no native kernels"
        assert ops.explain(getattr(ops, op), *change(arguments, dtype), **options) == told
    assert ops.explain(op, *arguments, **options, backend="torch").why == "requested by the backend argument"
    if both:
        assert ops.explain(op, *arguments, **{**options, "causal": True}).op == op


def test_every_operation_that_chooses_is_tested() -> None:
    functions = {name: getattr(ops, name) for name in ops.__all__ if name != "explain"}
    choose = [
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and "backend" in inspect.signature(function).parameters
    ]
    assert {call.op for call in CALLS.values()} == {name for name in choose if not name.endswith("_step")}


def test_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sigmoid", "exp", "matmul"):
        monkeypatch.setattr(Tensor, name, None)
    for op, arguments, options, _ in CALLS.values():
        ops.explain(op, *arguments, **options)


def test_a_step_is_explained() -> None:
    token, state = HEADS[:, 0], ops.init_flow_state(2, 2, 4, 4)
    assert ops.explain("flow_attention_step", token, token, token, state).op == "flow_attention_step"
    with pytest.raises(ValueError, match="softmax_attention_step has only one implementation, in plain PyTorch"):
        ops.explain("softmax_attention_step", token, token, token, ops.init_softmax_state(2, 2, 4, 4))
    token = CHANNELS[:, 0]
    for backend in ("auto", "native"):  # it has no C++ kernels
        told = ops.explain("aft_simple_step", token, token, token, ops.init_aft_simple_state(2, 8), backend=backend)
        assert told.backend == "torch"
        assert "aft_simple_step has no native kernels" in told.why
    with pytest.raises(
        ValueError, match=r"aft_simple_step: .*'triton'.* cannot run here: the Triton kernels run on GPU"
    ):
        ops.explain("aft_simple_step", token, token, token, ops.init_aft_simple_state(2, 8), backend="triton")


def test_mistakes_are_those_of_the_operation() -> None:
    with pytest.raises(ValueError, match="no operation 'attention'"):
        ops.explain("attention", HEADS, HEADS, HEADS)
    with pytest.raises(ValueError, match="no operation 'PRESETS'"):
        ops.explain("PRESETS")
    with pytest.raises(ValueError, match=r"no operation 'routing' \(did you mean 'routing_attention'\?\)"):
        ops.explain("routing", HEADS, HEADS, HEADS)
    with pytest.raises(ValueError, match=r"no operation 'flow_atention' \(did you mean 'flow_attention'\?\)"):
        ops.explain("flow_atention", HEADS, HEADS, HEADS)
    for wrong in (None, ["flow_attention"]):
        with pytest.raises(TypeError, match="op must be an operation or its name, got"):
            ops.explain(wrong, HEADS, HEADS, HEADS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"partial.* has only one implementation, in plain PyTorch"):
        ops.explain(
            functools.partial(ops.softmax_attention_step), *[HEADS[:, 0]] * 3, ops.init_softmax_state(2, 2, 4, 4)
        )
    with pytest.raises(TypeError, match="position_bias"):
        ops.explain("aft_full", CHANNELS, CHANNELS, CHANNELS)
    with pytest.raises(ValueError, match=r"q must be \(batch, length, channels\)"):
        ops.explain("aft_simple", HEADS, HEADS, HEADS)
    with pytest.raises(ValueError, match="aft_conv has no native kernels"):
        ops.explain("aft_conv", CHANNELS, CHANNELS[..., :2], CHANNELS, torch.randn(2, 3), backend="native")
    assert ops.aft_simple(CHANNELS, CHANNELS, CHANNELS).shape == CHANNELS.shape  # no longer only asked
