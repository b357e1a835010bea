"""Recipes on the command line and from files: options, groups, choices, mechanisms, and what is refused."""

import dataclasses
import json
import os
import typing
from pathlib import Path

import pytest

from flowformer import cli
from flowformer.cli.arguments.parser import UsageError
from flowformer.cli.arguments.recipes import read_command
from flowformer.common.fields import GROUPS, options_of
from flowformer.recipes import create_recipe, list_recipes, read_recipe
from flowformer.training.recipe import Schedule
from flowformer.training.schedules import SCHEDULES

VOWELS = "uea/JapaneseVowels"


def read(*words, name=VOWELS):
    return read_command(name, [str(word) for word in words]).recipe


def refused(*words, name=VOWELS):
    with pytest.raises(UsageError) as error:
        read(*words, name=name)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_read_back_exactly(name):
    recipe = create_recipe(name)
    written = json.loads(json.dumps(recipe.to_json(), allow_nan=False))
    assert read_recipe(written) == recipe
    assert set(written) == {field.name for field in dataclasses.fields(recipe)}
    assert {option.group for option in options_of(type(recipe)).values()} <= set(GROUPS)


def test_changed_recipes_are_read_back_exactly():
    for name, fields in (
        (VOWELS, {"data_dir": Path("a/b"), "clip_grad_norm": None, "attention": "linear", "validation_fraction": 0.5}),
        (VOWELS, {"attention_options": {}, "learning_rate": 1}),
        ("imagenet/flowformer", {"attention": None, "mixup": None, "accumulate": 3, "data": "images"}),
        ("density/aft-local-24", {"attention_options": {"window": 5, "position_dim": None}, "num_layers": 2}),
        ("imagenet/aft-conv-transfer", {"attention_options": {"kernel_size": (3, 5)}}),
    ):
        recipe = create_recipe(name, **fields)
        again = read_recipe(json.loads(json.dumps(recipe.to_json())))
        assert again == recipe
        assert type(getattr(again, "data_dir", None)) is type(getattr(recipe, "data_dir", None))


def test_values_are_kept_in_the_type_of_their_field():
    recipe = create_recipe(VOWELS, data_dir="a/b", learning_rate=1, attention_options={"preset": "core"})
    assert recipe.data_dir == Path("a/b")
    assert isinstance(recipe.learning_rate, float)
    assert create_recipe("images/cifar10", data=Path("x")).to_json()["data"] == "x"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": "3"}, "seed must be an integer, at least 0, got '3'"),
        ({"seed": 1.0}, "seed must be an integer, at least 0, got 1.0"),
        ({"seed": True}, "seed must be an integer, at least 0, got True"),
        ({"epochs": None}, "epochs must be an integer, at least 1, got None"),
        ({"learning_rate": float("inf")}, "learning_rate must be a number, above 0, got inf"),
        ({"clip_grad_norm": 0}, "clip_grad_norm must be above 0, or None, got 0"),
        ({"clip_grad_norm": "4"}, "clip_grad_norm must be a number, above 0, or None, got '4'"),
        ({"optimizer": "sgd"}, "optimizer must be one of radam, adam, adamw, got 'sgd'"),
        ({"mask_padding": 1}, "mask_padding must be true or false, got 1"),
        ({"data_dir": ""}, "data_dir must be a path or None, got ''"),
        ({"attention": ""}, "attention must be a non-empty string, got ''"),
        ({"attention_options": {1: 2}}, "attention_options must be a mapping"),
        ({"attention_options": {"clamp": object()}}, "attention_options must be a mapping"),
        ({"epoch": 3}, r"unknown field 'epoch' \(did you mean 'epochs'\?\)"),
    ],
)
def test_python_refuses_what_the_command_line_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        create_recipe(VOWELS, **fields)


def test_a_recipe_keeps_its_own_copy_of_options():
    options = {"window": 5}
    recipe = create_recipe(VOWELS, attention="aft_local", attention_options=options)
    options["window"] = 7
    assert recipe.attention_options == {"window": 5}
    assert create_recipe("text/bytes").attention_options is not create_recipe("text/bytes").attention_options


def test_another_mechanism_leaves_the_published_options_behind():
    assert create_recipe(VOWELS).attention_options == {"preset": "timeseries"}
    assert create_recipe(VOWELS, attention="linear").attention_options == {}
    assert create_recipe("density/digits", attention="softmax").attention_options == {}
    assert create_recipe("density/digits", attention="aft_local").attention_options["window"] == 16


def test_choices_of_the_schedule_are_those_that_there_are():
    assert typing.get_args(Schedule) == tuple(SCHEDULES)


# -------------------------------------------------------------------------------------------------------- command line


