"""The toy projects, trained to the end."""

import pytest
import torch
from rich.console import Console

from flowformer.recipes import create_recipe
from flowformer.training.fit import train


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wanted"), [("toys/adder", 99), ("toys/sort", 100)])
def test_toys_are_learned(name, wanted, tmp_path):
    recipe = create_recipe(name, accelerator="cpu")
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
