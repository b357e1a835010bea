"""YOSO: what the laws do not say of it, and the sampled form, which they do not call."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flowformer import create_attention, ops
from flowformer.mechanisms import find_attention

ROW = find_attention("yoso")
SAMPLED = {"gradient": "surrogate", "hash_code_len": 3}


def inputs(*lengths, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, 2, 4, generator=random, dtype=torch.float64).to(dtype) for n in lengths]


def rotations(hashes=6, bits=3, seed=1, dtype=torch.float64):
    return torch.randn(hashes, 4, bits, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


def all_close(got, want, tolerance=1e-10):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other.double()).abs().max() <= tolerance * other.double().abs().max()


def both(causal=False, drawn=None, **options):
    """The operation and its truth."""
    return (
        lambda q, k, v, function=function, **masks: function(q, k, v, drawn, causal=causal, **options, **masks)
        for function in (ops.yoso_attention, ROW.truth)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("drawn", [None, rotations()], ids=["expected", "sampled"])
def test_surrogate_equals_truth(causal, drawn, monkeypatch):
    monkeypatch.setattr("flowformer.mechanisms.yoso.BLOCK", 16)
    op, truth = both(causal, drawn, **SAMPLED)
    tensors = inputs(40, 40, 40) if causal else inputs(40, 25, 25)
    all_close(with_gradients(op, *tensors), with_gradients(truth, *tensors))
    single = [t.float() for t in tensors]
    all_close(with_gradients(op, *single), with_gradients(truth, *(t.double() for t in single)), 1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_sampled_form_does_not_see_padding(causal):
    op, truth = both(causal, rotations(), **SAMPLED)
    tensors = inputs(30, 30, 30)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.7
    poisoned = [t.masked_fill(~mask[..., None, None], torch.nan) for t in tensors]
    got, want = with_gradients(partial(op, mask=mask), *poisoned), with_gradients(partial(truth, mask=mask), *tensors)
    all_close(got, want)
    bounds = torch.tensor([0, 7, 7, 30], dtype=torch.int32)
    packed = [t[:1] for t in tensors]
    pieces = [op(*(t[:, a:b] for t in packed)) for a, b in ((0, 7), (7, 30))]
    all_close([op(*packed, cu_seqlens=bounds)], [torch.cat(pieces, 1)])


def test_causal_sampled_form_does_not_see_the_future():
    op, _ = both(True, rotations(), **SAMPLED)
    before, other = inputs(20, 20, 20), inputs(20, 20, 20, seed=9)
    after = [torch.cat([a[:, :12], 1e3 * b[:, 12:]], 1) for a, b in zip(before, other, strict=True)]
    assert torch.equal(op(*after)[:, :12], op(*before)[:, :12])


def test_sampled_mean_tends_to_the_expectation():
    """Weights are means over hashes: their error falls as hashes^-1/2."""
    tensors = inputs(30, 30, 30)
    exact = with_gradients(partial(ops.yoso_attention, **SAMPLED), *tensors)
    errors = []
    for hashes in (16, 128, 1024):
        of_seeds = []
        for seed in range(3):
            sampled, _ = both(drawn=rotations(hashes, seed=seed), **SAMPLED)
            pairs = zip(with_gradients(sampled, *tensors), exact, strict=True)
            of_seeds.append([float((one - other).norm() / other.norm()) for one, other in pairs])
        errors.append(torch.tensor(of_seeds).mean(0))
    for fewer, more in pairwise(errors):
        ratio = fewer / more  # 8^0.5, and its scatter
        assert (ratio > 1.9).all(), errors
        assert (ratio < 4.2).all(), errors


def test_expectation_is_the_probability_of_one_code():
    q, k = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    drawn = rotations(40_000, 2)
    signs = [torch.einsum("k,rkt->rt", x.double(), drawn) > 0 for x in (q, k)]
    share = (signs[0] == signs[1]).all(-1).double().mean()
    assert abs(share - (1 - math.acos(0.5**0.5) / math.pi) ** 2) < 0.01


def test_gradients_differ_by_name():
    tensors = inputs(12, 12, 12)
    exact, surrogate = (
        with_gradients(partial(ops.yoso_attention, gradient=name), *tensors) for name in ("exact", "surrogate")
    )
    assert (exact[1] - surrogate[1]).norm() > 0.1 * exact[1].norm()


def test_surrogate_is_finite_where_query_is_key():
    q = torch.ones(1, 3, 1, 4)
    for gradient in ("exact", "surrogate"):
        for part in with_gradients(partial(ops.yoso_attention, gradient=gradient), q, q, torch.randn(1, 3, 1, 4)):
            assert part.isfinite().all()


def test_sampled_backward_is_linear_in_memory():
    largest = []
    for length in (512, 2048):
        tensors = [t.requires_grad_() for t in inputs(length, length, length, dtype=torch.float32)]
        with Recorder() as recorder:
            ops.yoso_attention(*tensors, rotations(2, dtype=torch.float32), **SAMPLED).sum().backward()
        largest.append(recorder.largest)
    assert largest[1] <= 4 * largest[0]
    assert largest[1] <= 8 * 2 * 2048 * 2 * 4


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """How many numbers the largest tensor has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_module_samples_with_its_own_rotations():
    torch.manual_seed(0)
    module = create_attention("yoso", 8, 2, num_hashes=5, hash_code_len=3, seed=4)
    x = torch.randn(2, 9, 8)
    q, k, v = (part(x).unflatten(-1, (2, 4)) for part in (module.q_proj, module.k_proj, module.v_proj))
    out = ops.yoso_attention(q, k, v, module.rotations, **SAMPLED)
    assert torch.equal(module(x), module.out_proj(out.flatten(2)))
    assert module.rotations.shape == (5, 4, 3)
    assert create_attention("yoso", 8, 2).learned() == ()


