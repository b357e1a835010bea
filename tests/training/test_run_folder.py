"""The folder of a run: damaged, moved, of a stranger, of an earlier version, shared, on a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flowformer.cli import main
from flowformer.common.errors import RunError
from flowformer.common.interrupts import check_signals
from flowformer.recipes import create_recipe
from flowformer.training.callbacks import History
from flowformer.training.folder import RunFolder, read_plain, save_plain
from flowformer.training.module import TaskModule

SIZES = ["--dim", "16", "--num-heads", "2", "--num-layers", "1", "--ffn-dim", "16", "--batch-size", "4"]


def write_series(path, *, seed=0, classes="ab", series=12, scale=1.0):
    random = np.random.default_rng(seed)
    rows = ["series,time,label,x,y"]
    for number in range(series):
        label = number % len(classes)
        for time in range(6):
            x, y = scale * (random.normal(size=2) + 3 * label)
            rows.append(f"s{number},{time},{classes[label]},{x:.4f},{y:.4f}")
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def words_for(folder, *more, epochs=2):
    files = ["--train-file", str(folder / "train.csv"), "--test-file", str(folder / "test.csv")]
    return ["train", "timeseries/own", *files, *SIZES, "--epochs", str(epochs), "--out", str(folder / "run"), *more]


def train(folder, *more, epochs=2):
    for seed, name in enumerate(("train", "test")):
        write_series(folder / f"{name}.csv", seed=seed)
    words = words_for(folder, *more, epochs=epochs)
    assert main(words) == 0
    return words


def elsewhere(words, run):
    return [str(run) if word.endswith("/run") else word for word in words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a complete run."""
    return Path(shutil.copytree(whole[0] / "run", tmp_path / "run"))


@pytest.fixture
def unfinished(run):
    (run / "result.json").unlink()
    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ damage


def write(name, data):
    return lambda run: (run / name).write_bytes(data)


def edit(file, /, **changes):
    def change(run):
        values = json.loads((run / file).read_text())
        (run / file).write_text(json.dumps({**values, **changes}))

    return change


