"""Linear attention by Triton kernels: :mod:`flowformer.kernels.triton.linear` has the equations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.checks import Masks
from flowformer.core.masks import run_packed
from flowformer.core.run import Checked
from flowformer.kernels.triton.attend import attend
from flowformer.mechanisms.linear.operation import LinearState, init_linear_state, step_in_torch

ELU = 2  # of kernels/triton/device.py

implements("linear_attention_step", "triton")(step_in_torch)  # one token is little work


@implements("linear_attention", "triton")
def attend_linearly(given: Checked, log_decay: Tensor | None, eps: float) -> tuple[Tensor, LinearState | None]:
    """Either form of linear attention: the output, and the state after it."""
    q, k, v, causal, masks, cu_seqlens, state = given
    if causal and state is None:
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = init_linear_state(sequences, q.shape[2], q.shape[3], v.shape[3], device=q.device)
    if cu_seqlens is None:
        return _dense(q, k, v, masks, state, log_decay, eps)
    of_tokens = (log_decay,) if log_decay is not None and log_decay.ndim == 3 else ()

    def padded(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Any]:
        *decays, mask, state = rest
        return _dense(q, k, v, Masks(mask, mask), state, decays[0] if decays else log_decay, eps)

    return run_packed(padded, (q, k, v, *of_tokens), cu_seqlens, state)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, state: LinearState | None, log_decay: Tensor | None, eps: float
) -> tuple[Tensor, LinearState | None]:
    options = {"feature_map": ELU, "log_decay": log_decay, "eps": eps}
    if state is None:
        return attend("linear_attention", q, k, v, masks, **options)[0], None
    out, keys, memory = attend(
        "linear_attention", q, k, v, masks, causal=True, keys=state.key_sum, memory=state.memory, **options
    )
    assert keys is not None
    assert memory is not None
    return out, LinearState(keys, memory)
