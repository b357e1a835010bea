"""Longformer: transformers' module, and Long Range Arena's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from flowformer import ops

from .files import Golden, Pairs, compared, reads
from .kernels import project


def none(tensors: Sequence[Tensor]) -> Tensor:
    """Return a zero with gradients of zero, for the projections of global tokens where there are none."""
    return torch.stack([0 * tensor.sum() for tensor in tensors]).sum()


@reads("longformer_hf", "longformer_hf_local")
def longformer_hf(golden: Golden) -> Pairs:
    heads, window = golden.options["heads"], golden.options["attention_window"]
    kinds = golden.tensors["attention_mask"]  # -10000 padding, 0 local, 10000 global
    names = [f"param.{name}{kind}.{part}" for kind in ("", "_global") for name in ("query", "key", "value")
             for part in ("weight", "bias")]  # fmt: skip

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        given = [linear(x, weight, bias).unflatten(-1, (heads, -1)) for weight, bias in pairs]
        out = ops.longformer_attention(*given, global_mask=kinds > 0, mask=kinds >= 0, window=window)
        assert isinstance(out, Tensor)
        return out.flatten(2) + none(parameters)

    return compared(golden, run, "x", *names)


@reads("longformer_lra", "longformer_lra_causal")
def longformer_lra(golden: Golden) -> Pairs:
    attend = partial(
        ops.longformer_attention,
        global_mask=golden.tensors["global_mask"].bool(),
        causal=golden.options["causal"],
        window=golden.options["sliding_window_size"],
        released="lra",
    )
    names = [
        f"param.{name}_{kind}.kernel" for kind in ("sliding_window", "global") for name in ("query", "key", "value")
    ]

    def run(x: Tensor, *kernels: Tensor) -> Tensor:
        *projections, out = kernels
        heads = attend(*(project(x, kernel) for kernel in projections))
        return torch.einsum("blhd,hdc->blc", heads, out) + none(kernels)

    return compared(golden, run, "x", *names, "param.out.kernel")
