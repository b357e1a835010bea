"""What is specific to Longformer: global tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from windowed import equals_truth, inputs

from flowformer import LongformerAttention, ops


def chosen(length: int) -> torch.Tensor:
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.1
    mask[1] = False  # a row without a global token beside one that has some
    return mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("released", [None, "lra"])
def test_global_tokens_anywhere_equal_the_reference(causal: bool, released: str | None) -> None:
    tensors, real = inputs(90, count=6), torch.rand(2, 90, generator=torch.Generator().manual_seed(0)) < 0.8
    for options in ({}, {"mask": real}):
        equals_truth("longformer", tensors, chosen(90), causal=causal, window=8, released=released, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_first_tokens_equal_the_reference(causal: bool) -> None:
    tensors, real = inputs(90, count=6), torch.rand(2, 90, generator=torch.Generator().manual_seed(0)) < 0.8
    options = {"causal": causal, "window": 8, "global_tokens": 3}
    equals_truth("longformer", tensors, mask=real, **options)
    packed = [tensor[:1] for tensor in tensors]
    equals_truth("longformer", packed, cu_seqlens=torch.tensor([0, 2, 2, 50, 90]), **options)
    equals_truth("longformer", [tensor[:, :2] for tensor in tensors], **options)


def test_packed_global_tokens_equal_sequences_one_by_one() -> None:
    tensors, mask = [tensor[:1] for tensor in inputs(40, count=6)], chosen(40)[:1]
    whole = ops.longformer_attention(*tensors, mask, window=4, cu_seqlens=torch.tensor([0, 15, 40]))
    parts = [
        ops.longformer_attention(*(tensor[:, at] for tensor in (*tensors, mask)), window=4)
        for at in (slice(0, 15), slice(15, 40))
    ]
    torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"window": 80}, {"window": 2, "global_tokens": 40}])
def test_a_window_or_global_tokens_that_reach_all_are_softmax(options: dict[str, Any], causal: bool) -> None:
    tensors = inputs(40)
    want = ops.softmax_attention(*tensors, causal=causal)
    torch.testing.assert_close(ops.longformer_attention(*tensors, causal=causal, **options), want)


@pytest.mark.parametrize("causal", [False, True])
def test_modules_have_projections_of_global_tokens(causal: bool) -> None:
    torch.manual_seed(0)
    module = LongformerAttention(12, 3, window=4, global_tokens=2, causal=causal).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    before = module(x)
    with torch.no_grad():
        module.v_global_proj.weight.mul_(2)
    moved = (module(x) != before).any(-1)
    assert moved[:, :2].all()
    assert not moved[:, 2:].any()
    bounds, mask = torch.tensor([0, 8, 20]), torch.arange(20) >= 5
    pieces = torch.cat([module(x[:1, :8]), module(x[:1, 8:])], 1)
    torch.testing.assert_close(module(x[:1], cu_seqlens=bounds), pieces)
    padded = module(x, mask=mask.expand(2, -1))
    torch.testing.assert_close(padded[:, 5:], module(x[:, 5:]))
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    module.reset_parameters()
    assert not any(torch.equal(weight, weights[name]) for name, weight in module.state_dict().items())


def test_a_state_with_global_tokens_is_refused() -> None:
    tensors = inputs(6)
    says = "there is no state with global tokens"
    with pytest.raises(ValueError, match=says):
        ops.longformer_attention(*tensors, causal=True, return_state=True, global_tokens=1)
    with pytest.raises(ValueError, match=says):
        ops.longformer_attention(*tensors, global_mask=chosen(6), causal=True, return_state=True)
    with pytest.raises(ValueError, match=says):
        LongformerAttention(12, 3, causal=True, global_tokens=1).init_state(2)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"window": 0}, ValueError, "window must be positive, got 0"),
        ({"global_tokens": -1}, ValueError, "global_tokens must be at least 0, got -1"),
        ({"global_tokens": 1.0}, TypeError, "global_tokens must be a whole number, got 1.0"),
        ({"released": "hf"}, ValueError, "released must be None or 'lra', got 'hf'"),
    ],
)
def test_bad_options_are_refused_in_words(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        ops.longformer_attention(*inputs(6), **options)
    with pytest.raises(kind, match=says):
        LongformerAttention(12, 3, **options)


def test_bad_tensors_of_global_tokens_are_refused_in_words() -> None:
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match=r"q_global must be \(2, 6, 3, 4\) float64 on cpu like q, got \(2, 5, 3, 4\)"):
        ops.longformer_attention(q, k, v, q[:, :5])
    with pytest.raises(TypeError, match=r"v_global must be .* like v, got list"):
        ops.longformer_attention(q, k, v, v_global=[1.0])
    with pytest.raises(TypeError, match="global_mask must be a boolean tensor"):
        ops.longformer_attention(q, k, v, global_mask=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="conv must be 0 with global tokens, got 3"):
        LongformerAttention(12, 3, global_tokens=1, conv=3)
