"""Linformer: what the laws do not say of it."""

from __future__ import annotations

import pytest
import torch

from flowformer import LinformerAttention, ops


def rand(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return [rand(2, 24, 3, 8, seed=seed) for seed in range(3)]


def test_identity_is_softmax_attention(tensors: list[torch.Tensor]) -> None:
    want = ops.softmax_attention(*tensors)
    for projection in (torch.eye(24).double(), torch.eye(24, 40).double().expand(3, -1, -1)):
        torch.testing.assert_close(ops.linformer_attention(*tensors, projection), want, rtol=1e-12, atol=1e-12)


def test_error_falls_as_the_rank_grows() -> None:
    # Tokens that are like their neighbours, and projections that average neighbours.
    k, v = (rand(1, 64, 2, 8, seed=seed).cumsum(1) / 4 for seed in range(2))
    q, errors = rand(1, 64, 2, 8, seed=2), []
    want = ops.softmax_attention(q, k, v)
    for rank in (4, 16, 64):
        means = torch.eye(rank).double().repeat_interleave(64 // rank, 1) * rank / 64
        errors.append(float((ops.linformer_attention(q, k, v, means) - want).norm() / want.norm()))
    assert errors[0] > 2 * errors[1] > 0
    assert errors[2] < 1e-12


def test_pair_of_one_projection_is_one_projection(tensors: list[torch.Tensor]) -> None:
    for E in (rand(5, 30), rand(3, 5, 30)):
        assert torch.equal(ops.linformer_attention(*tensors, E), ops.linformer_attention(*tensors, (E, E)))
    both = ops.linformer_attention(*tensors, (rand(5, 30), rand(5, 30, seed=1)))
    assert not torch.allclose(both, ops.linformer_attention(*tensors, rand(5, 30)))


def test_positions_are_those_of_real_tokens(tensors: list[torch.Tensor]) -> None:
    q, k, v = tensors
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[:, 3:9] = False
    E = rand(5, 24)
    want = ops.linformer_attention(*(x[:, mask[0]] for x in (q, k, v)), E)
    torch.testing.assert_close(ops.linformer_attention(q, k, v, E, mask=mask)[:, mask[0]], want)


@pytest.mark.parametrize("share_heads", [True, False])
@pytest.mark.parametrize("share_values", [True, False])
def test_modules_share_as_they_are_told(share_heads: bool, share_values: bool) -> None:
    module = LinformerAttention(12, 3, max_length=20, rank=5, share_heads=share_heads, share_values=share_values)
    shape = (5, 20) if share_heads else (3, 5, 20)
    assert module.key_projection.shape == shape
    assert (module.value_projection is None) == share_values
    assert share_values or module.value_projection.shape == shape
    assert 0.4 < module.key_projection.abs().max() <= 5**-0.5
    assert module(torch.randn(2, 17, 12), torch.randn(2, 20, 12)).shape == (2, 17, 12)


def test_what_does_not_fit_is_refused(tensors: list[torch.Tensor]) -> None:
    q, k, v = tensors
    for projection, kind, says in (
        (rand(5, 23), ValueError, "projection has 23 positions, got 24 tokens"),
        (rand(2, 5, 24), ValueError, r"must be a tensor \(r, T\) or \(3, r, T\), or two .* got \(2, 5, 24\)"),
        ((rand(5, 24), rand(6, 24)), ValueError, "two of the same shape"),
        ([rand(5, 24)] * 3, TypeError, "two of the same shape, of floating-point dtype"),
    ):
        with pytest.raises(kind, match=says):
            ops.linformer_attention(q, k, v, projection)
    with pytest.raises(ValueError, match=r"there is no causal form, since each of the rows .* mixes all positions"):
        ops.linformer_attention(q, k, v, rand(5, 24), causal=True)
    with pytest.raises(ValueError, match="max_length is required"):
        LinformerAttention(12, 3)
    with pytest.raises(TypeError, match="share_heads must be True or False"):
        LinformerAttention(12, 3, max_length=4, share_heads=1)  # pyright: ignore[reportArgumentType]
