"""Sums over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowformer.core.sums import (
    CHANNELS_FIRST,
    HEADS_FIRST,
    RUN,
    TOKENS_FIRST,
    running_sums,
    sum_over_tokens,
    times_sum,
)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_running_sums_are_cumulative_sums(length: int) -> None:
    random = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 3, 5, generator=random, dtype=torch.float64).requires_grad_()
    past = torch.randn(2, 3, 5, generator=random, dtype=torch.float64).requires_grad_()
    sums, last = running_sums(x, past)
    want = x.cumsum(1) + past.unsqueeze(1)
    torch.testing.assert_close((sums, last), (want, want[:, -1]))
    weights = torch.randn(sums.shape, generator=random, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad((y * weights).sum(), (x, past)) for y in (sums, want))
    torch.testing.assert_close(grads, wanted)


def test_running_sums_of_float32_do_not_drift() -> None:
    sums, last = running_sums(torch.full((1, 300_000, 1), 0.35), torch.zeros(1, 1, dtype=torch.float64))
    want = 0.35 * torch.arange(1, 300_001, dtype=torch.float64)
    assert ((sums[0, :, 0] - want).abs() <= 1e-6 * want).all()
    assert last.dtype == torch.float64


@pytest.mark.parametrize("batch", [(2, 3), (1,)])
@pytest.mark.parametrize("length", [0, 1, RUN - 1, RUN, RUN + 1, 300, 3 * RUN])
def test_sums_over_tokens_are_sums(length: int, batch: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(length)
    A = torch.randn(*batch, length, 4, generator=random, dtype=torch.float64, requires_grad=True)
    B = torch.randn(2, *batch[1:], length, 5, generator=random, dtype=torch.float64, requires_grad=True)
    M = torch.randn(2, *batch[1:], 4, 5, generator=random, dtype=torch.float64, requires_grad=True)
    got, want = sum_over_tokens(A, B), A.mT @ B
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (A, B), M), torch.autograd.grad(want, (A, B), M))
    torch.testing.assert_close(times_sum(A, M), A @ M)
    upstream = torch.randn_like(B)
    got = torch.autograd.grad(times_sum(A, M), (A, M), upstream)
    torch.testing.assert_close(got, torch.autograd.grad(A @ M, (A, M), upstream))


@pytest.mark.parametrize("layout", [HEADS_FIRST, TOKENS_FIRST, CHANNELS_FIRST])
def test_layouts_in_memory_change_no_sum(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowformer.core.sums.LARGE", 1)
    random = torch.Generator().manual_seed(0)

    def tokens(channels: int) -> Tensor:
        x = torch.randn(2, 3, 300, channels, generator=random, dtype=torch.float64)
        return _laid_out(x, layout).requires_grad_()

    A, B, upstream = tokens(4), tokens(5), tokens(5).detach()
    M = torch.randn(2, 3, 4, 5, generator=random, dtype=torch.float64, requires_grad=True)
    out = times_sum(A, M, layout)
    assert out.stride() == upstream.stride()
    torch.testing.assert_close(out, A @ M)
    got = torch.autograd.grad(out, (A, M), upstream)
    assert got[0].stride() == A.stride()
    torch.testing.assert_close(got, torch.autograd.grad(A @ M, (A, M), upstream))
    torch.testing.assert_close(sum_over_tokens(A, B), A.mT @ B)
    got = torch.autograd.grad(sum_over_tokens(A, B), (A, B), M)
    assert [x.stride() for x in got] == [A.stride(), B.stride()]
    torch.testing.assert_close(got, torch.autograd.grad(A.mT @ B, (A, B), M))


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """x as it lies in memory by a layout."""
    if layout == CHANNELS_FIRST:
        return x.mT.contiguous().mT
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == TOKENS_FIRST else x


def test_gradients_of_gradients_of_sums() -> None:
    A, B = (torch.randn(1, 2, 130, n, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    M = torch.randn(1, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(sum_over_tokens, (A, B), fast_mode=True)
    assert torch.autograd.gradgradcheck(times_sum, (A, M), fast_mode=True)


@pytest.mark.parametrize("heads", [0, 2])
def test_sums_over_tokens_do_not_drift(heads: int) -> None:
    shape = (1, heads, 300_000) if heads else (300_000,)
    A, B = torch.full((*shape, 4), 0.35), torch.full((*shape, 5), 0.7)
    exact = 300_000 * A.flatten()[0].double() * B.flatten()[0].double()
    assert ((sum_over_tokens(A, B).double() - exact).abs() <= 3e-6 * exact).all()
    M = torch.ones(*shape[:-1], 4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(times_sum(A, M), M, B)
    assert ((grad.double() - exact).abs() <= 3e-6 * exact).all()
