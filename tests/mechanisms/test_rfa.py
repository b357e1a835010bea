"""Random feature attention: what its equations promise beyond the laws."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowformer import create_attention, ops
from flowformer.mechanisms import find_attention
from flowformer.mechanisms.rfa import RFAAttention

TRUTH = find_attention("rfa").truth
EXACT = {"norm_eps": 0.0, "bound": "none"}


def inputs(length: int, channels: int = 8, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 2, channels, generator=random, dtype=torch.float64) for _ in range(3)]


def matrices(features: int, channels: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(2, features, channels, generator=torch.Generator().manual_seed(seed)).double()


def gates(length: int) -> Tensor:
    return -torch.rand(2, length, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def attend(weights: Tensor, v: Tensor, causal: bool) -> Tensor:
    weights = weights.tril() if causal else weights
    return torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)


def cosines(q: Tensor, k: Tensor) -> Tensor:
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return torch.einsum("bihk,bjhk->bhij", q, k)


KERNELS = {
    "gaussian": torch.exp,
    "arccos": lambda c: (1 - c.square()).clamp(min=0).sqrt() + (math.pi - c.clamp(-1, 1).acos()) * c,
}


def distance(kind: str, features: int, causal: bool) -> float:
    """The error of outputs beside those under the exact kernel, root mean square, of several matrices."""
    q, k, v = inputs(30)
    want = attend(KERNELS[kind](cosines(q, k)), v, causal)
    options = {**EXACT, "kind": kind, "feature_scale": None, "causal": causal}
    errors = [
        (ops.rfa_attention(q, k, v, None, matrices(features, seed=seed), **options) - want).square().mean()
        for seed in range(8)
    ]
    return float(torch.stack(errors).mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KERNELS)
def test_converges_to_its_kernel_as_features_grow(kind, causal) -> None:
    found = [distance(kind, features, causal) for features in (16, 128, 1024)]
    for few, many in pairwise(found):
        assert many < few / 2  # 8 times as many: a root of 8 times less by theory
    assert found[-1] < 0.1


def test_kernel_is_softmax_of_unit_vectors() -> None:
    q, k, v = inputs(30)
    unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True) * 8**0.5 for x in (q, k))
    want = ops.softmax_attention(unit_q, unit_k / 8**0.5, v)  # a product of unit vectors, over sqrt(8) times it
    torch.testing.assert_close(attend(cosines(q, k).exp(), v, False), want)


def test_gate_is_the_recurrence() -> None:
    (q, k, v), W, log_gate = inputs(70), matrices(20), gates(70)
    got = ops.rfa_attention(q, k, v, log_gate, W, causal=True, bound="none")

    def phi(x: Tensor) -> Tensor:
        u = torch.einsum("bhk,hfk->bhf", x / (x.norm(dim=-1, keepdim=True) + 1e-3), W)
        return torch.cat([u.sin(), u.cos()], -1)

    S, z = torch.zeros(2, 2, 40, 8).double(), torch.zeros(2, 2, 40).double()
    for t in range(70):
        g = log_gate[:, t].exp()
        feature = (1 - g)[..., None] * phi(k[:, t])
        S = g[..., None, None] * S + feature[..., None] * v[:, t, :, None]
        z = g[..., None] * z + feature
        Q = phi(q[:, t])
        want = torch.einsum("bhf,bhfv->bhv", Q, S) / (Q * z).sum(-1, keepdim=True)
        torch.testing.assert_close(got[:, t], want, rtol=1e-9, atol=1e-9)


def test_gate_that_never_closes_gives_zeros() -> None:
    (q, k, v), W = inputs(5), matrices(20)
    out = ops.rfa_attention(q, k, v, torch.zeros(2, 5, 2), W, causal=True, bound="none")
    assert not out.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "arccos"}, {"feature_scale": 0.02}, {"norm_eps": 0.5}, {"bound": "positive", "least": 12.0},
        {"bound": "absolute", "least": 12.0}, {"least": 20.0},
    ],
)  # fmt: skip
def test_other_options_equal_the_reference(options, causal) -> None:
    tensors, W = inputs(130), matrices(20)
    got = ops.rfa_attention(*tensors, None, W, causal=causal, **options)
    torch.testing.assert_close(got, TRUTH(*tensors, None, W, causal=causal, **options), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(got, ops.rfa_attention(*tensors, None, W, causal=causal), rtol=1e-6)


def test_published_bound_makes_first_outputs_small() -> None:
    q, k, v = inputs(200)
    W = matrices(16)
    bounded = ops.rfa_attention(q, k, torch.ones_like(v), None, W, causal=True)
    assert (bounded[:, :4] < 0.7).all()  # four times 0.16 are below the bound of 1
    torch.testing.assert_close(bounded[:, -1], torch.ones_like(bounded[:, -1]))


def test_module_gates_and_scales() -> None:
    torch.manual_seed(0)
    module = create_attention("rfa", 16, 2, causal=True, gate=True, num_features=12).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    out = module(x)
    for name in ("scales", "forget_proj.weight", "forget_proj.bias"):
        (grad,) = torch.autograd.grad(out.square().sum(), module.get_parameter(name), retain_graph=True)
        assert grad.abs().max() > 0, name
    state, outs = module.init_state(2), []
    for token in x.unbind(1):
        step, state = module.step(token, state)
        outs.append(step)
    torch.testing.assert_close(torch.stack(outs, 1), out)
    log_gate, _ = module.learned(x)
    torch.testing.assert_close(log_gate.exp(), module.forget_proj(x).sigmoid())
    assert module.init_state(3).memory.shape == (3, 2, 24, 8)
    assert create_attention("rfa", 16, 2, kind="arccos", causal=True).init_state(3).memory.shape == (3, 2, 64, 8)


def test_temperature_and_orthogonal_rows() -> None:
    one, half = (RFAAttention(16, 2, num_features=8, tau=tau, seed=1) for tau in (1.0, 0.5))
    torch.testing.assert_close(half.learned()[1], 2 * one.learned()[1])
    W = RFAAttention(16, 2, num_features=8, orthogonal=True).projection
    products = W @ W.mT
    torch.testing.assert_close(products, torch.diag_embed(products.diagonal(dim1=1, dim2=2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kind": "elu"}, ValueError, "kind must be one of gaussian, arccos, got 'elu'"),
        ({"bound": "signed"}, ValueError, "bound must be one of positive, absolute, none or None, got 'signed'"),
        ({"least": 0.0}, ValueError, "least must be above 0 or None, got 0.0"),
        ({"feature_scale": "1"}, TypeError, "feature_scale must be a number, got '1'"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps must be at least 0, got -1.0"),
    ],
)
def test_bad_options_are_refused(options, error, says) -> None:
    with pytest.raises(error, match=says):
        ops.rfa_attention(*inputs(5), None, matrices(6), **options)
    with pytest.raises(error, match=says):
        RFAAttention(16, 2, **options)


@pytest.mark.parametrize(
    ("gate", "error", "says"),
    [
        ([0.0], TypeError, "log_gate must be a floating-point tensor or None, got list"),
        (torch.zeros(2, 5, 2, dtype=torch.int64), TypeError, "log_gate must be a floating-point tensor or None, got"),
        (torch.zeros(2, 5), ValueError, r"log_gate must be \(2, 5, 2\) on cpu like q, got \(2, 5\)"),
    ],
)
def test_bad_gates_are_refused(gate, error, says) -> None:
    with pytest.raises(error, match=says):
        ops.rfa_attention(*inputs(5), gate, matrices(6), causal=True)


def test_gates_are_for_causal_forms() -> None:
    with pytest.raises(ValueError, match="a gate requires causal=True, since it forgets"):
        ops.rfa_attention(*inputs(5), gates(5), matrices(6))
    with pytest.raises(ValueError, match="gate=True requires causal=True, since a gate forgets"):
        RFAAttention(16, 2, gate=True)
    with pytest.raises(ValueError, match="tau must be above 0, got 0"):
        RFAAttention(16, 2, tau=0)
