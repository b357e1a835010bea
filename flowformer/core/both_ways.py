"""Bidirectional sums with decay in linear time: a scan over the tokens in their order, and one in reverse.

gamma(i, j) joins i and j in either order, so each sum over tokens is one over those up to i and one over those from i
on, less the token itself, which both contain. In the reverse, token i is reached from i + 1, by the decay of the
latter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.chunks import pad_to_chunks
from flowformer.core.decay import Decay, block_decay
from flowformer.core.masks import fill
from flowformer.core.precision import sum_dtype
from flowformer.core.scan import scan


class Block(NamedTuple):
    """What a block function is given besides its tensors; see :func:`both_ways`.

    Attributes:
        mask: (batch, tokens); ``None`` where all are real.
        log_decay: By token, (batch, tokens, heads), or (heads,).
        reverse: Whether this is the scan in reverse, which is to leave out each token itself.
    """

    mask: Tensor | None
    log_decay: Tensor
    reverse: bool

    def prepare(
        self, tensors: Sequence[Tensor], chunk: int, wide: torch.dtype
    ) -> tuple[list[Tensor], Tensor | None, Decay]:
        """Pad tensors (batch, tokens, ...) to whole chunks: those, the mask and the decay; ``wide`` is of states."""
        by_token = self.log_decay.ndim == 3
        padded, mask = pad_to_chunks([*tensors, self.log_decay] if by_token else tensors, self.mask, chunk)
        log_decay = padded[-1] if by_token else self.log_decay
        count = padded[0].shape[1]
        # The log-decays know of padding already: in reverse, that of a real token may stand at a padded one.
        decay = block_decay(log_decay, None, count, (count // chunk, chunk), sum_dtype(tensors[0].dtype), wide)
        return padded[: len(tensors)], mask, decay


Both = Callable[..., tuple[Tensor, Tensor]]


def both_ways(log_decay: Tensor, mask: Tensor | None, learned: Sequence[Tensor | None] = ()) -> Both:
    """Return a function that scans tokens in their order, and in reverse.

    Args:
        log_decay: (heads,), or (batch, length, heads).
        mask: (batch, length); padding does not decay.
        learned: What block functions take last.

    Returns:
        A function of a block function, tensors (batch, length, ...) and the state before the first token. It returns
        the outputs of both scans, in the order of the tokens. The block function takes (:class:`Block`, tensors of the
        block, state, *learned) and returns outputs and the state after the block.
    """
    there, back, constant = _directions(log_decay, mask)

    def step(run: Any, reverse: bool, tokens: Sequence[Any], state: Any, constant: Any, *learned: Any) -> Any:
        mask, by_token, *tensors = tokens
        return run(Block(mask, constant if by_token is None else by_token, reverse), tensors, state, *learned)

    flipped: dict[int, tuple[Tensor, Tensor]] = {}  # what several calls are given is flipped once, and kept for its id

    def flip(x: Tensor) -> Tensor:
        if id(x) not in flipped:
            flipped[id(x)] = x, x.flip(1)
        return flipped[id(x)][1]

    def both(run: Callable[..., Any], tensors: Sequence[Tensor], state: Any) -> tuple[Tensor, Tensor]:
        given = (constant, *learned)
        onwards, _ = scan(partial(step, run, False), (mask, there, *tensors), state, given)
        turned = [None if mask is None else flip(mask), back, *map(flip, tensors)]
        backwards, _ = scan(partial(step, run, True), turned, state, given)
        return onwards, backwards.flip(1)

    return both


def _directions(log_decay: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Log-decays by token in order and in reverse, (batch, length, heads); or those of heads, for both."""
    if log_decay.ndim == 1 and mask is None:
        return None, None, log_decay
    if log_decay.ndim == 1:
        assert mask is not None
        log_decay = log_decay.expand(*mask.shape, -1)
    there = fill(log_decay, mask)
    return there, torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], 1).flip(1), None
