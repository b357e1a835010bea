"""SOFT of the authors' repository, as of 2021 and since 2022; images."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads


def attend(golden: Golden, **form: object) -> Pairs:
    options = golden.options
    size, width = (options["height"], options["width"]), options["conv_size"]
    attention = partial(ops.soft_attention, iterations=options["max_iter"], value_conv=width, **form)

    def run(q: Tensor, v: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, *conv: Tensor) -> Tensor:
        q, v = (x.unflatten(1, size) for x in (q, v))
        return attention(q, q, v, (weight, scale, offset), *(one.squeeze(1) for one in conv)).flatten(1, 2)

    weights = ["Qlandmark_op.weight", "Qnorm_act.0.weight", "Qnorm_act.0.bias", *(["conv.weight"] if width else [])]
    return compared(golden, run, "q", "v", *(f"param.{name}" for name in weights))


@reads("soft_2021", "soft_2021_conv")
def soft_2021(golden: Golden) -> Pairs:
    return attend(golden, ridge=0.0, start="batch")


@reads("soft", "soft_conv")
def soft(golden: Golden) -> Pairs:
    return attend(golden, gradient="released")
