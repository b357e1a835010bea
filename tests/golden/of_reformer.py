"""Reformer: reformer-pytorch, transformers and Long Range Arena."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads


@reads("reformer_lsh_1hash", "reformer_lsh_1hash_causal", "reformer_lsh_4hash")
def reformer_pytorch(golden: Golden) -> Pairs:
    rotations = golden.tensors["random.rotations"].transpose(0, 1)
    return _shared(golden, rotations, chunk_length=golden.options["bucket_size"])


@reads("reformer_hf_1hash", "reformer_hf_1hash_causal", "reformer_hf_4hash")
def transformers(golden: Golden) -> Pairs:
    rotations, options = golden.tensors["random.rotations"].transpose(1, 2), golden.options
    after = options["chunks_after"]
    return _shared(golden, rotations, chunk_length=options["chunk_length"], chunks_after=after, form="hf")


# Published causal forms see the future.
reads("reformer_lsh_4hash_causal", tolerance=1e-10)(reformer_pytorch)
reads("reformer_hf_4hash_causal", tolerance=1e-10)(transformers)


def _shared(golden: Golden, rotations: Tensor, **options) -> Pairs:
    causal = golden.options["causal"]

    def attend(qk: Tensor, v: Tensor) -> Tensor:
        return ops.reformer_attention(qk, qk, v, rotations, causal=causal, sees_future=causal, **options)

    return compared(golden, attend, "qk", "v")


@reads("reformer_lra_1hash", "reformer_lra_2hash")
def long_range_arena(golden: Golden) -> Pairs:
    options = golden.options
    rotations = golden.tensors["random.rotations"].transpose(0, 1)
    attend = partial(ops.reformer_attention, chunk_length=options["chunk_len"], form="lra")

    def module(x: Tensor, query: Tensor, value: Tensor) -> Tensor:
        qk, v = ((x @ kernel.flatten(1)).unflatten(-1, kernel.shape[1:]) for kernel in (query, value))
        return attend(qk, qk, v, rotations).flatten(2)

    return compared(golden, module, "x", "param.query.kernel", "param.value.kernel")
