"""Boosted trees on flattened series: XGBoost."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowformer.models.classical.fitted import FittedModel, check_not_empty

_NUMBERS_OF_A_NODE = (
    "left_children", "right_children", "parents", "split_indices", "split_conditions", "split_type", "default_left",
    "base_weights", "loss_changes", "sum_hessian",
)  # fmt: skip
_FRACTIONS = ("split_conditions", "base_weights", "loss_changes", "sum_hessian")
_NO_NODE = 2**31 - 1  # the parent of a root


class XGBoostClassifier(FittedModel):
    """Gradient-boosted trees of XGBoost (Chen and Guestrin, 2016) on series as vectors.

    A series is flattened to a vector of all steps and channels. Steps that it does not have are missing values, for
    which each split learns a side.

    Args:
        in_chans: Channels of a series.
        num_classes: Number of classes.
        max_length: Longest series.
        num_trees: Rounds of boosting, each of a tree per class (one tree for two classes).
        max_depth: Depth of a tree.
        learning_rate: Shrinkage of each round.
        threads: Threads of XGBoost.
    """

    trees: Tensor

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
        import xgboost  # takes a second; an installation without it is noticed before a run starts

        super().__init__()
        self._booster: Any = xgboost.Booster()
        self.in_chans, self.num_classes, self.max_length, self.threads = in_chans, num_classes, max_length, threads
        self.options = {"n_estimators": num_trees, "max_depth": max_depth, "learning_rate": learning_rate}
        self.register_buffer("trees", torch.empty(0, dtype=torch.uint8))  # XGBoost's JSON in UTF-8

    def fit(self, x: Tensor, y: Tensor, mask: Tensor, *, seed: int) -> None:
        """Grow the trees. By default nothing in it is random."""
        from xgboost import XGBClassifier

        classifier = XGBClassifier(**self.options, random_state=seed, n_jobs=self.threads)
        classifier.fit(self._prepare(x, mask), y.numpy())
        self._booster = classifier.get_booster()
        self.trees = torch.frombuffer(self._booster.save_raw("json"), dtype=torch.uint8).clone()

    def check_fitted(self) -> None:
        """Check trees that were loaded: XGBoost follows their links wherever they lead."""
        check_not_empty("trees", self.trees)
        try:
            learner = json.loads(self._content())["learner"]
            self._check_learner(learner)
            model = learner["gradient_booster"]["model"]
            for place, tree in enumerate(model["trees"]):
                _check_tree(tree, place, self.in_chans * self.max_length)
            count, groups = len(model["trees"]), self._groups
            rounds, numbers = model["iteration_indptr"], model["gbtree_model_param"]
            if not (
                _integers(model["tree_info"], count, 0, groups - 1)
                and int(numbers["num_trees"]) == count
                and int(numbers.get("num_parallel_tree", 1)) == 1
                and rounds == list(range(0, count + 1, groups))
                and all(
                    [*model["tree_info"][a:b]] == list(range(groups)) for a, b in itertools.pairwise(rounds)
                )
            ):  # fmt: skip
                raise ValueError("its rounds and trees do not fit each other")
            self._booster.load_model(bytearray(self._content()))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            first = (str(error).splitlines() or [""])[0]  # XGBoost adds a trace of its own
            raise ValueError(f"trees is not a model of XGBoost for this data: {first}") from error

    @property
    def _groups(self) -> int:
        """Trees of a round."""
        return self.num_classes if self.num_classes > 2 else 1

    def _check_learner(self, learner: dict[str, Any]) -> None:
        numbers = learner["learner_model_param"]
        few = self.num_classes == 2
        found = (
            learner["gradient_booster"]["name"],
            learner["objective"]["name"],
            int(numbers["num_feature"]),
            int(numbers["num_class"]),
            int(numbers.get("num_target", 1)),
        )
        wanted = (
            "gbtree",
            "binary:logistic" if few else "multi:softprob",
            self.in_chans * self.max_length,
            0 if few else self.num_classes,
            1,
        )
        if found != wanted:
            raise ValueError(f"booster, objective, features, classes and targets are {found}, expected {wanted}")
        base = json.loads(numbers["base_score"])  # a number, or since version 3 a list
        base = base if isinstance(base, list) else [base]
        if not (len(base) in (1, self._groups) and _numbers(base, len(base))):
            raise ValueError(f"base_score is {numbers['base_score']!r}")
        categories = learner["gradient_booster"]["model"].get("cats", {})
        if any(learner.get(name) for name in ("feature_names", "feature_types")) or any(categories.values()):
            raise ValueError("there are names, types or categories of features")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return log-probabilities of classes."""
        import xgboost

        self._booster.set_param({"nthread": self.threads})
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        found = self._booster.predict(xgboost.DMatrix(self._prepare(x, real), nthread=self.threads))
        if found.ndim == 1:
            found = np.stack([1 - found, found], axis=1)
        return torch.from_numpy(found).to(self.trees.device).log()

    def _content(self) -> bytes:
        return self.trees.cpu().numpy().tobytes()

    def _prepare(self, x: Tensor, mask: Tensor) -> np.ndarray:
        """Series as vectors, (series, max_length * channels), NaN where there is no step."""
        padded = x.masked_fill(~mask[..., None], torch.nan)
        missing = self.max_length - x.shape[1]
        return torch.nn.functional.pad(padded, (0, 0, 0, missing), value=torch.nan).flatten(1).cpu().numpy()


