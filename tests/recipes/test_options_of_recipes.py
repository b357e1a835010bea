"""Options of all recipes: each number has its range, and each field is read by something."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest

from flowformer import cli
from flowformer.common.fields import options_of
from flowformer.recipes import create_recipe, list_recipes
from flowformer.recipes.model import build_model, check_model
from flowformer.training import fit, fitted, module, recipe

CLASSES = {type(create_recipe(name)): name for name in list_recipes()}
WRONG = (math.nan, math.inf, -math.inf, -1, 1e20, 10**20, 2**63, 2**64, 10**400, "1", True, [1])


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_number_is_refused_out_of_its_range(kind):
    for option in options_of(kind).values():
        if option.type in (int, float):
            for value in WRONG:
                with pytest.raises(ValueError, match=rf"^{option.name} must be") as error:
                    option.convert(value)
                assert len(str(error.value)) < 400


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_read(kind):
    """By the class itself or by training; the others have to be declared as having no effect."""
    read = {name for source in (fit, fitted, module, recipe) for name in _names(inspect.getsource(source), "recipe")}
    read |= _read_by(kind)
    unread = [name for name in options_of(kind) if name not in read]
    assert [name for name in unread if name not in create_recipe(CLASSES[kind]).misfits()] == []


def _read_by(kind: type) -> set[str]:
    """Fields that the methods of a class read, those of base classes only where they are not overridden."""
    found: set[str] = set()
    seen: set[str] = set()
    for one in kind.__mro__[:-1]:
        for name, member in vars(one).items():
            function = getattr(member, "fget", member)
            if not inspect.isfunction(function) or name in seen or name.startswith("__") or name == "misfits":
                continue
            source = inspect.getsource(function)
            if f"super().{name}" not in source:
                seen.add(name)
            found |= _names(source, "self")
    return found | _listed(kind)


def _names(source: str, owner: str) -> set[str]:
    return set(re.findall(rf"\b{owner}\.(\w+)", source))


def _listed(kind: type) -> set[str]:
    """Fields that are read by name, from the list of sizes of a language model or a classifier of sequences."""
    from flowformer.recipes import language, lra, lra_published

    lists = {language.LanguageRecipe: language._SIZES, lra.SequenceRecipe: lra_published.MODEL_FIELDS}
    return {name for base, names in lists.items() if issubclass(kind, base) for name in names}


def test_a_field_that_nothing_reads_is_found():
    from dataclasses import dataclass

    from flowformer.common.fields import option
    from flowformer.recipes.toys import SortRecipe

    @dataclass(frozen=True, kw_only=True)
    class Idle(SortRecipe):
        idle: int = option(1, "nothing reads it", at_least=1)

    assert "size" in _read_by(Idle)
    assert "idle" not in _read_by(Idle)


# ------------------------------------------------------------------------------------------------- on the command line

SERIES = ["train", "timeseries/own", "--train-file", "a.csv", "--test-file", "b.csv"]
IMAGES = ["train", "images/own", "--data", "x"]
TEXT = ["train", "text/own", "--file", "x.txt"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*SERIES, "--clip-grad-norm", "nan"], "clip_grad_norm must be a number, above 0, or None, got 'nan'"),
        ([*SERIES, "--clip-grad-norm", "-1"], "clip_grad_norm must be above 0, or None, got -1"),
        ([*SERIES, "--dropout", "1"], "dropout must be at least 0 and below 1, got 1"),
        ([*SERIES, "--seed", str(2**63)], "seed must be at most 4,294,967,295, got 9223372036854775808"),
        ([*SERIES, "--learning-rate", "inf"], "learning_rate must be a number, above 0, got 'inf'"),
        ([*SERIES, "--num-layers", "-1"], "num_layers must be at least 1, got -1"),
        ([*TEXT, "--steps", "1e20"], "steps must be "),
        ([*TEXT, "--dim", str(10**18)], "dim must be at most 1,000,000, got 1000000000000000000"),
        (
            [*TEXT, "--model", "flowformer_vision_micro"],
            "model must be a language model, got 'flowformer_vision_micro'",
        ),
        ([*TEXT, "--attention-options.clamp", "-1"], "attention_options: clamp must be positive or None, got -1"),
        ([*TEXT, "--attention-options.window", "5"], "flow has no option 'window'"),
        ([*TEXT, "--attention-options.num_heads", "8"], "flow has no option 'num_heads'"),
        ([*TEXT, "--steps", "10", "--eval-every", "1000"], "eval_every must be at most steps 10, got 1000"),
        ([*TEXT, "--steps", "10", "--warmup-steps", "11"], "warmup_steps must be at most steps 10, got 11"),
        ([*SERIES, "--epochs", "3", "--eval-every", "9"], "eval_every must be at most epochs 3, got 9"),
        ([*SERIES, "--min-learning-rate", "1e-5"], "min_learning_rate has no effect with the schedule constant"),
        ([*SERIES, "--warmup-learning-rate", "1e-5"], "warmup_learning_rate has no effect without warm-up steps"),
        ([*SERIES, "--decayed", "linear"], "decayed has no effect without weight_decay"),
        ([*IMAGES, "--step-images", "512"], "step_images has no effect where accumulate is given, 1"),
        (
            [*IMAGES, "--rand-augment", "rand-m9", "--color-jitter", "0.1"],
            "color_jitter has no effect with RandAugment",
        ),
        (["train", "imagenet/aft-conv-transfer", "--patch-size", "4"], "patch_size has no effect"),
        (["train", "wikitext103/flow", "--length", "100"], "context_window must be below length 100, got 400"),
    ],
)
def test_it_is_refused_before_any_data_is_read(words, says, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_a_short_run_is_a_config(tmp_path, capsys):
    """Its published options, such as the warm-up, may be longer than the run."""
    import json

    from flowformer.cli.arguments.recipes import read_command

    short = create_recipe("text/own", steps=1)
    assert (short.warmup_steps, short.eval_every) == (100, 500)  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "recipe.json").write_text(json.dumps(short.to_json()))
    words = ["--config", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run")]
    assert read_command("text/own", words).recipe == short
    (tmp_path / "recipe.json").write_text(json.dumps({**short.to_json(), "eval_every": 7}))
    assert cli.main(["train", "text/own", *words]) == 2
    assert "eval_every must be at most steps 1, got 7" in capsys.readouterr().err


def test_a_model_beyond_the_memory_is_refused_with_its_sizes():
    sizes: dict[str, Any] = {"vocab_size": 1_000_000, "dim": 1_000_000, "num_heads": 1, "num_layers": 1}
    with pytest.raises(ValueError, match=r"too large for this machine: its parameters take .* GB.* dim 1000000"):
        build_model("flowformer_text", **sizes, ffn_dim=1_000_000, max_length=8)
    with pytest.raises(ValueError, match=r"too large for this machine: its sizes are .*2147483647"):
        build_model(
            "flowformer_text", **{**sizes, "dim": 2**31 - 1, "vocab_size": 2**31 - 1}, ffn_dim=2**31 - 1, max_length=8
        )


def test_a_model_without_annotation_may_be_anything(monkeypatch):
    from flowformer.models.language import LanguageModel
    from flowformer.models.registry import MODELS

    MODELS.add("unknown_kind", lambda **options: None)  # pyright: ignore[reportArgumentType]
    try:
        check_model("unknown_kind", LanguageModel)
    finally:
        MODELS.remove("unknown_kind")


def test_damaged_fields_of_a_run_are_named(tmp_path, capsys):
    import json

    values = create_recipe("timeseries/own").to_json()
    for name, wrong in (("dim", "16"), ("num_heads", None), ("attention", [1]), ("optimizer", {}), ("epochs", [3])):
        (tmp_path / "recipe.json").write_text(json.dumps({**values, name: wrong}))
        assert cli.main(["evaluate", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert f"{name} must be " in said
        assert "recipe.json" in said
    for text in ("[1]", "null", "3", '"x"', "{}", '{"name": 3}', '{"name": ["a"]}', '{"name": null}', "[" * 100_000):
        (tmp_path / "recipe.json").write_text(text)
        assert cli.main(["evaluate", str(tmp_path)]) == 2
        assert "recipe.json" in capsys.readouterr().err
