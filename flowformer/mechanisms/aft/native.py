"""AFT-simple in C++ kernels, as PyTorch operators with gradients, compilation and tracing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowformer.core.backends import adjacent, implements, refuse_second_gradients
from flowformer.core.masks import run_packed
from flowformer.core.run import Checked
from flowformer.kernels.native.arguments import check_channels, check_inputs, check_part, check_whole
from flowformer.kernels.native.kernels import (
    View,
    address,
    contiguous,
    empty_like,
    run,
    view,
)
from flowformer.mechanisms.aft.simple import AFTSimpleState

RUN = 32  # tokens that are summed as floats before they go into sums of doubles


class _AftCall(ctypes.Structure):
    """The structure of source/call.h."""

    _fields_ = (
        *((name, View) for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("key_mask", "query_mask")),
        *((name, ctypes.c_void_p) for name in ("log_weight", "mean", "log_weight_after", "mean_after", "marks")),
        *((name, ctypes.c_void_p) for name in ("grad_log_weight_after", "grad_mean_after")),
        *((name, ctypes.c_void_p) for name in ("grad_log_weight", "grad_mean")),
        *((name, ctypes.c_int64) for name in ("batch", "queries", "keys", "channels", "threads", "run", "half")),
    )


def _call(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, marks: Tensor) -> Any:
    """The call without what only one of the operators has. It holds addresses: what it is made of must live on."""
    return _AftCall(
        q=view(q), k=view(k), v=view(v), key_mask=address(key_mask), query_mask=address(query_mask),
        marks=address(marks), batch=q.shape[0], queries=q.shape[1], keys=k.shape[1], channels=q.shape[2],
        threads=torch.get_num_threads(), run=RUN, half=q.dtype == torch.bfloat16,
    )  # fmt: skip


def _operator(name: str, signature: str) -> Callable[[Any], Any]:
    """Define an operator of PyTorch; the decorated function computes it on the CPU."""
    torch.library.define(f"flowformer::{name}", signature)
    return torch.library.impl(f"flowformer::{name}", "cpu")


def _new_marks(k: Tensor, runs: int) -> Tensor:
    """Memory for the sums that the backward pass starts from, see AftCall."""
    return k.new_empty(k.shape[0], runs + 1, 3, k.shape[2], dtype=torch.float32)


def _new_state(k: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for logarithmic weights and means, or for their gradients."""
    log_weight = k.new_empty(k.shape[0], k.shape[2], dtype=torch.float64)
    return log_weight, torch.empty_like(log_weight)


_TENSORS = "Tensor q, Tensor k, Tensor v"