def _check_tree(tree: dict[str, Any], place: int, features: int) -> None:
    """Check that a tree is one: links go down and back, numbers are finite, and features are there.

    Raises:
        ValueError, LookupError, TypeError: if it is not.
    """
    nodes = int(tree["tree_param"]["num_nodes"])
    left, right = tree["left_children"], tree["right_children"]
    sizes = {name: len(tree[name]) for name in _NUMBERS_OF_A_NODE}
    if nodes < 1 or set(sizes.values()) != {nodes}:
        raise ValueError(f"a tree of {nodes} nodes has lists of {sorted(set(sizes.values()))}")
    if tree["id"] != place:
        raise ValueError(f"tree {place} has the number {tree['id']}")
    param = tree["tree_param"]
    if int(param["num_feature"]) != features or int(param.get("num_deleted", 0)):
        raise ValueError(f"a tree is of {param['num_feature']} features, of {features}, or has deleted nodes")
    if int(param.get("size_leaf_vector", 1)) > 1 or any(tree["split_type"]) or tree["categories"]:
        raise ValueError("a tree has vectors or categories")
    if not all(_numbers(tree[name], nodes) for name in _FRACTIONS) or not _integers(tree["default_left"], nodes, 0, 1):
        raise ValueError("a tree has values that are not finite numbers, or sides that are neither 0 nor 1")
    if not (_integers(left, nodes, -1, nodes - 1) and _integers(right, nodes, -1, nodes - 1)):
        raise ValueError("a tree has links to nodes that are not there")
    parents = [_NO_NODE] * nodes
    for node, (one, other) in enumerate(zip(left, right, strict=True)):
        if one == other == -1:
            continue
        if not (one > node and other > node and one != other and parents[one] == parents[other] == _NO_NODE):
            raise ValueError(f"node {node} of a tree has the children {one} and {other}")
        parents[one] = parents[other] = node
    if tree["parents"] != parents or _NO_NODE in parents[1:]:
        raise ValueError("a tree has links to parents that are not those of its links to children")
    if not _integers(tree["split_indices"], nodes, 0, features - 1):
        raise ValueError(f"a tree has splits of features that are not there, of {features}")


def _integers(values: Any, count: int, least: int, most: int) -> bool:
    """Whether there are so many integers, within bounds."""
    return len(values) == count and all(type(one) is int and least <= one <= most for one in values)


def _numbers(values: Any, count: int) -> bool:
    """Whether there are so many finite numbers."""
    return len(values) == count and all(type(one) in (int, float) and math.isfinite(one) for one in values)
