"""What AFT is measured against: aft-pytorch, the formula as written, and cumulative sums.

aft-pytorch (Rishabh Anand, MIT licence, https://pypi.org/project/aft-pytorch/ 0.2.2) is bidirectional, and takes
exponentials as they are: it is right for keys of moderate size. Its projections are taken out, so that its attention
alone is timed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.bench.registry import Contender, Function, Inputs, Shape, add_contender
from flowformer.bench.rows.attention import FAMILIES
from flowformer.bench.rows.forms import truth_of, width_refusal
from flowformer.bench.rows.variants import WINDOW, Kind, full_flops
from flowformer.core.checks import CHANNELS


def _unavailable(inputs: Inputs) -> str | None:
    given = inputs[0]
    return width_refusal(CHANNELS, given.k.shape[-1], given.v.shape[-1])


def _add(
    name: str, operation: str, function: Function, form: tuple[str, str], about: str,
    unavailable: Callable[[Inputs], str | None] = _unavailable, **fields: Any,
) -> None:  # fmt: skip
    """Enter a peer that computes the same as a variant of a mechanism, and is given the same learned tensors."""
    truth = truth_of(*form)
    peer = dataclasses.replace(truth, function=function, variant=_without_options(truth.variant))
    only: dict[str, Any] = {"dtypes": (torch.float32,), "unavailable": unavailable}
    add_contender(Contender(name, operation, peer, truth, about, **only, **fields))


@cache
def _without_options(variant: Any) -> Any:
    return dataclasses.replace(variant, options={})


# ---------------------------------------------------------------------------------------------------------- as written


def direct(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *, causal: bool) -> Tensor:
    """AFT-full by equation 2 of the paper, with a tensor (batch, queries, keys, channels)."""
    if causal:
        w = w.masked_fill(torch.ones_like(w, dtype=torch.bool).triu(1), -torch.inf)
    weights = (k.unsqueeze(1) + w.unsqueeze(-1)).exp()
    return q.sigmoid() * (weights * v.unsqueeze(1)).sum(2) / weights.sum(2)


def direct_bytes(shape: Shape, *, training: bool) -> float:
    """Two such tensors of float32, three where gradients flow; a tenth for the rest."""
    one = 4.0 * shape.batch * shape.length**2 * shape.width
    return 1.1 * one * (3 if training else 2)


# ----------------------------------------------------------------------------------------------------- cumulative sums


def _two_cumulative_sums(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    return k.cumsum(1), v.cumsum(1)


def _simple_of_sums(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    weights = k.exp()
    return q.sigmoid() * (weights * v).cumsum(1) / weights.cumsum(1)


def _add_sums(operation: str) -> None:
    _add(
        "aft-simple-cumsum", operation, _simple_of_sums, ("aft_simple", ""),
        "causal AFT-simple by two cumulative sums, of exponentials as they are",
    )  # fmt: skip
    add_contender(
        Contender(
            "cumulative-sums", operation, _two_cumulative_sums, None,
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
    return _unavailable(inputs)


def _add_aft_pytorch(operation: str, kind: Kind) -> None:
    for name, form, fields in (
        ("AFTFull", ("aft_full", ""), {"flops": partial(full_flops, kind=kind)}),
        ("AFTLocal", ("aft_local", f"{WINDOW}-free"), {}),
        ("AFTSimple", ("aft_simple", ""), {}),
    ):
        _add(
            f"aft-pytorch-{form[0].removeprefix('aft_')}", operation, partial(_aft_pytorch, name), form,
            f"{name} of aft-pytorch without its projections", partial(_aft_pytorch_unavailable, name, kind), **fields,
        )  # fmt: skip


def _add_peers(operation: str, kind: Kind) -> None:
    if kind.causal:
        _add_sums(operation)
    else:
        _add_aft_pytorch(operation, kind)
    _add(
        "direct", operation, direct, ("aft_full", ""),
        "AFT-full as written, with a tensor of length x length x channels",
        needs_bytes=partial(direct_bytes, training=kind.training),
    )  # fmt: skip


for _family in FAMILIES:
    if _family.layout is CHANNELS:
        for _name, _kind in _family.operations():
            _add_peers(_name, _kind)
