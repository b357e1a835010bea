"""Boosted trees on flattened series: XGBoost grows them, and they are stored and read as tensors."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.models.classical.fitted import (
    FittedModel,
    check_finite,
    check_integers,
    check_not_empty,
    check_shape,
)

_INDICES = ("roots", "features", "left", "right", "missing")


class XGBoostClassifier(FittedModel):
    """Gradient-boosted trees of XGBoost (Chen and Guestrin, 2016) on series as vectors.

    A series is flattened to a vector of all steps and channels. Steps that it does not have are missing values, for
    which each split learns a side.

    XGBoost only grows the trees. They are tensors over the nodes of all trees, and :meth:`forward` walks along them
    itself, to the float32 sums that XGBoost has: a value below that of a node leads to the left, another one to the
    right. A leaf leads to itself. Tree ``i`` votes for class ``i % num_classes``; of two classes, all vote for the
    second one.

    Args:
        in_chans: Channels of a series.
        num_classes: Number of classes.
        max_length: Longest series.
        num_trees: Rounds of boosting, each of a tree per class (one tree for two classes).
        max_depth: Depth of a tree.
        learning_rate: Shrinkage of each round.
        threads: Threads that XGBoost grows trees with.
    """

    library: ClassVar[str] = "xgboost"

    base: Tensor  # (classes,) what a sum of votes starts from
    roots: Tensor  # (trees,) as all links, indices of nodes
    features: Tensor  # (nodes,) as all that follow
    values: Tensor  # what the feature is compared with; in a leaf, the vote
    left: Tensor
    right: Tensor
    missing: Tensor  # left or right, for a missing value

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        max_length: int,
        *,
        num_trees: int = 100,
        max_depth: int = 6,
        learning_rate: float = 0.3,
        threads: int = 1,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.max_length, self.threads = in_chans, num_classes, max_length, threads
        self.num_trees, self.max_depth, self.learning_rate = num_trees, max_depth, learning_rate
        for name in _INDICES:
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        for name in ("base", "values"):
            self.register_buffer(name, torch.empty(0))

    def fit(self, x: Tensor, y: Tensor, mask: Tensor, *, seed: int) -> None:
        """Grow the trees. By default nothing in it is random."""
        from xgboost import XGBClassifier

        classifier = XGBClassifier(
            n_estimators=self.num_trees, max_depth=self.max_depth, learning_rate=self.learning_rate,
            random_state=seed, n_jobs=self.threads,
        )  # fmt: skip
        classifier.fit(self._flatten(x, mask).numpy(), y.numpy())
        learner = json.loads(classifier.get_booster().save_raw("json"))["learner"]
        base = json.loads(learner["learner_model_param"]["base_score"])  # a number, or since version 3 a list
        start = torch.tensor(base, dtype=torch.float32).expand(self._votes).clone()
        self.base = start if self.num_classes > 2 else -torch.log(1 / start - 1)  # that of two is a probability
        for name, value in _join(learner["gradient_booster"]["model"]["trees"]).items():
            setattr(self, name, torch.from_numpy(value))
        self.check_fitted()

    def check_fitted(self) -> None:
        """Check buffers that were loaded: nodes are those of trees, and each walk ends in a leaf."""
        check_not_empty("roots", self.roots)
        nodes = len(self.values)
        check_shape("base", self.base, self._votes)
        check_shape("roots", self.roots, self.num_trees * self._votes)
        for name in ("features", "left", "right", "missing"):
            check_shape(name, getattr(self, name), nodes)
        check_integers("features", self.features, 0, self.in_chans * self.max_length - 1)
        check_finite("base", self.base)
        check_finite("values", self.values)
        own = torch.arange(nodes, device=self.left.device)
        inner = (self.left != own) | (self.right != own)
        check_finite("sums of leaves", self.values.masked_fill(inner, 0).abs().amax() * self.num_trees)
        left, right = self.left[inner], self.right[inner]
        if not torch.equal(torch.cat([self.roots, left, right]).sort().values, own):
            raise ValueError("left and right do not make trees: a node must be one root, or one child of one node")
        if not bool(((left > own[inner]) & (right > own[inner])).all()):
            raise ValueError("left and right do not make trees: a child must come after its node")
        if not bool(((self.missing == self.left) | (self.missing == self.right)).all()):
            raise ValueError("missing must lead to the left or to the right")
        reached = self.roots
        for _ in range(self.max_depth):
            reached = torch.cat([self.left[reached], self.right[reached]]).unique()
        if bool(inner[reached].any()):
            raise ValueError(f"a tree is deeper than {self.max_depth}")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return log-probabilities of classes."""
        votes = self.votes(x, mask)
        if self.num_classes > 2:
            return votes.log_softmax(1)
        return nn.functional.logsigmoid(torch.cat([-votes, votes], dim=1))

    def votes(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what XGBoost calls margins: sums over trees.

        Args:
            x: (series, length, channels), padded on the right.
            mask: (series, length) boolean, True = real time step.

        Returns:
            (series, classes) float32; of two classes (series, 1), for the second one.
        """
        vectors = self._flatten(x, mask)
        node = self.roots.expand(len(x), -1)
        for _ in range(self.max_depth):
            value = vectors.gather(1, self.features[node])
            below = torch.where(value < self.values[node], self.left[node], self.right[node])
            node = torch.where(value.isnan(), self.missing[node], below)
        total = self.base.expand(len(x), -1)
        for votes in self.values[node].split(self._votes, dim=1):  # in XGBoost's order, for its rounding
            total = total + votes
        return total

    @property
    def _votes(self) -> int:
        """Sums of a series, and trees of a round."""
        return self.num_classes if self.num_classes > 2 else 1

    def _flatten(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Series as vectors, (series, max_length * channels), NaN where there is no step."""
        padded = x if mask is None else x.masked_fill(~mask[..., None], torch.nan)
        missing = self.max_length - x.shape[1]
        return nn.functional.pad(padded, (0, 0, 0, missing), value=torch.nan).flatten(1)


def _join(trees: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Trees in XGBoost's JSON as arrays over the nodes of all of them, and their roots."""
    sizes = [len(tree["left_children"]) for tree in trees]
    roots = np.cumsum([0, *sizes[:-1]], dtype=np.int64)

    def join(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.array(tree[name], dtype=dtype) for tree in trees])

    own, first = np.arange(sum(sizes)), np.repeat(roots, sizes)
    leaf = join("left_children", np.int64) == -1
    left, right = (np.where(leaf, own, join(f"{side}_children", np.int64) + first) for side in ("left", "right"))
    return {
        "roots": roots,
        "features": join("split_indices", np.int64),
        "values": join("split_conditions", np.float32),
        "left": left,
        "right": right,
        "missing": np.where(join("default_left", np.int64) == 1, left, right),
    }
