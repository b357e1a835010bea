"""Speed and memory against peers, in one run; contenders with wrong results are not timed.

:mod:`registry` says what an operation and a contender are, :mod:`rows` has what is timed, :mod:`runner` checks, times
and measures, :mod:`compare` does so on two commits.
"""

from flowformer.bench.registry import Contender, Operation, Shape, add_contender, add_contenders, add_operation
from flowformer.bench.runner import Plan, run

__all__ = [
    "Contender", "Operation", "Plan", "Shape", "add_contender", "add_contenders", "add_operation", "run",
]  # fmt: skip
