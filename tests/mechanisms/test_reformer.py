"""Reformer: the published forms, which the laws do not call, and what the mechanism approximates."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from flowformer import create_attention, ops
from flowformer.mechanisms import find_attention
from flowformer.mechanisms.reformer import operation

ROW = find_attention("reformer")


def inputs(length, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 2, 4, generator=random, dtype=torch.float64) for _ in range(3)]


def rotations(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def all_close(got, want, tolerance=1e-10):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def shared_softmax(qk, v, causal=False):
    """Attention of tokens to the directions of others, to themselves only where there is nothing else."""
    k = qk / qk.norm(dim=-1, keepdim=True)
    scores = torch.einsum("blhk,bshk->bhls", qk, k) / qk.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.eye(qk.shape[1], dtype=torch.bool), -5e4)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhls,bshv->blhv", scores.softmax(-1), v)


FORMS = {
    "hf": {"form": "hf", "chunks_after": 1},
    "paper, three hashes": {"chunks_after": 1},
    "published causal": {"form": "hf", "causal": True, "sees_future": True},
    "hf causal": {"form": "hf", "causal": True},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [5, 8, 41])
def test_forms_equal_truth(name, length):
    drawn = rotations(2, 3, 4, 3)
    op, truth = (
        lambda q, k, v, function=function, **masks: function(q, k, v, drawn, chunk_length=4, **FORMS[name], **masks)
        for function in (ops.reformer_attention, ROW.truth)
    )
    tensors = inputs(length)
    all_close(with_gradients(op, *tensors), with_gradients(truth, *tensors))
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, :4] = True
    poisoned = [t.masked_fill(~mask[..., None, None], torch.nan) for t in tensors]
    want = with_gradients(partial(truth, mask=mask), *tensors)
    all_close(with_gradients(partial(op, mask=mask), *poisoned), want)


def test_published_causal_form_sees_the_future_and_ours_does_not():
    before, other = inputs(64), inputs(64, seed=9)
    after = [torch.cat([a[:, :40], b[:, 40:]], 1) for a, b in zip(before, other, strict=True)]
    attend = partial(ops.reformer_attention, rotations=rotations(2, 4, 4), causal=True, chunk_length=8)
    assert torch.equal(attend(*after)[:, :40], attend(*before)[:, :40])
    moved = (attend(*after, sees_future=True) - attend(*before, sees_future=True))[:, :40].abs().amax((-1, -2)) > 1e-3
    assert moved.double().mean() > 0.3


def test_empty_buckets_have_no_chunks():
    bucket = torch.randint(0, 1000, (1, 2, 20), generator=torch.Generator().manual_seed(0))
    assert operation._plan_apart(bucket, 4, 1000).own.shape[2] <= 20


@pytest.mark.parametrize("causal", [False, True])
def test_one_bucket_is_softmax_of_shared_queries_and_keys(causal):
    qk, _, v = inputs(40)
    drawn = torch.zeros(2, 4, 1, dtype=torch.float64)  # all tokens in the first bucket
    got = ops.reformer_attention(qk, qk, v, drawn, causal=causal, chunk_length=40)
    all_close([got], [shared_softmax(qk, v, causal)])


@pytest.mark.parametrize("causal", [False, True])
def test_error_to_shared_softmax_falls_with_chunks_and_hashes(causal):
    qk, _, v = inputs(128)
    qk = 3 * qk
    exact = shared_softmax(qk, v, causal)

    def error(hashes, chunk):
        errors = []
        for seed in range(4):
            drawn = rotations(hashes, 4, 1 if causal else 8, seed=seed)
            got = ops.reformer_attention(qk, qk, v, drawn, causal=causal, chunk_length=chunk)
            errors.append((got - exact).norm() / exact.norm())
        return float(torch.stack(errors).mean())

    by_chunk = [error(2, chunk) for chunk in (4, 16, 64)]
    assert all(more < 0.8 * fewer for fewer, more in pairwise(by_chunk)), by_chunk
    by_hashes = [error(hashes, 16) for hashes in (1, 4, 16)]
    assert all(more < 0.8 * fewer for fewer, more in pairwise(by_hashes)), by_hashes


def test_module_shares_queries_and_keys():
    torch.manual_seed(0)
    module = create_attention("reformer", 8, 2, num_hashes=2, num_buckets=6, chunk_length=4, seed=3).double()
    assert not any(name.startswith("k_proj") for name in module.state_dict())
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    qk, v = (part(x).unflatten(-1, (2, 4)) for part in (module.q_proj, module.v_proj))
    out = ops.reformer_attention(qk, qk, v, module.rotations, chunk_length=4)
    assert torch.equal(module(x), module.out_proj(out.flatten(2)))
    assert module.rotations.shape == (2, 4, 3)
    assert create_attention("reformer", 8, 2, form="hf").rotations.shape == (2, 8, 4, 16)
    apart = create_attention("reformer", 8, 2, shared_qk=False, conv=3)
    assert isinstance(apart.k_proj, nn.Linear)
    module = create_attention("reformer", 8, 2, conv=3, causal=True)
    assert not hasattr(module, "k_conv")
    module.reset_parameters()
    module(x.float()).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_long_range_arena_is_refused_what_it_did_not_have():
    q, k, v = inputs(20)
    attend = partial(ops.reformer_attention, q, k, v, rotations(2, 4, 3), form="lra", chunk_length=4)
    assert attend().shape == q.shape
    with pytest.raises(ValueError, match="neither mask nor cu_seqlens"):
        attend(mask=torch.ones(2, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="form 'lra' has no causal form"):
        attend(causal=True)
    with pytest.raises(ValueError, match="must be a multiple of 6, got 20"):
        ops.reformer_attention(*inputs(18), rotations(2, 4, 3), form="lra", chunk_length=4)


def test_wrong_options_are_refused():
    q, k, v = inputs(12)
    good = rotations(2, 4, 3)
    for options, kind, says in (
        ({"form": "trax"}, ValueError, "form must be one of 'paper', 'hf', 'lra', got 'trax'"),
        ({"form": []}, ValueError, r"form must be one of .*, got \[\]"),
        ({"chunk_length": 0}, ValueError, "chunk_length must be positive"),
        ({"chunks_after": 2}, ValueError, "chunks_after must be 0 or 1"),
        ({"causal": True, "chunks_after": 1}, ValueError, "chunks_after must be 0 in the causal form"),
        ({"sees_future": 1}, TypeError, "sees_future must be True or False"),
        ({"rotations": None}, TypeError, "rotations must be .* got NoneType"),
        ({"rotations": rotations(2, 5, 3)}, ValueError, r"rotations must be \(hashes, 4, .* got \(2, 5, 3\)"),
        ({"rotations": rotations(3, 2, 4, 3)}, ValueError, r"or \(2, hashes, 4, buckets / 2\).* got \(3, 2, 4, 3\)"),
        ({"rotations": good.long()}, ValueError, "rotations must be"),
        ({"context_mask": torch.ones(2, 12, dtype=torch.bool)}, ValueError, "self-attention, since queries and keys"),
    ):
        with pytest.raises(kind, match=says):
            ops.reformer_attention(q, k, v, **{"rotations": good, **options})
    with pytest.raises(ValueError, match="num_buckets must be even, got 7"):
        create_attention("reformer", 8, 2, num_buckets=7)
