"""Fit models that a library fits at once, and evaluate them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from flowformer.common.files import write_whole
from flowformer.common.interrupts import check_signals
from flowformer.models.classical.fitted import FittedModel
from flowformer.training.folder import RunFolder, save_weights
from flowformer.training.module import total
from flowformer.training.recipe import Recipe, Task

_BATCH = 64  # examples that are evaluated at a time


def fit_at_once(
    recipe: Recipe,
    task: Task,
    model: FittedModel,
    records: Sequence[dict[str, Any]] = (),
    *,
    run: RunFolder | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Fit a model in place, and evaluate it.

    There is nothing to resume: a fit that was interrupted has written nothing, and starts anew.

    Args:
        recipe: How.
        task: On what.
        model: The model.
        records: Of training steps before the fit, as of an encoder; the last one gets the evaluation.
        run: Where to write weights and metrics; ``None`` writes none.
        console: Where to say what is done; ``None`` for nowhere.

    Returns:
        The records. Without earlier ones it is a single one, of fit 1.
    """
    start = time.perf_counter()
    last = dict(records[-1]) if records else {recipe.unit: 1, "seconds": 0.0}
    batch = task.format.collate([task.train[index] for index in range(len(task.train))])
    _say(console, f"fitting {type(model).__name__} to {len(task.train)} examples")
    model.cpu().eval().fit(batch["x"], batch["y"], batch["mask"], seed=recipe.seed)
    if len(task.test):
        _say(console, f"evaluating on {len(task.test)} examples")
        last |= evaluate_fitted(task, model)
    last["seconds"] += time.perf_counter() - start
    found = [*records[:-1], last]
    if run is not None:
        told = {name: value for name, value in last.items() if name != "seconds"}
        save_weights(model, run.checkpoints / "last.safetensors", told)
        write_whole(run.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in found))
    return found


def evaluate_fitted(task: Task, model: FittedModel) -> dict[str, float]:
    """Evaluate a fitted model on the test set of a task: the quantities of the metric.

    There is no loss among them: the probabilities of a method that only chooses a class are 0 and 1.
    """
    sums: dict[str, float] = {}
    with torch.inference_mode():
        for start in range(0, len(task.test), _BATCH):
            check_signals()
            items = [task.test[index] for index in range(start, min(start + _BATCH, len(task.test)))]
            batch = task.format.collate(items)
            for name, value in task.step(model, batch).items():
                if name != "loss":
                    sums[name] = sums.get(name, 0.0) + total(value, task.size(batch))
    return {f"test/{name}": value / len(task.test) for name, value in sums.items()}


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False)
