"""Support vector classifier with a Gaussian kernel, as tensors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.models.classical.fitted import check_finite, check_integers, check_not_empty, check_shape

# Franceschi et al., 2019: scikit_wrappers.py, fit_classifier.
_PENALTIES = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0, np.inf)
_FOLDS, _FEW, _FEW_OF_A_CLASS, _MANY, _MOST_ITERATIONS = 5, 50, 5, 10_000, 10_000_000


class SupportVectors(nn.Module):
    """Support vector classifier with a Gaussian kernel; scikit-learn fits it, and this module computes with it.

    As in the code of Franceschi et al., 2019, C is the best of 0.0001 to 10,000 and infinity by cross-validation in 5
    folds on at most 10,000 examples; with fewer than 50 examples, or than 5 per class, it is infinite. The solver stops
    after 10 million iterations, which classes that no vectors separate reach where C is infinite.

    Args:
        dim: Channels of the features.
        num_classes: Number of classes.
    """

    vectors: Tensor
    coefficients: Tensor
    intercepts: Tensor
    counts: Tensor
    gamma: Tensor

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.dim, self.num_classes = dim, num_classes
        self.register_buffer("vectors", torch.empty(0, 0, dtype=torch.float64))  # of one class after the other
        self.register_buffer("coefficients", torch.empty(0, 0, dtype=torch.float64))
        self.register_buffer("intercepts", torch.empty(0, dtype=torch.float64))
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64))  # of support vectors of each class
        self.register_buffer("gamma", torch.empty(0, dtype=torch.float64))

    def fit(self, features: Tensor, y: Tensor) -> None:
        """Fit the classifier.

        Args:
            features: (examples, dim).
            y: (examples,) int64; each class occurs.
        """
        X, labels = features.double().numpy(), y.numpy()
        fitted = _search(X, labels, self.num_classes)
        sign = -1 if self.num_classes == 2 else 1  # scikit-learn turns both around for two classes
        self.vectors = torch.from_numpy(np.ascontiguousarray(fitted.support_vectors_))
        self.coefficients = torch.from_numpy(np.ascontiguousarray(sign * fitted.dual_coef_))
        self.intercepts = torch.from_numpy(np.ascontiguousarray(sign * fitted.intercept_))
        self.counts = torch.from_numpy(fitted.n_support_.astype(np.int64))
        self.gamma = torch.tensor([fitted._gamma], dtype=torch.float64)  # what "scale" came to

    def check_fitted(self) -> None:
        """Check buffers that were loaded.

        Raises:
            ValueError: if the classifier was not fitted, or if no fit can have given these values.
        """
        check_not_empty("vectors", self.vectors)
        count, classes = len(self.vectors), self.num_classes
        check_shape("vectors", self.vectors, count, self.dim)
        check_shape("coefficients", self.coefficients, classes - 1, count)
        check_shape("intercepts", self.intercepts, classes * (classes - 1) // 2)
        check_shape("counts", self.counts, classes)
        check_shape("gamma", self.gamma, 1)
        check_integers("counts", self.counts, 0, count)
        if int(self.counts.sum()) != count:
            raise ValueError(f"counts add up to {int(self.counts.sum())}, and there are {count} support vectors")
        for name in ("vectors", "coefficients", "intercepts", "gamma"):
            check_finite(name, getattr(self, name))
        if float(self.gamma) <= 0:
            raise ValueError(f"gamma must be above 0, got {float(self.gamma):g}")

    def forward(self, features: Tensor) -> Tensor:
        """Return the class that wins most comparisons of two classes; the first one of equals.

        Args:
            features: (examples, dim).

        Returns:
            (examples,) int64.
        """
        kernel = torch.exp(-self.gamma * torch.cdist(features.double(), self.vectors).square())
        ends = self.counts.cumsum(0).tolist()
        parts = [slice(end - count, end) for end, count in zip(ends, self.counts.tolist(), strict=True)]
        wins = torch.zeros(len(features), self.num_classes, dtype=torch.int64, device=kernel.device)
        pair = 0
        for first, of_first in enumerate(parts):
            for second in range(first + 1, self.num_classes):
                of_second = parts[second]
                score = kernel[:, of_first] @ self.coefficients[second - 1, of_first]
                score = score + kernel[:, of_second] @ self.coefficients[first, of_second] + self.intercepts[pair]
                wins[:, first] += score > 0
                wins[:, second] += score <= 0
                pair += 1
        return wins.argmax(1)


def _search(X: np.ndarray, labels: np.ndarray, num_classes: int) -> Any:
    """The fitted SVC of scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV, train_test_split
    from sklearn.svm import SVC

    classifier = SVC(C=np.inf, gamma="scale", max_iter=_MOST_ITERATIONS)
    few = len(X) < _FEW or len(X) // num_classes < _FEW_OF_A_CLASS
    if len(X) > _MANY:
        parts: Any = train_test_split(X, labels, train_size=_MANY, random_state=0, stratify=labels)
        X, _, labels, _ = parts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # A class with fewer examples than folds is missing in some of them.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        if few:
            return classifier.fit(X, labels)
        return GridSearchCV(classifier, {"C": _PENALTIES}, cv=_FOLDS).fit(X, labels).best_estimator_
