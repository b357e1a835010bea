"""Which implementation would run is told for every operation, from what the operation itself takes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from flowformer import ops
from flowformer.kernels.native.kernels import kernels

HEADS, CHANNELS, IMAGE = (torch.randn(2, 6, 2, 4), torch.randn(2, 6, 8), torch.randn(2, 3, 4, 8))
BIAS = torch.randn(6, 6)

CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{
        op: (op, (HEADS,) * 3) for op in ("flow_attention", "linear_attention", "mobile_attention", "softmax_attention")
    },
    "aft_simple": ("aft_simple", (CHANNELS,) * 3),
    "aft_full": ("aft_full", (CHANNELS, CHANNELS, CHANNELS, BIAS)),
    "aft_full with factors": ("aft_full", (CHANNELS, CHANNELS, CHANNELS, (BIAS, BIAS))),
    "aft_local": ("aft_local", (CHANNELS, CHANNELS, CHANNELS, BIAS, 3)),
    "aft_conv": ("aft_conv", (CHANNELS, CHANNELS[..., :2], CHANNELS, torch.randn(2, 3))),
    "aft_conv of images": ("aft_conv", (IMAGE, IMAGE[..., :2], IMAGE, torch.randn(2, 3, 3))),
}
WITH_KERNELS = ("flow_attention", "aft_simple")


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWFORMER_BACKEND", raising=False)


def change(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, tuple):
        return tuple(change(part, dtype) for part in argument)
    return argument.to(dtype) if isinstance(argument, Tensor) else argument


@pytest.mark.parametrize("call", CALLS)
def test_every_operation_is_explained(call: str) -> None:
    op, arguments = CALLS[call]
    for dtype, sums in ((torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float64, "float64")):
        told = ops.explain(op, *change(arguments, dtype))
        native = op in WITH_KERNELS and dtype != torch.float64 and kernels() is not None
        assert (told.op, told.backend, told.sums) == (op, "native" if native else "torch", sums)
        if op not in WITH_KERNELS:
            assert told.why == f"plain PyTorch, since {op} has no native kernels"
        assert ops.explain(getattr(ops, op), *change(arguments, dtype)) == told
    assert ops.explain(op, *arguments, backend="torch").why == "asked for by the backend argument"
    if "images" not in call:
        assert ops.explain(op, *arguments, causal=True).op == op


def test_every_operation_that_chooses_is_tested() -> None:
    functions = {name: getattr(ops, name) for name in ops.__all__ if name != "explain"}
    choose = [
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and "backend" in inspect.signature(function).parameters
    ]
    assert {op for op, _ in CALLS.values()} == {name for name in choose if not name.endswith("_step")}


def test_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sigmoid", "exp", "matmul"):
        monkeypatch.setattr(Tensor, name, None)
    for op, arguments in CALLS.values():
        ops.explain(op, *arguments)


def test_a_step_is_explained() -> None:
    token, state = HEADS[:, 0], ops.init_flow_state(2, 2, 4, 4)
    assert ops.explain("flow_attention_step", token, token, token, state).op == "flow_attention_step"
    token = CHANNELS[:, 0]
    with pytest.raises(ValueError, match="aft_simple_step has one implementation, in plain PyTorch"):
        ops.explain("aft_simple_step", token, token, token, ops.init_aft_simple_state(2, 8))


def test_mistakes_are_those_of_the_operation() -> None:
    with pytest.raises(ValueError, match="no operation 'attention'"):
        ops.explain("attention", HEADS, HEADS, HEADS)
    with pytest.raises(ValueError, match="no operation 'PRESETS'"):
        ops.explain("PRESETS")
    with pytest.raises(TypeError, match="position_bias"):
        ops.explain("aft_full", CHANNELS, CHANNELS, CHANNELS)
    with pytest.raises(ValueError, match=r"q must be \(batch, length, channels\)"):
        ops.explain("aft_simple", HEADS, HEADS, HEADS)
    with pytest.raises(ValueError, match="aft_conv has no native kernels"):
        ops.explain("aft_conv", CHANNELS, CHANNELS[..., :2], CHANNELS, torch.randn(2, 3), backend="native")
    assert ops.aft_simple(CHANNELS, CHANNELS, CHANNELS).shape == CHANNELS.shape  # no longer only asked
