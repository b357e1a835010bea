"""Linformer of the linformer package, of Long Range Arena and of Nystromformer's repository."""

from __future__ import annotations

from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


@reads("linformer")
def linformer(golden: Golden) -> Pairs:
    heads = golden.options["heads"]

    def attend(
        x: Tensor, E: Tensor, F: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, out: Tensor, bias: Tensor
    ) -> Tensor:
        q, k, v = (split(x @ weight.T, heads) for weight in (to_q, to_k, to_v))
        return ops.linformer_attention(q, k, v, (E.T, F.T)).flatten(2) @ out.T + bias

    weights = ("proj_k", "proj_v", "to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight", "to_out.bias")
    return compared(golden, attend, "x", *(f"param.{name}" for name in weights))


@reads("linformer_share_kv")
def linformer_share_kv(golden: Golden) -> Pairs:
    heads = golden.options["heads"]

    def attend(x: Tensor, E: Tensor, to_q: Tensor, to_k: Tensor, out: Tensor, bias: Tensor) -> Tensor:
        k = (x @ to_k.T).unsqueeze(2).expand(-1, -1, heads, -1)  # one head of keys, which are the values too
        return ops.linformer_attention(split(x @ to_q.T, heads), k, k, E.T).flatten(2) @ out.T + bias

    weights = ("proj_k", "to_q.weight", "to_k.weight", "to_out.weight", "to_out.bias")
    return compared(golden, attend, "x", *(f"param.{name}" for name in weights))


@reads("linformer_lra")
def linformer_lra(golden: Golden) -> Pairs:
    def attend(x: Tensor, E: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
        q, k, v = ((x @ kernel.flatten(1)).unflatten(-1, kernel.shape[1:]) for kernel in (query, key, value))
        return ops.linformer_attention(q, k, v, E.T).flatten(2) @ out.flatten(0, 1)

    weights = ("lr_kernel", "query.kernel", "key.kernel", "value.kernel", "out.kernel")
    return compared(golden, attend, "x", *(f"param.{name}" for name in weights))


@reads("linformer_per_head")
def linformer_per_head(golden: Golden) -> Pairs:
    real = golden.tensors["key_mask"].bool()

    def attend(q: Tensor, k: Tensor, v: Tensor, E: Tensor) -> Tensor:
        return ops.linformer_attention(q, k, v, E, context_mask=real)  # padded queries have outputs there

    return compared(golden, attend, "q", "k", "v", "param.E")
