"""Order of training examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RoundSampler(Sampler[int]):
    """Sampler of repeated random permutations, cut into rounds of equal length.

    Each example is seen once before any is seen twice, whatever a round's length. Rounds are a function of the seed and
    their number: one that is run again sees the same.

    Args:
        size: Examples of the set.
        length: Examples that a device sees in a round.
        world: Devices.
        rank: This device, from 0.
        seed: Seed of the permutations.

    Raises:
        ValueError: for an empty set.
    """

    def __init__(self, size: int, length: int, *, world: int = 1, rank: int = 0, seed: int = 0) -> None:
        if size < 1:
            raise ValueError("the training set is empty")
        self.size, self.length, self.world, self.rank, self.seed = size, length, world, rank, seed
        self.round = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the round, counted from 0; called by Lightning."""
        self.round = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start = self.round * self.length * self.world + self.rank
        turn, order = -1, torch.empty(0, dtype=torch.int64)
        for number in range(start, start + self.length * self.world, self.world):
            if number // self.size != turn:
                turn = number // self.size
                order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + turn))
            yield int(order[number % self.size])
