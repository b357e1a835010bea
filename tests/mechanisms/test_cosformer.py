"""cosFormer: what its equations promise beyond the laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowformer import create_attention, ops
from flowformer.mechanisms.cosformer import CosformerAttention


def inputs(length: int, sources: int | None = None) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = (length, sources or length, sources or length)
    return [torch.randn(2, size, 2, 4, generator=random, dtype=torch.float64) for size in sizes]


def by_formula(q: Tensor, k: Tensor, v: Tensor, m: int, causal: bool) -> Tensor:
    A = torch.einsum("bihk,bjhk->bhij", q.relu(), k.relu())
    i, j = torch.arange(q.shape[1]).double().unsqueeze(1), torch.arange(k.shape[1]).double()
    A = A * (math.pi / 2 * (i - j) / m).cos()
    A = A.tril() if causal else A
    return torch.einsum("bhij,bjhv->bihv", A / A.sum(-1, keepdim=True).clamp(min=1e-6), v)


@pytest.mark.parametrize(("length", "sources"), [(70, 70), (30, 70), (70, 30)])
@pytest.mark.parametrize("max_length", [None, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_its_formula(length, sources, max_length, causal) -> None:
    if causal and length != sources:
        sources = length
    tensors = inputs(length, sources)
    got = ops.cosformer_attention(*tensors, causal=causal, max_length=max_length)
    want = by_formula(*tensors, max_length or max(length, sources), causal)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_each_sequence_has_its_own_length(causal) -> None:
    tensors = inputs(20)
    mask = torch.tensor([[True] * 20, [False] * 5 + [True] * 11 + [False] * 4])
    out = ops.cosformer_attention(*tensors, causal=causal, mask=mask)
    short = ops.cosformer_attention(*(x[1:, 5:16] for x in tensors), causal=causal)
    torch.testing.assert_close(out[1:, 5:16], short)
    bounds = torch.tensor([0, 11, 20], dtype=torch.int32)
    packed = ops.cosformer_attention(*(x[:1] for x in tensors), causal=causal, cu_seqlens=bounds)
    torch.testing.assert_close(packed[:, 11:], ops.cosformer_attention(*(x[:1, 11:] for x in tensors), causal=causal))


def test_states_require_the_longest_sequence() -> None:
    q, k, v = inputs(5)
    with pytest.raises(ValueError, match="a state requires max_length, since all weights depend on it"):
        ops.cosformer_attention(q, k, v, causal=True, return_state=True)
    with pytest.raises(ValueError, match="a state requires max_length"):
        ops.cosformer_attention_step(q[:, 0], k[:, 0], v[:, 0], ops.init_cosformer_state(2, 2, 4, 4))
    with pytest.raises(ValueError, match="a state requires max_length: build the module with it"):
        CosformerAttention(8, 2, causal=True).init_state(2)


def test_longer_sequences_are_refused() -> None:
    q, k, v = inputs(9)
    says = "weights are negative beyond a distance of max_length 8, got 9 tokens"
    for causal in (False, True):
        with pytest.raises(ValueError, match=says):
            ops.cosformer_attention(q, k, v, causal=causal, max_length=8)
    _, state = ops.cosformer_attention(q[:, :8], k[:, :8], v[:, :8], causal=True, max_length=8, return_state=True)
    with pytest.raises(ValueError, match=says):
        ops.cosformer_attention_step(q[:, 8], k[:, 8], v[:, 8], state, max_length=8)
    rest = [x[:, 8:] for x in (q, k, v)]
    with pytest.raises(ValueError, match=says):
        ops.cosformer_attention(*rest, causal=True, max_length=8, initial_state=state)
    mask = torch.arange(9).expand(2, -1) < 8  # padding is no token
    ops.cosformer_attention(q, k, v, causal=True, max_length=8, mask=mask)


def test_modules_know_the_longest_sequence_where_they_decode() -> None:
    assert create_attention("cosformer", 8, 2, causal=True, max_length=30).max_length == 30
    assert create_attention("cosformer", 8, 2, max_length=30).max_length is None
    assert CosformerAttention(8, 2, max_length=30).arguments()["max_length"] == 30


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"max_length": 0}, ValueError, "max_length must be positive, got 0"),
        ({"max_length": 5.0}, TypeError, "max_length must be a whole number, got 5.0"),
    ],
)
def test_bad_options_are_refused(options, error, says) -> None:
    with pytest.raises(error, match=says):
        ops.cosformer_attention(*inputs(5), **options)
    with pytest.raises(error, match=says):
        CosformerAttention(8, 2, **options)