def _check_causal(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    check_inputs(op, q, k, v, 3, same_length=True)
    check_channels(op, q, v)
    check_part(op, "mask", mask, q.shape[:2], torch.bool, q)


def _check_state(op: str, q: Tensor, of: str, log_weight: Tensor | None, mean: Tensor | None) -> None:
    for name, part in (("log_weight", log_weight), ("mean", mean)):
        check_part(op, of + name, part, (q.shape[0], q.shape[2]), torch.float64, q)


def _check_bidirectional(op: str, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor | None) -> None:
    check_inputs(op, q, k, v, 3, same_length=False)
    check_channels(op, q, v)
    check_part(op, "key_mask", masks[0], k.shape[:2], torch.bool, q)
    check_part(op, "query_mask", masks[1], q.shape[:2], torch.bool, q)


def _check_backward(op: str, q: Tensor, k: Tensor, runs: int, marks: Tensor, grad_out: Tensor) -> None:
    check_part(op, "marks", marks, (k.shape[0], runs + 1, 3, k.shape[2]), torch.float32, q)
    check_part(op, "grad_out", grad_out, q.shape, q.dtype, q)


def _runs(k: Tensor) -> int:
    return -(-k.shape[1] // RUN)


# ----------------------------------------------------------------------------------------------------- the causal form


def _check_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *before: Tensor | None) -> None:
    op = "aft_simple_causal"
    _check_causal(op, q, k, v, mask)
    check_whole(op, log_weight=before[0], mean=before[1])
    _check_state(op, q, "", *before)


@_operator(
    "aft_simple_causal",
    f"({_TENSORS}, Tensor? mask, Tensor? log_weight, Tensor? mean) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _causal(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Any:
    _check_forward(q, k, v, *rest)
    mask, *before = contiguous(*rest)
    out, after, marks = empty_like(q), _new_state(k), _new_marks(k, _runs(k))
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    call = _call(q, k, v, mask, mask, marks)
    call.out = view(out)
    call.log_weight, call.mean = map(address, before)
    call.log_weight_after, call.mean_after = map(address, after)
    run("aft_causal_forward", call)
    return out, *after, marks


@torch.library.register_fake("flowformer::aft_simple_causal")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Any:
    _check_forward(q, k, v, *rest)
    return empty_like(q), *_new_state(k), _new_marks(k, _runs(k))


def _check_causal_backward(q: Tensor, k: Tensor, v: Tensor, mask: Any, marks: Any, grad_out: Any, *rest: Any) -> None:
    op = "aft_simple_causal_backward"
    _check_causal(op, q, k, v, mask)
    _check_backward(op, q, k, _runs(k), marks, grad_out)
    _check_state(op, q, "grad_", *rest)


@_operator(
    "aft_simple_causal_backward",
    f"({_TENSORS}, Tensor? mask, Tensor marks, Tensor grad_out, Tensor? grad_log_weight, Tensor? grad_mean)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _causal_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, marks: Tensor, grad_out: Tensor, *grad_state: Tensor | None
) -> Any:
    _check_causal_backward(q, k, v, mask, marks, grad_out, *grad_state)
    grads, grad_before = tuple(map(empty_like, (q, k, v))), _new_state(k)
    q, k, v, grad_out = map(adjacent, (q, k, v, grad_out))
    mask, *grad_after = contiguous(mask, *grad_state)
    marks = marks.contiguous()
    call = _call(q, k, v, mask, mask, marks)
    call.grad_out = view(grad_out)
    call.grad_q, call.grad_k, call.grad_v = map(view, grads)
    call.grad_log_weight_after, call.grad_mean_after = map(address, grad_after)
    call.grad_log_weight, call.grad_mean = map(address, grad_before)
    run("aft_causal_backward", call)
    return *grads, *grad_before


@torch.library.register_fake("flowformer::aft_simple_causal_backward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Any:
    _check_causal_backward(q, k, v, *rest)
    return *map(empty_like, (q, k, v)), *_new_state(k)


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], output[3])
    ctx.has_state = inputs[4] is not None


def _differentiate_causal(ctx: Any, grad_out: Tensor | None, *grad_state: Tensor | None) -> Any:
    refuse_second_gradients("native")
    q, *saved = ctx.saved_tensors
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    *grads, log_weight, mean = torch.ops.flowformer.aft_simple_causal_backward(q, *saved, grad_out, *grad_state[:2])
    return *grads, None, *((log_weight, mean) if ctx.has_state else (None, None))


# ---------------------------------------------------------------------------------------------- the bidirectional form


@_operator("aft_simple_bidirectional", f"({_TENSORS}, Tensor? key_mask, Tensor? query_mask) -> (Tensor, Tensor)")
def _bidirectional(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_bidirectional("aft_simple_bidirectional", q, k, v, *masks)
    out, marks = empty_like(q), _new_marks(k, 0)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    key_mask, query_mask = contiguous(*masks)
    call = _call(q, k, v, key_mask, query_mask, marks)
    call.out = view(out)
    run("aft_bidirectional_forward", call)
    return out, marks


@torch.library.register_fake("flowformer::aft_simple_bidirectional")
def _(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_bidirectional("aft_simple_bidirectional", q, k, v, *masks)
    return empty_like(q), _new_marks(k, 0)


def _check_bidirectional_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    op = "aft_simple_bidirectional_backward"
    _check_bidirectional(op, q, k, v, *rest[:2])
    _check_backward(op, q, k, 0, *rest[2:])


@_operator(
    "aft_simple_bidirectional_backward",
    f"({_TENSORS}, Tensor? key_mask, Tensor? query_mask, Tensor marks, Tensor grad_out) -> (Tensor, Tensor, Tensor)",
)
def _bidirectional_backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, marks: Tensor, grad_out: Tensor
) -> tuple[Tensor, ...]:
    _check_bidirectional_backward(q, k, v, key_mask, query_mask, marks, grad_out)
    grads = tuple(map(empty_like, (q, k, v)))
    q, k, v, grad_out = map(adjacent, (q, k, v, grad_out))
    key_mask, query_mask = contiguous(key_mask, query_mask)
    marks = marks.contiguous()
    call = _call(q, k, v, key_mask, query_mask, marks)
    call.grad_out = view(grad_out)
    call.grad_q, call.grad_k, call.grad_v = map(view, grads)
    run("aft_bidirectional_backward", call)
    return grads


@torch.library.register_fake("flowformer::aft_simple_bidirectional_backward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    _check_bidirectional_backward(q, k, v, *rest)
    return tuple(map(empty_like, (q, k, v)))


def _keep_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate_bidirectional(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> Any:
    refuse_second_gradients("native")
    if grad_out is None:
        return (None,) * 5
    grads = torch.ops.flowformer.aft_simple_bidirectional_backward(*ctx.saved_tensors, grad_out)
    return *grads, None, None


torch.library.register_autograd("flowformer::aft_simple_causal", _differentiate_causal, setup_context=_keep_causal)
torch.library.register_autograd(
    "flowformer::aft_simple_bidirectional", _differentiate_bidirectional, setup_context=_keep_bidirectional
)


# ------------------------------------------------------------------------------------------ what the operation calls


@implements("aft_simple", "native")
def attend(given: Checked) -> tuple[Tensor, AFTSimpleState | None]:
    """Compute either form of AFT-simple: the output, and the state after it."""
    q, k, v, causal, masks, cu_seqlens, state = given

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        if not causal:
            return torch.ops.flowformer.aft_simple_bidirectional(q, k, v, key, query)[0], None
        before = (None, None) if state is None else state
        out, *after, _ = torch.ops.flowformer.aft_simple_causal(q, k, v, key, *before)
        return out, AFTSimpleState(*after)

    if cu_seqlens is None:
        return dense(q, k, v, *masks, state)
    return run_packed(lambda q, k, v, mask, state: dense(q, k, v, mask, mask, state), (q, k, v), cu_seqlens, state)
