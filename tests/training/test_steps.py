"""Runs counted in steps: schedules, rounds, resuming, and the test that is made once."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from flowformer.common.errors import RunError
from flowformer.recipes import create_recipe
from flowformer.recipes.language import OwnTextRecipe
from flowformer.tasks.text import task as text
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.task import TextTask
from flowformer.tasks.text.tokenizers import BytesTokenizer
from flowformer.training.callbacks import RunProgress
from flowformer.training.fit import evaluate, load, train
from flowformer.training.module import TaskModule

TINY = {
    "model": "flowformer_gpt_nano", "num_layers": 1, "num_heads": 2, "dim": 16, "ffn_dim": 16, "length": 16,
    "batch_size": 2, "steps": 12, "eval_every": 4, "warmup_steps": 3, "accelerator": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def a_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 40)
    TINY["file"] = str(path)


def recipe(**fields):
    return create_recipe("text/own", **{**TINY, **fields})


def run(folder, resume=False, made=None, **fields):
    return train(made or recipe(**fields), folder, resume=resume, command="the command", console=Console(quiet=True))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


def test_records_count_steps(finished):
    folder, result = finished
    assert [record["step"] for record in records(folder)] == [0, 4, 8, 12]
    honest = result["protocols"]["honest"]
    assert honest["selection"] == "last step (12)"
    assert honest["metric"] == "test bits per byte"
    assert honest["value"] == pytest.approx(records(folder)[-1]["test/loss"] / np.log(2))
    assert result["protocols"]["paper"]["value"] == min(r["test/loss"] for r in records(folder)) / np.log(2)
    assert result["peak_memory_bytes"] > 1e8


def test_it_learns(finished):
    losses = [record["test/loss"] for record in records(finished[0])]
    assert losses[-1] < losses[0] - 0.05


def test_rounds_do_not_change_what_is_learned(finished, tmp_path):
    """Where evaluations fall decides on dropout's numbers, but not on the order of data."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, dropout=0.0, eval_every=12)
    run(cut, dropout=0.0, eval_every=3)
    one, other = (load(recipe(dropout=0.0), folder)[0].state_dict() for folder in (whole, cut))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("stop_at", [0, 2])
def test_interrupted_run_resumes_to_the_same_result(finished, tmp_path, monkeypatch, stop_at):
    step = TaskModule.training_step

    def interrupted(self, batch, index):
        if self.current_epoch == stop_at and index == 2:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(TaskModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(TaskModule, "training_step", step)
    result = run(tmp_path, resume=True)
    assert untimed(tmp_path) == untimed(finished[0])
    assert result["protocols"] == finished[1]["protocols"]


def test_accumulated_batches_are_one_large_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, dropout=0.0, batch_size=4)
    run(parts, dropout=0.0, batch_size=1, accumulate=4)
    for one, other in zip(records(whole), records(parts), strict=True):
        assert one["test/loss"] == pytest.approx(other["test/loss"], rel=1e-4)


def learning_rates(monkeypatch, tmp_path, **fields):
    seen = []
    step = TaskModule.training_step

    def looked_at(self, batch, index):
        seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return step(self, batch, index)

    monkeypatch.setattr(TaskModule, "training_step", looked_at)
    run(tmp_path, learning_rate=1.0e-3, **fields)
    return [rate / 1e-3 for rate in seen]


def test_learning_rate_follows_the_schedule(monkeypatch, tmp_path):
    rates = learning_rates(monkeypatch, tmp_path, schedule="linear", warmup_steps=3, steps=12)
    assert rates == pytest.approx([0.25, 0.5, 0.75, *(1 - step / 9 for step in range(9))])


def test_learning_rate_begins_and_ends_where_it_is_said(monkeypatch, tmp_path):
    bounds = {"warmup_learning_rate": 1e-4, "min_learning_rate": 2e-4}
    rates = learning_rates(monkeypatch, tmp_path, schedule="linear", warmup_steps=3, steps=12, **bounds)
    rising = [0.1 + 0.9 * step / 4 for step in (1, 2, 3)]
    assert rates == pytest.approx([*rising, *(1 - 0.8 * step / 9 for step in range(9))])


