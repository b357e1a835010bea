"""BigBird: transformers' attention in training and evaluation, and Long Range Arena's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flowformer import ops

from .files import Golden, Pairs, compared, reads
from .kernels import PROJECTIONS, between_kernels


def numbers_of(blocks: Tensor) -> Tensor:
    """Random numbers by which the recorded random blocks (heads, blocks - 2, r) are found."""
    count = blocks.shape[1] + 2
    numbers = torch.zeros_like(blocks, dtype=torch.int64)
    for head, row in torch.cartesian_prod(*(torch.arange(n) for n in blocks.shape[:2])).tolist():
        left = [block for block in range(1, count - 1) if abs(block - row - 1) > 1]
        for at, block in enumerate(blocks[head, row].tolist()):
            numbers[head, row, at] = left.index(block)
            left.remove(block)
    return numbers


@reads("bigbird_hf", "bigbird_hf_eval")
def bigbird_hf(golden: Golden) -> Pairs:
    training, blocks = golden.options["training_mode"], golden.tensors["random.blocks"]
    attend = partial(
        ops.bigbird_attention,
        random_blocks=numbers_of(blocks) if training else blocks,
        mask=golden.tensors["key_mask"].bool(),
        block=golden.options["block_size"],
        released="huggingface" if training else "huggingface-eval",
    )
    return compared(golden, attend, "q", "k", "v")


@reads("bigbird_lra")
def bigbird_lra(golden: Golden) -> Pairs:
    attend = partial(
        ops.bigbird_attention,
        random_blocks=numbers_of(golden.tensors["random.blocks"]),
        mask=golden.tensors["padding_mask"].bool(),
        block=golden.options["block_size"],
        released="lra",
    )
    return compared(golden, between_kernels(attend), *PROJECTIONS)
