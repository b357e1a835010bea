"""What mechanisms with heads are measured against: softmax attention of PyTorch, the published formulas."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flowformer.bench.registry import Contender, Inputs, Shape, add_contender
from flowformer.bench.rows import published
from flowformer.bench.rows.attention import FAMILIES
from flowformer.bench.rows.forms import has_heads, truth_of
from flowformer.bench.rows.variants import Kind, linear_flops, softmax_flops

HALVES = (torch.bfloat16, torch.float16)

# ---------------------------------------------------------------------------------------------------------------- SDPA


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """PyTorch's fused softmax attention, in our layout."""
    Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(Q, K, V, is_causal=causal).transpose(1, 2)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """The same by PyTorch's FlashAttention kernel, and by nothing else."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, causal=causal)


def _flash_unavailable(inputs: Inputs) -> str | None:
    if inputs[0].k.shape[-1] != inputs[0].v.shape[-1]:
        return "FlashAttention takes values as wide as keys: --channels and --value-channels must be equal"
    return None


def _add_sdpa(operation: str, kind: Kind) -> None:
    about = "torch scaled_dot_product_attention"
    forms: tuple[tuple[str, Any, str, dict[str, Any]], ...] = (
        ("sdpa", sdpa, about, {}),
        ("sdpa-bf16", sdpa, about, {"dtype": torch.bfloat16, "dtypes": (torch.bfloat16,)}),
        (
            "sdpa-flash", sdpa_flash, f"{about} by FlashAttention alone",
            {"dtype": torch.bfloat16, "dtypes": HALVES, "device": "cuda", "unavailable": _flash_unavailable},
        ),
    )  # fmt: skip
    for name, function, words, fields in forms:
        add_contender(
            Contender(
                name, operation, function, truth_of("softmax"), words, layout="heads-first",  # it would copy others
                flops=partial(softmax_flops, kind=kind), **fields,
            )
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- flash-linear-attention


def fla_linear(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Causal linear attention of flash-linear-attention, in Triton, on the features elu + 1 of ours."""
    chunked = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    q, k = (x.clamp(max=0).exp() + x.relu() for x in (q, k))
    return chunked(q, k, v, normalize=True)[0]


def fla_missing() -> str | None:
    """Why there is no flash-linear-attention here, or ``None``. It fails in several ways on a Triton it is not for."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    try:
        importlib.import_module("fla.ops.linear_attn")
    except Exception as error:
        return f"flash-linear-attention cannot be imported: {type(error).__name__}: {str(error)[:200]}"
    return None


def _add_fla(operation: str, kind: Kind) -> None:
    add_contender(
        Contender(
            "fla-linear", operation, fla_linear, truth_of("linear"),
            "chunk_linear_attn of flash-linear-attention, behind our feature map", dtype=torch.bfloat16, dtypes=HALVES,
            device="cuda", flops=partial(linear_flops, kind=kind), unavailable=lambda inputs: fla_missing(),
        )
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- published


def _published_bytes(shape: Shape, *, training: bool) -> float:
    """Two tensors (batch, heads, length, K, V) of float32, four where gradients flow; a tenth for the rest."""
    one = 4.0 * shape.batch * shape.heads * shape.length * shape.channels * shape.value_channels
    return 1.1 * one * (4 if training else 2)


def _add_published(operation: str, kind: Kind) -> None:
    needs: dict[str, Any] = {"needs_bytes": partial(_published_bytes, training=kind.training)} if kind.causal else {}
    add_contender(
        Contender(
            "published", operation, published.flow_attention, truth_of("flow"),
            "the published formulas of Flow-Attention, as written", dtypes=(torch.float32,), **needs,
        )
    )  # fmt: skip


for _family in FAMILIES:
    if has_heads(_family.layout):
        for _name, _kind in _family.operations():
            _add_sdpa(_name, _kind)
            if _kind.causal:
                _add_fla(_name, _kind)
            _add_published(_name, _kind)
