"""Synthesizer: the kinds of scores and the modules that the laws do not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowformer import SynthesizerAttention, ops
from flowformer.mechanisms.registry import find_attention

HEADS, KEY, LENGTH, T = 2, 4, 11, 15
ROW = find_attention("synthesizer")


def rand(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(sizes)))


TABLES: dict[str, Any] = {
    "random": rand(HEADS, T, T),
    "factorized_random": (rand(HEADS, T, 3), rand(HEADS, 3, T)),
    "dense": rand(HEADS, KEY, T),
    "factorized_dense": (rand(HEADS, KEY, 3), rand(HEADS, KEY, 5)),
}
FORMS = [(kind, {}) for kind in TABLES] + [
    ("dense", {"activation": "identity"}),
    ("factorized_dense", {"tiling": "both"}),
]


@pytest.fixture
def tensors() -> list[Tensor]:
    return [rand(2, LENGTH, HEADS, KEY, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dot_product", [False, True])
@pytest.mark.parametrize(("kind", "options"), FORMS)
def test_every_kind_is_its_reference(
    tensors: list[Tensor], kind: str, options: dict[str, Any], dot_product: bool, causal: bool
) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, 3:5] = mask[1, 9:] = False
    options = {"kind": kind, "dot_product": dot_product, "causal": causal, **options}
    for masked in (None, mask):
        got = ops.synthesizer_attention(*tensors, TABLES[kind], mask=masked, **options)
        torch.testing.assert_close(got, ROW.truth(*tensors, TABLES[kind], mask=masked, **options))


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_goes_on_from_a_state(tensors: list[Tensor], kind: str) -> None:
    for dot_product in (False, True):
        options = {"kind": kind, "dot_product": dot_product}
        want = ops.synthesizer_attention(*tensors, TABLES[kind], causal=True, **options)
        mask = torch.arange(8).expand(2, -1) >= torch.tensor([[3], [0]])
        first = [torch.cat([x.new_full((2, 3, HEADS, KEY), torch.nan), x[:, :5]], 1) for x in tensors]
        first = [torch.where(mask[..., None, None], x, x.nan_to_num()) for x in first]
        first = [torch.stack([x[0], torch.cat([x[1, 3:], x[1, :3]])]) for x in first]
        mask[1] = torch.arange(8) < 5
        outs, state = ops.synthesizer_attention(
            *first, TABLES[kind], causal=True, mask=mask, return_state=True, **options
        )
        torch.testing.assert_close(torch.stack([outs[0, 3:], outs[1, :5]]), want[:, :5])
        assert state.key.shape == (2, 8, HEADS, KEY if dot_product else 0)
        for at in range(5, LENGTH):
            token = [x[:, at] for x in tensors]
            out, state = ops.synthesizer_attention_step(*token, state, TABLES[kind], **options)
            torch.testing.assert_close(out, want[:, at])


def test_a_bias_of_dense_scores_is_for_all_heads_or_each(tensors: list[Tensor]) -> None:
    options, weight = {"kind": "dense", "dot_product": False}, rand(KEY, T)
    each = ops.synthesizer_attention(*tensors, (weight.expand(HEADS, -1, -1), rand(T).expand(HEADS, -1)), **options)
    torch.testing.assert_close(ops.synthesizer_attention(*tensors, (weight, rand(T)), **options), each)
    assert not torch.allclose(ops.synthesizer_attention(*tensors, weight, **options), each)


def test_lra_reshape_mixes_up_heads_and_positions(tensors: list[Tensor]) -> None:
    options, table = {"kind": "dense", "dot_product": False, "lra_reshape": True}, TABLES["dense"]
    found = ops.synthesizer_attention(*tensors, table, **options)
    torch.testing.assert_close(found, ROW.truth(*tensors, table, **options))
    # The scores of the first output are those of the first head's first query; of the second, of the second head's.
    q, _, v = tensors
    scores = (q[0, 0, 1].relu() @ table[1])[:LENGTH]
    torch.testing.assert_close(found[0, 1, 0], scores.softmax(-1) @ v[0, :, 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", TABLES)
def test_modules_have_the_projections_that_scores_depend_on(kind: str, causal: bool) -> None:
    options: dict[str, Any] = {"max_length": T, "kind": kind, "causal": causal, "conv": 3}
    for dot_product in (False, True):
        module = SynthesizerAttention(8, HEADS, dot_product=dot_product, **options).double()
        names = {name for name, _ in module.named_children()}
        assert ("k_proj" in names) == ("k_conv" in names) == dot_product
        assert ("q_proj" in names) == ("q_conv" in names) == (dot_product or "dense" in kind)
        x = rand(2, LENGTH, 8).requires_grad_()
        out = module(x)
        for grad in torch.autograd.grad(out.square().sum(), [x, *module.parameters()]):
            assert grad.isfinite().all()
        if causal:
            state, outs = module.init_state(2), []
            for token in x.unbind(1):
                step, state = module.step(token, state)
                outs.append(step)
            torch.testing.assert_close(torch.stack(outs, 1), out)


def test_factors_of_dense_scores_have_room_for_all_positions() -> None:
    for positions in (1, 2, 9, 10, 4096):
        module = SynthesizerAttention(8, 2, max_length=positions, kind="factorized_dense", device="meta")
        first, second = module.factors
        assert positions <= first * second <= positions + first
    with pytest.raises(ValueError, match="the product of factors must be at least max_length, 10, got 3 x 3"):
        SynthesizerAttention(8, 2, max_length=10, kind="factorized_dense", factors=(3, 3))


def test_what_does_not_fit_is_refused(tensors: list[Tensor]) -> None:
    bools = torch.ones(2, LENGTH, dtype=torch.bool)
    for synthetic, options, kind, says in (
        (rand(HEADS, 7, 7), {}, ValueError, "synthetic has 7 positions, got 11 tokens"),
        (rand(HEADS, T, 7), {}, ValueError, r"must be R \(2, T, T\), got \(2, 15, 7\)"),
        (TABLES["random"], {"kind": "dense"}, ValueError, r"must be W_2 \(4, T\) or \(2, 4, T\)"),
        (TABLES["dense"], {"kind": "sparse"}, ValueError, "kind must be one of 'random', .* got 'sparse'"),
        (TABLES["random"], {"lra_reshape": True}, ValueError, "lra_reshape is of kind='dense', got kind='random'"),
        (TABLES["dense"], {"kind": "dense", "lra_reshape": True, "mask": bools}, ValueError, "pass no masks"),
        (TABLES["dense"], {"kind": "dense", "lra_reshape": True, "causal": True}, ValueError, "and causal=False"),
        ([rand(HEADS, KEY, 3)] * 3, {"kind": "factorized_dense"}, ValueError, "W_A .* and W_B"),
    ):
        with pytest.raises(kind, match=says):
            ops.synthesizer_attention(*tensors, synthetic, **options)
    with pytest.raises(ValueError, match="lra_reshape has no causal form"):
        SynthesizerAttention(8, 2, max_length=4, kind="dense", lra_reshape=True, causal=True)
    with pytest.raises(ValueError, match="max_length is required"):
        SynthesizerAttention(8, 2)
