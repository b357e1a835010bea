"""Memory-efficient cross-entropy over a large vocabulary.

The scores of 2,048 tokens over the 267,735 words of WikiText-103 are 2.2 GB in float32, their gradient as much again.
Here a chunk of tokens is scored at a time, and again in the backward pass: what is kept is one number per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flowformer.core.checks import describe
from flowformer.core.precision import is_autocasting
from flowformer.core.tracing import is_transformed, may_look

# Scores held at a time: 64 MiB in float32. Over 267,735 words a chunk is 62 tokens, enough for a matrix product.
CHUNK_SCORES = 2**24

TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def cross_entropy(
    hidden: Tensor,
    head: Tensor | nn.Module,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_scores: int = CHUNK_SCORES,
) -> Tensor:
    """Compute ``cross_entropy(head(hidden), targets)`` without storing (tokens x vocabulary) logits.

    Loss and gradients are exact: only the order of sums differs. Scores are summed in float32 where the inputs are of
    lower precision. Under autocast the products are in its dtype, as those of a linear layer.

    Args:
        hidden: (..., dim).
        head: Its weight (vocabulary, dim), which is that of the embedding where both are one; or a layer, which is
            called, for chunks of tokens that are computed again in the backward pass. A layer that is nothing but a
            weight is faster as the weight.
        targets: (...), integers below the vocabulary, or ``ignore_index``.
        ignore_index: Target of tokens that do not count.
        reduction: ``"mean"`` over the tokens that count (0 where none does), ``"sum"``, or ``"none"``.
        chunk_scores: Scores held at a time; those of one token at least.

    Returns:
        The loss: a number, or with ``"none"`` the loss of each token, (...), 0 where it does not count.

    Raises:
        TypeError, ValueError: for invalid input.
    """
    _check(hidden, targets, reduction, chunk_scores)
    flat = targets.flatten().to(torch.int64)
    if isinstance(head, Tensor):
        losses = _by_weight(hidden, head, flat, ignore_index, chunk_scores)
    else:
        losses = _by_layer(hidden.flatten(0, -2), head, flat, ignore_index, chunk_scores)
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (flat != ignore_index).sum().clamp(min=1)


def _by_weight(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_scores: int) -> Tensor:
    """The losses (tokens,) of targets (tokens,)."""
    _check_weight(hidden, weight)
    check_tokens("targets", targets, weight.shape[0], ignore_index)
    if is_autocasting(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if is_transformed():  # torch.func has no use for what is kept for a backward pass
        scores = _scores(hidden.flatten(0, -2), weight)
        return nn.functional.cross_entropy(scores, targets, ignore_index=ignore_index, reduction="none")
    chunk = max(1, chunk_scores // weight.shape[0])
    return _CrossEntropy.apply(hidden.flatten(0, -2), weight, targets, ignore_index, chunk)


def _by_layer(hidden: Tensor, head: nn.Module, targets: Tensor, ignore_index: int, chunk_scores: int) -> Tensor:
    """The same by calls of the head: of a quantized layer, one around another, or one whose hooks gather its weight."""

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        scores = head(hidden)
        check_tokens("targets", targets, scores.shape[-1], ignore_index)
        return nn.functional.cross_entropy(_widen(scores), targets, ignore_index=ignore_index, reduction="none")

    vocabulary = getattr(head, "out_features", None)
    chunk = len(hidden) if vocabulary is None else max(1, chunk_scores // vocabulary)
    if chunk >= len(hidden):
        return losses(hidden, targets)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(losses, *pair, use_reentrant=False) for pair in pairs])


class _CrossEntropy(torch.autograd.Function):
    """The loss of each token; for the backward pass log sum exp of its scores is kept, and they are made again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int) -> Tensor:
        normalisers, losses = [], []
        for some, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            scores = _scores(some, weight)
            normaliser = scores.logsumexp(-1)
            ignored = wanted == ignore_index
            own = scores.gather(-1, wanted.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
            normalisers.append(normaliser)
            losses.append((normaliser - own).masked_fill(ignored, 0))
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalisers))
        ctx.ignore_index, ctx.chunk = ignore_index, chunk
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the argument's name
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, normalisers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # One sum for all chunks, in the precision of the scores.
        grad_weight = torch.zeros_like(weight, dtype=normalisers.dtype)
        columns = (hidden, grad_hidden, targets, normalisers, grads[0])
        for some, grad_some, wanted, normaliser, grad in zip(*(c.split(ctx.chunk) for c in columns), strict=True):
            grad_scores = _grad_scores(_scores(some, weight), wanted, normaliser, grad, ctx.ignore_index)
            grad_scores = grad_scores.to(weight.dtype)
            torch.mm(grad_scores, weight, out=grad_some)
            if grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(grad_scores.T, some)
            else:
                grad_weight += grad_scores.T @ some
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _scores(hidden: Tensor, weight: Tensor) -> Tensor:
    return _widen(hidden @ weight.T)


