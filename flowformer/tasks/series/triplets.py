"""Training of an encoder without labels: parts of a series are to be alike, and unlike parts of other series.

Source: Franceschi et al., NeurIPS 2019, section 3 and equation 1; losses/triplet_loss.py of their code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.tasks.series.dataset import SeriesSet
from flowformer.tasks.series.task import SeriesTask


class Windows(NamedTuple):
    """Parts of series.

    Attributes:
        start: (windows,) int64, first step.
        length: (windows,) int64, number of steps.
    """

    start: Tensor
    length: Tensor


@dataclass(frozen=True, eq=False)
class TripletTask(SeriesTask):
    """Triplet loss on the training series of a task. There is nothing to evaluate on while the encoder is trained.

    A window of a series (the anchor), a window in that one (the positive), and ``negatives`` windows of any training
    series are encoded. The loss is -log sigmoid(anchor . positive), and the mean of -log sigmoid(-anchor . negative).

    Attributes:
        negatives: Negative windows for each series of a batch.
    """

    negatives: int = 10

    @classmethod
    def of(cls, task: SeriesTask, negatives: int) -> TripletTask:
        """Return the one on the series of a task."""
        return cls(**{one.name: getattr(task, one.name) for one in fields(task)}, negatives=negatives)

    @property
    def evaluated(self) -> dict[str, SeriesSet]:
        """No sets."""
        return {}

    def step(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draw windows for a batch, and return the "loss" of a model's ``encoder``."""
        x, device = batch["x"], batch["x"].device
        every, lengths = self._series
        mine = batch["mask"].sum(1).cpu()
        rows = torch.randint(len(every), (self.negatives * len(x),))
        anchor, positive, negative = draw_windows(mine, lengths[rows], equal=bool((lengths == lengths[0]).all()))
        encode, own = model.encoder, torch.arange(len(x))
        a = encode(*(one.to(device) for one in cut(x.cpu(), own, anchor)))
        p = encode(*(one.to(device) for one in cut(x.cpu(), own, positive)))
        n = encode(*(one.to(device) for one in cut(every, rows, negative)))
        return {"loss": triplet_loss(a, p, n.view(self.negatives, *a.shape))}

    @cached_property
    def _series(self) -> tuple[Tensor, Tensor]:
        """All training series (series, length, channels), and their lengths."""
        batch = self.format.collate([self.train[index] for index in range(len(self.train))])
        return batch["x"], batch["mask"].sum(1)


def triplet_loss(anchor: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """Return the loss of vectors, equation 1 with the mean over negatives of the code (``negative_penalty`` 1).

    Args:
        anchor: (batch, dim).
        positive: (batch, dim).
        negatives: (negatives, batch, dim).
    """
    log_sigmoid = nn.functional.logsigmoid
    alike = log_sigmoid((anchor * positive).sum(-1)).mean()
    return -alike - log_sigmoid(-(anchor * negatives).sum(-1)).mean()


def draw_windows(lengths: Tensor, other_lengths: Tensor, *, equal: bool) -> tuple[Windows, Windows, Windows]:
    """Draw an anchor and a positive window for each series, and a negative window for each other one.

    The length of a positive is drawn first, from 1 to that of the series; the anchor is at least as long, and the
    positive lies in it. A negative has a length of its own. Where all training series are of equal length, all
    positives and negatives of a batch have one length, and all anchors another.

    Args:
        lengths: (batch,) int64, steps of each series.
        other_lengths: (n,) int64, steps of the series that negatives are taken of.
        equal: Whether all training series are of equal length.
    """
    batch, others = lengths.shape, other_lengths.shape
    one = (1,) if equal else batch
    inner = _draw(torch.ones(one, dtype=torch.int64), lengths[: one[0]])
    outer = _draw(inner, lengths[: one[0]])
    far = inner.expand(others) if equal else _draw(torch.ones(others, dtype=torch.int64), other_lengths)
    inner, outer = inner.expand(batch), outer.expand(batch)
    start = _draw(torch.zeros_like(lengths), lengths - outer)
    within = start + _draw(torch.zeros_like(lengths), outer - inner)
    away = _draw(torch.zeros_like(other_lengths), other_lengths - far)
    return Windows(start, outer), Windows(within, inner), Windows(away, far)


def _draw(least: Tensor, most: Tensor) -> Tensor:
    """Draw integers from ``least`` to ``most``, both included."""
    share = torch.rand(least.shape, dtype=torch.float64)
    return torch.minimum(least + (share * (most - least + 1)).long(), most)


def cut(x: Tensor, rows: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return windows of series, padded on the right, and their mask.

    Args:
        x: (series, length, channels).
        rows: (windows,) int64, which series.
        windows: Which steps.

    Returns:
        (windows, longest, channels), and (windows, longest) boolean.
    """
    steps = torch.arange(int(windows.length.max()))
    mask = steps < windows.length[:, None]
    places = (windows.start[:, None] + steps).clamp(max=x.shape[1] - 1)
    return x[rows[:, None], places], mask
