"""cosFormer: OpenNLPLab/cosFormer."""

from __future__ import annotations

from functools import partial

from flowformer import ops

from .files import Golden, Pairs, compared, reads


@reads("cosformer", "cosformer_causal", "cosformer_cross")
def cosformer(golden: Golden) -> Pairs:
    attend = partial(ops.cosformer_attention, causal=golden.options["causal"], eps=golden.options["eps"])
    return compared(golden, attend, "q", "k", "v")