@pytest.mark.parametrize("decayed", ["all", "linear", "weights"])
def test_weight_decay_acts_on_what_is_said(decayed):
    made = recipe(weight_decay=0.5, decayed=decayed, optimizer="adamw")
    task = made.build_task()
    model = made.build_model(task.format)
    model.no_weight_decay = lambda: {"embed.weight"}
    module = TaskModule(made, task, model)
    groups = module._parameter_groups()
    decays = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    by_name = {name: decays[id(one)] for name, one in module.model.named_parameters()}
    assert len(decays) == len(by_name)
    assert by_name["decoder.blocks.0.linear1.weight"] == by_name["head.weight"] == 0.5
    rest = 0.5 if decayed == "all" else 0.0
    for name in ("embed.weight", "decoder.blocks.0.linear1.bias", "decoder.norm.weight"):
        assert by_name[name] == rest


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_learns_the_same(finished, tmp_path, monkeypatch, backend):
    small = {"dropout": 0.0, "steps": 4, "attention": "softmax", "attention_options": {}}
    torch._dynamo.reset()
    compiled, original = [], torch.nn.Module.compile

    def compile_with(model, *args, **options):
        compiled.append(model)
        original(model, *args, backend=backend, fullgraph=True, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)
    plain = tmp_path / "plain"
    run(plain, **small)
    assert not compiled
    result = run(tmp_path / "run", **small, compile=True)
    assert len(compiled) == 1
    for one, other in zip(untimed(tmp_path / "run"), untimed(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    model, _ = load(recipe(**small, compile=True), tmp_path / "run")
    assert evaluate(recipe(**small), recipe(**small).build_task(), model)["test/loss"] == pytest.approx(
        result["protocols"]["honest"]["value"] * np.log(2), rel=1e-4
    )


def test_a_model_that_cannot_be_compiled_is_an_error_in_words(tmp_path, monkeypatch):
    torch._dynamo.reset()

    def refuse(*_):
        raise RuntimeError("no working compiler")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: original(model, backend=refuse))
    with pytest.raises(RunError, match=r"cannot compile the model, leave out --compile: .*no working compiler"):
        run(tmp_path / "run", steps=4, compile=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_time_left_does_not_count_compilation(monkeypatch, capsys, compiled):
    now = [0.0]
    monkeypatch.setattr("flowformer.training.callbacks.time.perf_counter", lambda: now[0])
    made = recipe(compile=compiled)
    shown = RunProgress(Console(width=200), made, made.build_task().metric)
    trainer = SimpleNamespace(num_training_batches=4, current_epoch=0, max_epochs=3, callback_metrics={})
    shown.on_train_start(trainer, None)
    for seconds in (100.0, 10.0):  # the first round compiles
        now[0] += seconds
        shown.on_train_epoch_end(trainer, None)
        trainer.current_epoch += 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("10 s left" if compiled else "55 s left")
    assert ("The first steps compile the model" in lines) == compiled


class SplitTextRecipe(OwnTextRecipe):
    """The end of the text in two halves: to choose by, and to test with."""

    def build_task(self, form=None) -> TextTask:
        whole = super().build_task(form)
        tokens = whole.test.tokens
        half = len(tokens) // 2
        corpus = Corpus("made", BytesTokenizer(), whole.train.tokens, tokens[:half], tokens[half:], "", "")
        return text.build_task(corpus, self.length, context=8, published={"": 1.5})


def test_with_a_validation_set_the_test_is_made_once(tmp_path, monkeypatch):
    made = SplitTextRecipe(**{**TINY, "name": "made", "held_out": 0.2, "learning_rate": 0.3, "dropout": 0.0})
    result = run(tmp_path, made=made)
    assert all("test/loss" not in record for record in records(tmp_path))
    by_step = {record["step"]: record["validation/loss"] for record in records(tmp_path)}
    best = min((step for step in by_step if step), key=lambda step: by_step[step])
    for entry in result["protocols"].values():
        assert entry["step"] == best
        assert entry["published"] == 1.5
        assert entry["selection"] == f"step {best}, best of 3 on the validation set; tested once"
    model, _ = load(made, tmp_path, "best-validation")
    task = made.build_task()
    assert evaluate(made, replace(task, test=task.validation), model)["test/loss"] == pytest.approx(by_step[best])
    value = evaluate(made, task, model)["test/loss"]
    assert result["protocols"]["honest"]["value"] == pytest.approx(value / np.log(2))
    sums = counts = 0.0
    with torch.no_grad():
        for item in task.test:
            batch = task.format.collate([item])
            sums += float(task.step(model, batch)["loss"]) * task.size(batch)
            counts += task.size(batch)
    assert counts == len(task.test.tokens)
    assert value == pytest.approx(sums / counts, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 10, "eval_every": 4}, "eval_every must divide steps, got eval_every 4 and steps 10"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, or None, got 0"),
        ({"schedule": "step"}, "schedule must be one of constant, inverse-sqrt, cosine, linear, got 'step'"),
        (
            {"schedule": "inverse-sqrt", "warmup_steps": 0},
            "warmup_steps must be positive with the schedule inverse-sqrt",
        ),
        ({"decayed": "some"}, "decayed must be one of all, linear, weights, got 'some'"),
        ({"min_learning_rate": 1.0}, "min_learning_rate must be at most learning_rate 0.004, got 1.0"),
        ({"warmup_learning_rate": -1.0}, "warmup_learning_rate must be at least 0, got -1.0"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"positions": "rotary"}, "positions must be one of model, learned, sinusoidal, or None, got 'rotary'"),
        ({"attention_options": "{window: 3}"}, "attention_options must be a mapping .*, got '{window: 3}'"),
        ({"dim": -1}, "dim must be at least 1, or None, got -1"),
        ({"attention": "flw"}, "did you mean 'flow'"),
        (
            {"attention_options": {"windw": 3}, "attention": "aft_local"},
            r"aft_local has no option 'windw' \(did you mean 'window'\?\); available: window, hard, position_dim",
        ),
        ({"attention_options": {"clmp": 3}}, r"flow has no option 'clmp' .did you mean 'clamp'"),
        ({"attention_options": 3}, "attention_options must be a mapping .*, got 3"),
    ],
)
def test_meaningless_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        recipe(**fields)


