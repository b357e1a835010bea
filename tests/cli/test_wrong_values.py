"""Values that a command does not take: one line, status 2, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowformer import cli

TINY = ["train", "text/bytes", "--steps", "1", "--eval-every", "1", "--num-layers", "1", "--dim", "16"]
TINY += ["--num-heads", "2", "--accelerator", "cpu"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main([*words]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_none_is_written_null(capsys):
    assert "write null for None" in refused(capsys, *TINY, "--clip-grad-norm", "None")
    assert "write null for None" in refused(capsys, *TINY, "--clip-grad-norm=None")


def test_a_second_config_is_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    config = ["--config", str(tmp_path / "a.yaml")]
    assert "--config is given more than once" in refused(capsys, *TINY, *config, *config)


def test_options_of_a_mechanism_are_named(capsys):
    assert "clamp must be a number, got 'five'" in refused(capsys, *TINY, "--attention-options.clamp", "five")
    assert "unknown preset None" in refused(capsys, *TINY, "--attention-options.preset", "null")


def test_a_file_is_no_folder_of_a_run(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert "file is a file: pass --out for a folder" in refused(capsys, *TINY, "--out", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--precision", "16-mixed"], "precision 16-mixed needs a GPU"),
        (["--accelerator", "tpu"], "accelerator tpu with 1 devices: "),
    ],
)
def test_what_this_machine_has_not_is_refused_before_a_folder_is_made(words, says, tmp_path: Path, capsys):
    folder = tmp_path / "run"
    assert says in refused(capsys, *TINY, *words, "--out", str(folder))
    assert not folder.exists()


def test_doctor_names_the_backend_that_runs(capsys):
    from flowformer.kernels.native.kernels import kernels

    assert cli.main(["doctor"]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("backend")]
    assert ("native: C++" if kernels() else "torch: ") in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--contenders", ""], "expects words separated by commas, got ''"),
        (["--lengths", ","], "expects words separated by commas, got ','"),
        (["--memory-gb", "nan"], "memory_gb must be at least 0 and below 1,000,000, got nan"),
        (["--seconds", "inf"], "seconds must be positive, got inf"),
        (["--threads", str(10**20)], "threads must be at most 1000000000, got 1"),
        (["--batch", str(10**18)], "batch must be at most 1000000000, got 1"),
    ],
)
def test_numbers_and_lists_of_the_benchmark(words, says, tmp_path, capsys):
    assert says in refused(capsys, "bench", "causal", "--out", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()
