"""Recipes of offline reinforcement learning: published numbers, and runs on small data."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from flowformer import list_attentions
from flowformer.common.errors import DataError
from flowformer.mechanisms import find_attention
from flowformer.models.decision import BehaviourCloning, DecisionTransformer
from flowformer.recipes import create_recipe, list_recipes
from flowformer.recipes.registry import check_given
from flowformer.report.tables import protocol_table
from flowformer.tasks.decision.format import DecisionFormat
from flowformer.tasks.decision.task import SETS
from flowformer.training import fit
from flowformer.training.fit import train

SMALL: dict[str, Any] = {
    "dim": 8, "num_heads": 2, "num_layers": 1, "steps": 4, "eval_every": 2, "warmup_steps": 1, "batch_size": 4,
    "episodes": 2, "test_episodes": 3, "accelerator": "cpu",
}  # fmt: skip
CAUSAL = [name for name in list_attentions() if find_attention(name).can("causal")]


def run(folder: Path, name: str, *, resume: bool = False, **fields: Any) -> dict[str, Any]:
    return train(create_recipe(name, **{**SMALL, **fields}), folder, resume=resume, console=Console(quiet=True))


@pytest.fixture
def swings(tmp_path: Path) -> Path:
    """Episodes of Pendulum-v1, of random numbers: actions are not bounded by 1."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "swings"
    folder.mkdir()
    for number, length in enumerate((30, 12, 25)):
        np.savez(
            folder / f"{number}.npz",
            observations=generator.normal(size=(length, 3)).astype(np.float32),
            actions=generator.uniform(-2, 2, (length, 1)).astype(np.float32),
            rewards=-np.full(length, number + 1, np.float32), terminated=np.array(False),
        )  # fmt: skip
    return folder


# -------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("name", "env", "targets", "published"),
    [
        ("hopper-medium", "Hopper-v4", "3600,1800", 66.9),
        ("halfcheetah-medium-expert", "HalfCheetah-v4", "12000,6000", 90.8),
        ("walker2d-medium-replay", "Walker2d-v4", "5000,2500", 62.0),
    ],
)  # fmt: skip
def test_published_numbers(name: str, env: str, targets: str, published: float) -> None:
    recipe: Any = create_recipe(f"decision/{name}")
    assert (recipe.env, recipe.targets, recipe.context, recipe.padding) == (env, targets, 20, "right")
    assert (recipe.num_layers, recipe.dim, recipe.num_heads, recipe.dropout) == (3, 256, 4, 0.1)
    assert (recipe.steps, recipe.eval_every, recipe.batch_size, recipe.seed) == (100_000, 10_000, 64, 1)
    assert (recipe.optimizer, recipe.learning_rate, recipe.weight_decay) == ("adamw", 1e-3, 1e-4)
    assert (recipe.schedule, recipe.warmup_steps, recipe.clip_grad_norm) == ("constant", 10_000, 0.25)
    assert (recipe.return_scale, recipe.max_timestep, recipe.episodes, recipe.test_episodes) == (1_000, 1_000, 10, 100)
    assert recipe.published_table()[1][recipe.row] == published
    for said in ("published with ±", "which of the two targets", f"Scores in {env}"):
        assert said in recipe.published_note


def test_all_sets_and_rows_are_there() -> None:
    assert {f"decision/{name}" for name in SETS} | {"decision/own", "decision/cartpole"} == {
        name for name in list_recipes() if name.startswith("decision/")
    }
    for row in ("softmax", "linear", "reformer", "performer", "cosformer"):
        recipe = create_recipe("decision/hopper-medium", attention=row)
        assert (recipe.row, recipe.label) == (row, f"{row}-seed1")
    assert create_recipe("decision/hopper-medium", attention="mobile").row == ""
    assert create_recipe("decision/hopper-medium", dim=128).row == ""
    assert create_recipe("decision/hopper-medium", attention_options={"preset": "core"}).row == ""