def test_null_is_none():
    recipe = read("--clip-grad-norm", "null", "--validation-fraction", "null", "--data-dir", "null")
    assert (recipe.clip_grad_norm, recipe.validation_fraction, recipe.data_dir) == (None, None, None)
    recipe = read("--attention", "null", "--rand-augment", "null", "--mixup", "null", name="imagenet/flowformer")
    assert (recipe.attention, recipe.rand_augment, recipe.mixup) == (None, None, None)


def test_options_of_a_mechanism():
    recipe = read("--attention-options.clamp", "5", "--attention-options.competition", "null")
    assert recipe.attention_options == {"preset": "timeseries", "clamp": 5, "competition": None}
    recipe = read("--attention", "aft_local", "--attention-options.window=3", "--attention-options.hard", "true")
    assert recipe.attention_options == {"window": 3, "hard": True}
    recipe = read("--attention-options.kernel_size", "[7, 7]", name="imagenet/aft-conv-transfer")
    assert recipe.attention_options == {"num_heads": 32, "kernel_size": [7, 7]}
    assert read("--attention-options", "{}").attention_options == {}
    assert read("--attention-options", '{"clamp": 1e-3}').attention_options == {"clamp": 0.001}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attention-options.clmp", "5"], "flow has no option 'clmp' (did you mean 'clamp'?)"),
        (["--attention-options.clmp", "5"], "did you mean 'clamp'"),
        (["--attention-options.causal", "true"], "flow has no option 'causal'; available: preset, bias, "),
        (["--attention", "aft_local", "--attention-options.windw", "5"], "(did you mean 'window'?)"),
        (["--attention", "linear", "--attention-options.window", "5"], "linear has no option 'window'; available: "),
        (["--attention-optons.clamp", "5"], "did you mean --attention-options.clamp?"),
        (["--attention-options", "3"], "attention_options must be a mapping"),
        (["--clip-grad-norm", "0"], "clip_grad_norm must be above 0, or None, got 0"),
        (["--clip-grad-norm", "x"], "clip_grad_norm must be a number, above 0, or None, got 'x'"),
        (["--seed", "1.5"], "seed must be an integer, at least 0, got '1.5'"),
        (["--seed", "null"], "seed must be an integer, at least 0, got None"),
        (["--optimizer", "sgd"], "optimizer must be one of radam, adam, adamw, got 'sgd'"),
        (["--learning_rate", "1"], "did you mean --learning-rate?"),
        (["--seed"], "--seed: expected one argument"),
        (["--data-dir", ""], "an option has an empty value: write null for None"),
        (["--data-dir="], "an option has an empty value: write null for None"),
        (["stray"], "unknown argument stray"),
    ],
)
def test_mistakes_take_one_line(words, message):
    assert message in refused(*words)


def test_mechanism_is_checked_before_data_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "timeseries/own", "--train-file", "no.ts", "--attention-options.clmp", "5"]) == 2
    assert "did you mean 'clamp'" in capsys.readouterr().err


def test_folder_and_resume():
    command = read_command(VOWELS, ["--attention", "linear", "--seed", "3"])
    assert (command.folder, command.resume) == (Path("runs") / VOWELS / "linear-seed3", False)
    command = read_command(VOWELS, ["--out", "here", "--resume"])
    assert (command.folder, command.resume) == (Path("here"), True)


def test_help_shows_groups_choices_ranges_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", VOWELS, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    text = " ".join(out.split())
    assert "--optimizer {radam,adam,adamw} optimizer (default: radam)" in text
    assert "--dropout FLOAT dropout (at least 0 and below 1; default: 0.1)" in text
    assert "--clip-grad-norm FLOAT|null" in text
    assert '--attention-options.NAME VALUE (default: {"preset": "timeseries"})' in text
    assert "--no-mask-padding" in text
    assert out.index("--seed") > places[GROUPS.index("optimisation")]


# --------------------------------------------------------------------------------------------------------------- files


def test_yaml_and_json_are_read_and_the_command_line_overrides_them(tmp_path):
    path = write(tmp_path / "a.yaml", "seed: 9\nclip_grad_norm:\nlearning_rate: 1e-4\nattention_options:\n  clamp: 5\n")
    recipe = read("--config", path, "--seed", 2)
    assert (recipe.seed, recipe.clip_grad_norm, recipe.learning_rate) == (2, None, 1e-4)
    assert recipe.attention_options == {"clamp": 5}
    assert read("--config", path, "--attention-options.competition", "null").attention_options == {
        "clamp": 5, "competition": None,
    }  # fmt: skip
    path = write(tmp_path / "a.json", json.dumps({"attention_options": {"eps": 1e-06}, "data_dir": "x", "dim": 16}))
    recipe = read("--config", path)
    assert (recipe.attention_options, recipe.data_dir, recipe.dim) == ({"eps": 1e-06}, Path("x"), 16)


