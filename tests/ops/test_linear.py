"""What is specific to linear attention, and the scan that causal mechanisms share."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flowformer import ops
from flowformer.ops import linear


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, 3, 4, generator=random, dtype=torch.float64).to(dtype) for _ in "qkv"]


def test_feature_map_keeps_the_digits_of_small_values() -> None:
    x = torch.tensor([-80.0, -30.0, -1.0, 0.0, 1e-3, 2.0, 1e4], requires_grad=True)
    y = linear.elu_plus_one(x)
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    assert ((y - exact).abs() <= 1e-6 * exact).all()
    assert torch.nn.functional.elu(x)[0] + 1 == 0  # what the plain form makes of -80
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad[0] > 0
    assert grad.isfinite().all()


def test_equals_the_written_out_form() -> None:
    q, k, v = inputs(40)
    Q, K = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    weights = torch.einsum("bihk,bjhk->bhij", Q, K)
    for causal, scores in ((False, weights), (True, weights.tril())):
        want = torch.einsum("bhij,bjhv->bihv", scores / (scores.sum(-1, keepdim=True) + 1e-6), v)
        torch.testing.assert_close(ops.linear_attention(q, k, v, causal=causal), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_are_means_of_values(causal: bool) -> None:
    q, k, v = inputs(100)
    out = ops.linear_attention(q, k, torch.ones_like(v), causal=causal, eps=0.0)
    torch.testing.assert_close(out, torch.ones_like(v), rtol=1e-12, atol=0)
    assert (ops.linear_attention(q, k, torch.ones_like(v), causal=causal, eps=10.0) < 0.99).any()


# ------------------------------------------------------------------------------------------------------- the scan


class Total(NamedTuple):
    count: Tensor
    sum: Tensor


def running_sum(tokens: list[Any], state: Total) -> tuple[Tensor, Total]:
    x, scale = tokens
    x = x if scale is None else x * scale
    out = state.sum.unsqueeze(1) + x.cumsum(1)
    return out, Total(state.count + x.shape[1], out[:, -1])


def start() -> Total:
    return Total(torch.zeros(2, dtype=torch.int64), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 3, 10, 11, 100])
@pytest.mark.parametrize("with_scale", [True, False])
def test_scan_carries_the_state_through_blocks(block: int, with_scale: bool) -> None:
    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 10, 3, dtype=torch.float64) if with_scale else None
    state = Total(start().count, start().sum.requires_grad_())
    out, after = linear.scan(running_sum, (x, scale), state, block=block)
    assert after.count.tolist() == [10, 10]
    torch.testing.assert_close(out, 1 + (x if scale is None else x * scale).cumsum(1))
    torch.testing.assert_close(after.sum, out[:, -1])
    upstream = torch.randn_like(out)
    got = torch.autograd.grad([out, after.sum], [x, state.sum], [upstream, torch.ones_like(after.sum)])
    each = upstream.flip(1).cumsum(1).flip(1) + 1
    torch.testing.assert_close(got[0], each if scale is None else each * scale)
    torch.testing.assert_close(got[1], upstream.sum(1) + 1)


def test_scan_differentiates_only_what_is_asked_for() -> None:
    x = torch.randn(2, 10, 3, dtype=torch.float64)
    out, _ = linear.scan(running_sum, (x, None), start(), block=4)
    assert not out.requires_grad
    with torch.no_grad():
        out, _ = linear.scan(running_sum, (x.clone().requires_grad_(), None), start(), block=4)
    assert not out.requires_grad
    scale = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    out, after = linear.scan(running_sum, (x, scale), start(), block=4)
    assert not after.count.requires_grad
    torch.testing.assert_close(torch.autograd.grad(out[:, -1].sum(), scale)[0], x)


def test_scan_recomputes_blocks_and_keeps_none_of_their_values() -> None:
    calls = []

    def spied(tokens: list[Any], state: Total) -> tuple[Tensor, Total]:
        calls.append((tokens[0].shape[1], torch.is_grad_enabled()))
        return running_sum(tokens, state)

    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    out, _ = linear.scan(spied, (x, None), start(), block=4)
    assert calls == [(4, False), (4, False), (2, False)]
    out.sum().backward()
    assert calls[3:] == [(2, True), (4, True), (4, True)]


def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    out, _ = linear.scan(running_sum, (x, None), start())
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 1024])
def test_sums_over_tokens_are_sums(length: int) -> None:
    random = torch.Generator().manual_seed(length)
    A, B = (torch.randn(2, 3, length, n, generator=random, dtype=torch.float64).requires_grad_() for n in (4, 5))
    M = torch.randn(2, 3, 4, 5, generator=random, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(linear.sum_over_tokens(A, B), A.transpose(-1, -2) @ B)
    torch.testing.assert_close(linear.times_sum(A, M), A @ M)
    upstream = torch.randn(2, 3, length, 5, generator=random, dtype=torch.float64)
    got = torch.autograd.grad(linear.times_sum(A, M), (A, M), upstream)
    torch.testing.assert_close(got, torch.autograd.grad(A @ M, (A, M), upstream))


def test_sums_over_tokens_do_not_drift() -> None:
    A, B = torch.full((300_000, 4), 0.35), torch.full((300_000, 5), 0.7)
    exact = 300_000 * A[0, 0].double() * B[0, 0].double()
    assert ((linear.sum_over_tokens(A, B).double() - exact).abs() <= 3e-6 * exact).all()
    M = torch.ones(4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(linear.times_sum(A, M), M, B)
    assert ((grad.double() - exact).abs() <= 3e-6 * exact).all()
