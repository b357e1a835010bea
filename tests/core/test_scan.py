"""The scan that mechanisms share."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flowformer.core.scan import scan


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
