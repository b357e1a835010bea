"""The command line, as a user meets it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flowformer
from flowformer import cli

SIZES = ["--dim", "16", "--num-heads", "2", "--ffn-dim", "16", "--batch-size", "4", "--accelerator", "cpu"]


@pytest.fixture
def arguments(waves):
    return ["timeseries/own", "--train-file", waves["train_file"], "--test-file", waves["test_file"], *SIZES]


def run(capsys, *words):
    status = cli.main(list(words))
    return status, *capsys.readouterr()


def test_train_evaluate_predict(arguments, waves, tmp_path, capsys):
    folder = tmp_path / "run"
    status, out, _ = run(capsys, "train", *arguments, "--epochs", "2", "--out", str(folder))
    assert status == 0
    assert "paper" in out
    assert "honest" in out
    assert "last epoch (2)" in out
    result = json.loads((folder / "result.json").read_text())
    assert result["command"].startswith("flowformer train timeseries/own")
    assert result["recipe"]["dim"] == 16

    status, out, _ = run(capsys, "evaluate", str(folder))
    assert status == 0
    assert f"test/accuracy: {result['protocols']['honest']['value'] / 100:.4f}" in out

    status, out, _ = run(capsys, "predict", str(folder), waves["test_file"], "--out", str(tmp_path / "p.csv"))
    assert status == 0
    assert "18 predictions" in out
    header, *rows = (tmp_path / "p.csv").read_text().splitlines()
    assert header == "series,label,p_x,p_y,p_z"
    assert len(rows) == 18


@pytest.fixture(scope="module")
def language_run(tmp_path_factory):
    """A language model of bytes, trained for a moment."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "text.txt").write_text("to be, or not to be: that is the question\n" * 60)
    words = ["--file", str(folder / "text.txt"), "--steps", "60", "--eval-every", "30", "--length", "32", "--dim", "32"]
    small = ["--num-layers", "1", "--learning-rate", "0.02", "--accelerator", "cpu", "--warmup-steps", "5"]
    assert cli.main(["train", "text/own", *words, *small, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_language_run_is_evaluated_and_writes(language_run, capsys):
    result = json.loads((language_run / "result.json").read_text())
    status, out, _ = run(capsys, "evaluate", str(language_run))
    assert status == 0
    assert f"test bits per byte: {result['protocols']['honest']['value']:.4f}" in out

    words = ["generate", str(language_run), "--prompt", "to be, or", "--temperature", "0", "--tokens", "60"]
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert out == out.rstrip("\n") + "\n"
    assert out.startswith("to be, or")
    assert " be" in out[9:]
    stopped = run(capsys, *words, "--stop", " be")[1]
    assert out.startswith(stopped.rstrip("\n"))
    assert " be" not in stopped[9:]
    both = run(capsys, *words, "--prompt", "that")[1].split("\n---\n")
    assert both[0].startswith("to be, or")
    assert both[1].startswith("that")
    seeded = [
        run(capsys, "generate", str(language_run), "--seed", "3", "--tokens", "40", "--top-k", "5")[1] for _ in "ab"
    ]
    assert seeded[0] == seeded[1]


def test_language_run_is_exported(language_run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    status, out, _ = run(capsys, "export", str(language_run), "--to", "hf", "--out", str(tmp_path / "hf"))
    assert status == 0
    assert str(tmp_path / "hf") in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = model.generate(**tokenizer("to be, or", return_tensors="pt"), max_new_tokens=30, do_sample=False)
    ours = run(capsys, "generate", str(language_run), "--prompt", "to be, or", "--temperature", "0", "--tokens", "30")[
        1
    ]
    assert tokenizer.decode(tokens[0]) == ours.removesuffix("\n")


def test_exports_to_what_is_no_empty_folder(language_run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out, message in (
        (tmp_path / "file", "is a file: pass --out for a folder"),
        (tmp_path / "file" / "below", "cannot be written"),
        (tmp_path, "is not empty: choose another folder"),
        (tmp_path / ("a" * 300), "too long"),
        ("/proc/flowformer", "cannot be written"),
    ):
        status, printed, err = run(capsys, "export", str(language_run), "--to", "hf", "--out", str(out))
        assert (status, printed) == (2, "")
        assert str(out) in err
        assert message in err
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_language_run_is_resumed(language_run, capsys):
    command = json.loads((language_run / "result.json").read_text())["command"].split()[1:]
    status, out, _ = run(capsys, *command, "--resume")
    assert status == 0
    assert "last step (60)" in out


def test_a_run_is_used_for_what_it_is(language_run, arguments, tmp_path, capsys):
    status, _, err = run(capsys, "predict", str(language_run), "no.csv")
    assert status == 2
    assert f"`flowformer predict` does not apply to {language_run}, whose data is text; " in err
    assert "available: evaluate, generate, visualize, export" in err
    folder = str(tmp_path / "series")
    assert run(capsys, "train", *arguments, "--epochs", "1", "--out", folder)[0] == 0
    for words in (["generate", folder], ["export", folder, "--to", "hf"]):
        status, _, err = run(capsys, *words)
        assert status == 2
        assert f"does not apply to {folder}, whose data is series; available: evaluate, predict, visualize" in err


def test_options_of_generation_are_those_of_the_run(language_run, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", str(language_run), "--help"])
    out = capsys.readouterr().out
    for words in ("--prompt", "--tokens", "--stop", "--temperature", "default: 0.8", "default: 200"):
        assert words in out
    assert "--count" not in out
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    out = capsys.readouterr().out
    assert "`flowformer generate RUN --help`" in out
    assert "--prompt" not in out
    status, _, err = run(capsys, "generate", "--tokens", "3", str(language_run), "--promt", "to be")
    assert status == 2
    assert f"--promt does not apply to {language_run}; its options are " in err


def test_data_sets_are_listed(capsys):
    status, out, _ = run(capsys, "data")
    assert status == 0
    assert "wikitext" in out
    assert "enwik8" in out


def test_default_folder_names_the_run(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "train", *arguments, "--epochs", "1", "--attention", "linear", "--seed", "3")[0] == 0
    assert (tmp_path / "runs" / "timeseries" / "own" / "linear-seed3" / "result.json").exists()
    status, _, err = run(capsys, "train", *arguments, "--epochs", "1", "--attention", "linear", "--seed", "3")
    assert status == 2
    assert "--resume" in err


def test_killed_process_resumes_to_the_same_result(arguments, tmp_path):
    """The real thing: SIGKILL in the middle of a run, then --resume; and the same run without a break."""

    def words(folder):
        return ["train", *arguments, "--epochs", "12", "--out", str(folder)]

    def start(*more):
        command = [sys.executable, "-m", "flowformer", *words(killed), *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def untimed(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start()
    deadline = time.monotonic() + 300
    while not ((killed / "metrics.jsonl").exists() and len(untimed(killed)) > 2):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "result.json").exists(), "the run was over before it was killed"
    process = start("--resume")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    assert errors.decode() == ""  # nothing but the result is shown
    assert cli.main(words(whole)) == 0
    assert untimed(killed) == untimed(whole)


def test_interrupt_tells_how_to_go_on(arguments, tmp_path, capsys, monkeypatch):
    from flowformer.training import fit

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "fit", interrupted)
    status, _, err = run(capsys, "train", *arguments, "--out", str(tmp_path / "run"))
    assert status == 130
    assert "--resume" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "uea/JapaneseVowel"], "did you mean 'uea/JapaneseVowels'?"),
        (["train", "japanesevowels"], "did you mean 'uea/JapaneseVowels'?"),
        (["train", "uea/JapaneseVowels", "--epoch", "3"], "did you mean --epochs?"),
        (["train", "uea/JapaneseVowels", "--epochs", "many"], "epochs must be an integer, at least 1, got 'many'"),
        (["train", "uea/JapaneseVowels", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "uea/JapaneseVowels", "--attention", "flw", "--epochs", "1"], "did you mean 'flow'?"),
        (["train", "uea/JapaneseVowels", "--attention-options.preset", "cor", "--epochs", "1"], "did you mean 'core'?"),
        (["train", "uea/JapaneseVowels", "--precision", "8-bit"], "precision must be one of auto, 32-true"),
        (["train", "uea/JapaneseVowels", "--accelerator", "abacus"], "abacus"),
        (["train", "timeseries/own"], "requires --train-file FILE"),
        (["train", "timeseries/own", "--train-file", "no.csv", "--test-file", "no.csv"], "no.csv: no such file"),
        (["trian"], "did you mean 'train'?"),
        (["info", "flwo"], "did you mean 'flow'?"),
        (["evaluate", "nowhere"], "nowhere is not the folder of a run"),
        (["generate", "nowhere"], "nowhere is not the folder of a run"),
        (["train", "text/own"], "text/own requires --file FILE"),
        (["train", "text/own", "--file", "no.txt"], "file or folder no.txt not found"),
        (["train", "text/bytes", "--attention", "flw"], "did you mean 'flow'?"),
        (["train", "enwik8/aft-local-12", "--data-dir", "nowhere"], "flowformer data enwik8"),
        (["data", "wikitxt"], "did you mean 'wikitext'?"),
    ],
)
def test_mistakes_are_explained(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "uea/JapaneseVowels", "--help"])
    out = capsys.readouterr().out
    for option in ("--learning-rate", "--attention", "--no-mask-padding", "--resume", "--data-dir", "--precision"):
        assert option in out
    assert "default: 0.001" in out


