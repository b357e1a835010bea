"""Synthesizer of Long Range Arena, of a third party (leaderj1001), and as the paper has it (computed by ourselves)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads


def project(x: Tensor, kernel: Tensor) -> Tensor:
    """(batch, length, channels) by a kernel (channels, heads, dim)."""
    return (x @ kernel.flatten(1)).unflatten(-1, kernel.shape[1:])


# ------------------------------------------------------------------------------------------------- Long Range Arena


def lra(golden: Golden) -> partial:
    options = golden.options
    return partial(
        ops.synthesizer_attention, kind=options["mode"], dot_product=not options["ignore_dot_product"],
        causal=options["causal"],
    )  # fmt: skip


@reads("synthesizer_lra_random", "synthesizer_lra_factorized_random", "synthesizer_lra_factorized_random_causal")
def lra_random(golden: Golden) -> Pairs:
    def attend(x: Tensor, value: Tensor, out: Tensor, *tables: Tensor) -> Tensor:
        v = project(x, value)
        return lra(golden)(v, v, v, tables).flatten(2) @ out.flatten(0, 1)

    tables = ("random",) if golden.options["mode"] == "random" else ("random1", "random2")
    return compared(golden, attend, "x", *(f"param.{name}" for name in ("value.kernel", "out.kernel", *tables)))


@reads("synthesizer_lra_random_plus_dot")
def lra_random_plus_dot(golden: Golden) -> Pairs:
    def attend(x: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, table: Tensor) -> Tensor:
        q, k, v = (project(x, kernel) for kernel in (query, key, value))
        return lra(golden)(q, k, v, table).flatten(2) @ out.flatten(0, 1)

    weights = ("query.kernel", "key.kernel", "value.kernel", "out.kernel", "random")
    return compared(golden, attend, "x", *(f"param.{name}" for name in weights))


@reads("synthesizer_lra_dense")
def lra_dense(golden: Golden) -> Pairs:
    def attend(x: Tensor, first: Tensor, second: Tensor, value: Tensor, out: Tensor) -> Tensor:
        v = project(x, value)
        return lra(golden)(project(x, first), v, v, second, lra_reshape=True).flatten(2) @ out.flatten(0, 1)

    weights = ("dense_syn.kernel", "dense_syn_len.kernel", "value.kernel", "out.kernel")
    return compared(golden, attend, "x", *(f"param.{name}" for name in weights))


# ------------------------------------------------------------------------------------------ a third party, one head


@reads("synthesizer_dense")
def third_party_dense(golden: Golden) -> Pairs:
    attend = partial(ops.synthesizer_attention, kind="dense", dot_product=False)

    def run(x: Tensor, first: Tensor, bias1: Tensor, second: Tensor, bias2: Tensor, value: Tensor, bias: Tensor):
        q, v = ((x @ weight.T + offset).unsqueeze(2) for weight, offset in ((first, bias1), (value, bias)))
        return attend(q, q, v, (second.T, bias2)).squeeze(2)

    weights = [f"{name}.{part}" for name in ("dense.0", "dense.2", "value_fc") for part in ("weight", "bias")]
    return compared(golden, run, "x", *(f"param.{name}" for name in weights))


@reads("synthesizer_factorized_dense")
def third_party_factorized_dense(golden: Golden) -> Pairs:
    attend = partial(
        ops.synthesizer_attention, kind="factorized_dense", dot_product=False, activation="identity", tiling="both"
    )

    def run(x: Tensor, a: Tensor, a_bias: Tensor, b: Tensor, b_bias: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        q = (x @ torch.cat([a, b]).T + torch.cat([a_bias, b_bias])).unsqueeze(2)
        factors = torch.eye(q.shape[-1], dtype=x.dtype).split([len(a), len(b)], 1)
        return attend(q, q, (x @ value.T + bias).unsqueeze(2), [factor.unsqueeze(0) for factor in factors]).squeeze(2)

    weights = [f"{name}.{part}" for name in ("a_proj", "b_proj", "value_fc") for part in ("weight", "bias")]
    return compared(golden, run, "x", *(f"param.{name}" for name in weights))


# --------------------------------------------------------------------------------------------------------- the paper


@reads("synthesizer_dense_paper", "synthesizer_factorized_dense_paper")
def paper(golden: Golden) -> Pairs:
    heads, factorized = golden.options["heads"], "param.wa" in golden.tensors
    kind = "factorized_dense" if factorized else "dense"

    def run(
        x: Tensor, w1: Tensor, b1: Tensor, value: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor, *tables: Tensor
    ) -> Tensor:
        q = (torch.einsum("blc,hck->bhlk", x, w1) + b1).transpose(1, 2)
        v = (x @ value.T + bias).unflatten(-1, (heads, -1))
        attended = ops.synthesizer_attention(q, q, v, tables, kind=kind, dot_product=False)
        return attended.flatten(2) @ out.T + out_bias

    weights = ["w1", "b1", "value.weight", "value.bias", "out.weight", "out.bias"]
    tables = ["wa", "wb"] if factorized else ["w2"]
    return compared(golden, run, "x", *(f"param.{name}" for name in (*weights, *tables)))
