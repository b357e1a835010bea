"""The Sparse Transformer: Long Range Arena's, and the masks of OpenAI's code."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowformer import ops
from flowformer.mechanisms import find_attention

from .files import Golden, Pairs, compared, reads
from .kernels import PROJECTIONS, between_kernels


def sees(length: int, number: int, **options: Any) -> Tensor:
    """Which tokens each of a number of heads sees, (number, length, length), 0 or 1."""
    q = torch.zeros(1, length, number, 1, dtype=torch.float64)
    rows = find_attention("sparse").rows
    assert rows is not None
    return (rows(q, q, torch.arange(length), **options)[0] > 0).to(torch.uint8)


@reads("sparse_lra_strided", "sparse_lra_fixed", "sparse_lra_fixed_cls")
def sparse_lra(golden: Golden) -> Pairs:
    causal, sizes = golden.options["causal"], [int(n) for n in re.findall(r"=(\d+)", str(golden.options["patterns"]))]
    options: dict[str, Any] = {"pattern": "strided" if "Strided" in str(golden.options["patterns"]) else "fixed"}
    options |= {"stride": sizes[0], "released": "lra-cls" if golden.options["cls"] else "lra"}
    if options["pattern"] == "fixed":
        options["columns"] = sizes[-1]
    pairs = compared(golden, between_kernels(partial(ops.sparse_attention, causal=causal, **options)), *PROJECTIONS)
    mask = golden.tensors["mask"]
    return {**pairs, "mask": (sees(len(mask), 1, causal=causal, **options)[0], mask)}


@reads("sparse_openai_masks")
def sparse_openai_masks(golden: Golden) -> Pairs:
    size = golden.options["strided"]["length"]
    stride = golden.options["strided"]["local_attn_ctx"]
    alternate = sees(size, 2, causal=True, stride=stride, combine="alternate")
    # Strided attention was run on the transposed sequence.
    order = torch.arange(size).view(-1, stride).T.flatten()
    got = {
        "mask.all": sees(size, 1, causal=True, stride=size),
        "mask.dense_local": alternate[0],
        "mask.dense_strided": alternate[1],
        "mask.local": alternate[:1],
        "mask.strided": alternate[1:, order][:, :, order],
    }
    for name in ("fixed", "fixed_heads"):
        given = golden.options[name]
        sets = given["num_verts"]
        columns = given["vertsize"] * given["blocksize"]
        fixed = {"pattern": "fixed", "stride": given["local_attn_ctx"], "columns": columns, "column_sets": sets}
        got[f"mask.{name}"] = sees(given["length"], sets, causal=True, **fixed)
    return {name: (mask, golden.tensors[name]) for name, mask in got.items()}
