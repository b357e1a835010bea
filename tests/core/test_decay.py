"""Factors of decay: equal to their products, at any strength, and without underflow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowformer.core.decay import (
    between,
    carry_decayed,
    check_log_decay,
    clip_log_decay,
    decay_of,
    decaying_heads,
    default_log_decay,
    log_sum_decayed,
)


def log_decays(*shape: int, seed: int = 0) -> Tensor:
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_factors_are_products_of_the_decays_between() -> None:
    g = log_decays(2, 3, 7)
    found = between(g)
    for i in range(7):
        for j in range(7):
            want = g[..., j + 1 : i + 1].exp().prod(-1) if j <= i else torch.zeros(2, 3, dtype=torch.float64)
            torch.testing.assert_close(found[..., i, j], want)


def test_factors_keep_their_digits_after_a_token_that_forgets_everything() -> None:
    g = torch.full((64,), -1e-3)
    g[10] = -1e6
    found = between(g)
    torch.testing.assert_close(found[40, 12], torch.tensor(-1e-3 * 28).exp(), rtol=1e-6, atol=0)
    assert found[40, 9] == 0


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 100.0])
def test_sums_carried_over_chunks_are_the_recurrence(strength: float) -> None:
    g, x = strength * log_decays(1, 2, 40), log_decays(1, 2, 40, seed=1)
    past = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    decay = decay_of(g, 5, torch.float64)
    before, after = carry_decayed((x.unflatten(-1, (5, 8)) * decay.leaving).sum(-1), past, decay)
    state, want = past, []
    for t in range(40):
        if t % 8 == 0:
            want.append(state)
        state = g[..., t].exp() * state + x[..., t]
    torch.testing.assert_close(before, torch.stack(want, -1))
    torch.testing.assert_close(after, state)


def test_chunks_that_are_alike_are_computed_once() -> None:
    g = torch.tensor([-0.1, -2.0], dtype=torch.float64).view(1, 2, 1).expand(1, 2, 24)
    one, each = decay_of(g, 3, torch.float64, alike=True), decay_of(g, 3, torch.float64)
    assert one.within.shape == (1, 2, 1, 8, 8)
    for part, other in zip(one, each, strict=True):
        torch.testing.assert_close(part.expand_as(other), other)


def test_log_sums_are_logarithms_of_decayed_sums() -> None:
    g, x = 3 * log_decays(1, 2, 30), 40 * log_decays(1, 2, 30, seed=1)
    found = log_sum_decayed(x, torch.full((1, 2), -1e30, dtype=torch.float64), decay_of(g, 3, torch.float64))
    state = torch.zeros(1, 2, dtype=torch.float64)
    for t in range(30):
        state = state * g[..., t].exp() + x[..., t].exp()
        torch.testing.assert_close(found[..., t], state.log())


def test_values_above_zero_count_as_zero_and_zero_has_a_gradient() -> None:
    g = torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
    found = clip_log_decay(g)
    assert found.tolist() == [0.0, 0.0, -1.0]
    found.sum().backward()
    assert g.grad is not None
    assert g.grad.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("heads", "without"), [(1, 0), (2, 1), (3, 1), (4, 1), (8, 2), (12, 3), (16, 4)])
def test_default_time_constants_are_spread_and_some_heads_have_none(heads: int, without: int) -> None:
    g = default_log_decay(heads, dtype=torch.float64)
    constants = -1 / g[: heads - without]
    assert decaying_heads(heads) == heads - without
    assert not g[heads - without :].any()
    assert bool((constants[1:] > constants[:-1]).all())
    if len(constants) > 1:
        assert constants[0].item() == pytest.approx(4)
        assert constants[-1].item() == pytest.approx(64)
        ratios = constants[1:] / constants[:-1]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    else:
        assert constants.item() == pytest.approx(math.sqrt(4 * 64))


def test_log_decays_that_do_not_fit_are_refused() -> None:
    q = torch.zeros(2, 6, 4, 8)
    for given, kind, says in (
        ([0.0], TypeError, "log_decay must be a floating-point tensor, got list"),
        (torch.zeros(4).long(), TypeError, "floating-point tensor, got .*int64"),
        (
            torch.zeros(3),
            ValueError,
            r"must be \(heads,\) or \(batch, length, heads\), \(4,\) or \(2, 6, 4\), got \(3,\)",
        ),
        (torch.zeros(2, 4), ValueError, r"got \(2, 4\)"),
        (torch.zeros(4, device="meta"), ValueError, "must be on cpu"),
        (torch.zeros(4).to_sparse(), TypeError, "dense"),
    ):
        with pytest.raises(kind, match=says):
            check_log_decay("op", given, q)
    with pytest.raises(ValueError, match=r"\(heads,\) or \(batch, heads\), \(4,\) or \(2, 4\)"):
        check_log_decay("op", torch.zeros(2, 6, 4), q[:, 0], step=True)
