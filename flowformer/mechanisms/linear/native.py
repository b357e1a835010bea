"""Linear attention by the C++ kernels: :mod:`flowformer.kernels.native.attend` has the equations."""

from __future__ import annotations

from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.run import Checked
from flowformer.kernels.native.attend import attend, attend_step
from flowformer.mechanisms.linear.operation import LinearState

ELU = 2  # of kernels/native/source/call.h


@implements("linear_attention", "native")
def attend_linearly(given: Checked, log_decay: Tensor | None, eps: float) -> tuple[Tensor, LinearState | None]:
    """Either form of linear attention: the output, and the state after it."""
    q, k, v, causal, masks, cu_seqlens, state = given
    keys, memory = (None, None) if state is None else state
    out, keys, memory = attend(
        "linear_attention", q, k, v, masks, feature_map=ELU, log_decay=log_decay, eps=eps, causal=causal, keys=keys,
        memory=memory, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return out, None if keys is None or memory is None else LinearState(keys, memory)


@implements("linear_attention_step", "native")
def step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState, log_decay: Tensor | None, eps: float
) -> tuple[Tensor, LinearState]:
    """Compute one token: the output, and the state after it."""
    out, keys, memory = attend_step(
        q, k, v, feature_map=ELU, log_decay=log_decay, eps=eps, keys=state.key_sum, memory=state.memory
    )
    assert keys is not None
    return out, LinearState(keys, memory)
