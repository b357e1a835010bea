"""Runs of methods that a library fits: what the commands do with them, and that they are whole or not there."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowformer.cli import main
from flowformer.models.classical import svm
from flowformer.models.classical.tcn import TCNClassifier
from flowformer.training import fit as fit_module
from flowformer.training.module import TaskModule

TINY = {
    "xgboost": ["--num-trees", "5", "--max-depth", "3"],
    "tcn": [
        "--steps=6", "--eval-every=2", "--channels=4", "--depth=2", "--reduced-dim=5", "--dim=6", "--accelerator=cpu",
    ],
    "lstm": ["--epochs=1", "--eval-every=1", "--dim=4", "--accelerator=cpu"],
    "rocket": ["--num-kernels", "30"],
    "dtw": [],
}  # fmt: skip


def words(method: str, files: dict[str, str], folder: Path, *more: str) -> list[str]:
    named = ["--train-file", files["train_file"], "--test-file", files["test_file"]]
    return ["train", f"timeseries/own/{method}", *named, *TINY[method], "--out", str(folder), *more]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def numbers(folder: Path) -> tuple:
    """What two runs of one seed have in common."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds")
    return records, result(folder)["protocols"], load_file(folder / "checkpoints" / "last.safetensors")


def same(one: Path, other: Path) -> bool:
    (*plain, tensors), (*others, second) = numbers(one), numbers(other)
    return plain == others and all(torch.equal(tensors[name], second[name]) for name in {**tensors, **second})