def cut(name):
    return lambda run: os.truncate(run / name, (run / name).stat().st_size // 2)


def flip(name):
    def change(run):
        data = bytearray((run / name).read_bytes())
        data[-100] ^= 4  # in a weight
        (run / name).write_bytes(data)

    return change


LAST, RESUME = "checkpoints/last.safetensors", "checkpoints/last.ckpt"
DAMAGE = {
    "recipe.json empty": write("recipe.json", b""),
    "recipe.json list": write("recipe.json", b"[1]"),
    "recipe.json no text": write("recipe.json", b"\xff\xfe\x00"),
    "recipe.json deep": write("recipe.json", b"[" * 100_000),
    "recipe.json newer": edit("recipe.json", newer_option=1),
    "recipe.json unknown": edit("recipe.json", name="timeseries/none"),
    "recipe.json text for a number": edit("recipe.json", dim="16"),
    "recipe.json null for a number": edit("recipe.json", num_heads=None),
    "recipe.json of another size": edit("recipe.json", dim=32),
    "format.json empty": write("format.json", b""),
    "format.json list": write("format.json", b"[]"),
    "format.json without classes": write("format.json", b'{"mean": [0, 0]}'),
    "format.json text for numbers": edit("format.json", mean="abc"),
    "format.json number for a list": edit("format.json", mean=1e308),
    "format.json infinite": edit("format.json", std=[1e999, 1]),
    "format.json length": edit("format.json", max_length="9"),
    "format.json classes": edit("format.json", classes=[1, 2]),
    "format.json one mean": edit("format.json", mean=[0.0]),
    "format.json of other channels": edit("format.json", mean=[0, 0, 0], std=[1, 1, 1]),
    f"{LAST} empty": write(LAST, b""),
    f"{LAST} cut": cut(LAST),
    f"{LAST} changed": flip(LAST),
    f"{LAST} foreign": write(LAST, b"hello" * 1000),
    f"{RESUME} empty": write(RESUME, b""),
    f"{RESUME} cut": cut(RESUME),
    f"{RESUME} foreign": write(RESUME, b"hello" * 1000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_evaluate_names_what_is_damaged(run, damage, capsys):
    DAMAGE[damage](run)
    assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    named = damage.split()[0]
    assert str(run / named) in said or ("of" in damage and str(run / LAST) in said)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if "safetensors" not in name])
def test_failed_resume_names_what_is_damaged_and_changes_nothing(whole, unfinished, damage, capsys):
    DAMAGE[damage](unfinished)
    before = contents(unfinished)
    assert main([*elsewhere(whole[1], unfinished), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(unfinished) in said
    assert contents(unfinished) == before


@pytest.mark.parametrize("name", ["recipe.json", "format.json", LAST, RESUME])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_pipes_and_devices_are_not_waited_for(run, name, kind, capsys):
    (run / name).unlink()
    if kind == "fifo":
        os.mkfifo(run / name)
    elif kind == "device":
        (run / name).symlink_to("/dev/zero")
    else:
        (run / name).mkdir()
    assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err
    assert str(run / name) in said
    assert "expected a file" in said


@pytest.mark.parametrize("name", ["recipe.json", LAST, "test.csv", "link.csv"])
def test_predictions_do_not_replace_what_is_read(whole, run, tmp_path, name, capsys):
    shutil.copy(whole[0] / "test.csv", tmp_path / "test.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "test.csv")
    out = tmp_path / name if name.endswith("csv") else run / name
    before = out.read_bytes()
    assert main(["predict", str(run), str(tmp_path / "test.csv"), "--out", str(out)]) == 2
    assert "would replace what is read" in capsys.readouterr().err
    assert out.read_bytes() == before
    for _ in range(2):  # a file of its own may be replaced, also within the run
        assert main(["predict", str(run), str(tmp_path / "test.csv"), "--out", str(run / "predicted.csv")]) == 0


def test_empty_channel_of_new_series_is_told(whole, run, tmp_path, caplog):
    rows = (whole[0] / "test.csv").read_text().splitlines()
    (tmp_path / "new.csv").write_text("\n".join([rows[0], *(row.rsplit(",", 1)[0] + "," for row in rows[1:])]) + "\n")
    assert main(["predict", str(run), str(tmp_path / "new.csv")]) == 0
    assert "channel 'y' without any value" in caplog.text


def test_sums_of_a_checkpoint_are_checked(whole, unfinished, capsys):
    path = unfinished / RESUME
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda one: one.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 30 + len(largest.filename) + largest.file_size // 2] ^= 1
    path.write_bytes(data)
    assert main([*elsewhere(whole[1], unfinished), "--resume"]) == 2
    assert "last.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{}, {"state_dict": 3}, {"optimizer_states": [1]}, {"loops": []}])
def test_checkpoint_of_other_contents_is_refused(whole, unfinished, content, capsys):
    save_plain({**read_plain(unfinished / RESUME), **content} if content else {}, unfinished / RESUME)
    assert main([*elsewhere(whole[1], unfinished), "--resume"]) == 2
    said = capsys.readouterr().err
    assert str(unfinished / RESUME) in said
    assert said.count("\n") == 1


def test_weights_lost_by_a_kill_after_the_last_round_are_written_again(whole, unfinished, capsys):
    before = (unfinished / LAST).read_bytes()
    (unfinished / LAST).write_bytes(b"of an earlier round")
    assert main([*elsewhere(whole[1], unfinished), "--resume"]) == 0
    assert (unfinished / LAST).read_bytes() == before


def test_run_killed_between_its_first_files_starts_again(whole, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole[0] / "run/recipe.json", run)
    assert main(["evaluate", str(run)]) == 2
    assert "was never started" in capsys.readouterr().err
    assert main([*elsewhere(whole[1], run), "--resume"]) == 0
    assert contents(run)[LAST] == contents(whole[0] / "run")[LAST]


def test_checkpoints_without_a_recipe_are_not_resumed(whole, unfinished, capsys):
    (unfinished / "recipe.json").unlink()
    before = contents(unfinished)
    for more in ([], ["--resume"]):
        assert main([*elsewhere(whole[1], unfinished), *more]) == 2
        assert "has checkpoints and no recipe.json" in capsys.readouterr().err
    assert contents(unfinished) == before


def test_missing_metrics_come_from_the_checkpoint(whole, unfinished):
    (unfinished / "metrics.jsonl").unlink()
    assert main([*elsewhere(whole[1], unfinished), "--resume"]) == 0
    results = [
        json.loads((folder / "result.json").read_text())["protocols"] for folder in (whole[0] / "run", unfinished)
    ]
    assert results[0] == results[1]
    assert (unfinished / "metrics.jsonl").read_text() == (whole[0] / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("damage", [b"", bytes(range(256)), b'{"epoch": 1'])
def test_damaged_metrics_of_a_complete_run_are_written_again(whole, unfinished, damage):
    (unfinished / "metrics.jsonl").write_bytes(damage)
    assert main([*elsewhere(whole[1], unfinished), "--resume"]) == 0
    assert (unfinished / "metrics.jsonl").read_text() == (whole[0] / "run" / "metrics.jsonl").read_text()


def test_a_run_goes_on_on_another_device_and_without_being_compiled(whole, unfinished):
    edit("recipe.json", accelerator="auto", compile=True)(unfinished)
    assert main([*elsewhere(whole[1], unfinished), "--resume"]) == 0


# ------------------------------------------------------------------------------------------------ strangers


class Payload:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.makedirs, (self.mark,)


def poison(run, mark):
    for path in (run / "checkpoints").iterdir():
        content = read_plain(path) if path.suffix == ".ckpt" else {}
        torch.save({**content, "more": Payload(mark)}, path)


@pytest.mark.parametrize(
    "command", [["evaluate"], ["predict", "test.csv"], ["visualize", "test.csv"], ["export", "--to", "hf"], ["resume"]]
)
def test_code_of_a_stranger_is_not_run(whole, unfinished, tmp_path, command, capsys):
    poison(unfinished, tmp_path / "code-ran")
    words = [command[0], str(unfinished), *(str(whole[0] / one) if one == "test.csv" else one for one in command[1:])]
    if command == ["resume"]:
        words = [*elsewhere(whole[1], unfinished), "--resume"]
    assert main(words) == 2
    assert not (tmp_path / "code-ran").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_of_an_earlier_version_are_read_from_its_checkpoint(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    before = capsys.readouterr().out
    for path in (run / "checkpoints").glob("*.safetensors"):
        path.unlink()
    assert main(["evaluate", str(run)]) == 0
    assert capsys.readouterr().out == before


def test_checkpoint_without_records_says_that_it_cannot_be_resumed(whole, unfinished, capsys):
    content = read_plain(unfinished / RESUME)
    save_plain({**content, "callbacks": {}}, unfinished / RESUME)
    more = elsewhere(words_for(whole[0], epochs=3), unfinished)
    edit("recipe.json", epochs=3)(unfinished)
    assert main([*more, "--resume"]) == 2
    assert "earlier version" in capsys.readouterr().err


def test_option_added_by_a_newer_version_does_not_block_resuming(whole, unfinished):
    values = json.loads((unfinished / "recipe.json").read_text())
    del values["warmup_steps"], values["name"]
    (unfinished / "recipe.json").write_text(json.dumps({"name": "timeseries/own", **values}))
    folder = RunFolder(unfinished)
    folder.check_recipe(create_recipe("timeseries/own", **values))
    with pytest.raises(RunError, match="warmup_steps was 0, now 5"):
        folder.check_recipe(create_recipe("timeseries/own", **{**values, "warmup_steps": 5}))


# ------------------------------------------------------------------------------------------------ data


def accuracy(run, capsys, *more):
    capsys.readouterr()
    assert main(["evaluate", str(run), *more]) == 0
    return capsys.readouterr().out


@pytest.fixture
def trained(tmp_path):
    return tmp_path, train(tmp_path, "--learning-rate", "0.01", epochs=4)


@pytest.mark.parametrize(("part", "change"), [("train", {"scale": 100.0}), ("test", {"series": 8})])
def test_changed_data_is_told_and_prepared_as_the_run_did(trained, part, change, capsys):
    folder, _ = trained
    before = accuracy(folder / "run", capsys)
    write_series(folder / f"{part}.csv", seed=part == "test", **change)
    assert main(["evaluate", str(folder / "run")]) == 2
    said = capsys.readouterr().err
    assert f"{part}.csv" in said
    assert f"its {part} set" in said
    assert "--data-changed-ok" in said
    if part == "train":  # the statistics are those of the run
        assert accuracy(folder / "run", capsys, "--data-changed-ok") == before
    else:
        assert "accuracy" in accuracy(folder / "run", capsys, "--data-changed-ok")


def test_renamed_class_does_not_turn_the_others(trained, capsys):
    folder, _ = trained
    before = accuracy(folder / "run", capsys)
    for seed, name in enumerate(("train", "test")):
        write_series(folder / f"{name}.csv", seed=seed, classes="zb")
    assert main(["evaluate", str(folder / "run"), "--data-changed-ok"]) == 2
    assert "'z'" in capsys.readouterr().err
    for seed, name in enumerate(("train", "test")):
        path = folder / f"{name}.csv"
        write_series(path, seed=seed)
        rows = path.read_text().splitlines()
        path.write_text("\n".join([rows[0], *reversed(rows[1:])]).replace(",5,", ",9,"))
    assert accuracy(folder / "run", capsys, "--data-changed-ok").splitlines()[-1] == before.splitlines()[-1]


@pytest.mark.parametrize("change", [{"classes": "abc"}, {"seed": 7, "series": 20}, {"seed": 7}])
def test_resume_on_other_data_changes_nothing(whole, unfinished, tmp_path, change, capsys):
    write_series(tmp_path / "train.csv", **change)
    words = elsewhere(whole[1], unfinished)
    words[words.index("--train-file") + 1] = str(tmp_path / "train.csv")
    edit("recipe.json", train_file=str(tmp_path / "train.csv"))(unfinished)
    before = contents(unfinished)
    assert main([*words, "--resume"]) == 2
    assert "train.csv" in capsys.readouterr().err
    assert contents(unfinished) == before
    assert main(["predict", str(unfinished), str(whole[0] / "test.csv")]) == 0


def test_changed_text_is_told_and_encoded_with_the_vocabulary_of_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"one two three {number % 7}\n" for number in range(300)))
    sizes = [*SIZES, "--length", "16", "--steps", "2", "--eval-every", "2", "--tokenizer", "words"]
    assert main(["train", "text/own", "--file", str(text), *sizes, "--out", str(tmp_path / "run")]) == 0
    text.write_text(text.read_text() + "four five\n")
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert str(text) in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--data-changed-ok"]) == 0


# -------------------------------------------------------------------------------------- moved, shared, stopped


@pytest.mark.parametrize("moved", [False, True], ids=["stayed", "moved"])
def test_best_round_is_remembered_by_value(tmp_path, moved, monkeypatch):
    from flowformer.tasks.series.task import SeriesTask

    plain, seen, record = SeriesTask.step, [], History.on_train_epoch_end

    def worse_each_time(self, model, batch):
        values = plain(self, model, batch)
        if not model.training:
            values["accuracy"] = values["accuracy"] * 0.0 + (1 / len(seen) if seen else 0)
            seen.append(True)
        return values

    def stop(self, trainer, module):
        if trainer.current_epoch == 2 and len(seen) < 14:
            seen.extend([True] * 14)
            raise KeyboardInterrupt
        record(self, trainer, module)

    monkeypatch.setattr(SeriesTask, "step", worse_each_time)
    monkeypatch.setattr(History, "on_train_epoch_end", stop)
    for seed, name in enumerate(("train", "test")):
        write_series(tmp_path / f"{name}.csv", seed=seed)
    words, run = words_for(tmp_path, "--eval-every", "1", epochs=4), tmp_path / "run"
    assert main(words) == 130
    if moved:
        run = run.rename(tmp_path / "elsewhere")
        words = elsewhere(words, run)
    assert main([*words, "--resume"]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(records[1:], key=lambda one: one["test/accuracy"])
    import safetensors

    with safetensors.safe_open(run / "checkpoints/best-test.safetensors", "pt") as file:
        assert json.loads(file.metadata()["flowformer"])["epoch"] == best["epoch"] == 1


def test_second_process_is_told_by_whom_the_folder_is_used(whole, tmp_path, monkeypatch, capsys):
    step, told = TaskModule.training_step, []

    def another(self, batch, index):
        if not told:
            told.append(main(elsewhere(whole[1], tmp_path / "shared/run")))
            told.append(capsys.readouterr().err)
        return step(self, batch, index)

    monkeypatch.setattr(TaskModule, "training_step", another)
    assert main(elsewhere(whole[1], tmp_path / "shared/run")) == 0
    assert told[0] == 2
    assert f"is in use by process {os.getpid()} on " in told[1]
    assert main([*elsewhere(whole[1], tmp_path / "shared/run"), "--resume"]) == 0  # free again


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
@pytest.mark.parametrize("where", ["validation_step", "training_step", "train_dataloader"])
def test_signal_ends_a_run_with_one_line(whole, tmp_path, monkeypatch, name, status, where, capsys):
    plain, sent = getattr(TaskModule, where), []

    def interrupted(self, *words, **values):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), getattr(signal, name))
        return plain(self, *words, **values)

    before = signal.getsignal(getattr(signal, name))
    monkeypatch.setattr(TaskModule, where, interrupted)
    words = elsewhere(whole[1], tmp_path / "stopped/run")
    assert main(words) == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip().endswith("--resume")
    assert not (tmp_path / "stopped/run/result.json").exists()
    assert signal.getsignal(getattr(signal, name)) == before
    assert main([*words, "--resume"]) == 0
    assert contents(tmp_path / "stopped/run")[LAST] == contents(whole[0] / "run")[LAST]


def test_signal_whose_exception_was_lost_is_not_forgotten(whole, tmp_path, monkeypatch):
    step = TaskModule.training_step

    class Destroyed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)  # Python reports and drops what a destructor raises

    def interrupted(self, batch, index):
        if index == 0 and self.current_epoch == 0:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "unraisablehook", lambda _: None)
                Destroyed()
        return step(self, batch, index)

    monkeypatch.setattr(TaskModule, "training_step", interrupted)
    assert main(elsewhere(whole[1], tmp_path / "run")) == 143


def test_interrupted_evaluation_says_so(run, monkeypatch, capsys):
    monkeypatch.setattr(TaskModule, "validation_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["evaluate", str(run)]) == 130
    assert capsys.readouterr().err == "flowformer: interrupted\n"
    check_signals()  # what runs in this process afterwards is not interrupted


def test_full_disk_keeps_the_last_checkpoint(whole, tmp_path, capsys):
    """A limit on the size of files, which the system reports as it does a full disk."""
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    words = elsewhere(whole[1], run)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, unlimited[1]))
    try:
        status = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    said = capsys.readouterr().err
    assert status == 2
    assert f"{run / RESUME}: File too large. There is no checkpoint yet" in said
    assert not list(run.rglob(".staged*"))
    assert main([*words, "--resume"]) == 0
    assert contents(run)[LAST] == contents(whole[0] / "run")[LAST]


def test_staged_files_of_a_killed_process_are_removed(whole, unfinished):
    (unfinished / "checkpoints/.staged-1-last.ckpt").write_bytes(b"half")
    assert main([*elsewhere(whole[1], unfinished), "--resume"]) == 0
    assert not list(unfinished.rglob(".staged*"))


def test_fault_of_the_program_is_reported_with_a_file(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TaskModule, "validation_step", lambda *_: 1 / 0)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run)]) == 70
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    report = Path(said.split()[-1])
    assert report.parent == tmp_path
    assert "ZeroDivisionError" in report.read_text()


@pytest.mark.slow
def test_chaos():
    tool = Path(__file__).parents[2] / "tools" / "chaos.py"
    done = subprocess.run([sys.executable, tool, "--rounds", "30", "--seed", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
