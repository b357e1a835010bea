"""What an addition costs: one file, which registers itself. The library has no line about what is added here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flowformer
from flowformer import cli
from flowformer.recipes.registry import RECIPES

PACKAGE = Path(flowformer.__file__).parent


# --------------------------------------------------------------------------------------------------------- a benchmark


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The toy benchmark, registered for these tests only."""
    import toy_benchmark

    yield toy_benchmark
    RECIPES.remove("toys/clouds")


@pytest.fixture(scope="module")
def run(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, trained by the command line."""
    folder = tmp_path_factory.mktemp("clouds") / "run"
    assert cli.main(["train", "toys/clouds", "--out", str(folder)]) == 0
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    status = cli.main([str(word) for word in words])
    return status, *capsys.readouterr()


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_benchmark_is_one_short_file_that_the_library_does_not_know(benchmark):
    source = Path(benchmark.__file__).read_text()
    assert len([line for line in source.splitlines() if line.strip()]) <= 100
    for file in PACKAGE.rglob("*.py"):
        assert "clouds" not in file.read_text(), file


def test_benchmark_is_listed_and_described(benchmark, capsys):
    status, out, _ = call(capsys, "list")
    assert status == 0
    assert "toys/clouds" in out
    status, out, _ = call(capsys, "info", "toys/clouds")
    assert status == 0
    assert "Discs and rings, told apart in seconds." in out
    assert "did you mean 'toys/clouds'?" in call(capsys, "train", "toys/cluods")[2]
    assert "toys/clouds" in call(capsys, "list", "recipes", "rings")[1]


def test_benchmark_is_trained_and_evaluated(run, capsys):
    result = json.loads((run / "result.json").read_text())
    assert result["protocols"]["honest"]["published"] == 99.0
    assert result["protocols"]["paper"]["value"] > 80
    assert result["data"] == {"source": "drawn at random", "licence": "made here; no terms"}
    status, out, _ = call(capsys, "evaluate", run)
    assert status == 0
    assert f"test accuracy, percent: {result['protocols']['honest']['value']:.2f}" in out


def test_benchmark_predicts_files(benchmark, run, tmp_path, capsys):
    for cloud, label in benchmark.draw(2, seed=5):
        (tmp_path / f"{label}.json").write_text(json.dumps(cloud.tolist()))
    status, out, _ = call(capsys, "predict", run, tmp_path / "0.json", tmp_path / "1.json")
    assert status == 0
    header, *rows = [line.split(",") for line in out.splitlines()]
    assert header == ["cloud", "label", "p_disc", "p_ring"]
    assert [row[:2] for row in rows] == [["0", "disc"], ["1", "ring"]]
    (tmp_path / "2.json").write_text("[[0, 0]]")
    assert "want 16 points of 2 coordinates" in call(capsys, "predict", run, tmp_path / "2.json")[2]


@pytest.mark.parametrize(
    "words", [["generate", "RUN"], ["visualize", "RUN", "--out", "a.png"], ["export", "RUN", "--to", "hf"]]
)
def test_what_the_benchmark_does_not_offer_is_refused_with_what_it_does(words, run, capsys):
    status, _, err = call(capsys, *(run if word == "RUN" else word for word in words))
    assert status == 2
    assert f"`flowformer {words[0]}` does not apply to {run}" in err
    assert "available: evaluate, predict\n" in err


def test_benchmark_resumes_to_the_same_result(benchmark, run, tmp_path, monkeypatch, capsys):
    steps, step = 0, benchmark.CloudTask.step

    def interrupted(*arguments):
        nonlocal steps
        steps += 1
        if steps == 90:  # in the third epoch
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(benchmark.CloudTask, "step", interrupted)
    folder = tmp_path / "run"
    assert call(capsys, "train", "toys/clouds", "--out", folder)[0] == 130
    assert not (folder / "result.json").exists()
    assert 1 < len(records(folder)) < 5
    monkeypatch.undo()
    assert call(capsys, "train", "toys/clouds", "--out", folder, "--resume")[0] == 0
    assert records(folder) == records(run)
