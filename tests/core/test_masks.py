"""Checks, padding and packing."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowformer.core import masks as masks_module
from flowformer.core.checks import CHANNELS, HEADS, Layout, Masks, check, check_dtype, check_step, describe
from flowformer.core.masks import fill, run_packed
from flowformer.core.precision import state_dtype, sum_dtype


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


def test_the_mask_is_of_keys_too_in_self_attention_only() -> None:
    mask, other = torch.rand(2, 6) < 0.5, torch.rand(2, 6) < 0.5
    assert check("op", *tensors()) == (None, None)
    masks = check("op", *tensors(), mask=mask)
    assert masks.query is mask
    assert masks.key is mask
    masks = check("op", *tensors(), mask=mask, context_mask=other)
    assert masks.query is mask
    assert masks.key is other
    assert check("op", *tensors(), context_mask=other) == (other, None)
    longer = torch.rand(2, 9) < 0.5
    assert check("op", *tensors(9), mask=longer) == (None, longer)


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"mask": torch.ones(2, 6)}, TypeError, r"op: mask .* got \(2, 6\) float32 on cpu"),
        (
            {"mask": torch.ones(2, 7).bool()},
            ValueError,
            r"op: mask must have shape \(2, 6\), got \(2, 7\)",
        ),
        ({"context_mask": torch.ones(6).bool()}, ValueError, r"op: context_mask must have shape \(2, 6\)"),
        (
            {"causal": True, "context_mask": torch.ones(2, 6).bool()},
            ValueError,
            "self-attention, since it is causal: pass mask, not context_mask",
        ),
        ({"cu_seqlens": bounds(0, 6)}, ValueError, r"a packed batch is \(1, total length.*got q \(2, 6, 2, 4\)"),
        (
            {"cu_seqlens": bounds(0, 6), "context_mask": torch.ones(2, 6).bool()},
            ValueError,
            "pass cu_seqlens or masks, not both",
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


# ---------------------------------------------------------------------------------------------------------- layouts

KEYS_PER_HEAD = CHANNELS._replace(heads=True)


def of(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize("layout", [HEADS, CHANNELS, KEYS_PER_HEAD])
def test_self_attention_requires_as_many_queries_as_keys(layout: Layout) -> None:
    axes = (2, 4) if layout is HEADS else (4,)
    q, k = torch.zeros(2, 7, *axes), torch.zeros(2, 6, *axes)
    check("op", q, k, k, layout=layout)
    with pytest.raises(ValueError, match=r"self-attention, since it has a window: .* the same length, got 7 and 6"):
        check("op", q, k, k, layout=layout._replace(self_only="it has a window"))
    check("op", k, k, k, layout=layout._replace(self_only="it has a window"))
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert check("op", k, k, k, layout=layout, mask=mask).query is mask
    with pytest.raises(ValueError, match="since it has a window: pass mask"):
        check("op", k, k, k, layout=layout._replace(self_only="it has a window"), context_mask=mask)
    with pytest.raises(ValueError, match=r"since it is causal: .* the same length, got 7 and 6"):
        check("op", q, k, k, layout=layout, causal=True)


@pytest.mark.parametrize(
    ("layout", "shapes", "says"),
    [
        (CHANNELS, [(2, 6, 2, 4)] * 3, r"q must be \(batch, length, channels\), got \(2, 6, 2, 4\)"),
        (CHANNELS, [(2, 6, 4), (2, 6, 0), (2, 6, 4)], r"k must have at least one token and channel, got \(2, 6, 0\)"),
        (CHANNELS, [(2, 6, 3), (2, 6, 4), (2, 6, 4)], "q and k must agree in batch, q and v in channels, got q"),
        (CHANNELS, [(3, 6, 4), (2, 6, 4), (2, 6, 4)], "q and k must agree in batch, q and v in channels, got q"),
        (CHANNELS, [(2, 6, 4), (2, 6, 2), (2, 6, 4)], "k and v must agree in batch, length and channels, got q"),
        (CHANNELS, [(2, 6, 4), (2, 5, 4), (2, 6, 4)], "k and v must agree in batch, length and channels, got q"),
        (KEYS_PER_HEAD, [(2, 6, 4), (2, 5, 2), (2, 6, 4)], "k and v must agree in batch and length, got q"),
        (KEYS_PER_HEAD, [(2, 6, 4), (2, 6, 3), (2, 6, 4)], "the number of heads must divide"),
        (HEADS, [(2, 6, 4)] * 3, r"q must be \(batch, length, heads, channels\), got \(2, 6, 4\)"),
    ],
)
def test_tensors_of_another_layout_are_refused(layout: Layout, shapes: list[tuple[int, ...]], says: str) -> None:
    with pytest.raises(ValueError, match=f"op: .*{says}"):
        check("op", *of(*shapes), layout=layout)


def test_keys_may_have_one_channel_for_each_head() -> None:
    tensors = of((2, 6, 10), (2, 6, 5), (2, 6, 10))
    check("op", *tensors, layout=KEYS_PER_HEAD)
    with pytest.raises(ValueError, match="k and v must agree"):
        check("op", *tensors, layout=CHANNELS)


def test_a_packed_batch_without_heads() -> None:
    with pytest.raises(ValueError, match=r"a packed batch is \(1, total length, channels\) for q, k and v alike"):
        check("op", *of(*[(2, 6, 4)] * 3), layout=CHANNELS, cu_seqlens=bounds(0, 6))
    check("op", *of(*[(1, 6, 4)] * 3), layout=CHANNELS, cu_seqlens=bounds(0, 6))


def test_steps_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match=r"op: q of one step must be \(batch, channels\), got \(2, 3, 4\)"):
        check_step("op", *of(*[(2, 3, 4)] * 3), Masks(None, None), Masks, CHANNELS)
    check_step("op", *of(*[(2, 4)] * 3), Masks(None, None), Masks, CHANNELS)


# -------------------------------------------------------------------------------------------- filling and packing


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
            buckets = masks_module._buckets(places)
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

    before = Masks(torch.tensor([100, 200, 300, 400]), torch.tensor([1, 2, 3, 4]))
    _, after = run_packed(dense, (torch.zeros(1, 12, 1, 1),), bounds(0, 1, 1, 8, 12), before)
    assert after.key.tolist() == [101, 200, 307, 404]
    assert after.query.tolist() == [1, 2, 3, 4]


class Calls(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class State(NamedTuple):
    """A state of sequences."""

    row: Tensor


def test_sequences_of_like_length_are_gathered_once() -> None:
    x, cu_seqlens = torch.arange(14.0).view(1, 14, 1), bounds(0, 4, 9, 9, 14)
    with Calls() as calls:
        out, state = run_packed(lambda x, mask, state: (x * 2, state), (x,), cu_seqlens, State(torch.arange(4)))
    assert torch.equal(out, x * 2)
    assert torch.equal(state.row, torch.arange(4))
    assert calls.names.count("aten::index_select") == 2  # the tensor, and the output
    assert "aten::cat" not in calls.names
