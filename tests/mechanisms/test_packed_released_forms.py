"""Forms whose outputs depend on padding, as released: packed sequences have none, and are those one by one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from flowformer import create_attention

BOUNDS = [0, 12, 40, 40, 72]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local", {"window": 8, "released": "lra"}),
        ("bigbird", {"block": 4, "released": "huggingface", "seed": 0}),
        ("bigbird", {"block": 4, "released": "huggingface-eval", "seed": 0}),
        ("nystromformer", {"num_landmarks": 4, "segments": "positions"}),
        ("nystromformer", {"num_landmarks": 4, "segments": "front"}),
        ("nystromformer", {"num_landmarks": 4, "start": "batch"}),
        ("soft", {"num_landmarks": 4, "start": "batch", "ridge": 0.0}),
    ],
)
def test_a_packed_batch_equals_its_sequences(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, x = create_attention(name, 16, 2, **options).double(), torch.randn(1, BOUNDS[-1], 16).double()
    got = module(x, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))
    want = [module(x[:, a:b]) for a, b in pairwise(BOUNDS) if b > a]
    torch.testing.assert_close(got, torch.cat(want, 1), rtol=1e-9, atol=1e-10)