def test_list_and_info_and_doctor(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    for name in ("uea/PEMS-SF", "timeseries/own", "flowformer_timeseries", *flowformer.list_attentions()):
        assert name in out
        assert run(capsys, "info", name)[0] == 0
    out = run(capsys, "info", "uea/JapaneseVowels")[1]
    assert "98.9" in out
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "backend" in out


def test_doctor_obeys_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("FLOWFORMER_BACKEND", "torch")
    assert "requested by FLOWFORMER_BACKEND" in run(capsys, "doctor")[1]
    monkeypatch.setenv("FLOWFORMER_BACKEND", "abacus")
    assert "unknown backend 'abacus'" in run(capsys, "doctor")[2]


def test_missing_extra_names_the_remedy(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, _, err = run(capsys, "train", "uea/JapaneseVowels")
    assert status == 2
    assert "pip install 'flowformer[timeseries]'" in err


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert flowformer.__version__ in capsys.readouterr().out


def test_import_is_as_cheap_as_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import flowformer; "
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('flowformer')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_command_is_installed():
    command = Path(sys.executable).with_name("flowformer")
    assert subprocess.run([command, "--version"], capture_output=True, check=True).stdout.startswith(b"flowformer")


def test_output_that_nobody_reads_to_its_end_is_no_error():
    command = [sys.executable, "-c", "import sys; from flowformer.cli import main; sys.exit(main(['list']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()  # as `| head` does, before anything is written
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
