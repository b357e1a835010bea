"""Recipes of pictures."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from flowformer.cli import main
from flowformer.recipes import create_recipe
from flowformer.tasks.images.cifar import CLASSES
from flowformer.training.fit import load, train

# Most digits are held out: training is what takes time.
TINY = {"epochs": 2, "eval_every": 1, "batch_size": 30, "accelerator": "cpu", "test_fraction": 0.85}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty pictures whose class is their colour."""
    folder = tmp_path_factory.mktemp("cifar")
    for row in range(40):
        label = row % 4
        path = folder / CLASSES[label] / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), ((label % 2) * 200, (label // 2) * 200, row)).save(path)
    for name in CLASSES[4:]:
        for row in range(2):
            (folder / name).mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (9, 9, 200)).save(folder / name / f"{row}.png")
    return folder


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("attention", ["flow", "aft_conv", "aft_full"])
def test_digits_learn_with_any_attention(tmp_path, attention):
    made = create_recipe("images/digits", **TINY, attention=attention)
    train(made, tmp_path, console=Console(quiet=True))
    losses = [record["test/loss"] for record in records(tmp_path)]
    assert losses[-1] < losses[0] - 0.05
    model, form = load(made, tmp_path, "best-test")
    assert form.classes == tuple("0123456789")
    assert model.stages[0].blocks[0].attention.__class__.__name__.lower().startswith(attention.replace("_", "")[:4])


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, monkeypatch):
    made = create_recipe("images/digits", **TINY, dropout=0.1, drop_path=0.1, flip=True)
    train(made, tmp_path / "whole", console=Console(quiet=True))
    from flowformer.training.module import TaskModule

    plain = TaskModule.on_train_epoch_start

    def stop(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(TaskModule, "on_train_epoch_start", stop)
        with pytest.raises(KeyboardInterrupt):
            train(made, tmp_path / "cut", console=Console(quiet=True))
    assert len(records(tmp_path / "cut")) == 2
    train(made, tmp_path / "cut", resume=True, console=Console(quiet=True))
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert {"test/accuracy", "train/accuracy"} <= set(records(tmp_path / "whole")[-1])


def test_cifar10_by_command(tmp_path, pictures, capsys, caplog):
    out = str(tmp_path / "run")
    words = ["train", "images/cifar10", "--data", str(pictures), "--out", out, "--epochs", "1", "--accelerator", "cpu"]
    assert main([*words, "--test-fraction", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "attention flow" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "without a test set: 0.5 of it held out" in result["data"]["source"]
    assert main(["evaluate", out]) == 0
    assert "test accuracy, percent" in capsys.readouterr().out

    (tmp_path / "new").mkdir()
    Image.new("L", (50, 40), 100).save(tmp_path / "new" / "grey.png")
    (tmp_path / "new" / "broken.jpg").write_text("no picture")
    (tmp_path / "new" / "notes.txt").write_text("no picture either")
    Image.new("RGB", (32, 32), (200, 0, 3)).save(tmp_path / "one.png")
    assert main(["predict", out, str(tmp_path / "new"), str(tmp_path / "one.png")]) == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["picture", "label", *(f"p_{name}" for name in CLASSES)]
    assert [row[0] for row in rows] == [str(tmp_path / "new" / "grey.png"), str(tmp_path / "one.png")]
    assert "broken.jpg is left out: not an image of a known format" in caplog.text
    for row in rows:
        probabilities = [float(cell) for cell in row[2:]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert row[1] == CLASSES[int(np.argmax(probabilities))]
    assert main(["predict", out, str(tmp_path / "new" / "broken.jpg")]) == 2
    assert "none of 1 files" in capsys.readouterr().err
    assert main(["predict", out, str(tmp_path / "absent.jpg")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_a_model_of_its_own_attention_is_named(tmp_path, capsys):
    words = ["train", "images/digits", "--attention", "null", "--patch-size", "4"]
    small = ["--epochs", "1", "--batch-size", "50", "--accelerator", "cpu", "--test-fraction", "0.9"]
    assert main([*words, *small, "--out", str(tmp_path / "run")]) == 0
    assert "attention of flowformer_vision_micro" in capsys.readouterr().out.replace("\n", " ")


def test_what_would_be_ignored_is_refused(capsys):
    # Pictures of these sets have one size.
    assert main(["train", "images/digits", "--image-size", "64"]) == 2
    assert "unknown argument --image-size" in capsys.readouterr().err


def test_the_command_says_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path))
    assert main(["train", "images/cifar10"]) == 2
    assert "CIFAR-10: no cifar-10-python.tar.gz in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention_options": "{window: 3}"}, "attention_options must be a mapping from option names to JSON values"),
        ({"attention_options": {"clmp": 1}}, "flow has no option 'clmp'"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1"),
        ({"patch_size": -1}, "patch_size must be at least 1, or None, got -1"),
        ({"crop_padding": -1}, "crop_padding must be at least 0, got -1"),
        ({"test_fraction": 1.0}, "test_fraction must be above 0 and below 1, got 1.0"),
        ({"warmup_epochs": 99}, "warmup_epochs must be at most epochs 30, got 99"),
    ],
)
def test_meaningless_values_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        create_recipe("images/digits", **fields)


def test_a_model_of_another_kind_is_refused():
    said = "model must be an image classifier, got 'flowformer_timeseries', a series classifier; available: aft_conv"
    with pytest.raises(ValueError, match=said):
        create_recipe("images/digits", model="flowformer_timeseries")


def test_warm_up_is_counted_in_epochs():
    assert create_recipe("images/digits", epochs=10, warmup_epochs=2).count_warmup_steps(500) == 100
    assert create_recipe("images/digits", epochs=10, warmup_epochs=2, warmup_steps=7).count_warmup_steps(500) == 107


@pytest.mark.slow
def test_the_demo_reaches_97_percent(tmp_path):
    result = train(create_recipe("images/digits"), tmp_path, console=Console(quiet=True))
    assert result["protocols"]["honest"]["value"] >= 97


def test_options_reach_the_mechanism():
    made = create_recipe("images/digits", attention_options={"competition": None})
    torch.manual_seed(0)
    model = made.build_model(made.build_task().format).eval()
    with_competition = create_recipe("images/digits")
    torch.manual_seed(0)
    other = with_competition.build_model(made.build_task().format).eval()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32))
    assert (model(x) - other(x)).abs().max() > 0
