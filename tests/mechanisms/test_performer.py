"""Performer attention: what its equations promise beyond the laws."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowformer import create_attention, ops
from flowformer.mechanisms import find_attention
from flowformer.mechanisms.draws import orthogonal_gaussian
from flowformer.mechanisms.performer import PerformerAttention

TRUTH = find_attention("performer").truth


def inputs(length: int, *, heads: int = 2, channels: int = 8, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, heads, channels, generator=random, dtype=torch.float64) for _ in range(3))
    return [scale * q, scale * k, v]


def matrix(features: int, channels: int, seed: int = 0) -> Tensor:
    return orthogonal_gaussian(features, channels, torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("options", [{}, {"kernel": "relu"}, {"sum_eps": 1e-6}, {"least": 1.0}, {"detach": True}])
def test_causal_output_is_that_of_the_sequence_cut_after_it(options) -> None:
    q, k, v = inputs(150)
    W = matrix(12, 8)
    causal = ops.performer_attention(q, k, v, W, causal=True, **options)
    for t in (0, 1, 63, 64, 149):
        cut = ops.performer_attention(q[:, : t + 1], k[:, : t + 1], v[:, : t + 1], W, **options)
        torch.testing.assert_close(causal[:, t], cut[:, t], rtol=1e-11, atol=1e-13)


def test_published_causal_form_knows_the_future() -> None:
    q, k, v = inputs(40)
    W, later = matrix(12, 8), torch.cat([k[:, :20], 2 * k[:, 20:]], 1)
    moved = {
        maximum: (
            ops.performer_attention(q, later, v, W, causal=True, maximum=maximum)
            - ops.performer_attention(q, k, v, W, causal=True, maximum=maximum)
        )[:, :20].abs().max()
        for maximum in ("past", "all")
    }  # fmt: skip
    assert moved["past"] == 0
    assert moved["all"] > 0.1


def test_published_causal_form_has_no_state() -> None:
    q, k, v = inputs(5)
    W = matrix(12, 8)
    with pytest.raises(ValueError, match="maximum='all' has no state, since the maximum is over later keys too"):
        ops.performer_attention(q, k, v, W, causal=True, maximum="all", return_state=True)
    state = ops.init_performer_state(2, 2, 12, 8)
    with pytest.raises(ValueError, match="maximum='all' has no step"):
        ops.performer_attention_step(q[:, 0], k[:, 0], v[:, 0], state, W, maximum="all")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"eps": 0.0}, {"least": 0.1}, {"sum_eps": 0.1}, {"scale": 0.2}, {"eps": 1.0}])
def test_other_options_equal_the_reference(options, causal) -> None:
    tensors, W = inputs(130), matrix(12, 8)
    got = ops.performer_attention(*tensors, W, causal=causal, **options)
    want = TRUTH(*tensors, W, causal=causal, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    plain = ops.performer_attention(*tensors, W, causal=causal)
    assert not torch.allclose(got, plain, rtol=1e-6)


def test_rising_keys_do_not_overflow() -> None:
    q, k, v = inputs(200)
    k = k * torch.linspace(0, 40, 200, dtype=torch.float64)[:, None, None]
    W = matrix(12, 8)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        got = ops.performer_attention(*(x.to(dtype) for x in (q, k, v)), W, causal=True)
        want = TRUTH(*(x.to(dtype) for x in (q, k, v)), W, causal=True)
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_without_eps_features_that_vanish_give_no_nan(causal) -> None:
    leaves = [x.float().requires_grad_() for x in inputs(70, scale=1e3)]
    out = ops.performer_attention(*leaves, matrix(12, 8), causal=causal, eps=0.0)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_detached_maximum_changes_gradients_alone() -> None:
    def run(detach):
        leaves = [x.requires_grad_() for x in inputs(30)]
        out = ops.performer_attention(*leaves, matrix(12, 8), eps=0.01, detach=detach)
        return out, *torch.autograd.grad(out.sin().sum(), leaves)

    (out, *grads), (same, *others) = run(False), run(True)
    assert torch.equal(out, same)
    assert not torch.allclose(grads[0], others[0])
    assert not torch.allclose(grads[1], others[1])
    torch.testing.assert_close(grads[2], others[2])


@pytest.mark.parametrize("options", [{}, {"kernel": "relu"}, {"eps": 0.0}, {"eps": 1.0}, {"detach": True}])
def test_outputs_are_those_without_gradients_and_without_padding(options) -> None:
    q, k, v = (x.float() for x in inputs(100))
    mask = torch.arange(100) < torch.tensor([[0], [70]])
    k, v = (x.masked_fill(~mask[..., None, None], torch.nan) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ops.performer_attention(*leaves, matrix(12, 8), context_mask=mask, **options)
    with torch.no_grad():
        same = ops.performer_attention(q, k, v, matrix(12, 8), context_mask=mask, **options)
        cut = ops.performer_attention(q, k[:, :70], v[:, :70], matrix(12, 8), **options)
    torch.testing.assert_close(out, same, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same[1], cut[1], rtol=1e-5, atol=1e-6)
    assert not same[0].any()


def distance_to_softmax(features: int, causal: bool) -> float:
    """The error of outputs beside softmax attention, root mean square, of several matrices."""
    q, k, v = inputs(20, scale=0.4)
    want = ops.softmax_attention(q, k, v, causal=causal)
    errors = [
        (ops.performer_attention(q, k, v, matrix(features, 8, seed), causal=causal, eps=0.0) - want).square().mean()
        for seed in range(12)
    ]
    return float(torch.stack(errors).mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("causal", [False, True])
def test_converges_to_softmax_attention_as_features_grow(causal) -> None:
    found = [distance_to_softmax(features, causal) for features in (8, 64, 512)]
    for few, many in pairwise(found):
        assert many < 0.65 * few  # 8 times as many; for very many features, 0.35
    assert found[-1] < 0.08


def test_orthogonal_rows_estimate_the_kernel_better() -> None:
    x, y = (x / 8**0.25 for x in torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1)).double())

    def error(orthogonal: bool) -> float:
        random, total = torch.Generator().manual_seed(0), 0.0
        for _ in range(200):
            W = (orthogonal_gaussian(8, 8, random) if orthogonal else torch.randn(8, 8, generator=random)).double()
            a, b = (z @ W.T - z.square().sum(-1, keepdim=True) / 2 for z in (x, y))
            total += float(((a + b).exp().mean(-1) / (x * y).sum(-1).exp() - 1).square().mean())
        return total

    assert error(True) < 0.9 * error(False)


def test_rows_are_orthogonal_in_blocks() -> None:
    W = matrix(20, 8)
    for block in W.split(8):
        products = block @ block.T
        torch.testing.assert_close(products, torch.diag(products.diagonal()), atol=1e-5, rtol=0)
    constant = orthogonal_gaussian(20, 8, torch.Generator().manual_seed(0), scaled=False)
    torch.testing.assert_close(constant.norm(dim=1), torch.full((20,), math.sqrt(8)))
    many = orthogonal_gaussian(4000, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(many.std(0), torch.ones(8), atol=0.05, rtol=0)


def test_module_has_the_published_defaults() -> None:
    module = create_attention("performer", 64, 4)
    assert module.projection.shape == (int(16 * math.log(16)), 16)
    assert create_attention("performer", 4, 4).projection.shape == (1, 1)
    constant = PerformerAttention(64, 4, num_features=10, row_norms="constant")
    torch.testing.assert_close(constant.projection.norm(dim=1), torch.full((10,), 4.0))
    free = PerformerAttention(64, 4, num_features=10, orthogonal=False, seed=3)
    assert torch.equal(free.projection, torch.randn(10, 16, generator=torch.Generator().manual_seed(3)))


def test_module_of_long_range_arena_has_no_random_matrix() -> None:
    module = PerformerAttention(16, 2, kernel="relu", projected=False, scale=1.0, causal=True).double()
    assert "projection" not in module.state_dict()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    state, outs = module.init_state(2), []
    for token in x.unbind(1):
        out, state = module.step(token, state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), module(x))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kernel": "elu"}, ValueError, "kernel must be one of softmax, relu, got 'elu'"),
        ({"maximum": "none"}, ValueError, "maximum must be one of past, all, got 'none'"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"eps": "1"}, TypeError, "eps must be a number, got '1'"),
        ({"detach": 1}, TypeError, "detach must be True or False, got 1"),
        ({"projected": False}, ValueError, "projected=False requires kernel='relu', got kernel='softmax'"),
        ({"epsilon": 1.0}, TypeError, "no option 'epsilon'; available: kernel"),
    ],
)
def test_bad_options_are_refused(options, error, says) -> None:
    q, k, v = inputs(5)
    with pytest.raises(error, match=says):
        ops.performer_attention(q, k, v, matrix(12, 8), **options)
    if "epsilon" not in options:
        with pytest.raises(error, match=says):
            PerformerAttention(16, 2, **options)


def test_bad_sizes_of_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="num_features must be positive, got 0"):
        PerformerAttention(16, 2, num_features=0)
    with pytest.raises(ValueError, match="row_norms must be one of gaussian, constant, got 'unit'"):
        PerformerAttention(16, 2, row_norms="unit")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="projection must be None with projected=False, got a tensor"):
        ops.performer_attention(*inputs(5), matrix(12, 8), kernel="relu", projected=False)
