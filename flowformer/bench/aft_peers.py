"""What AFT is measured against: aft-pytorch, the formula as written, and cumulative sums.

aft-pytorch (Rishabh Anand, MIT licence, https://pypi.org/project/aft-pytorch/ 0.2.2) is bidirectional, and takes
exponentials as they are: it is right for keys of moderate size. Its projections are taken out, so that its attention
alone is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.bench.aft import (
    OPERATIONS,
    TRUTHS,
    WINDOW,
    Form,
    Given,
    Kind,
    add,
    full_flops,
    unavailable,
)
from flowformer.bench.registry import Contender, Inputs, Shape, add_contender

# ---------------------------------------------------------------------------------------------------------- as written


def direct(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *, causal: bool) -> Tensor:
    """AFT-full by equation 2 of the paper, with a tensor (batch, queries, keys, channels)."""
    if causal:
        w = w.masked_fill(torch.ones_like(w, dtype=torch.bool).triu(1), -torch.inf)
    weights = (k.unsqueeze(1) + w.unsqueeze(-1)).exp()
    return q.sigmoid() * (weights * v.unsqueeze(1)).sum(2) / weights.sum(2)


def _direct_bytes(shape: Shape, *, training: bool) -> float:
    """Two such tensors of float32, three where gradients flow; a tenth for the rest."""
    one = 4.0 * shape.batch * shape.length**2 * shape.heads * shape.channels
    return 1.1 * one * (3 if training else 2)


# ----------------------------------------------------------------------------------------------------- cumulative sums


def _two_cumulative_sums(k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    return k.cumsum(1), v.cumsum(1)


def _take_keys_and_values(given: Given) -> tuple[Tensor, ...]:
    return given.k, given.v


def _simple_of_sums(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    weights = k.exp()
    return q.sigmoid() * (weights * v).cumsum(1) / weights.cumsum(1)


def _add_sums(operation: str) -> None:
    add(
        "aft-simple-cumsum", operation, _simple_of_sums, "simple",
        "causal AFT-simple by two cumulative sums, of exponentials as they are",
    )  # fmt: skip
    add_contender(
        Contender(
            "cumulative-sums", operation, Form(_two_cumulative_sums, _take_keys_and_values), None,
            "torch.cumsum of k and of v: no AFT, a yardstick", unchecked="no AFT, a yardstick",
        )
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- aft-pytorch


class _Given(nn.Module):
    """Stands where a projection was, and returns what it is given."""

    tensor: Tensor

    def forward(self, _: Tensor) -> Tensor:
        """Whatever the input."""
        return self.tensor


@lru_cache(maxsize=8)
def _module(name: str, channels: int) -> Any:
    kind = getattr(importlib.import_module("aft_pytorch"), name)
    # Its bias is replaced: one of a single place costs nothing.
    module = kind(1, channels, channels, **({"s": WINDOW} if name == "AFTLocal" else {}))
    module.to_q, module.to_k, module.to_v, module.project = _Given(), _Given(), _Given(), nn.Identity()
    return module


def _aft_pytorch(name: str, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, causal: bool) -> Tensor:
    module = _module(name, q.shape[-1])
    module.to_q.tensor, module.to_k.tensor, module.to_v.tensor = q, k, v
    if bias:
        module.max_seqlen = len(bias[0])
        del module.wbias  # a parameter, which AFTLocal replaces by another one in every call
        module.wbias = bias[0]
    return module(q)


def _aft_pytorch_unavailable(name: str, kind: Kind, inputs: Inputs) -> str | None:
    if importlib.util.find_spec("aft_pytorch") is None:
        return "aft-pytorch is not installed"
    if name == "AFTLocal" and kind.training:
        return "aft-pytorch copies the bias of AFTLocal in every call, so no gradient reaches it"
    return unavailable(inputs)


def _add_aft_pytorch(operation: str, kind: Kind) -> None:
    for name, form, fields in (
        ("AFTFull", "full", {"flops": partial(full_flops, kind=kind)}),
        ("AFTLocal", "local-free", {}),
        ("AFTSimple", "simple", {}),
    ):
        add(
            f"aft-pytorch-{form.removesuffix('-free')}", operation, partial(_aft_pytorch, name), form,
            f"{name} of aft-pytorch without its projections",
            unavailable=partial(_aft_pytorch_unavailable, name, kind), **fields,
        )  # fmt: skip


def _add_peers(operation: str, kind: Kind) -> None:
    if kind.causal:
        _add_sums(operation)
    else:
        _add_aft_pytorch(operation, kind)
    add(
        "direct", operation, direct, "full", "AFT-full as written, with a tensor of length x length x channels",
        needs_bytes=partial(_direct_bytes, training=kind.training),
    )  # fmt: skip


if TRUTHS:
    for _name, _kind in OPERATIONS.items():
        _add_peers(_name, Kind(*_kind))
