"""Learning rate schedules, as factors of the peak learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

# From steps since warm-up ended, steps of warm-up, and all steps since then, to a factor of the learning rate.
SCHEDULES: Mapping[str, Callable[[int, int, int], float]] = {
    "constant": lambda step, warmup, total: 1.0,
    "inverse-sqrt": lambda step, warmup, total: math.sqrt(warmup / (warmup + step)),
    "cosine": lambda step, warmup, total: 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0))),
    "linear": lambda step, warmup, total: max(1 - step / max(total, 1), 0.0),
}


def learning_rate_factor(
    schedule: str, warmup_steps: int, steps: int, *, first: float = 0.0, last: float = 0.0
) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the step, counted from 0.

    In warm-up it rises by as much each step, and is 1 at step ``warmup_steps``. Afterwards: ``constant``;
    ``inverse-sqrt`` falls with the root of the step (Vaswani et al., 2017); ``cosine`` and ``linear`` fall to ``last``
    at the last step.

    Args:
        schedule: One of :data:`SCHEDULES`.
        warmup_steps: Steps of warm-up.
        steps: All steps of the run.
        first: Factor that warm-up rises from.
        last: Factor that ``cosine`` and ``linear`` fall to.
    """
    fall = last if schedule in ("cosine", "linear") else 0.0

    def factor(step: int) -> float:
        if step < warmup_steps:
            # Not from its beginning: where that is 0, the first step is not to be lost.
            return first + (1 - first) * (step + 1) / (warmup_steps + 1)
        return fall + (1 - fall) * SCHEDULES[schedule](step - warmup_steps, warmup_steps, steps - warmup_steps)

    return factor
