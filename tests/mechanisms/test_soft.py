"""SOFT: images, and what the laws do not say of series."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flowformer import SoftAttention, ops
from flowformer.mechanisms.maps import attention_rows
from flowformer.mechanisms.registry import find_attention

HEADS, KEY = 2, 4
ROW = find_attention("soft")


def rand(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(sizes)))


def learned(*sides: int) -> tuple[Tensor, Tensor, Tensor]:
    return rand(KEY, KEY, *sides), rand(KEY, seed=1), rand(KEY, seed=2)


IMAGE = [rand(2, 6, 10, HEADS, KEY, seed=seed) for seed in range(3)]
SERIES = [rand(2, 30, HEADS, KEY, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_images_equal_their_reference(ratio: int) -> None:
    given: tuple[Any, ...] = (learned(ratio, ratio), rand(HEADS, 3, 3))
    leaves = [x.clone().requires_grad_() for x in (*IMAGE, *given[0], given[1])]

    def run(function: Any) -> list[Tensor]:
        out = function(*leaves[:3], tuple(leaves[3:6]), leaves[6], value_conv=3)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for got, want in zip(run(ops.soft_attention), run(ROW.truth), strict=True):
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_error_to_the_kernel_falls_as_landmarks_grow() -> None:
    # Not to zero: landmarks have been through a norm and an activation, and lie elsewhere than tokens.
    q, v, errors = rand(1, 64, 1, KEY) / 2, rand(1, 64, 1, 3, seed=1), []
    given = (torch.eye(KEY).double(), torch.ones(KEY).double(), torch.zeros(KEY).double())
    square = (q[:, :, 0, None] - q[:, None, :, 0]).square().sum(-1) / KEY**0.5
    want = ((-square / 2).exp() @ v[:, :, 0]).unsqueeze(2)
    for m in (1, 4, 16, 64):
        out = ops.soft_attention(q, q, v, given, num_landmarks=m, ridge=1e-6, iterations=60)
        errors.append(float((out - want).norm() / want.norm()))
    assert all(later < 0.9 * earlier for earlier, later in pairwise(errors))


def test_enough_iterations_are_the_inverse() -> None:
    for ridge in (0.01, 1.0):
        found, other = (
            ops.soft_attention(*SERIES, learned(), num_landmarks=5, ridge=ridge, iterations=n) for n in (40, 80)
        )
        torch.testing.assert_close(found, other)
    assert not torch.allclose(found, ops.soft_attention(*SERIES, learned(), num_landmarks=5, ridge=0.01))


def test_released_gradient_is_exact_where_iterations_have_converged() -> None:
    for iterations, alike in ((60, True), (4, False)):
        grads = []
        for gradient in ("exact", "released"):
            q = SERIES[0].clone().requires_grad_()
            out = ops.soft_attention(
                q, q, SERIES[2], learned(), num_landmarks=5, iterations=iterations, gradient=gradient
            )
            grads.append(torch.autograd.grad(out.square().sum(), q)[0])
        assert torch.allclose(*grads, rtol=1e-6, atol=1e-6 * float(grads[0].abs().max())) == alike


def test_start_of_the_batch_couples_what_start_of_a_matrix_does_not() -> None:
    other = [torch.cat([x[:1], 3 * x[1:]]) for x in SERIES]
    for start, alike in (("matrix", True), ("batch", False)):
        one, two = (
            ops.soft_attention(*x, learned(), num_landmarks=5, start=start, iterations=4)[0] for x in (SERIES, other)
        )
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-12) == alike


def test_short_rows_have_as_many_landmarks_as_tokens() -> None:
    short = [x[:, :3] for x in SERIES]
    found, want = (ops.soft_attention(*short, learned(), num_landmarks=m) for m in (49, 3))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("shared_qk", [True, False])
def test_modules_share_queries_and_keys(shared_qk: bool) -> None:
    module = SoftAttention(8, HEADS, shared_qk=shared_qk, num_landmarks=4, conv=3).double()
    assert hasattr(module, "k_proj") != shared_qk
    assert hasattr(module, "k_conv") != shared_qk
    x = rand(2, 9, 8)
    q, k, _, _ = module.project(x, x, {"mask": None, "context_mask": None})
    assert torch.equal(q, k) == shared_qk


def test_modules_of_images_and_their_maps() -> None:
    torch.manual_seed(0)
    module = SoftAttention(8, HEADS, ratio=2, value_conv=3).double()
    x = rand(2, 6, 5, 8)
    seen: list[Tensor] = []
    module.out_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert module(x).shape == x.shape
    weights = attention_rows(module, x, [0, 17, 29])
    values = module.v_proj(x).flatten(1, 2).unflatten(-1, (HEADS, -1))
    want = seen[0].flatten(1, 2)[:, [0, 17, 29]]
    torch.testing.assert_close(torch.einsum("bhrs,bshv->brhv", weights, values).flatten(2), want)


def test_what_does_not_fit_is_refused() -> None:
    bools = torch.ones(2, 6, dtype=torch.bool)
    image = learned(2, 2)
    for tensors, given, options, kind, says in (
        (SERIES, image, {}, ValueError, r"landmarks must be three tensors, \(4, 4\) for series, \(4,\) and \(4,\)"),
        (IMAGE, learned(), {}, ValueError, r"\(4, 4, r, r\) for images"),
        (IMAGE, image, {"mask": bools}, ValueError, "images have no padding"),
        (IMAGE, learned(7, 7), {}, ValueError, "patches of 7 x 7 pixels in an image of 6 x 10"),
        ([IMAGE[0], *(x[:, :, :9] for x in IMAGE[1:])], image, {}, ValueError, "q and k of images must have one shape"),
        (SERIES, learned()[:2], {}, TypeError, "landmarks must be three tensors"),
        (SERIES, learned(), {"gradient": "none"}, ValueError, "gradient must be one of 'exact', 'released'"),
        (SERIES, learned(), {"ridge": -1}, ValueError, "ridge must be at least 0"),
    ):
        with pytest.raises(kind, match=says):
            ops.soft_attention(*tensors, given, **options)
    with pytest.raises(ValueError, match="conv=3 is along a sequence, and ratio=2 is for images"):
        SoftAttention(8, 2, ratio=2, conv=3)
    assert ROW.rows is not None
    with pytest.raises(ValueError, match="weights are of start='matrix' and gradient='exact'"):
        ROW.rows(*SERIES[:2], [0], learned(), gradient="released")
