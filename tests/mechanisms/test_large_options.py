"""Windows, blocks, buckets and strides far beyond the length: the same results, at the cost of the length."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowformer import ops
from flowformer.mechanisms import find_attention

LENGTH, LARGE = 20, 2**31 - 1
BLOCKS = torch.randint(100, (2, 50, 2), generator=torch.Generator().manual_seed(0))
ROTATIONS = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CENTROIDS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FORMS = {
    "local": ("local", (), {"window": LARGE}, "both"),
    "local, many blocks": ("local", (), {"window": 3, "look_backward": LARGE}, "both"),
    "local, exact": ("local", (), {"window": LARGE, "exact_window": True}, "both"),
    "longformer": ("longformer", (), {"window": LARGE}, "both"),
    "sparse": ("sparse", (), {"stride": LARGE}, "both"),
    "sparse, apart": ("sparse", (), {"stride": LARGE, "combine": "alternate"}, "both"),
    "sparse, fixed": ("sparse", (), {"stride": LARGE, "pattern": "fixed"}, "both"),
    "bigbird": ("bigbird", (BLOCKS,), {"block": LARGE}, "bidirectional"),
    "reformer": ("reformer", (ROTATIONS,), {"chunk_length": LARGE}, "both"),
    "routing": ("routing", (CENTROIDS,), {"window": LARGE}, "both"),
    "sinkhorn": ("sinkhorn", (), {"bucket_length": LARGE, "num_top": 2}, "both"),
}
CASES = [
    pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'bidirectional'}")
    for name, (*_, forms) in FORMS.items()
    for causal in ((False, True) if forms == "both" else (False,))
]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that comes to be."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize
            for leaf in tree_leaves(out)
            if isinstance(leaf, torch.Tensor)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize(("name", "causal"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_cost_is_that_of_the_length(name, causal, padded):
    mechanism, tensors, options, _ = FORMS[name]
    row = find_attention(mechanism)
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, LENGTH, 2, 4, generator=random, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, LENGTH, generator=random) < 0.7 if padded else None
    with Largest() as largest:
        got = row.operation(q, k, v, *tensors, causal=causal, mask=mask, **options)
    want = row.truth(q, k, v, *tensors, causal=causal, mask=mask, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert largest.elements < 300 * LENGTH**2


def test_null_buckets_keep_their_weight():
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, LENGTH, 4, 4, generator=random, dtype=torch.float64) for _ in range(3))
    null = torch.randn(2, 4, 4, generator=random, dtype=torch.float64)
    given = {"causal": True, "bucket_length": 1000, "num_top": 2}
    got = ops.sinkhorn_attention(q, k, v, *null, **given)
    torch.testing.assert_close(got, find_attention("sinkhorn").truth(q, k, v, *null, **given), rtol=1e-10, atol=1e-10)
