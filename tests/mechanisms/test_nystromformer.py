"""Nystromformer: what the laws do not say of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowformer import NystromformerAttention, ops
from flowformer.mechanisms.inverses import pseudo_inverse
from flowformer.mechanisms.registry import find_attention


def rand(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth(length: int, seed: int) -> Tensor:
    """Tokens that are like their neighbours, as those of images and of speech are."""
    return rand(2, 64, 2, 8, seed=seed).cumsum(1).mul(0.25).repeat_interleave(length // 64, 1)


@pytest.fixture
def tensors() -> list[Tensor]:
    return [smooth(128, seed) for seed in range(3)]


def error(tensors: list[Tensor], **options: object) -> float:
    want = ops.softmax_attention(*tensors)
    return float((ops.nystromformer_attention(*tensors, **options) - want).norm() / want.norm())


def test_error_falls_as_landmarks_grow(tensors: list[Tensor]) -> None:
    errors = [error(tensors, num_landmarks=m, iterations=20) for m in (2, 8, 32, 128)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[3] < 1e-12


def test_more_landmarks_than_tokens_are_softmax_attention(tensors: list[Tensor]) -> None:
    for length in (1, 5, 64):
        short = [x[:, :length] for x in tensors]
        assert error(short, num_landmarks=64) < 1e-12


def test_a_short_row_of_a_batch_is_softmax_attention(tensors: list[Tensor]) -> None:
    mask = torch.arange(128).expand(2, -1) >= torch.tensor([[0], [120]])
    out = ops.nystromformer_attention(*tensors, mask=mask, num_landmarks=8)
    want = ops.softmax_attention(*tensors, mask=mask)
    torch.testing.assert_close(out[1], want[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out[0], want[0], rtol=1e-3)


def test_enough_iterations_are_the_pseudo_inverse() -> None:
    q, k, v = (rand(1, 24, 1, 8, seed=seed) * 3 for seed in range(3))
    found = ops.nystromformer_attention(q, k, v, num_landmarks=6, iterations=40)
    Q, K = (x[0, :, 0] / 8**0.25 for x in (q, k))
    ql, kl = (x.unflatten(0, (6, 4)).mean(1) for x in (Q, K))
    middle = torch.linalg.pinv((ql @ kl.T).softmax(-1))
    want = (Q @ kl.T).softmax(-1) @ middle @ (ql @ K.T).softmax(-1) @ v[0, :, 0]
    torch.testing.assert_close(found[0, :, 0], want, rtol=1e-9, atol=1e-9)


def test_start_of_the_batch_couples_what_start_of_a_matrix_does_not(tensors: list[Tensor]) -> None:
    other = [torch.cat([x[:1], 3 * x[1:]]) for x in tensors]
    for start, alike in (("matrix", True), ("batch", False)):
        one, two = (ops.nystromformer_attention(*x, num_landmarks=16, start=start)[0] for x in (tensors, other))
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12) == alike


def test_segments_of_positions_and_from_the_front_are_those_of_tokens_without_padding(tensors: list[Tensor]) -> None:
    want = ops.nystromformer_attention(*tensors, num_landmarks=16)
    for segments in ("positions", "front"):
        found = ops.nystromformer_attention(*tensors, num_landmarks=16, segments=segments)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", ["matrix", "batch"])
@pytest.mark.parametrize("segments", ["tokens", "positions", "front"])
def test_a_row_of_padding_alone_is_zeros(tensors: list[Tensor], segments: str, start: str) -> None:
    mask = torch.tensor([[True], [False]]).expand(2, 128)
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = ops.nystromformer_attention(*leaves, mask=mask, num_landmarks=8, segments=segments, start=start)
    assert not out[1].any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_from_the_front_masks_are_not_looked_at(tensors: list[Tensor]) -> None:
    mask = torch.ones(2, 128, dtype=torch.bool, device="meta")  # of which looking at a value is an error
    out = ops.nystromformer_attention(*(x.to("meta") for x in tensors), mask=mask, num_landmarks=8, segments="front")
    assert out.is_meta
    assert out.shape == tensors[2].shape
    whole = torch.ones(2, 128, dtype=torch.bool)
    found = ops.nystromformer_attention(*tensors, mask=whole, num_landmarks=8, segments="front")
    want = ops.nystromformer_attention(*tensors, num_landmarks=8, segments="front")
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)  # not as with what the package adds to counts


@pytest.mark.parametrize("couple", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_pseudo_inverse_are_those_of_its_steps(couple: bool, masked: bool) -> None:
    A = rand(2, 2, 4, 4).softmax(-1).requires_grad_()
    used = torch.tensor([[True] * 4, [True, True, True, False]]) if masked else None

    def by_steps(A: Tensor) -> Tensor:
        one = torch.eye(4, dtype=A.dtype)
        sums = A.sum(-2)
        if used is not None:
            A = torch.where(used[:, None, :, None] & used[:, None, None], A, one)
            sums = (A * used[:, None, :, None]).sum(-2)
        Z = A.mT / (sums.max() if couple else sums.amax(-1)[..., None, None])
        for _ in range(3):
            Z = Z @ (13 * one - A @ Z @ (15 * one - A @ Z @ (7 * one - A @ Z))) / 4
        return Z

    def ours(A: Tensor) -> Tensor:
        return pseudo_inverse(A, used, 3, couple)

    upstream, again = rand(2, 2, 4, 4, seed=1), rand(2, 2, 4, 4, seed=2)
    torch.testing.assert_close(ours(A), by_steps(A), rtol=1e-12, atol=1e-12)
    for create in (False, True):
        firsts = [torch.autograd.grad(f(A), A, upstream, create_graph=create)[0] for f in (ours, by_steps)]
        torch.testing.assert_close(*firsts, rtol=1e-10, atol=1e-10)
    seconds = [torch.autograd.grad(first, A, again)[0] for first in firsts]
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(ours, A, check_batched_grad=True)


def test_module_adds_its_convolution() -> None:
    torch.manual_seed(0)
    module = NystromformerAttention(12, 3, num_landmarks=4, value_conv=5).double()
    plain = NystromformerAttention(12, 3, num_landmarks=4).double()
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if name != "value_filters"})
    x = rand(2, 20, 12)
    v = module.v_proj(x).unflatten(-1, (3, 4)).permute(0, 2, 3, 1).flatten(0, 2).unsqueeze(1)  # (2 3 4, 1, 20)
    near = torch.nn.functional.conv1d(
        v.view(2, 3, 4, 20).transpose(1, 2).flatten(0, 1), module.value_filters.unsqueeze(1), padding=2, groups=3
    ).view(2, 4, 3, 20)
    want = plain(x) + torch.nn.functional.linear(near.permute(0, 3, 2, 1).flatten(2), module.out_proj.weight)
    torch.testing.assert_close(module(x), want)


def test_what_does_not_fit_is_refused(tensors: list[Tensor]) -> None:
    for options, kind, says in (
        ({"num_landmarks": 0}, ValueError, "num_landmarks must be positive, got 0"),
        (
            {"num_landmarks": 7, "segments": "positions"},
            ValueError,
            "num_landmarks must divide the length .* 7 and 128",
        ),
        ({"segments": "words"}, ValueError, "segments must be one of 'tokens', 'positions', 'front', got 'words'"),
        ({"start": None}, ValueError, "start must be one of 'matrix', 'batch', got None"),
        ({"value_conv": 4}, ValueError, "value_conv must be odd, or 0 for none, got 4"),
        ({"value_conv": 3}, TypeError, r"filters must be \(2, 3\), of floating-point dtype, got NoneType"),
        ({"filters": rand(2, 3)}, ValueError, "filters must be absent without value_conv"),
        ({"filters": rand(2, 5), "value_conv": 3}, ValueError, r"filters must be \(2, 3\) .* got \(2, 5\)"),
        ({"causal": True}, ValueError, "there is no causal form, since its landmarks are means of tokens"),
    ):
        with pytest.raises(kind, match=says):
            ops.nystromformer_attention(*tensors, **options)
    rows = find_attention("nystromformer").rows
    assert rows is not None
    with pytest.raises(ValueError, match="weights are of segments='tokens' and start='matrix'"):
        rows(*tensors[:2], [0], start="batch")
