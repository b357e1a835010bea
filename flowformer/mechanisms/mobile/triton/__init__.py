"""Mobile-Attention by the Triton kernels for linear attention: :mod:`flowformer.mechanisms.mobile.by_heads`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.checks import Masks
from flowformer.core.run import Checked
from flowformer.kernels.triton.attend import attend
from flowformer.kernels.triton.operators import check_channels, operator, wants_gradients
from flowformer.mechanisms.mobile.by_heads import attend_among_heads
from flowformer.mechanisms.mobile.operation import MobileState
from flowformer.mechanisms.mobile.options import MobileOptions

implements("mobile_attention", "triton")(functools.partial(attend_among_heads, attend))


@implements("mobile_attention_step", "triton")
def step(
    q: Tensor, k: Tensor, v: Tensor, state: MobileState, options: MobileOptions
) -> tuple[Tensor, MobileState]:  # fmt: skip
    """Compute one token: the output, and the state after it."""
    check_channels("mobile_attention_step", q, v)
    if wants_gradients(q, k, v, *state):  # a sequence of one token: that has a backward pass
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        out, after = attend_among_heads(attend, Checked(q, k, v, True, Masks(None, None), None, state), options)
        assert after is not None
        return out.squeeze(1), after
    out, *parts = torch.ops.flowformer.mobile_step_triton(q, k, v, *state, *values_of(options))
    return out, MobileState(*parts)


def values_of(options: MobileOptions) -> Sequence[Any]:
    """Return the options as the operator takes them."""
    return (
        options.feature_map, options.clamp, options.eps, options.competition, options.allocation, options.normalize,
    )  # fmt: skip


def _fake_step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (v, *rest[:3]))


@operator(
    "mobile_step_triton",
    "Tensor q, Tensor k, Tensor v, Tensor length, Tensor log_normaliser, Tensor memory, "
    "str feature_map, float? clamp, float eps, str? competition, bool allocation, bool normalize",
    _fake_step,
    4,
)
def _step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    from flowformer.mechanisms.mobile.triton.step import run_step

    return run_step(q, k, v, rest[0], rest[1], rest[2], MobileOptions(*rest[3:]))