def test_wrong_options_are_refused():
    q, k, v = inputs(6, 6, 6)
    for bad, says in (
        ({"hash_code_len": 0}, "hash_code_len must be positive"),
        ({"hash_code_len": 33}, "at most 32, got 33"),
        ({"gradient": "true"}, "gradient must be 'exact' or 'surrogate', got 'true'"),
        ({"rotations": rotations(bits=9)}, "gradient must be 'surrogate' with rotations"),
        ({"rotations": rotations(), "gradient": "surrogate"}, r"rotations must be \(hashes, 4, 9\).* got \(6, 4, 3\)"),
    ):
        with pytest.raises(ValueError, match=says):
            ops.yoso_attention(q, k, v, **bad)
    with pytest.raises(TypeError, match=r"rotations must be .* got list"):
        ops.yoso_attention(q, k, v, [1.0], **SAMPLED)
    with pytest.raises(ValueError, match="must be 'surrogate'"):
        create_attention("yoso", 8, 2, num_hashes=5, gradient="exact")
    total = ops.yoso_attention(q.requires_grad_(), k, v).sum()
    with pytest.raises(RuntimeError, match="second-order"):
        torch.autograd.grad(total, q, create_graph=True)


@pytest.mark.parametrize("options", [{}, {"gradient": "surrogate"}, {"causal": True}, {"hash_code_len": 1}])
@pytest.mark.parametrize("fit", [1, 2 * 9 * 9, 8 * 9 * 9])
def test_rows_and_heads_that_are_computed_at_a_time_change_nothing(
    monkeypatch: pytest.MonkeyPatch, fit: int, options: dict[str, Any]
) -> None:
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(3, 9, 3, 4, dtype=torch.float64, generator=random).requires_grad_() for _ in range(3)]
    mask = torch.arange(9) < torch.tensor([[9], [4], [0]])
    upstream = torch.randn(3, 9, 3, 4, dtype=torch.float64, generator=random)

    def found() -> tuple[Tensor, ...]:
        out = ops.yoso_attention(*leaves, mask=mask, **options)
        return out, *torch.autograd.grad(out, leaves, upstream)

    want = found()
    monkeypatch.setattr("flowformer.mechanisms.yoso.IN_CACHE", fit)
    torch.testing.assert_close(found(), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["exact", "surrogate", "sampled"])
def test_transforms_have_the_gradients_of_each_form(causal: bool, form: str) -> None:
    q, k, v = (torch.randn(2, 19, 2, 4, dtype=torch.float64) for _ in range(3))
    given: dict[str, Any] = {
        "causal": causal,
        "hash_code_len": 3,
        "gradient": "exact" if form == "exact" else "surrogate",
    }
    rotations = torch.randn(5, 4, 3, dtype=torch.float64) if form == "sampled" else None
    mask = torch.rand(2, 19) < 0.8

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.yoso_attention(q, k, v, rotations, mask=mask, **given).sin().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), tuple(want))
