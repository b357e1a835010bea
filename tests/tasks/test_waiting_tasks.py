"""A training step of a task looks at no value of its batch, model or loss: on a GPU, Python would wait there.

A tensor on the meta device has no values, so that looking at one is an error, and takes the paths of a GPU's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowformer.recipes import create_recipe

SMALL: dict[str, dict[str, Any]] = {
    "toys/sort": {},
    "toys/recall": {"train_examples": 10, "test_examples": 10},
    "toys/brackets": {"train_examples": 10, "test_examples": 10},
    "density/digits": {"attention": "flow", "attention_options": {}},
    "text/bytes": {"length": 32, "num_layers": 1},
    "images/digits": {},
    "uea/JapaneseVowels": {"dim": 16, "ffn_dim": 16},
    "decision/cartpole": {"recorded": 3, "dim": 16},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_waits_for_nothing(name: str) -> None:
    recipe = create_recipe(name, **SMALL[name])
    task = recipe.build_task()
    model = recipe.build_model(task.format).to("meta").train()
    batch = task.format.collate([task.train[index] for index in range(4)])
    assert task.size(batch) > 0
    values = task.step(model, {key: value.to("meta") for key, value in batch.items()})
    values["loss"].backward()
    assert all(isinstance(value, torch.Tensor) and value.is_meta for value in values.values())