def test_behaviour_cloning_is_as_published() -> None:
    recipe: Any = create_recipe("decision/hopper-medium", model="behaviour_cloning")
    assert (recipe.row, recipe.attention, recipe.clip_grad_norm) == ("bc", None, None)
    assert "cites" in recipe.published_note
    assert recipe.label == "behaviour_cloning-seed1"
    assert create_recipe("decision/hopper-medium", model="behaviour_cloning", every_action=True).row == ""
    with pytest.raises(ValueError, match="num_heads has no effect with behaviour_cloning"):
        check_given(recipe, ["num_heads"])
    with pytest.raises(ValueError, match="every_action has no effect with flowformer_decision"):
        check_given(create_recipe("decision/own"), ["every_action"])
    with pytest.raises(ValueError, match="recorded has no effect with data"):
        check_given(create_recipe("decision/cartpole", data="x.npz"), ["recorded"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"targets": "many"}, "targets must be numbers joined by commas, such as 3600,1800, or None, got 'many'"),
        ({"targets": "1,inf"}, "targets must be numbers"),
        ({"attention": None}, "attention must be given with flowformer_decision"),
        ({"attention": "linformer"}, "no causal form"),
        ({"model": "flowformer_text"}, "model must be a decision model, got 'flowformer_text', a language model"),
        ({"dim": 10}, "num_heads must divide dim"),
        ({"padding": "both"}, "padding must be one of right, left"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create_recipe("decision/own", **fields)


@pytest.mark.parametrize("evaluation", ["window", "recurrent"])
@pytest.mark.parametrize("attention", CAUSAL)
def test_every_causal_mechanism_makes_a_model(attention: str, evaluation: str) -> None:
    form = DecisionFormat("CartPole-v1", (0.0,) * 4, (1.0,) * 4, num_actions=2, context=3, max_timestep=9)
    recipe = create_recipe("decision/cartpole", **{**SMALL, "attention": attention, "evaluation": evaluation})
    model: Any = recipe.build_model(form).eval()
    assert isinstance(model, DecisionTransformer)
    length = 9 if evaluation == "recurrent" else 3
    steps = torch.arange(length).expand(1, -1)
    assert model(torch.zeros(1, length, 4), steps % 2, torch.zeros(1, length), steps).shape == (1, length, 2)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_cartpole_records_trains_and_tells_everything(tmp_path: Path) -> None:
    result = run(tmp_path / "run", "decision/cartpole", recorded=6)
    assert result["recipe"]["targets"] == "500"
    for name in ("paper", "honest"):
        entry = result["protocols"][name]
        assert entry["metric"] == "test return in CartPole-v1"
        assert [one["seed"] for one in entry["episodes"]] == [101, 102, 103]  # those of the published evaluation
        returns = [one["return"] for one in entry["episodes"]]
        assert entry["value"] == pytest.approx(np.mean(returns))
        target, data, best = entry["parts"]
        assert (target["name"], target["value"]) == ("target 500, 3 episodes", pytest.approx(np.mean(returns)))
        assert target["spread"] == pytest.approx(np.std(returns))
        assert (data["name"], best["name"]) == ("data, 6 episodes", "data, best tenth")
        assert 10 < data["value"] < best["value"] <= 500
    assert result["protocols"]["paper"]["selection"] == "last step (4)"
    assert "best of 2 on the validation set; tested once" in result["protocols"]["honest"]["selection"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(protocol_table(result))
    part = result["protocols"]["paper"]["parts"][0]
    assert f"{part['value']:.1f} ± {part['spread']:.1f}" in console.export_text()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"validation/return", "validation/length", "validation/failed", "train/accuracy"} <= set(records[-1])


def test_the_same_seed_records_and_trains_the_same(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, "decision/cartpole", recorded=4)["protocols"] for name in "ab")
    assert first == second
    one, other = (create_recipe("decision/cartpole", recorded=4, seed=seed).build_task() for seed in (1, 5))
    assert one.train.fingerprint() == other.train.fingerprint()
    assert set(other.test.seeds) & set(other.validation.seeds) == set()


