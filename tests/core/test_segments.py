"""Means of segments."""

from __future__ import annotations

import pytest
import torch

from flowformer.core.segments import segment_means, split_evenly, with_means


@pytest.mark.parametrize(("count", "segments"), [(12, 4), (13, 4), (15, 4), (4, 4), (3, 4), (1, 4), (0, 4), (7, 1)])
def test_parts_are_all_tokens_in_order(count: int, segments: int) -> None:
    start, size = (part[0].tolist() for part in split_evenly(torch.tensor([count]), segments))
    tokens = [token for first, many in zip(start, size, strict=True) for token in range(first, first + many)]
    assert tokens == list(range(count))
    used = size[: min(count, segments)]
    assert max(used, default=0) - min(used, default=0) <= 1
    assert not any(size[min(count, segments) :])


def test_means_are_of_real_tokens() -> None:
    x = torch.randn(3, 11, 2, 5, dtype=torch.float64)
    counts = [11, 6, 2]
    real = torch.arange(11) < torch.tensor(counts).unsqueeze(1)
    means, used = segment_means(x.masked_fill(~real[..., None, None], 0), 4, real)
    assert used is not None
    for row, count in enumerate(counts):
        many = min(count, 4)
        assert used[row].tolist() == [True] * many + [False] * (4 - many)
        for at in range(many):
            want = x[row, at * count // many : (at + 1) * count // many].mean(0)
            torch.testing.assert_close(means[row, at], want)
        assert not means[row, many:].any()


def test_equal_parts_need_no_gathering() -> None:
    x = torch.randn(2, 12, 2, 5, dtype=torch.float64)
    means, used = segment_means(x, 4)
    gathered, _ = segment_means(x, 4, torch.ones(2, 12, dtype=torch.bool))
    assert used is None
    torch.testing.assert_close(means, gathered)


def test_gradients_of_tokens_and_of_their_means_are_added() -> None:
    x = torch.randn(2, 12, 2, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(12, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def total(tokens: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        return (weights[0].unsqueeze(1) * tokens.sin()).sum() + (weights[1].unsqueeze(1) * means.sin()).sum()

    got, want = with_means(x, 4), (x, x.unflatten(1, (4, 3)).mean(2))
    torch.testing.assert_close(got, want)
    firsts = [torch.autograd.grad(total(*y), x, create_graph=True)[0] for y in (got, want)]
    torch.testing.assert_close(*firsts)
    torch.testing.assert_close(*(torch.autograd.grad(first.square().sum(), x)[0] for first in firsts))
