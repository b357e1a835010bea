"""Runs: what they write, how they resume, what they report."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from flowformer.common.errors import RunError
from flowformer.recipes import create_recipe, read_recipe
from flowformer.report.tables import protocol_table
from flowformer.tasks.series.task import SeriesTask
from flowformer.training import fit as fit_module
from flowformer.training.fit import evaluate, load, protocols, train
from flowformer.training.module import TaskModule

TINY = {"dim": 16, "num_heads": 2, "ffn_dim": 16, "batch_size": 4, "accelerator": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def data(waves):
    TINY.update(waves)


def recipe(**fields):
    return create_recipe("timeseries/own", **{**TINY, "epochs": 3, "eval_every": 2, **fields})


def run(folder, resume=False, **fields):
    return train(recipe(**fields), folder, resume=resume, command="the command", console=Console(quiet=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records(folder)]


def test_result_holds_both_protocols(finished):
    folder, result = finished
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["recipe"]["attention"] == "flow"
    assert result["seed"] == 0
    assert result["command"] == "the command"
    assert result["environment"]["torch"] == torch.__version__
    paper, honest = result["protocols"]["paper"], result["protocols"]["honest"]
    for entry in (paper, honest):
        assert {"metric", "value", "published", "selection"} <= set(entry)
        assert entry["published"] is None
    by_epoch = {record["epoch"]: record for record in records(folder)}
    assert paper["value"] == 100 * max(r["test/accuracy"] for r in by_epoch.values() if "test/accuracy" in r)
    assert honest["value"] == 100 * by_epoch[3]["test/accuracy"]
    assert "last epoch (3)" in honest["selection"]
    assert "on the test set" in paper["selection"]


def test_accuracy_is_a_fraction_without_rounding_errors(finished):
    folder, _ = finished
    task = recipe().build_task()
    for record in records(folder):
        for name, examples in (("test/accuracy", len(task.test)), ("train/accuracy", len(task.train))):
            if name in record:
                assert record[name] == round(record[name] * examples) / examples


def test_evaluates_when_the_recipe_says(finished):
    evaluated = [record["epoch"] for record in records(finished[0]) if "test/accuracy" in record]
    assert evaluated == [0, 1, 2, 3]
    assert recipe(epochs=9, eval_every=4).evaluated_rounds == [0, 1, 4, 8, 9]
    assert create_recipe("uea/JapaneseVowels").evaluated_rounds[:5] == [0, 1, 2, 4, 6]


def test_unscheduled_epochs_are_not_evaluated(tmp_path):
    run(tmp_path, epochs=4, eval_every=4)
    assert [r["epoch"] for r in records(tmp_path) if "test/accuracy" in r] == [0, 1, 4]


def test_training_learns(finished):
    losses = [record["train/loss"] for record in records(finished[0])[1:]]
    assert losses[-1] < losses[0]


def test_same_seed_same_numbers(finished, tmp_path):
    run(tmp_path)
    assert untimed(tmp_path) == untimed(finished[0])


def test_other_seed_other_numbers(finished, tmp_path):
    run(tmp_path, seed=1)
    assert untimed(tmp_path) != untimed(finished[0])


@pytest.mark.parametrize("when", ["first epoch", "later epoch"])
def test_interrupted_run_resumes_to_the_same_result(finished, tmp_path, monkeypatch, when):
    stop_at = 0 if when == "first epoch" else 2
    step = TaskModule.training_step

    def interrupted(self, batch, index):
        if self.current_epoch == stop_at and index == 5:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(TaskModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(TaskModule, "training_step", step)
    result = run(tmp_path, resume=True)
    assert untimed(tmp_path) == untimed(finished[0])
    assert result["protocols"] == finished[1]["protocols"]
    ours, _ = load(recipe(), tmp_path)
    whole, _ = load(recipe(), finished[0])
    for name, value in whole.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_epoch_recorded_but_not_saved_is_run_again(finished, tmp_path, monkeypatch):
    run(tmp_path, epochs=2)
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + json.dumps({"epoch": 3, "seconds": 1.0, "train/loss": 9.0}) + "\n")
    (tmp_path / "result.json").unlink()
    three = json.loads((tmp_path / "recipe.json").read_text()) | {"epochs": 3}
    (tmp_path / "recipe.json").write_text(json.dumps(three))
    run(tmp_path, resume=True)
    assert untimed(tmp_path)[3] == untimed(finished[0])[3]


def test_folder_with_a_run_is_not_overwritten(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(RunError, match="already contains a run: pass --resume to continue it"):
        run(folder)
    with pytest.raises(RunError, match=r"run of another recipe: learning_rate was 0.001, now 0.1"):
        run(folder, resume=True, learning_rate=0.1)


def test_complete_run_is_not_run_again(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(fit_module, "fit", None)
    assert run(folder, resume=True, workers=1) == result  # workers do not change a result


def test_validation_part_chooses_the_epoch(tmp_path):
    result = run(tmp_path, validation_fraction=0.2)
    by_epoch = {record["epoch"]: record for record in records(tmp_path)}
    honest = result["protocols"]["honest"]
    best = max(record["validation/accuracy"] for record in by_epoch.values())
    assert by_epoch[honest["epoch"]]["validation/accuracy"] == best
    assert honest["value"] == 100 * by_epoch[honest["epoch"]]["test/accuracy"]
    assert "on the validation set" in honest["selection"]
    assert (tmp_path / "checkpoints" / "best-validation.safetensors").exists()


def test_protocols_choose_as_they_say(tmp_path):
    history = [
        {"epoch": 0, "test/accuracy": 0.1, "validation/accuracy": 0.2},
        {"epoch": 1, "test/accuracy": 0.9, "validation/accuracy": 0.5},
        {"epoch": 2, "train/loss": 0.3},
        {"epoch": 3, "test/accuracy": 0.7, "validation/accuracy": 0.8},
        {"epoch": 4, "test/accuracy": 0.8, "validation/accuracy": 0.6},
    ]
    published = create_recipe("uea/JapaneseVowels")
    task = published.build_task()
    plain = protocols(published, task, history, tmp_path)
    assert (plain["paper"]["epoch"], plain["honest"]["epoch"]) == (1, 4)
    assert (plain["paper"]["value"], plain["honest"]["value"]) == (90, 80)
    assert plain["paper"]["published"] == plain["honest"]["published"] == 98.9
    held_out = protocols(published, task.split_validation(0.5, 0), history, tmp_path)
    assert (held_out["paper"]["epoch"], held_out["honest"]["epoch"]) == (1, 3)
    other = replace(published, attention="linear", attention_options={})
    assert protocols(other, task, history, tmp_path)["paper"]["published"] == 99.2


def test_a_note_on_a_published_value_is_shown_below_the_result(tmp_path, monkeypatch):
    published = create_recipe("uea/JapaneseVowels")
    monkeypatch.setattr(type(published), "published_note", property(lambda recipe: "measured elsewhere"))
    for recipe, shown in ((published, True), (replace(published, attention_options={}), False)):
        noted = protocols(recipe, recipe.build_task(), [{"epoch": 1, "test/accuracy": 0.9}], tmp_path)
        assert noted["paper"]["published_note"] == noted["honest"]["published_note"] == "measured elsewhere"
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(protocol_table({"recipe": recipe.to_json(), "seed": 0, "protocols": noted}))
        assert ("measured elsewhere" in console.export_text()) == shown


def test_checkpoints_hold_what_was_measured(finished):
    folder, result = finished
    task = recipe().build_task()
    last, _ = load(recipe(), folder)
    best, _ = load(recipe(), folder, "best-test")
    assert evaluate(recipe(), task, last)["test/accuracy"] * 100 == result["protocols"]["honest"]["value"]
    assert evaluate(recipe(), task, best)["test/accuracy"] * 100 == result["protocols"]["paper"]["value"]
    with pytest.raises(RunError, match=r"no checkpoint 'best'.*best-test, last"):
        load(recipe(), folder, "best")


def test_recipe_read_back_is_the_same(finished):
    assert read_recipe(json.loads((finished[0] / "recipe.json").read_text())) == recipe()


@pytest.mark.parametrize("fields", [{"mask_padding": False, "trim_batches": False}, {"attention": "linear"}])
def test_variants_train(tmp_path, fields):
    assert run(tmp_path, epochs=1, **fields)["protocols"]["honest"]["value"] > 5


def test_mixed_precision_trains_close_to_full(finished, tmp_path):
    run(tmp_path, precision="bf16-mixed")
    full, mixed = records(finished[0])[-1], records(tmp_path)[-1]
    assert full["train/loss"] != mixed["train/loss"]
    assert mixed["train/loss"] == pytest.approx(full["train/loss"], rel=0.1)


def test_divergence_is_said(tmp_path, monkeypatch):
    step = SeriesTask.step

    def diverged(self, model, batch):
        values = step(self, model, batch)
        return {**values, "loss": values["loss"] * torch.nan} if model.training else values

    monkeypatch.setattr(SeriesTask, "step", diverged)
    with pytest.raises(RunError, match="training diverged in epoch 1"):
        run(tmp_path)


def test_a_run_that_its_first_batch_shows_to_be_impossible_leaves_the_folder_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SeriesTask, "step", lambda *_: (_ for _ in ()).throw(ValueError("window must divide 29")))
        with pytest.raises(ValueError, match="window must divide 29"):
            run(tmp_path)
    assert not list(tmp_path.glob("*.json*"))
    run(tmp_path, epochs=1)


def test_a_run_that_fails_after_its_first_checkpoint_is_kept(tmp_path, monkeypatch):
    step = SeriesTask.step

    def fails_later(self, model, batch):
        if (tmp_path / "checkpoints" / "last.ckpt").exists():
            raise ValueError("later")
        return step(self, model, batch)

    monkeypatch.setattr(SeriesTask, "step", fails_later)
    with pytest.raises(ValueError, match="later"):
        run(tmp_path)
    assert (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"optimizer": "sgdd"}, "optimizer must be one of radam, adam, adamw, got 'sgdd'"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0, got -1.0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be above 0 and below 1, or None, got 1.0"),
    ],
)
def test_meaningless_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        recipe(**fields)
