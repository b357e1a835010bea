"""The toy projects, trained to the end."""

import pytest
import torch
from rich.console import Console

from flowformer.recipes import create_recipe
from flowformer.training.fit import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "wanted"),
    [
        ("toys/adder", {}, 99),
        ("toys/sort", {}, 100),
        ("toys/recall", {"attention": "softmax", "steps": 800, "eval_every": 800}, 97),
        # More than the outermost operation tells, which is right in 22 %.
        ("toys/brackets", {"attention": "softmax", "steps": 400, "eval_every": 400}, 28),
    ],
)
def test_toys_are_learned(name, fields, wanted, tmp_path):
    recipe = create_recipe(name, accelerator="cpu", **fields)
    result = train(recipe, tmp_path, command="", console=Console(quiet=True))
    assert result["protocols"]["honest"]["value"] >= wanted


def test_the_gain_acts_on_queries_and_keys():
    weights = []
    for gain in (1.0, 30.0):
        recipe = create_recipe("toys/adder", query_key_gain=gain)
        torch.manual_seed(0)
        weights.append(recipe.build_model(recipe.build_task().format).state_dict())
    for name, plain in weights[0].items():
        gained = weights[1][name]
        factor = 30 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
        assert torch.equal(gained, plain * factor), name


def learn(name, steps, **fields):
    """The accuracy on the test set after a few steps on batches of 32, with softmax attention of 32 channels."""
    recipe = create_recipe(name, attention="softmax", dim=32, train_examples=32 * steps, test_examples=600, **fields)
    task = recipe.build_task()
    torch.manual_seed(0)
    model = recipe.build_model(task.format)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        batch = task.format.collate([task.train[index] for index in range(32 * step, 32 * step + 32)])
        task.step(model, batch)["loss"].backward()
        optimizer.step()
    whole = task.format.collate(list(task.test))
    with torch.no_grad():
        return task.metric.shown(float(task.step(model.eval(), whole)["accuracy"]) / task.size(whole))


def test_recall_of_one_pair_is_learned_at_once():
    assert learn("toys/recall", 40, pairs=1, length=8, vocab_size=64) >= 50  # chance: one of 32 values


def test_outermost_operations_are_learned_at_once():
    assert learn("toys/brackets", 40, depth=2, length=16) >= 16  # chance: 10; the outermost operation tells 22


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("toys/recall", {"pairs": 17}, "length must be at least 68 for 17 pairs"),
        ("toys/recall", {"pairs": 64, "length": 256}, "vocab_size must be even and at least 130 for 64 pairs"),
        ("toys/recall", {"pairs": 0}, "pairs must be at least 1, got 0"),
        ("toys/brackets", {"depth": 4, "length": 7}, "length must be at least 8 for depth 4"),
        ("toys/brackets", {"depth": 21}, "depth must be from 1 to 20, got 21"),
    ],
)
def test_sizes_are_checked_before_data_is_drawn(name, fields, said):
    with pytest.raises(ValueError, match=said):
        create_recipe(name, **fields)
