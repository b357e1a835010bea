"""Nystromformer of the authors' repository, and of the package nystrom-attention."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads


@reads("nystromformer", "nystromformer_conv_padding")
def nystromformer(golden: Golden) -> Pairs:
    options = golden.options
    attend = partial(
        ops.nystromformer_attention, mask=golden.tensors["key_mask"].bool(), num_landmarks=options["num_landmarks"],
        iterations=options["pinv_iterations"], segments="positions", start="batch",
    )  # fmt: skip
    width = options["conv_kernel_size"]
    if width is None:
        return compared(golden, attend, "q", "k", "v")

    def with_conv(q: Tensor, k: Tensor, v: Tensor, conv: Tensor) -> Tensor:
        return attend(q, k, v, conv[:, 0, :, 0], value_conv=width)

    return compared(golden, with_conv, "q", "k", "v", "param.conv")


@reads("nystrom_attention_module")
def nystrom_attention(golden: Golden) -> Pairs:
    options = golden.options

    def attend(x: Tensor, qkv: Tensor, conv: Tensor, out: Tensor, bias: Tensor) -> Tensor:
        q, k, v = ((x @ qkv.T).unflatten(-1, (3, options["heads"], -1))).unbind(2)
        attended = ops.nystromformer_attention(
            q, k, v, conv[:, 0, :, 0], mask=golden.tensors["key_mask"].bool(), num_landmarks=options["num_landmarks"],
            iterations=options["pinv_iterations"], value_conv=options["residual_conv_kernel"], segments="front",
            start="batch",
        )  # fmt: skip
        return attended.flatten(2) @ out.T + bias

    weights = ("to_qkv.weight", "res_conv.weight", "to_out.0.weight", "to_out.0.bias")
    return compared(golden, attend, "x", *(f"param.{name}" for name in weights))
