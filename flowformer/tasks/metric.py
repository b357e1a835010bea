"""Evaluation metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """An evaluation metric.

    Attributes:
        name: Its name.
        key: Which value of the task's ``step`` it is made of, from the mean over a whole set.
        unit: Its unit; "" where it has none.
        shown: From that mean to the value that is reported.
        higher_is_better: Whether more is better.
        digits: Decimals to show.
    """

    name: str
    key: str
    unit: str = ""
    shown: Callable[[float], float] = float
    higher_is_better: bool = True
    digits: int = 2

    def __str__(self) -> str:
        """Return name and unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def best(self, records: Sequence[Mapping[str, Any]], split: str) -> Mapping[str, Any]:
        """Return the record with the best value on a set; the first one of equals."""
        return (max if self.higher_is_better else min)(records, key=lambda record: record[f"{split}/{self.key}"])


ACCURACY = Metric("accuracy", "accuracy", "percent", lambda share: 100 * share)
