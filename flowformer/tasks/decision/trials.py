"""Episodes to run in a simulator: the return that is asked for, and the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset


class Trial(NamedTuple):
    """An episode to run.

    Attributes:
        target: The return that the policy is asked for.
        seed: Of the environment.
    """

    target: float
    seed: int


@dataclass(frozen=True, eq=False)
class Trials(Dataset[Trial]):
    """Episodes to run in a simulator; a map-style PyTorch data set of :class:`Trial`.

    Attributes:
        targets: (n,) float64, returns that the policy is asked for.
        seeds: (n,) int64, seeds of the environment.
    """

    targets: np.ndarray
    seeds: np.ndarray

    @classmethod
    def of(cls, targets: Sequence[float], episodes: int, seed: int = 1) -> Trials:
        """Make trials: ``episodes`` of each target, with the same seeds for every target.

        Args:
            targets: Returns that the policy is asked for.
            episodes: Trials of each of them.
            seed: Of the run. Episode i has the seed ``seed + 100 + i``; the published code seeds the environment once,
                with ``seed + 100``.

        Raises:
            ValueError: no targets, or no episodes.
        """
        if not len(targets) or episodes < 1:
            raise ValueError(f"expected targets and at least one episode of each, got {targets} and {episodes}")
        seeds = seed + 100 + np.arange(episodes, dtype=np.int64)
        return cls(np.repeat(np.asarray(targets, dtype=np.float64), episodes), np.tile(seeds, len(targets)))

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> Trial:
        return Trial(float(self.targets[index]), int(self.seeds[index]))
