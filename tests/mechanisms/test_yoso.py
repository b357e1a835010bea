"""YOSO: what its equations promise beyond the laws."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowformer import create_attention, ops
from flowformer.mechanisms.yoso import YosoAttention, hash_codes


def inputs(length: int, sources: int | None = None) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = (length, sources or length, sources or length)
    return [torch.randn(2, size, 2, 6, generator=random, dtype=torch.float64) for size in sizes]


def planes(hashes: int, bits: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(hashes, bits, 6, generator=torch.Generator().manual_seed(seed)).double()


def test_sample_is_its_definition() -> None:
    q, k, v = inputs(20, 30)
    P, mask = planes(5), torch.arange(30).expand(2, -1) < torch.tensor([[30], [18]])
    got = ops.yoso_attention(q, k, v, P, bits=4, context_mask=mask)
    share = torch.zeros(2, 2, 20, 30).double()
    for one in P:
        codes, others = hash_codes(q, one).transpose(1, 2), hash_codes(k, one).transpose(1, 2)
        share += (codes.unsqueeze(-1) == others.unsqueeze(-2)) / 5
    out = torch.einsum("bhij,bjhv->bihv", share * mask[:, None, None], v)
    torch.testing.assert_close(got, torch.nn.functional.normalize(out, dim=-1))


def test_codes_collide_as_often_as_the_angle_says() -> None:
    x, y = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1))
    P = torch.randn(4000, 3, 6, generator=torch.Generator().manual_seed(0))
    share = torch.stack([hash_codes(x, one) == hash_codes(y, one) for one in P]).double().mean(0)
    want = (1 - torch.cosine_similarity(x, y).arccos() / math.pi) ** 3
    torch.testing.assert_close(share, want.double(), atol=0.03, rtol=0)


def distance(hashes: int) -> float:
    q, k, v = inputs(20)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for given, options in ((None, {"surrogate": True}), (planes(hashes), {})):
        out = ops.yoso_attention(*leaves, given, bits=4, cosine_scale=1.0, **options)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    return max(float((one - other).norm() / one.norm()) for one, other in zip(*results, strict=True))


def test_sample_converges_to_the_expectation_with_its_gradients() -> None:
    found = [distance(hashes) for hashes in (8, 64, 512)]
    for few, many in pairwise(found):
        assert many < few / 2  # 8 times as many: a root of 8 times less by theory
    assert found[-1] < 0.25


def test_surrogate_changes_gradients_alone() -> None:
    leaves = [x.requires_grad_() for x in inputs(12)]
    one, other = (ops.yoso_attention(*leaves, surrogate=surrogate) for surrogate in (False, True))
    assert torch.equal(one, other)
    grads, others = (torch.autograd.grad(out.sin().sum(), leaves) for out in (one, other))
    assert not torch.allclose(grads[0], others[0])
    torch.testing.assert_close(grads[2], others[2])


def test_sample_takes_linear_memory_and_padding() -> None:
    module = YosoAttention(12, 2, hashes=3, bits=4, seed=1).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    mask = torch.arange(27).expand(2, -1) < 20
    padded = torch.cat([x, torch.full((2, 7, 12), torch.nan).double()], 1)
    torch.testing.assert_close(module(padded, mask=mask)[:, :20], module(x))
    assert module.state_dict()["planes"].shape == (3, 4, 6)
    assert "planes" not in create_attention("yoso", 12, 2).state_dict()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"bits": 0}, ValueError, "bits must be from 1 to 20, got 0"),
        ({"bits": 2.5}, TypeError, "bits must be a whole number, got 2.5"),
        ({"cosine_scale": 1.1}, ValueError, "cosine_scale must be at most 1, got 1.1"),
        ({"surrogate": 1}, TypeError, "surrogate must be True or False, got 1"),
    ],
)
def test_bad_options_are_refused(options, error, says) -> None:
    with pytest.raises(error, match=says):
        ops.yoso_attention(*inputs(5), **options)
    with pytest.raises(error, match=says):
        YosoAttention(12, 2, **options)


def test_there_is_no_causal_form() -> None:
    with pytest.raises(ValueError, match="there is no causal form, since none is published"):
        ops.yoso_attention(*inputs(5), planes(3), bits=4, causal=True)
    with pytest.raises(ValueError, match="has no causal form, since none is published"):
        YosoAttention(12, 2, causal=True)


def test_planes_fit_channels_and_bits() -> None:
    with pytest.raises(ValueError, match=r"planes must be \(hashes, 9, 6\), got \(3, 4, 6\)"):
        ops.yoso_attention(*inputs(5), planes(3))
