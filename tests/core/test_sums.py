"""Sums over tokens."""

from __future__ import annotations

import pytest
import torch

from flowformer.core.sums import RUN, running_sums, sum_over_tokens


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


@pytest.mark.parametrize("length", [0, 1, RUN - 1, RUN, RUN + 1, 3 * RUN])
def test_sums_over_tokens_are_matrix_products(length: int) -> None:
    random = torch.Generator().manual_seed(length)
    A, B = (
        torch.randn(*batch, length, width, generator=random, dtype=torch.float64).requires_grad_()
        for batch, width in (((1,), 3), ((2,), 4))
    )
    got, want = sum_over_tokens(A, B), A.mT @ B
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, generator=random, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad((y * weights).sum(), (A, B)) for y in (got, want))
    torch.testing.assert_close(grads, wanted)
