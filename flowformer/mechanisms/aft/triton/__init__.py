"""AFT-simple by Triton kernels: what the operation calls, and the operators of PyTorch that run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import implements, refuse_second_gradients
from flowformer.core.checks import Masks
from flowformer.core.masks import fill, run_packed
from flowformer.core.precision import no_autocast, sum_dtype
from flowformer.core.run import Checked
from flowformer.kernels.triton.operators import operator, wants_gradients, with_adjacent_channels
from flowformer.mechanisms.aft.simple import AFTSimpleState

CHUNK = 32  # tokens that a thread walks through


@implements("aft_simple", "triton")
def attend(given: Checked) -> tuple[Tensor, AFTSimpleState | None]:
    """Either form of AFT-simple: the output, and the state after it."""
    q, k, v, causal, masks, cu_seqlens, state = given

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        if not causal:
            return _gated(q, torch.ops.flowformer.aft_means_triton(k, v, key)[1], query), None
        before = (None, None) if state is None else state
        out, *after, _ = torch.ops.flowformer.aft_causal_triton(q, k, v, key, *before)
        return out, AFTSimpleState(*after)

    if cu_seqlens is None:
        return dense(q, k, v, *masks, state)
    return run_packed(lambda q, k, v, mask, state: dense(q, k, v, mask, mask, state), (q, k, v), cu_seqlens, state)


@implements("aft_simple_step", "triton")
def step(q: Tensor, k: Tensor, v: Tensor, state: AFTSimpleState) -> tuple[Tensor, AFTSimpleState]:
    """Compute one token: the output, and the state after it."""
    if wants_gradients(q, k, v, *state):  # a sequence of one token: that has a backward pass
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        out, after = attend(Checked(q, k, v, True, Masks(None, None), None, state))
        assert after is not None
        return out.squeeze(1), after
    out, *parts = torch.ops.flowformer.aft_step_triton(q, k, v, *state)
    return out, AFTSimpleState(*parts)


def _gated(q: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    with no_autocast(q.device):
        gate = fill(q, mask).to(sum_dtype(q.dtype)).sigmoid()
        return fill((gate * mean.to(gate.dtype).unsqueeze(1)).to(q.dtype), mask)


def _new_state(k: Tensor) -> tuple[Tensor, Tensor]:
    one, other = (k.new_empty(k.shape[0], k.shape[2], dtype=torch.float64) for _ in range(2))
    return one, other


def _chunk_of(k: Tensor) -> int:
    return CHUNK if k.shape[1] > 1 else 1  # a step with gradients is a sequence of one token


def _new_marks(k: Tensor) -> Tensor:
    return k.new_empty(k.shape[0], -(-k.shape[1] // CHUNK) + 1, 3, k.shape[2], dtype=torch.float32)


def _fake_step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, *state))


@operator("aft_step_triton", "Tensor q, Tensor k, Tensor v, Tensor log_weight, Tensor mean", _fake_step, 3)
def _step(*given: Tensor) -> Any:
    from flowformer.mechanisms.aft.triton.step import run_step

    return run_step(*given)


# ------------------------------------------------------------------------------------------------------------- causal

_CAUSAL = "Tensor q, Tensor k, Tensor v, Tensor? mask"


def _fake_causal(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), *_new_state(k), _new_marks(k)


@operator("aft_causal_triton", f"{_CAUSAL}, Tensor? log_weight, Tensor? mean", _fake_causal, 4)
def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *before: Tensor | None) -> Any:
    from flowformer.mechanisms.aft.triton import walk

    q, k, v = with_adjacent_channels(q, k, v)
    return walk.causal_forward(walk.Form(k, v, mask, _chunk_of(k)), q, *before)


def _fake_causal_backward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), *_new_state(k)


@operator(
    "aft_causal_triton_backward",
    f"{_CAUSAL}, Tensor marks, Tensor grad_out, Tensor? grad_log_weight, Tensor? grad_mean",
    _fake_causal_backward,
    5,
)
def _causal_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, marks: Tensor, grad_out: Tensor, *grad_state: Tensor | None
) -> Any:
    from flowformer.mechanisms.aft.triton import walk

    q, k, v, grad_out = with_adjacent_channels(q, k, v, grad_out)
    return walk.causal_backward(walk.Form(k, v, mask, _chunk_of(k)), q, marks, grad_out, *grad_state)


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], output[3])
    ctx.mark_non_differentiable(output[3])
    ctx.has_state = inputs[4] is not None


def _differentiate_causal(ctx: Any, grad_out: Tensor | None, *grad_state: Tensor | None) -> Any:
    refuse_second_gradients("Triton")
    q, *saved = ctx.saved_tensors
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    *grads, log_weight, mean = torch.ops.flowformer.aft_causal_triton_backward(q, *saved, grad_out, *grad_state[:2])
    return *grads, None, *((log_weight, mean) if ctx.has_state else (None, None))


# -------------------------------------------------------------------------------------------------------- bidirectional


def _fake_means(k: Tensor, v: Tensor, _: Any) -> tuple[Tensor, ...]:
    return *_new_state(k), _new_marks(k)


@operator("aft_means_triton", "Tensor k, Tensor v, Tensor? mask", _fake_means, 3)
def _means(k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
    from flowformer.mechanisms.aft.triton import walk

    k, v = with_adjacent_channels(k, v)
    marks, after = walk.Form(k, v, mask, _chunk_of(k)).sum(None, None)
    return *after, marks


def _fake_means_backward(k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@operator(
    "aft_means_triton_backward",
    "Tensor k, Tensor v, Tensor? mask, Tensor marks, Tensor grad_log_weight, Tensor grad_mean",
    _fake_means_backward,
    2,
)
def _means_backward(k: Tensor, v: Tensor, mask: Tensor | None, *rest: Tensor) -> Any:
    from flowformer.mechanisms.aft.triton import walk

    k, v = with_adjacent_channels(k, v)
    return walk.means_backward(walk.Form(k, v, mask, _chunk_of(k)), *rest)


def _keep_means(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate_means(ctx: Any, *grads: Tensor) -> Any:
    refuse_second_gradients("Triton")
    return *torch.ops.flowformer.aft_means_triton_backward(*ctx.saved_tensors, *grads[:2]), None


torch.library.register_autograd("flowformer::aft_causal_triton", _differentiate_causal, setup_context=_keep_causal)
torch.library.register_autograd("flowformer::aft_means_triton", _differentiate_means, setup_context=_keep_means)