def _widen(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _grad_scores(scores: Tensor, targets: Tensor, normaliser: Tensor, grad: Tensor, ignore_index: int) -> Tensor:
    """softmax(scores) - one_hot(targets), times the gradient of each token's loss; in the place of the scores."""
    ignored = targets == ignore_index
    # A token without a finite loss that does not count must not make its gradient NaN: 0 x NaN is NaN.
    probabilities = scores.sub_(normaliser.unsqueeze(-1)).exp_()
    own = targets.masked_fill(ignored, 0).unsqueeze(-1)
    probabilities.scatter_add_(-1, own, probabilities.new_full((1, 1), -1).expand(own.shape))
    return probabilities.mul_(grad.unsqueeze(-1)).masked_fill_(ignored.unsqueeze(-1), 0)


def _check_weight(hidden: Tensor, weight: Tensor) -> None:
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden must be (..., dim) and weight (vocabulary, dim), got {describe(hidden)} and {describe(weight)}"
        )
    if hidden.dtype != weight.dtype and not is_autocasting(hidden.device):
        raise TypeError(f"hidden and weight must have the same dtype, got {hidden.dtype} and {weight.dtype}")


def _check(hidden: Tensor, targets: Tensor, reduction: str, scores: int) -> None:
    for name, tensor in (("hidden", hidden), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
    if hidden.ndim < 2:
        raise ValueError(f"hidden must be (..., dim), got {describe(hidden)}")
    if targets.dtype not in TOKEN_DTYPES:
        raise TypeError(f"targets must be integers, got {describe(targets)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must be {tuple(hidden.shape[:-1])} like hidden, got {describe(targets)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if scores < 1:
        raise ValueError(f"chunk_scores must be positive, got {scores}")


def weight_or_layer(layer: nn.Module) -> Tensor | nn.Module:
    """Return the weight of a layer that is nothing but its weight, else the layer, which is to be called.

    A layer that was replaced or wrapped need not have a weight, and one with hooks (FSDP, tensor parallel, offloading)
    may have it only while it is called.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    forward = getattr(layer.forward, "__func__", None)  # of an instance's own it is not a class's
    if forward not in (nn.Linear.forward, nn.Embedding.forward) or any(getattr(layer, name) for name in hooks):
        return layer
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    return weight if isinstance(weight, Tensor) and bias is None else layer


def check_tokens(what: str, tokens: Tensor, vocabulary: int, ignore_index: int | None = None) -> None:
    """Raise ValueError for tokens beyond the vocabulary; on the CPU only, since it would synchronise a GPU.

    Raises:
        ValueError: naming the vocabulary and the token.
    """
    if not may_look(tokens) or not tokens.numel():
        return
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if ignore_index is not None:
        wrong &= tokens != ignore_index
    if wrong.any():
        extra = "" if ignore_index is None else f", or {ignore_index}"
        raise ValueError(f"{what} must be from 0 to {vocabulary - 1}{extra}, got {int(tokens[wrong][0])}")
