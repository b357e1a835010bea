"""Sparse Sinkhorn attention: sinkhorn-transformer, as released and corrected, and Long Range Arena."""

from __future__ import annotations

import torch
from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads


@reads("sinkhorn_topk", "sinkhorn_topk_values_corrected", "sinkhorn_gumbel", "sinkhorn_gumbel_values_corrected")
def sinkhorn_transformer(golden: Golden) -> Pairs:
    options, noise = golden.options, golden.tensors.get("random.gumbel")
    given = {"bucket_length": options["bucket_size"], "values": "values"}
    if "values_corrected" not in golden.name:
        given["values"] = "keys"  # as released
    if noise is None:
        given |= {"num_top": options["n_top_buckets"]}
    else:
        given |= {"sort": "gumbel", "temperature": options["temperature"], "iterations": options["sinkhorn_iter"]}

    def attend(*qkv: Tensor) -> Tensor:  # the noise of each sequence is its own
        rows = range(len(qkv[0]))
        of_rows = [None if noise is None else noise[row] for row in rows]
        outs = [
            ops.sinkhorn_attention(*(x[row : row + 1] for x in qkv), None, None, of_rows[row], **given) for row in rows
        ]
        return torch.cat(outs)

    return compared(golden, attend, "q", "k", "v")


@reads("sinkhorn_causal")
def sinkhorn_causal(golden: Golden) -> Pairs:
    options = golden.options
    names = {"bucket_length": "bucket_size", "num_top": "n_top_buckets", "temperature": "temperature"}
    given = {name: options[theirs] for name, theirs in names.items()}

    def attend(q: Tensor, k: Tensor, v: Tensor, null_keys: Tensor, null_values: Tensor) -> Tensor:
        return ops.sinkhorn_attention(q, k, v, null_keys[:, 0], null_values[:, 0], causal=True, **given)

    return compared(golden, attend, "q", "k", "v", "param.null_keys", "param.null_values")


@reads("sinkhorn_lra", "sinkhorn_lra_sinkhorn")
def long_range_arena(golden: Golden) -> Pairs:
    options = golden.options
    sort = f"lra_{options['sort_activation']}"

    def module(x: Tensor, query: Tensor, key: Tensor, value: Tensor, sort_kernel: Tensor, last: Tensor) -> Tensor:
        q, k, v = ((x @ kernel.flatten(1)).unflatten(-1, kernel.shape[1:]) for kernel in (query, key, value))
        out = ops.sinkhorn_attention(
            q, k, v, None, None, None, sort_kernel, bucket_length=options["block_size"], sort=sort
        )
        return out.flatten(2) @ last.flatten(0, 1)

    names = ("query.kernel", "key.kernel", "value.kernel", "DenseGeneral_0.kernel", "out.kernel")
    pairs = compared(golden, module, "x", *(f"param.{name}" for name in names))
    if sort == "lra_softmax":
        # Shares add up to 1, so that the gradient of the sort network is rounding: it is measured by another's size.
        (got, want), keys = pairs["grad.DenseGeneral_0.kernel"], pairs["grad.key.kernel"]
        beside = [torch.cat([one.flatten(), key.flatten()]) for one, key in zip((got, want), keys, strict=True)]
        pairs["grad.DenseGeneral_0.kernel"] = (beside[0], beside[1])
    return pairs
