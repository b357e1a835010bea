"""Wrong options of operations, modules and rows of the registry: each error names the option and what was passed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import flowformer
from flowformer import FlowAttention, create_attention, ops
from flowformer.mechanisms import Attention, find_attention
from flowformer.mechanisms.maps import attention_rows
from flowformer.mechanisms.registry import register
from flowformer.ops import linear_attention

X = torch.randn(1, 3, 2, 4)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"num_heads": "4"}, TypeError, "num_heads must be a whole number, got '4'"),
        ({"num_heads": True}, TypeError, "num_heads must be a whole number, got True"),
        ({"head_dim": 8.0}, TypeError, "head_dim must be a whole number, got 8.0"),
        ({"causal": "false"}, TypeError, "causal must be True or False, got 'false'"),
        ({"bias": 0}, TypeError, "bias must be True or False, got 0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got '0.1'"),
        ({"dropout": float("nan")}, ValueError, "dropout must be finite, got nan"),
        ({"clamp": "5"}, TypeError, "clamp must be a number, got '5'"),
        ({"clamp": True}, TypeError, "clamp must be a number, got True"),
        ({"eps": float("inf")}, ValueError, "eps must be finite, got inf"),
        ({"preset": None}, ValueError, "unknown preset None; available: core"),
    ],
)
def test_of_a_module(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        FlowAttention(**{"dim": 64, "num_heads": 4, **options})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "flow",
            {"clmp": 3.0},
            r"attention 'flow' has no option 'clmp'; available: preset, .*\(did you mean 'clamp'\?\)",
        ),
        ("linear", {"clamp": 3.0}, "attention 'linear' has no option 'clamp'; available: eps, decay, bias"),
    ],
)
def test_unknown_ones_are_told_from_all_that_there_are(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        flowformer.create_attention(name, 64, 4, **options)


@pytest.mark.parametrize("name", [None, 3, {}])
def test_a_name_must_be_a_string(name: Any) -> None:
    with pytest.raises(ValueError, match=f"unknown attention {name}; available: aft_conv"):
        flowformer.create_attention(name, 64, 4)


def test_an_operation_is_no_mechanism() -> None:
    for function in (find_attention, lambda name: flowformer.create_attention(name, 64, 4)):
        with pytest.raises(ValueError, match=r"'flow_attention' is an operation, .* \(did you mean 'flow'\?\)"):
            function("flow_attention")


@pytest.mark.parametrize("option", ["causal", "return_state"])
def test_words_are_no_flags_of_an_operation(option: str) -> None:
    with pytest.raises(TypeError, match=f"flow_attention: {option} must be True or False, got 'False'"):
        ops.flow_attention(X, X, X, **{option: "False"})


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
def test_eps_of_linear_attention(eps: float) -> None:
    with pytest.raises(ValueError, match="linear_attention: eps must be"):
        linear_attention(X, X, X, eps=eps)


@pytest.mark.parametrize("x", [[1.0], torch.ones(1, 2, 64, dtype=torch.int64)])
def test_input_of_a_module_must_be_a_floating_tensor(x: Any) -> None:
    with pytest.raises(TypeError, match=r"FlowAttention: x must be a tensor of dtype float16, .*, got"):
        FlowAttention(64, 4)(x)


def test_rows_of_nothing_have_the_shape_of_rows() -> None:
    module, x = FlowAttention(16, 2), torch.randn(2, 5, 16)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    assert attention_rows(module, x, [0], mask=hidden).shape == (2, 2, 1, 5)
    assert attention_rows(module, x[:0], [0, 1]).shape == (0, 2, 2, 5)


def without_masks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
    return v


ROW: dict[str, Any] = {
    "operation": linear_attention, "truth": linear_attention, "source": "here", "cost": "L",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("", {}, "name must be lower-case words joined by _, got ''"),
        (None, {}, "name must be lower-case words joined by _, got None"),
        ("mine", {"truth": None}, "mine: truth must be a function, got None"),
        ("mine", {"operation": without_masks}, "mine: operation must take mask, context_mask, cu_seqlens, backend"),
        ("mine", {"layout": "x"}, "mine: layout must be a Layout, got 'x'"),
        ("mine", {"cannot": {"flying": "no wings"}}, "mine: unknown limit 'flying'"),
    ],
)
def test_rows_of_the_registry_are_checked_when_they_are_entered(name: Any, row: dict[str, Any], says: str) -> None:
    class Mine(Attention):
        """Not to be entered."""

    with pytest.raises((TypeError, ValueError), match=says):
        register(name, **{**ROW, **row})(Mine)
    assert "mine" not in flowformer.list_attentions()


def test_only_modules_of_attention_are_entered() -> None:
    with pytest.raises(TypeError, match=r"must derive from flowformer\.mechanisms\.Attention"):
        register("mine", **ROW)(nn.Linear)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("option", ["look_backward", "look_forward"])
def test_windows_of_more_than_can_be_counted(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 0 and at most 2147483647"):
        create_attention("local", 8, 2, **{option: 10**30})


@pytest.mark.parametrize(("name", "option"), [("performer", "eps"), ("performer", "scale"), ("cosformer", "eps")])
def test_integers_of_more_than_64_bits(name, option):
    with pytest.raises(ValueError, match=f"{option} must be at most 9223372036854775807 where"):
        create_attention(name, 8, 2, **{option: 10**30})


def test_causal_is_a_flag_before_all_else():
    with pytest.raises(TypeError, match="causal must be True or False, got"):
        create_attention("performer", 8, 2, causal=torch.zeros(2))
    q = torch.randn(1, 4, 2, 4)
    with pytest.raises(TypeError, match="causal must be True or False, got"):
        ops.local_attention(q, q, q, causal=torch.zeros(2))
