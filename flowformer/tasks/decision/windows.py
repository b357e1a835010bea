"""Windows of recorded episodes: some successive steps each, as sequence models are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from torch.utils.data import Dataset

from flowformer.tasks.decision.episodes import Episodes

Padding = Literal["right", "left"]
PADDED_ACTION = -10.0  # of padding: thuml/Flowformer, Flowformer_RL, and kzl/decision-transformer before it


class Windows(Dataset[dict[str, np.ndarray]]):
    """Windows of ``context`` steps of episodes, one from every step on; a map-style PyTorch data set.

    Window i begins with step i of all steps, and has fewer steps than ``context`` if its episode ends earlier; the
    rest is padding. Drawn uniformly, all pairs of an episode and a start are equally likely, as published: longer
    episodes more than shorter ones.

    Items hold numbers as recorded; :class:`flowformer.tasks.decision.format.DecisionFormat` scales them:

    - "observations": (context, S) float32, 0 at padding;
    - "actions": (context, A) float32, -10 at padding; or (context,) int64, 0 at padding;
    - "returns_to_go": (context,) float32, the rewards from this step to the end of the episode; 0 at padding;
    - "timesteps": (context,) int64, the step's number in its episode, from 0; 0 at padding;
    - "mask": (context,) bool, True for a step, False for padding.

    Padding is published with these values, and its mask makes it invisible: the loss leaves it out, on the right no
    step comes after it, and on the left attention leaves it out. Any other values would give the same results.

    Args:
        episodes: The episodes.
        context: Steps of a window.
        padding: "right" as in the published code, "left" as in the original Decision Transformer.

    Raises:
        ValueError: for a context that is not positive, or padding elsewhere.
    """

    def __init__(self, episodes: Episodes, context: int = 20, padding: Padding = "right") -> None:
        if context < 1:
            raise ValueError(f"context must be at least 1 step, got {context}")
        if padding not in get_args(Padding):
            raise ValueError(f"padding must be one of {', '.join(get_args(Padding))}, got {padding!r}")
        self.episodes, self.context, self.padding = episodes, context, padding

    def __len__(self) -> int:
        return self.episodes.num_steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return several windows at once, each array with an axis in front; PyTorch's ``DataLoader`` calls it.

        Raises:
            IndexError: for a window that is not there.
        """
        first, stop, begin = self._find(indices)
        offsets = np.arange(self.context)
        if self.padding == "left":
            # The last of the window's steps is in the last place.
            first_place = np.minimum(first + self.context, stop) - self.context
            rows = first_place[:, None] + offsets
            mask = rows >= first[:, None]
        else:
            rows = first[:, None] + offsets
            mask = rows < stop[:, None]
        rows = np.where(mask, rows, first[:, None])
        episodes = self.episodes
        padded_action = PADDED_ACTION if episodes.num_actions is None else 0
        return {
            "observations": _fill(episodes.observations[rows], mask, 0),
            "actions": _fill(episodes.actions[rows], mask, padded_action),
            "returns_to_go": _fill(self._returns_to_go[rows], mask, 0),
            "timesteps": _fill(rows - begin[:, None], mask, 0),
            "mask": mask,
        }

    def _find(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First step of each window, the step after the last of its episode, and the first of its episode."""
        first = np.asarray(indices, dtype=np.int64).reshape(-1)
        first = np.where(first < 0, first + len(self), first)
        if len(wrong := np.flatnonzero((first < 0) | (first >= len(self)))):
            raise IndexError(f"window {np.ravel(indices)[wrong[0]]} of {len(self):,}")
        starts = self.episodes.starts
        episode = np.searchsorted(starts, first, side="right") - 1
        return first, starts[episode + 1], starts[episode]

    @cached_property
    def _returns_to_go(self) -> np.ndarray:
        return self.episodes.returns_to_go()

    def fingerprint(self) -> str:
        """Return a hash of the episodes."""
        return self.episodes.fingerprint()


def _fill(values: np.ndarray, mask: np.ndarray, padding: float) -> np.ndarray:
    values[~mask] = padding
    return values
