"""The scan and the sums that mechanisms share."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flowformer.core.scan import scan
from flowformer.core.sums import CHANNELS_FIRST, HEADS_FIRST, TOKENS_FIRST, sum_over_tokens, times_sum


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
    out, after = scan(running_sum, (x, scale), state, block=block)
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
    out, _ = scan(running_sum, (x, None), start(), block=4)
    assert not out.requires_grad
    with torch.no_grad():
        out, _ = scan(running_sum, (x.clone().requires_grad_(), None), start(), block=4)
    assert not out.requires_grad
    scale = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    out, after = scan(running_sum, (x, scale), start(), block=4)
    assert not after.count.requires_grad
    torch.testing.assert_close(torch.autograd.grad(out[:, -1].sum(), scale)[0], x)


def test_scan_recomputes_blocks_and_keeps_none_of_their_values() -> None:
    calls = []

    def spied(tokens: list[Any], state: Total) -> tuple[Tensor, Total]:
        calls.append((tokens[0].shape[1], torch.is_grad_enabled()))
        return running_sum(tokens, state)

    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    out, _ = scan(spied, (x, None), start(), block=4)
    assert calls == [(4, False), (4, False), (2, False)]
    out.sum().backward()
    assert calls[3:] == [(2, True), (4, True), (4, True)]


def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    out, _ = scan(running_sum, (x, None), start())
    with pytest.raises(RuntimeError, match="not support second-order gradients"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 1024])
def test_sums_over_tokens_are_sums(length: int) -> None:
    random = torch.Generator().manual_seed(length)
    A, B = (torch.randn(2, 3, length, n, generator=random, dtype=torch.float64).requires_grad_() for n in (4, 5))
    M = torch.randn(2, 3, 4, 5, generator=random, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(sum_over_tokens(A, B), A.transpose(-1, -2) @ B)
    torch.testing.assert_close(times_sum(A, M), A @ M)
    upstream = torch.randn(2, 3, length, 5, generator=random, dtype=torch.float64)
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
