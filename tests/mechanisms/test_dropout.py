"""Dropout of modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowformer.mechanisms.dropout import Dropout


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_so_many_elements_are_dropped_and_the_others_are_scaled(p):
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(999, 1_001))
    kept = out[out != 0]
    share = 1 - len(kept) / out.numel()
    assert abs(share - p) < 5 * (p * (1 - p) / out.numel()) ** 0.5
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)
    assert abs(float(out.double().mean()) - 1) < 5 * (p / (1 - p) / out.numel()) ** 0.5


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    out = (Dropout(0.5)(torch.ones(400_000)) == 0).double() - 0.5
    for distance in (1, 2, 3, 4, 8, 64):
        assert abs(float((out[distance:] * out[:-distance]).mean())) < 5 * 0.25 / 400_000**0.5


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 4), (5, 7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_shape_and_dtype(shape, dtype):
    out = Dropout(0.5)(torch.ones(shape, dtype=dtype))
    assert out.shape == shape
    assert out.dtype == dtype
    assert set(out.flatten().tolist()) <= {0.0, 2.0}


def test_the_gradient_is_that_of_what_was_kept():
    torch.manual_seed(0)
    x = torch.randn(100, requires_grad=True)
    out = Dropout(0.3)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient * x, out)


def test_the_same_seed_gives_the_same_with_any_number_of_threads():
    x, threads = torch.randn(100_000), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(3)
            found.append(Dropout(0.1)(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize(("p", "value"), [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0)])
def test_all_or_nothing(p, value):
    assert torch.equal(Dropout(p)(torch.ones(1_000)), torch.full((1_000,), value))


def test_evaluation_drops_nothing():
    x = torch.randn(10)
    assert Dropout(0.5).eval()(x) is x


def test_a_traced_graph_has_the_dropout_of_pytorch():
    traced = torch.export.export(nn.Sequential(Dropout(0.5)).train(), (torch.ones(4),))
    assert "aten.dropout" in str(traced.graph) or "aten.bernoulli" in str(traced.graph)
