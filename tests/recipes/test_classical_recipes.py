"""Recipes of the methods without attention: one for each row of the published table and each subset."""

import pytest

from flowformer.recipes import create_recipe, list_recipes
from flowformer.tasks.series import uea
from flowformer.training.recipe import FitRecipe, StepRecipe

METHODS = ("dtw", "xgboost", "rocket", "lstm", "tcn")


def test_every_row_and_subset_has_a_recipe():
    names = {f"uea/{subset}/{method}" for subset in uea.SUBSETS for method in METHODS}
    own = {f"timeseries/own/{method}" for method in METHODS}
    assert {name for name in list_recipes() if name.split("/")[-1] in METHODS} == names | own


@pytest.mark.parametrize("method", METHODS)
def test_published_value_is_that_of_the_row(method):
    recipe = create_recipe(f"uea/Heartbeat/{method}", seed=3)
    _, table = recipe.published_table() or ("", {})
    assert table[recipe.row] == uea.PUBLISHED[method]["Heartbeat"]
    assert recipe.label == "seed3"
    assert create_recipe(f"timeseries/own/{method}").published_table() is None


def test_hyper_parameters_of_the_sources():
    tcn = create_recipe("uea/Heartbeat/tcn")
    assert isinstance(tcn, StepRecipe)
    # default_hyperparameters.json of White-Link/UnsupervisedScalableRepresentationLearningTimeSeries
    found = {name: tcn.to_json()[name] for name in (
        "steps", "batch_size", "optimizer", "learning_rate", "clip_grad_norm", "negatives", "channels", "depth",
        "reduced_dim", "dim", "kernel_size",
    )}  # fmt: skip
    assert list(found.values()) == [1500, 10, "adam", 1e-3, None, 10, 40, 10, 160, 320, 3]
    lstm, transformer = create_recipe("uea/Heartbeat/lstm").to_json(), create_recipe("uea/Heartbeat").to_json()
    shared = ("epochs", "eval_every", "batch_size", "optimizer", "learning_rate", "schedule", "clip_grad_norm")
    assert [lstm[name] for name in shared] == [transformer[name] for name in shared]


def test_library_recipes_have_no_settings_of_gradients():
    for method in ("dtw", "xgboost", "rocket"):
        recipe = create_recipe(f"uea/Heartbeat/{method}", threads=2)
        assert isinstance(recipe, FitRecipe)
        assert not {"batch_size", "epochs", "optimizer", "attention", "accelerator"} & set(recipe.to_json())
    with pytest.raises(ValueError, match="scaling must be one of none, training, series"):
        create_recipe("uea/Heartbeat/dtw", scaling="all")
