"""What mechanisms with heads are measured against: softmax attention of PyTorch, the published formulas, Performer."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowformer.bench.registry import Contender, Inputs, Shape, add_contender
from flowformer.bench.rows import published
from flowformer.bench.rows.attention import FAMILIES
from flowformer.bench.rows.forms import has_heads, truth_of
from flowformer.bench.rows.variants import Kind, softmax_flops

# ---------------------------------------------------------------------------------------------------------------- SDPA


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """PyTorch's fused softmax attention, in our layout."""
    Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(Q, K, V, is_causal=causal).transpose(1, 2)


def _add_sdpa(operation: str, kind: Kind) -> None:
    for name, dtype in (("sdpa", torch.float32), ("sdpa-bf16", torch.bfloat16)):
        add_contender(
            Contender(
                name, operation, sdpa, truth_of("softmax"), "torch scaled_dot_product_attention", dtype=dtype,
                layout="heads-first",  # its own: it would copy others
                flops=partial(softmax_flops, kind=kind),
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
            "the published formulas of Flow-Attention, as written", **needs,
        )
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- Performer


@lru_cache(maxsize=8)
def _performer_module(channels: int, causal: bool) -> Any:
    module = importlib.import_module("performer_pytorch")
    torch.manual_seed(0)  # its random features
    return module.FastAttention(dim_heads=channels, causal=causal)


def _performer(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    return _performer_module(q.shape[-1], causal)(*tensors).transpose(1, 2)


def _performer_unavailable(inputs: Inputs) -> str | None:
    if importlib.util.find_spec("performer_pytorch") is None:
        return "performer-pytorch is not installed"
    return None


def _add_performer(operation: str) -> None:
    add_contender(
        Contender(
            "performer-pytorch", operation, _performer, None, "FastAttention, an approximation of softmax",
            layout="heads-first", unavailable=_performer_unavailable,
        )
    )  # fmt: skip


for _family in FAMILIES:
    if has_heads(_family.layout):
        for _name, _kind in _family.operations():
            _add_sdpa(_name, _kind)
            _add_published(_name, _kind)
            _add_performer(_name)