def test_another_mechanism_leaves_the_options_of_the_file_behind(tmp_path):
    path = write(tmp_path / "a.yaml", "attention: aft_local\nattention_options: {window: 5}\n")
    assert read("--config", path).attention_options == {"window": 5}
    assert read("--config", path, "--attention", "linear").attention_options == {}
    assert read("--config", path, "--attention", "flow").attention_options == {"preset": "timeseries"}
    path = write(tmp_path / "b.yaml", "attention_options: {clamp: 5}\n")  # of the recipe's own mechanism
    assert read("--config", path, "--attention", "linear").attention_options == {}
    assert read("--config", path, "--attention", "flow").attention_options == {"clamp": 5}


@pytest.mark.parametrize("name", ["density/aft-local-24-free", "images/own", VOWELS, "wikitext103/flow-no-competition"])
def test_recipe_of_a_run_is_a_config(tmp_path, name):
    recipe = create_recipe(name, seed=7, clip_grad_norm=None)
    path = write(tmp_path / "recipe.json", json.dumps(recipe.to_json()))
    assert read("--config", path, name=name) == recipe
    assert read("--config", path, "--seed", 8, name=name) == dataclasses.replace(recipe, seed=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 9", "unknown field 'sed' (did you mean 'seed'?)"),
        ("seed: x", "seed must be an integer, at least 0, got 'x'"),
        ("seed: [x", "Problems parsing config"),
        ("- 1", "expected a mapping from fields of the recipe to their values"),
        ("", "expected a mapping from fields of the recipe to their values"),
        ("name: uea/PEMS-SF", "contains options of the recipe uea/PEMS-SF, not of uea/JapaneseVowels"),
        ("resume: true", "unknown field 'resume'"),
        ("\0", "Problems parsing config"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, message):
    said = refused("--config", write(tmp_path / "bad.yaml", text))
    assert "bad.yaml" in said
    assert message in said


def test_files_that_cannot_be_read(tmp_path):
    assert refused("--config", tmp_path / "absent.yaml") == f"{tmp_path / 'absent.yaml'}: No such file or directory"
    assert refused("--config", tmp_path) == f"{tmp_path}: is a folder, expected a file"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert "binary.yaml cannot be read" in refused("--config", tmp_path / "binary.yaml")


def test_run_of_a_config_repeats_it(waves, tmp_path, capsys):
    words = ["--train-file", waves["train_file"], "--test-file", waves["test_file"], "--epochs", "1", "--dim", "8"]
    small = ["--num-heads", "2", "--ffn-dim", "8", "--accelerator", "cpu", "--clip-grad-norm", "null"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(["train", "timeseries/own", *words, *small, "--out", str(first)]) == 0
    config = ["--config", str(first / "recipe.json")]
    assert cli.main(["train", "timeseries/own", *config, "--out", str(second)]) == 0
    assert (second / "recipe.json").read_text() == (first / "recipe.json").read_text()
    values = [json.loads((folder / "result.json").read_text())["protocols"] for folder in (first, second)]
    assert values[0] == values[1]
    assert json.loads((first / "recipe.json").read_text())["clip_grad_norm"] is None
    assert cli.main(["train", "timeseries/own", *config, "--out", str(first), "--resume", "--seed", "1"]) == 2
    assert "seed was 0, now 1" in capsys.readouterr().err


def test_recipe_file_of_another_version_is_explained(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(json.dumps({**create_recipe(VOWELS).to_json(), "preset": "core"}))
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "unknown field 'preset'" in capsys.readouterr().err


def test_aliases_of_yaml_are_refused(tmp_path, capsys):
    """A few of them can stand for more than any memory holds."""
    lines = ["a: &b0 [x, x]", *(f"a{n}: &b{n + 1} [*b{n}, *b{n}, *b{n}, *b{n}]" for n in range(40)), "dim: *b40"]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    assert cli.main(["train", "text/own", "--config", str(tmp_path / "bomb.yaml")]) == 2
    assert "bomb.yaml, line 2: aliases of YAML are not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "dim: " + "[" * 25 + "]" * 25, "a:\n" + "".join(" " * n + "- a:\n" for n in range(1, 90, 2))],
)
def test_deep_nesting_is_refused(tmp_path, text, capsys):
    (tmp_path / "deep.yaml").write_text(text)
    assert cli.main(["train", "text/own", "--config", str(tmp_path / "deep.yaml")]) == 2
    assert "nesting of more than 20 levels is not supported" in capsys.readouterr().err


def test_config_that_is_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["train", "text/own", "--config", str(tmp_path / "pipe")]) == 2
    assert "is a pipe or a device, expected a file" in capsys.readouterr().err
