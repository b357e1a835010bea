"""What is specific to linear attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowformer import ops
from flowformer.mechanisms.linear.operation import elu_plus_one


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, 3, 4, generator=random, dtype=torch.float64).to(dtype) for _ in "qkv"]


def test_feature_map_keeps_the_digits_of_small_values() -> None:
    x = torch.tensor([-80.0, -30.0, -1.0, 0.0, 1e-3, 2.0, 1e4], requires_grad=True)
    y = elu_plus_one(x)
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
