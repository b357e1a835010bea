"""YOSO-E: yoso_v1, as transformers has it, and yoso_v2 of the same authors."""

from __future__ import annotations

from functools import partial

from flowformer import ops

from .files import Golden, Pairs, compared, reads


@reads("yoso_e", "yoso_e_v2")
def yoso(golden: Golden) -> Pairs:
    attend = partial(
        ops.yoso_attention,
        causal=golden.options["causal"],
        mask=golden.tensors["mask"].bool(),
        hash_code_len=golden.options["hash_code_len"],
        gradient="exact" if "dot_scale" in golden.options else "surrogate",
    )
    return compared(golden, attend, "q", "k", "v")
