"""Sparse Sinkhorn attention: the forms that the laws do not call."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flowformer import create_attention, ops
from flowformer.mechanisms import find_attention

ROW = find_attention("sinkhorn")


def inputs(length, heads=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, heads, n, generator=random, dtype=torch.float64) for n in (4, 4, 5)]


def drawn(*shape, seed=1):
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


def both(**options):
    return (partial(function, **options) for function in (ops.sinkhorn_attention, ROW.truth))


def equal_with_and_without_padding(op, truth, length, *tensors):
    qkv = inputs(length)
    all_close(with_gradients(op, *qkv, *tensors), with_gradients(truth, *qkv, *tensors))
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, 0] = True
    op, truth = partial(op, mask=mask), partial(truth, mask=mask)
    poisoned = [t.masked_fill(~mask[..., None, None], torch.nan) for t in qkv]
    all_close(with_gradients(op, *poisoned, *tensors), with_gradients(truth, *qkv, *tensors))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("num_top", [1, 3])
@pytest.mark.parametrize("length", [3, 4, 21])
def test_learned_null_buckets(heads, num_top, length):
    op, truth = both(causal=True, bucket_length=4, num_top=num_top)
    tensors = [*inputs(length, heads), drawn(heads, 4), drawn(heads, 5)]
    all_close(with_gradients(op, *tensors), with_gradients(truth, *tensors))


@pytest.mark.parametrize("length", [3, 8, 21])
def test_gumbel_mixtures(length):
    noise = drawn(3, 6, 6)

    def with_noise(function):
        return lambda q, k, v, **masks: function(q, k, v, None, None, noise, sort="gumbel", bucket_length=4, **masks)

    equal_with_and_without_padding(with_noise(ops.sinkhorn_attention), with_noise(ROW.truth), length)


def test_mixtures_are_balanced():
    """With many iterations, what is sorted is a permutation of buckets, if a soft one: values of 1 stay 1."""
    q, k, v = inputs(24)
    noise = drawn(3, 6, 6)
    out = ops.sinkhorn_attention(
        q, k, torch.ones_like(v), None, None, noise, sort="gumbel", bucket_length=4, iterations=300, temperature=5.0
    )
    all_close([out], [torch.ones_like(v)], 1e-6)
    other = ops.sinkhorn_attention(q, k, v, None, None, drawn(3, 6, 6, seed=2), sort="gumbel", bucket_length=4)
    assert not torch.allclose(other, ops.sinkhorn_attention(q, k, v, None, None, noise, sort="gumbel", bucket_length=4))


def test_more_buckets_than_there_are_are_all_of_them():
    op, truth = both(bucket_length=4, num_top=9)
    equal_with_and_without_padding(op, truth, 11)


def test_one_bucket_is_softmax_attention():
    q, k, v = inputs(20)
    got = ops.sinkhorn_attention(q, k, v, bucket_length=20)
    want = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    all_close([got], [want])


def test_released_values_are_keys():
    q, k, _ = inputs(20)
    for options in ({}, {"sort": "gumbel"}):
        attend = partial(ops.sinkhorn_attention, bucket_length=4, **options)
        tensors = (None, None, drawn(3, 5, 5) if options else None)
        all_close([attend(q, k, k, *tensors, values="keys")], [attend(q, k, k, *tensors)])  # where they are the same
        assert not torch.allclose(attend(q, k, q, *tensors, values="keys"), attend(q, k, q, *tensors))


def test_sort_network_of_long_range_arena_learns_nothing_with_the_softmax():
    q, k, v = inputs(20)
    kernel = drawn(4, 6)
    for sort, learns in (("lra_softmax", False), ("lra_sinkhorn", True)):
        attend = partial(ops.sinkhorn_attention, q, k, v, None, None, None, bucket_length=5, sort=sort)
        grad = with_gradients(lambda kernel, attend=attend: attend(kernel), kernel)[1]
        assert (grad.abs().max() > 1e-6) == learns


def test_module_owns_nulls_noise_and_sort_network():
    x = torch.randn(2, 20, 8)
    causal = create_attention("sinkhorn", 8, 2, causal=True, bucket_length=4)
    assert set(dict(causal.named_parameters(recurse=False))) == {"null_key", "null_value"}
    before = causal.null_key.clone()
    causal.reset_parameters()
    assert not torch.equal(before, causal.null_key)
    causal(x).sum().backward()
    assert causal.null_key.grad.any()
    assert causal.null_value.grad.any()
    noisy = create_attention("sinkhorn", 8, 2, sort="gumbel", bucket_length=4, max_buckets=5, seed=1)
    assert noisy.noise.shape == (2, 5, 5)
    assert torch.equal(noisy(x), noisy(x))
    with pytest.raises(ValueError, match=r"noise must be \(2, 6, 6\).* got \(2, 5, 5\)"):
        noisy(torch.randn(2, 21, 8))
    released = create_attention("sinkhorn", 8, 2, sort="lra_sinkhorn", bucket_length=4)
    released(x).sum().backward()
    assert released.sort_kernel.grad.any()


def test_wrong_options_are_refused():
    q, k, v = inputs(12)
    for options, kind, says in (
        (
            {"sort": "quick"},
            ValueError,
            "sort must be one of 'top', 'gumbel', 'lra_softmax', 'lra_sinkhorn', got 'quick'",
        ),
        ({"sort": []}, ValueError, r"sort must be one of .*, got \[\]"),
        ({"bucket_length": 0}, ValueError, "bucket_length must be positive"),
        ({"num_top": 1.5}, TypeError, "num_top must be a whole number"),
        ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ({"values": "queries"}, ValueError, "values must be 'values' or 'keys'"),
        ({"values": "keys"}, ValueError, "as many channels as v, got 4 and 5"),
        ({"values": "keys", "causal": True}, ValueError, "values must be 'values' in the causal form"),
        ({"causal": True, "sort": "gumbel"}, ValueError, "sort must be 'top' in the causal form"),
        ({"sort": "gumbel"}, TypeError, r"noise must be a tensor \(3, 3, 3\), got NoneType"),
        ({"noise": drawn(3, 3, 3)}, ValueError, "noise must be None in this form"),
        ({"null_key": drawn(3, 4)}, ValueError, "null_key must be None in this form"),
        ({"null_key": drawn(4, 3), "causal": True}, ValueError, r"null_key must be \(3, 4\)"),
        ({"sort": "lra_softmax", "sort_kernel": drawn(4, 2)}, ValueError, r"sort_kernel must be \(4, 3\).* 3 buckets"),
        (
            {"sort": "lra_softmax", "sort_kernel": drawn(4, 3), "mask": torch.ones(2, 12, dtype=torch.bool)},
            ValueError,
            "neither mask nor cu_seqlens",
        ),
        ({"sort": "lra_softmax", "sort_kernel": drawn(4, 3), "bucket_length": 5}, ValueError, "a length that 5"),
    ):
        with pytest.raises(kind, match=says):
            ops.sinkhorn_attention(q, k, v, **{"bucket_length": 4, **options})
