"""Linear attention by Triton kernels: :mod:`flowformer.kernels.triton.linear` has the equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.checks import Masks
from flowformer.core.masks import run_packed
from flowformer.core.run import Checked
from flowformer.kernels.triton.attend import attend
from flowformer.kernels.triton.operators import check_channels, operator, wants_gradients
from flowformer.mechanisms.linear.operation import LinearState, init_linear_state

ELU = 2  # of kernels/triton/device.py


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


@implements("linear_attention_step", "triton")
def step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState, log_decay: Tensor | None, eps: float
) -> tuple[Tensor, LinearState]:
    """Compute one token: the output, and the state after it."""
    check_channels("linear_attention_step", q, v)
    if wants_gradients(q, k, v, log_decay, *state):  # a sequence of one token: that has a backward pass
        if log_decay is not None and log_decay.ndim == 2:
            log_decay = log_decay.unsqueeze(1)
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        out, after = _dense(q, k, v, Masks(None, None), state, log_decay, eps)
        assert after is not None
        return out.squeeze(1), after
    out, *sums = torch.ops.flowformer.linear_step_triton(q, k, v, log_decay, *state, eps)
    return out, LinearState(*sums)


def _fake_step(q: Tensor, k: Tensor, v: Tensor, _: Any, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (v, *rest[:2]))


@operator(
    "linear_step_triton",
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor key_sum, Tensor memory, float eps",
    _fake_step,
    3,
)
def _step(*given: Any) -> Any:
    from flowformer.mechanisms.linear.triton.step import run_step

    return run_step(*given)