def test_own_episodes_train_both_models(tmp_path: Path, swings: Path) -> None:
    fields: dict[str, Any] = {}
    for model in ("flowformer_decision", "behaviour_cloning"):
        fields = {"episodes": 1, "data": str(swings), "env": "Pendulum-v1", "model": model, "max_timestep": 200}
        result = run(tmp_path / model, "decision/own", **fields)
        names = [part["name"] for part in result["protocols"]["paper"]["parts"]]
        # The best return of the data and its median.
        assert names == ["target -24, 3 episodes", "target -30, 3 episodes", "data, 3 episodes", "data, best tenth"]
    model, form = fit.load(create_recipe("decision/own", **{**SMALL, **fields}), tmp_path / model)
    assert isinstance(model, BehaviourCloning)
    assert (form.action_low, form.action_high) == ((-2.0,), (2.0,))  # the environment's: the files do not tell


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    fields = {"recorded": 4}
    whole = run(tmp_path / "whole", "decision/cartpole", **fields)
    stopped = tmp_path / "stopped"
    recipe = create_recipe("decision/cartpole", **{**SMALL, **fields})
    calls = iter(range(100))

    def stop(*arguments: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flowformer.training.module.check_signals", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, stopped, console=Console(quiet=True))
    assert not (stopped / "result.json").exists()
    assert run(stopped, "decision/cartpole", resume=True, **fields)["protocols"] == whole["protocols"]


def test_data_that_is_missing_or_of_another_kind_is_named(swings: Path) -> None:
    with pytest.raises(ValueError, match="decision/hopper-medium requires --data FILE"):
        create_recipe("decision/hopper-medium").build_task()
    with pytest.raises(ValueError, match="does not tell its environment: pass --env"):
        create_recipe("decision/own", data=str(swings)).build_task()
    with pytest.raises(DataError, match="observations of 3 numbers; CartPole-v1 has 4"):
        create_recipe("decision/own", data=str(swings), env="CartPole-v1").build_task()


def test_the_paper_tests_the_last_step_and_honest_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = create_recipe("decision/cartpole", **SMALL, recorded=4)
    history = [{"step": step, "validation/return": value} for step, value in ((0, 90.0), (2, 80.0), (4, 70.0))]
    asked: list[str] = []

    def load(recipe: Any, folder: Path, checkpoint: str) -> tuple[Any, Any]:
        asked.append(checkpoint)
        return checkpoint, None

    monkeypatch.setattr(fit, "load", load)
    monkeypatch.setattr(fit, "evaluate", lambda recipe, task, model: {"test/return": {"last": 1.0}.get(model, 2.0)})
    found = fit.protocols(recipe, recipe.build_task(), history, tmp_path)
    assert asked == ["best-validation", "last"]
    assert [(found[name]["step"], found[name]["value"]) for name in ("paper", "honest")] == [(4, 1.0), (2, 2.0)]
    history[2]["validation/return"] = 85.0  # the last is the best: one test is both
    asked.clear()
    found = fit.protocols(recipe, recipe.build_task(), history, tmp_path)
    assert asked == ["best-validation"]
    assert [(found[name]["step"], found[name]["value"]) for name in ("paper", "honest")] == [(4, 2.0), (4, 2.0)]


def test_the_format_of_a_run_does_not_choose_the_simulator():
    """The folder of a run may come from a stranger: no module that it names is imported."""
    recipe = create_recipe("decision/cartpole", recorded=4)
    form = replace(recipe.build_task().format, environment="evil:CartPole-v1")
    with pytest.raises(DataError, match="the run is of 'evil:CartPole-v1', not of CartPole-v1"):
        recipe.build_task(form)
