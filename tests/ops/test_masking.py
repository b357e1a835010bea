"""Checks, padding and packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowformer.ops import masking
from flowformer.ops.masking import check, check_dtype, describe, fill, run_packed, state_dtype, sum_dtype


def tensors(length: int = 6, sources: int = 6, batch: int = 2) -> list[Tensor]:
    return [torch.zeros(batch, length, 2, 4), torch.zeros(batch, sources, 2, 4), torch.zeros(batch, sources, 2, 5)]


def bounds(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int32)


def test_describe_says_shape_dtype_and_device() -> None:
    assert describe(torch.zeros(2, 3, dtype=torch.bfloat16)) == "(2, 3) bfloat16 on cpu"
    assert describe(None) == "NoneType"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_not_for_computing_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"x must be float16, bfloat16, float32 or float64, got {dtype}"):
        check_dtype("x", dtype)


def test_sums_are_never_in_half_precision() -> None:
    assert sum_dtype(torch.float16) == sum_dtype(torch.bfloat16) == sum_dtype(torch.float32) == torch.float32
    assert sum_dtype(torch.float64) == torch.float64
    assert state_dtype(torch.device("cpu")) == torch.float64
    assert state_dtype(torch.device("mps")) == torch.float32


def test_the_key_mask_says_both_in_self_attention_only() -> None:
    mask, other = torch.rand(2, 6) < 0.5, torch.rand(2, 6) < 0.5
    assert check("op", *tensors()) == (None, None)
    assert check("op", *tensors(), key_padding_mask=mask).query is mask
    masks = check("op", *tensors(), key_padding_mask=mask, query_padding_mask=other)
    assert masks.key is mask
    assert masks.query is other
    assert check("op", *tensors(9), key_padding_mask=mask).query is None
    assert check("op", *tensors(), query_padding_mask=other).key is None


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"key_padding_mask": torch.ones(2, 6)}, TypeError, r"op: key_padding_mask .* got \(2, 6\) float32 on cpu"),
        (
            {"key_padding_mask": torch.ones(2, 7).bool()},
            ValueError,
            r"op: key_padding_mask must have shape \(2, 6\), got \(2, 7\)",
        ),
        ({"query_padding_mask": torch.ones(6).bool()}, ValueError, r"op: query_padding_mask must have shape \(2, 6\)"),
        (
            {"causal": True, "query_padding_mask": torch.ones(2, 6).bool()},
            ValueError,
            "key_padding_mask says both, drop query_padding_mask",
        ),
        ({"cu_seqlens": bounds(0, 6)}, ValueError, r"a packed batch is \(1, total length.*got q \(2, 6, 2, 4\)"),
        (
            {"cu_seqlens": bounds(0, 6), "query_padding_mask": torch.ones(2, 6).bool()},
            ValueError,
            "give cu_seqlens or padding masks, not both",
        ),
    ],
)
def test_bad_masks_are_refused(arguments: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        check("op", *tensors(), **arguments)


@pytest.mark.parametrize(
    ("places", "kind", "says"),
    [
        (torch.tensor([0.0, 6.0]), TypeError, "must be an int32 tensor, got .*float32"),
        (bounds(0), ValueError, "must hold the N . 1 boundaries"),
        (bounds(0, 6).view(1, 2), ValueError, "must hold the N . 1 boundaries"),
        (bounds(0, 3), ValueError, r"must rise from 0 to the total length 6, got \[0, 3\]"),
        (bounds(0, 7), ValueError, "must rise from 0"),
        (bounds(1, 6), ValueError, "must rise from 0"),
        (bounds(0, 5, 4, 6), ValueError, "must rise from 0"),
    ],
)
def test_bad_boundaries_are_refused(places: Tensor, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        check("op", *tensors(batch=1), cu_seqlens=places)


def test_a_packed_batch_is_self_attention() -> None:
    with pytest.raises(ValueError, match=r"for q, k and v alike, got q .*7.* k .*6"):
        check("op", *tensors(7, 6, batch=1), cu_seqlens=bounds(0, 6))
    check("op", *tensors(batch=1), cu_seqlens=bounds(0, 0, 2, 2, 6, 6))
    check("op", *tensors(batch=1), cu_seqlens=bounds(0, 6).long())


def test_fill_stops_nan_and_its_gradient() -> None:
    x = torch.tensor([[1.0, torch.nan, torch.inf]], requires_grad=True)
    filled = fill(x, torch.tensor([[True, False, False]]))
    assert filled.tolist() == [[1.0, 0.0, 0.0]]
    assert torch.autograd.grad(filled.sum(), x)[0].tolist() == [[1.0, 0.0, 0.0]]
    assert fill(x, None) is x


def test_buckets_waste_less_than_one_half() -> None:
    random = torch.Generator().manual_seed(0)
    for top in (3, 10, 1000):
        for _ in range(20):
            lengths = torch.randint(0, top, (30,), generator=random)
            places = torch.cat([torch.zeros(1), lengths]).cumsum(0).int()
            buckets = masking._buckets(places)
            assert sorted(row for bucket in buckets for row in bucket.rows) == list(range(30))
            for bucket in buckets:
                own = lengths[bucket.rows]
                assert bucket.mask.sum(1).tolist() == own.tolist()
                if own.max():
                    assert 2 * bucket.mask.sum() >= bucket.mask.numel()
            tokens = torch.cat([bucket.positions[bucket.mask] for bucket in buckets])
            assert sorted(tokens.tolist()) == list(range(int(lengths.sum())))


def test_packed_tokens_return_to_their_places() -> None:
    x = torch.arange(12.0).view(1, 12, 1, 1)
    seen = []

    def dense(x: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, None]:
        seen.append([row[real].flatten().tolist() for row, real in zip(x, mask, strict=True)])
        return 2 * x, None

    out, state = run_packed(dense, (x,), bounds(0, 1, 1, 8, 12))
    assert torch.equal(out, 2 * x)
    assert state is None
    rows = [row for batch in seen for row in batch]
    assert sorted(rows) == [[], [0.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]


def test_packed_states_return_to_their_sequences() -> None:
    def dense(x: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, Any]:
        return x, type(state)(state.key + mask.sum(1), state.query)

    before = masking.Masks(torch.tensor([100, 200, 300, 400]), torch.tensor([1, 2, 3, 4]))
    _, after = run_packed(dense, (torch.zeros(1, 12, 1, 1),), bounds(0, 1, 1, 8, 12), before)
    assert after.key.tolist() == [101, 200, 307, 404]
    assert after.query.tolist() == [1, 2, 3, 4]