@pytest.fixture(scope="module")
def xgboost(waves, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "run"
    assert main(words("xgboost", waves, folder)) == 0
    return folder


def test_every_command_on_a_fitted_run(xgboost, waves, tmp_path, capsys):
    shutil.copytree(xgboost, tmp_path / "run")
    run = tmp_path / "run"
    found = result(run)
    paper, honest = found["protocols"]["paper"], found["protocols"]["honest"]
    assert paper == honest
    assert paper["value"] > 45  # a third by chance
    assert paper["value"] == 100 * (round(paper["value"] * 18 / 100) / 18)  # no rounding errors
    assert paper["selection"] == "the only evaluation: nothing was chosen"
    assert (paper["fit"], paper["published"]) == (1, None)
    assert {one.name for one in run.rglob("*.*") if one.is_file() and one.name != ".lock"} == {
        "recipe.json", "format.json", "metrics.jsonl", "result.json", "last.safetensors",
    }  # fmt: skip
    assert "learning_rate" in found["recipe"]
    assert "batch_size" not in found["recipe"]

    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"test accuracy, percent: {paper['value']:.2f}" in out
    assert "loss" not in out
    assert main(["predict", str(run), waves["test_file"]]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header[:2] == ["series", "label"]
    assert len(rows) == 18
    assert all(abs(sum(float(cell) for cell in row[2:]) - 1) < 1e-5 for row in rows)
    assert main(["visualize", str(run), waves["test_file"], "--out", str(tmp_path / "a.png")]) == 2
    assert "XGBoostClassifier has no attention to show" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--checkpoint", "best-test"]) == 2
    assert "no checkpoint 'best-test'" in capsys.readouterr().err

    before = numbers(run), (run / "result.json").stat().st_mtime_ns
    assert main(words("xgboost", waves, run)) == 2
    assert "already contains a run" in capsys.readouterr().err
    assert main(words("xgboost", waves, run, "--resume")) == 0
    assert "the only evaluation" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert before[1] == (run / "result.json").stat().st_mtime_ns


def test_interrupted_fit_leaves_nothing_half_written(xgboost, waves, tmp_path, monkeypatch, capsys):
    from flowformer.models.classical.boosting import XGBoostClassifier

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(XGBoostClassifier, "forward", stop)
        assert main(words("xgboost", waves, folder)) == 130
    assert "--resume" in capsys.readouterr().err
    assert {one.name for one in folder.rglob("*.*") if one.name != ".lock"} == {"recipe.json", "format.json"}
    assert main(["evaluate", str(folder)]) == 2
    assert "no checkpoint 'last'" in capsys.readouterr().err
    assert main(words("xgboost", waves, folder, "--resume")) == 0
    assert same(folder, xgboost)


def test_damaged_trees_are_refused_in_words(xgboost, waves, tmp_path, capsys):
    shutil.copytree(xgboost, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "left": tensors["left"] + 10**9}, path)
    assert main(["predict", str(tmp_path / "run"), waves["test_file"]]) == 2
    assert "cannot be used: left and right do not make trees" in capsys.readouterr().err


def test_trees_in_the_json_of_xgboost_are_refused_in_words(xgboost, waves, tmp_path, capsys):
    shutil.copytree(xgboost, tmp_path / "run")
    save_file({"trees": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert main(["predict", str(tmp_path / "run"), waves["test_file"]]) == 2
    assert "does not fit the model that recipe.json describes: weights that are missing" in capsys.readouterr().err


def test_grown_trees_are_used_without_xgboost(xgboost, waves, monkeypatch, capsys):
    assert main(["predict", str(xgboost), waves["test_file"]]) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "xgboost", None)
    assert main(["predict", str(xgboost), waves["test_file"]]) == 0
    assert capsys.readouterr().out == wanted
    assert main(["evaluate", str(xgboost)]) == 0


def test_numbers_of_another_dtype_are_refused(tcn, waves, tmp_path, capsys):
    shutil.copytree(tcn, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "classifier.counts": tensors["classifier.counts"].float()}, path)
    assert main(["predict", str(tmp_path / "run"), waves["test_file"]]) == 2
    assert "of another shape or dtype: 1, the first classifier.counts" in capsys.readouterr().err


def test_absent_library_is_named_before_anything_is_written(waves, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    assert main(words("xgboost", waves, tmp_path / "run")) == 2
    assert "pip install 'flowformer[xgboost]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(autouse=True, scope="module")
def short_search():
    """Few iterations: the vectors of an encoder that was hardly trained are not separable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svm, "_MOST_ITERATIONS", 1000)
        yield


@pytest.fixture(scope="module")
def tcn(waves, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tcn") / "run"
    assert main(words("tcn", waves, folder)) == 0
    return folder


@pytest.mark.parametrize("when", ["encoder", "classifier"])
def test_interrupted_tcn_resumes_to_the_same_result(tcn, waves, tmp_path, monkeypatch, capsys, when):
    folder, before = tmp_path / "run", TaskModule.on_train_epoch_start

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def stop_in_the_third_round(module):
        stop() if module.current_epoch == 2 else before(module)

    with monkeypatch.context() as patch:
        if when == "encoder":
            patch.setattr(TaskModule, "on_train_epoch_start", stop_in_the_third_round)
        else:
            patch.setattr(TCNClassifier, "fit", stop)
        assert main(words("tcn", waves, folder)) == 130
    assert not (folder / "result.json").exists()
    assert main(["predict", str(folder), waves["test_file"]]) == 2
    assert "the model has not been fitted" in capsys.readouterr().err
    assert main(words("tcn", waves, folder, "--resume")) == 0
    assert same(folder, tcn)
    paper = result(folder)["protocols"]["paper"]
    assert (paper["step"], paper["selection"]) == (6, "the only evaluation: nothing was chosen")


def test_other_seed_gives_another_encoder(tcn, waves, tmp_path):
    assert main(words("tcn", waves, tmp_path / "run", "--seed", "1")) == 0
    assert not same(tmp_path / "run", tcn)


def test_options_without_effect_are_refused(waves, tmp_path, capsys):
    assert main(words("tcn", waves, tmp_path / "run", "--compile")) == 2
    assert "compile has no effect" in capsys.readouterr().err
    assert main(words("xgboost", waves, tmp_path / "run", "--epochs", "3")) == 2
    assert "unknown argument --epochs" in capsys.readouterr().err


def test_lstm_is_trained_as_the_others_are(waves, tmp_path, capsys):
    assert main(words("lstm", waves, tmp_path / "run", "--validation-fraction", "0.3")) == 0
    assert "best of 2 on the validation set" in result(tmp_path / "run")["protocols"]["honest"]["selection"]
    assert main(["evaluate", str(tmp_path / "run"), "--checkpoint", "best-validation"]) == 0
    assert "test/loss" in capsys.readouterr().out


def test_two_runs_of_an_lstm_are_equal(waves, tmp_path):
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        assert main(words("lstm", waves, tmp_path / name, "--seed", seed)) == 0
    assert same(tmp_path / "one", tmp_path / "two")
    assert not same(tmp_path / "one", tmp_path / "other")


@pytest.mark.slow  # aeon compiles with numba
@pytest.mark.parametrize("method", ["dtw", "rocket"])
def test_two_runs_of_aeon_are_equal(waves, tmp_path, method, capsys):
    for name in ("one", "two"):
        assert main(words(method, waves, tmp_path / name, "--seed", "3")) == 0
        assert main(["evaluate", str(tmp_path / name)]) == 0
    assert same(tmp_path / "one", tmp_path / "two")
    value = result(tmp_path / "one")["protocols"]["paper"]["value"]
    assert value > 45
    assert f"{value:.2f}" in capsys.readouterr().out


@pytest.mark.slow
def test_dtw_gives_the_published_accuracy_of_japanese_vowels(tmp_path):
    assert main(["train", "uea/JapaneseVowels/dtw", "--out", str(tmp_path / "run")]) == 0
    paper = result(tmp_path / "run")["protocols"]["paper"]
    assert (round(paper["value"], 1), paper["published"]) == (94.9, 94.9)


def test_evaluation_of_no_fitted_model_is_an_error():
    """A recipe of a library has no way to evaluate by gradients' trainer."""
    from flowformer.recipes import create_recipe

    with pytest.raises(TypeError, match="fitted at once"):
        fit_module.evaluate(create_recipe("timeseries/own/dtw"), None, torch.nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]
