"""What a graph that is traced needs: whether one is, and operations that hold for any length.

A traced graph is bound to what Python found out while it was traced: the number of turns of a loop, whether a length is
divisible, whether a slice reaches the end. Where a graph is exported, the functions here do by index what slices,
padding and loops do elsewhere, so that one program serves every length and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowformer.core.precision import LOG_ZERO

DOUBLINGS = 24  # of a running combination: enough for 2^24 pieces


def is_traced() -> bool:
    """Return whether a graph is traced (torch.compile, torch.export, torch.jit.trace): no value may be looked at."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is active: they require plain PyTorch operations."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def may_look(x: Tensor) -> bool:
    """Return whether values of ``x`` may be looked at to find a shorter way, or a fault.

    Not in a traced graph or where torch.func is active, nor on a GPU: looking at a value of a GPU's makes Python wait
    for all that it was asked to compute before.
    """
    return x.device.type == "cpu" and not is_traced() and not is_transformed()


def is_exporting() -> bool:
    """Return whether the graph that is traced has to hold for other sizes, and without this package."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def cut(x: Tensor, length: int) -> Tensor:
    """Return the first ``length`` tokens of (batch, tokens, ...)."""
    return x.index_select(1, torch.arange(length, device=x.device)) if is_exporting() else x[:, :length]


def shift(x: Tensor, first: float, by: int = 1, dim: int = 2) -> Tensor:
    """Move what is in x along an axis ``by`` places on; the first places become ``first``."""
    if not is_exporting():
        count = x.shape[dim] - by
        return torch.cat([torch.full_like(x.narrow(dim, 0, by), first), x.narrow(dim, 0, count)], dim)
    place = torch.arange(x.shape[dim], device=x.device)
    is_first = (place < by).view(-1, *(1,) * (x.ndim - 1 - dim % x.ndim))
    return x.index_select(dim, (place - by).clamp(min=0)).masked_fill(is_first, first)


def count_chunks(length: int, chunk: int) -> int:
    """Return how many chunks hold ``length`` tokens; at least two in exported graphs, where a size of 1 stays 1."""
    return (length + 2 * chunk - 1) // chunk if is_exporting() else -(-length // chunk)


def frame(x: Tensor, before: int, total: int, value: float = 0.0) -> Tensor:
    """Return ``total`` tokens with those of (batch, tokens, ...) from place ``before`` on, and ``value`` around."""
    length = x.shape[1]
    if not is_exporting():
        after = total - before - length
        return (
            torch.nn.functional.pad(x, (*(0, 0) * (x.ndim - 2), before, after), value=value) if before or after else x
        )
    place = torch.arange(total, device=x.device) - before
    outside = ((place < 0) | (place >= length)).view(-1, *(1,) * (x.ndim - 2))
    return x.index_select(1, place.clamp(min=0).clamp(max=length - 1)).masked_fill(outside, value)


def window_tokens(x: Tensor, count: int, step: int, width: int) -> Tensor:
    """Return ``count`` windows of (batch, tokens, ...), ``step`` tokens apart: (batch, count, width, ...)."""
    if not is_exporting():
        tokens = x[:, : (count - 1) * step + width]
        return tokens.unflatten(1, (count, width)) if step == width else tokens.unfold(1, width, step).movedim(-1, 2)
    places = step * torch.arange(count, device=x.device).unsqueeze(1) + torch.arange(width, device=x.device)
    return x[:, places]


def cumulate(
    pieces: Sequence[Tensor],
    join: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    nothing: Sequence[float],
    dim: int,
) -> Sequence[Tensor]:
    """Combine each piece along ``dim`` with all before it, for any number of pieces, by doubling.

    Args:
        pieces: Tensors of like length along ``dim``.
        join: ``join(earlier, later)``, associative.
        nothing: What changes nothing when it is joined, a number for each tensor.
        dim: The axis.
    """
    for doubling in range(DOUBLINGS):
        earlier = [shift(part, first, 2**doubling, dim) for part, first in zip(pieces, nothing, strict=True)]
        pieces = join(earlier, pieces)
    return pieces


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """Return log(exp(a) + exp(b)); exported as what does not overflow in ONNX, whose own form takes exponentials."""
    return torch.maximum(a, b) + (-(a - b).abs()).exp().log1p() if is_exporting() else torch.logaddexp(a, b)


def log_cumsum(x: Tensor) -> Tensor:
    """Return log cumsum exp along the last axis; in an exported graph no later value decides what underflows."""
    if not is_exporting():
        return x.logcumsumexp(-1)
    (total,) = cumulate([x], lambda one, other: [log_add(one[0], other[0])], [LOG_ZERO], -1)
    return total