@pytest.mark.parametrize("optimizer", ["radam", "adam", "adamw"])
def test_mixed_precision_trains_close_to_full(tmp_path, optimizer):
    full, mixed = tmp_path / "full", tmp_path / "mixed"
    run(full, optimizer=optimizer, clip_grad_norm=1.0)
    run(mixed, optimizer=optimizer, clip_grad_norm=1.0, precision="bf16-mixed")
    one, other = (records(folder)[-1]["test/loss"] for folder in (full, mixed))
    assert one != other
    assert one == pytest.approx(other, rel=0.02)


def test_fewer_steps_than_a_round_are_a_round():
    short = recipe(steps=3, eval_every=100)
    assert (short.rounds, short.count(1), short.evaluated_rounds) == (1, 3, [0, 1])


@pytest.mark.parametrize("model", ["flowformer_timeseries", "flowformer_vision_micro"])
def test_models_of_another_kind_are_refused(model):
    with pytest.raises(
        ValueError, match=f"model must be a language model, got '{model}', .* classifier; available: aft_c"
    ):
        recipe(model=model)


def test_recipe_fields_reach_the_model():
    made = recipe(positions=None, attention="aft_local", attention_options={"window": 3, "position_dim": 2})
    model = made.build_model(made.build_task().format)
    assert model.position is None
    attention = model.decoder.layers[0].attention
    assert (attention.window, attention.position_dim, attention.max_length) == (3, 2, 16)
    assert replace(made, dim=32).build_model(made.build_task().format).dim == 32
