"""What a mechanism costs: one file, which registers itself. The library has no line about the one added here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import flowformer
from flowformer import cli
from flowformer.mechanisms.registry import unregister

TESTS = Path(__file__).parent
PACKAGE = Path(flowformer.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[ModuleType]:
    """The toy mechanism, registered for these tests only."""
    import toy_mechanism

    yield toy_mechanism
    unregister("toy")
    del sys.modules["toy_mechanism"]


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    status = cli.main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_it_is_one_short_file_that_the_library_does_not_know(toy: ModuleType) -> None:
    assert len(Path(toy.__file__).read_text().splitlines()) <= 60
    for file in PACKAGE.rglob("*.py"):
        assert "toy_attention" not in file.read_text(), file


def test_it_is_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert "toy" in flowformer.list_attentions()
    status, out, _ = call(capsys, "list", "attentions", "toy")
    assert status == 0
    assert "A gated mean of all values." in out
    status, out, _ = call(capsys, "info", "toy")
    assert status == 0
    assert "Time: L (K + V)" in out
    assert "No state to continue from, and no decoding token by token: it has no step" in out


@pytest.mark.long
def test_it_passes_every_law() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(PACKAGE.parent)])}
    words = ["-m", "pytest", str(TESTS / "laws.py"), "-p", "toy_mechanism", "-k", "toy", "-q", "-p", "no:xdist"]
    words += ["-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 70


SIZES = {
    "text/bytes": ["--steps", "1", "--eval-every", "1", "--dim", "16", "--num-layers", "1", "--num-heads", "2"],
    "images/digits": ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "500"],
    "uea/JapaneseVowels": [
        *("--epochs", "1", "--batch-size", "270", "--dim", "16", "--num-layers", "1", "--num-heads", "2"),
        *("--ffn-dim", "16"),
    ],
}


@pytest.fixture(scope="module", params=SIZES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the toy mechanism, one for each kind of data."""
    folder = tmp_path_factory.mktemp("toy") / request.param.replace("/", "-")
    assert cli.main(["train", request.param, "--attention", "toy", *SIZES[request.param], "--out", str(folder)]) == 0
    return folder


def test_it_trains_in_every_kind_of_model(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["recipe"]["attention"] == "toy"
    assert result["protocols"]["honest"]["value"] > 0


def test_it_is_pictured() -> None:
    from flowformer.mechanisms.maps import attention_rows

    module = flowformer.create_attention("toy", 8, 2, causal=True)
    weights = attention_rows(module, torch.randn(1, 5, 8), [0, 4])
    assert weights.shape == (1, 2, 2, 5)
    assert weights[0, :, 0, 1:].count_nonzero() == 0


@pytest.mark.parametrize("run", ["text/bytes"], indirect=True)
def test_it_is_drawn_by_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("To be or not to be")
    status, _, err = call(capsys, "visualize", run, tmp_path / "notes.txt", "--out", tmp_path / "toy.png")
    assert status == 0, err
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_it_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "causal", "--contenders", "toy", "--lengths", "64", "--heads", "2", "--channels", "8"]
    words += ["--seconds", "0.003", "--no-memory", "--no-limits"]
    status, out, err = call(capsys, *words, "--out", tmp_path / "bench")
    assert status == 0, err
    assert "toy" in out
