"""Performer: performer-pytorch, Long Range Arena and Nystromformer's code."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads


def _attend(golden: Golden, **options: Any) -> Pairs:
    projection = golden.tensors.get("random.projection")
    return compared(
        golden, lambda q, k, v: ops.performer_attention(q, k, v, projection, causal=causal_of(golden), **options),
        "q", "k", "v",
    )  # fmt: skip


def causal_of(golden: Golden) -> bool:
    return golden.options["causal"]


@reads("performer_softmax", "performer_softmax_causal")
def softmax(golden: Golden) -> Pairs:
    given = golden.options
    return _attend(golden, eps=given["eps"], sum_eps=given.get("denominator_eps", 0.0), detach=True, maximum="all")


@reads("performer_relu", "performer_relu_causal")
def relu(golden: Golden) -> Pairs:
    given = golden.options
    return _attend(golden, kernel="relu", eps=given["kernel_epsilon"], sum_eps=given.get("denominator_eps", 0.0))


@reads("performer_lra_softmax", "performer_lra_softmax_causal")
def lra_softmax(golden: Golden) -> Pairs:
    given = golden.options
    return _attend(golden, eps=given["eps"], least=given["numerical_stabilizer"], maximum="all")


@reads("performer_lra_relu", "performer_lra_relu_causal")
def lra_relu(golden: Golden) -> Pairs:
    given = golden.options
    return _attend(
        golden, kernel="relu", projected=False, scale=1.0, eps=given["kernel_epsilon"],
        least=given["numerical_stabilizer"],
    )  # fmt: skip


@reads("performer_mlpen")
def mlpen(golden: Golden) -> Pairs:
    """The softmax kernel although the option says relu; padded keys and values are zeros, which are attended to."""
    mask = golden.tensors["key_mask"][..., None, None]
    attend = partial(ops.performer_attention, scale=golden.tensors["q"].shape[-1] ** -0.5, detach=True)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, mask * k, mask * v, golden.tensors["random.projection"])

    return compared(golden, masked, "q", "k", "v")
