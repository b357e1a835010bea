"""What is specific to the Sparse Transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from windowed import equals_truth, inputs

from flowformer import SparseAttention, ops


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 5, "combine": "alternate"},
        {"stride": 20},
        {"stride": 5, "released": "lra"},
        {"pattern": "fixed", "stride": 20, "columns": 3},
        {"pattern": "fixed", "stride": 8, "columns": 2, "released": "lra"},
    ],
)
def test_other_patterns_equal_the_reference(options: dict[str, Any], causal: bool) -> None:
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) < 0.8
    equals_truth("sparse", inputs(150), causal=causal, mask=mask, **options)
    equals_truth("sparse", inputs(4), causal=causal, **options)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_a_first_token_that_sees_all_equals_the_reference(pattern: str) -> None:
    for length in (1, 2, 60):
        equals_truth("sparse", inputs(length), pattern=pattern, stride=7, released="lra-cls")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("stride", [1, 40, 64])
def test_a_stride_that_reaches_all_is_softmax(pattern: str, causal: bool, stride: int) -> None:
    tensors = inputs(40)
    want = ops.softmax_attention(*tensors, causal=causal)
    got = ops.sparse_attention(*tensors, causal=causal, pattern=pattern, stride=stride)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_one_head_of_two_alternate_patterns_is_local() -> None:
    tensors = inputs(30, heads=1)
    want = ops.local_attention(*tensors, causal=True, window=3, exact_window=True)
    got = ops.sparse_attention(*tensors, causal=True, stride=4, combine="alternate")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"combine": "alternate"}, {"pattern": "fixed", "released": "lra"}])
def test_steps_of_other_patterns_go_on_from_a_state(options: dict[str, Any]) -> None:
    tensors = inputs(40)
    want = ops.sparse_attention(*tensors, causal=True, stride=6, **options)
    first = [tensor[:, :17] for tensor in tensors]
    _, state = ops.sparse_attention(*first, causal=True, return_state=True, stride=6, **options)
    for at in range(17, 40):
        out, state = ops.sparse_attention_step(*(tensor[:, at] for tensor in tensors), state, stride=6, **options)
        torch.testing.assert_close(out, want[:, at], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"pattern": "axial"}, ValueError, "pattern must be one of strided, fixed, got 'axial'"),
        ({"combine": "both"}, ValueError, "combine must be one of merged, alternate, got 'both'"),
        ({"stride": 0}, ValueError, "stride must be positive, got 0"),
        (
            {"pattern": "fixed", "stride": 4, "columns": 3, "column_sets": 2},
            ValueError,
            "at most stride 4, got 3 times 2",
        ),
        ({"columns": 2}, ValueError, "columns and column_sets require pattern='fixed', got 2 and 1"),
        ({"pattern": "fixed", "combine": "alternate"}, ValueError, "requires pattern='strided'"),
        ({"released": "lra", "column_sets": 2}, ValueError, "takes combine='merged', column_sets=1, got 'merged', 2"),
        ({"released": "lra-cls", "causal": True}, ValueError, "released='lra-cls' has no causal form"),
        ({"released": "openai"}, ValueError, "released must be one of None, lra, lra-cls, got 'openai'"),
    ],
)
def test_bad_options_are_refused_in_words(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        ops.sparse_attention(*inputs(6), **options)
    with pytest.raises(kind, match=says):
        SparseAttention(12, 3, **options)


def test_states_of_a_packed_batch_are_refused() -> None:
    tensors = inputs(6, batch=1)
    with pytest.raises(ValueError, match="the states of a packed batch differ in length"):
        ops.sparse_attention(*tensors, causal=True, return_state=True, cu_seqlens=torch.tensor([0, 2, 6]))
