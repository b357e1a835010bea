"""YOSO-E: the code of transformers, whose gradient is a surrogate, and the later one of its authors."""

from __future__ import annotations

from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads


@reads("yoso_e", "yoso_e_v2")
def yoso(golden: Golden) -> Pairs:
    given = golden.options
    scale = given.get("dot_scale", 1.0)
    mask = golden.tensors["mask"].bool()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.yoso_attention(
            q, k, v, mask=mask, bits=given["hash_code_len"], cosine_scale=scale, surrogate=scale == 1.0
        )

    return compared(golden, attend, "q", "k", "v")
