"""The tool that checks and times the library on a GPU, in its dry run, which needs none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_cuda import Card
from law_cases import variants_of

from flowformer import list_attentions, ops
from flowformer.bench.device import Cuda
from flowformer.core.backends import backends_of
from flowformer.mechanisms import find_attention


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("gpu_check")


@pytest.fixture(scope="module")
def finished(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one complete dry run, in which nothing failed."""
    folder = tmp_path_factory.mktemp("gpu")
    assert tool.main(["--dry-run", "--out", str(folder)]) == 0
    return folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def wrong_linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> Any:
    """Off by a thousandth."""
    out = ops.linear_attention(q, k, v, **arguments)
    return (1.001 * out[0], out[1]) if isinstance(out, tuple) else 1.001 * out


def test_every_operation_is_checked_and_every_part_has_run(finished: Path) -> None:
    lines = lines_of(finished)
    assert {line["part"] for line in lines} == {"machine", "correctness", "times", "training"}
    for name in list_attentions():
        row = find_attention(name)
        kernels = len(backends_of(row.operation.__name__)) > 1
        for label, variant in list(variants_of(row).items())[: None if kernels else 1]:
            forms = ("bidirectional", "causal") if row.can("causal") else ("bidirectional",)
            for form in [form for form in forms if variant.only in ("", form)]:
                of = {line["name"] for line in lines if line.get("name", "").startswith(f"{name} {label} {form}: ")}
                kinds = {one.rpartition(": ")[2] for one in of}
                assert kinds >= {"float64", "float32", "bfloat16", "float16", "padding", "packing"}
    timed = {line["name"]: line for line in lines if line["part"] == "times"}
    assert timed["causal forward, 8 channels, length 40"]["contenders"]["flow"]["ms"] > 0
    trained = next(line for line in lines if line["part"] == "training")
    assert trained["tokens_per_s"] > 0
    assert 0 < trained["curve"][-1]["bits_per_byte"] < 9


def test_kernels_are_checked_before_what_is_in_plain_pytorch(finished: Path) -> None:
    names = [line["name"].split()[0] for line in lines_of(finished) if line["part"] == "correctness"]
    kernels = [len(backends_of(find_attention(name).operation.__name__)) > 1 for name in names]
    assert kernels == sorted(kernels, reverse=True)
    assert {True, False} == set(kernels)


def test_a_second_run_measures_only_what_is_missing(
    tool: ModuleType, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (finished / "results.jsonl").read_text().splitlines()
    dropped = json.loads(whole[5])["name"]
    (tmp_path / "results.jsonl").write_text("\n".join(whole[:5] + whole[6:]) + "\n")
    assert tool.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.jsonl").read_text().splitlines()[:-1] == whole[:5] + whole[6:]
    assert lines_of(tmp_path)[-1]["name"] == dropped
    assert "0 failed" in capsys.readouterr().out


def test_results_of_another_machine_are_not_added_to(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps({"part": "machine", "card": "another"}) + "\n")
    with pytest.raises(ValueError, match="another machine or commit"):
        tool.main(["--dry-run", "--out", str(tmp_path)])


def test_a_wrong_operation_fails(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = dataclasses.replace(find_attention("linear"), operation=wrong_linear)
    monkeypatch.setattr(tool, "find_attention", lambda name: wrong)
    asked = ["--dry-run", "--out", str(tmp_path), "--only", "correctness", "--mechanisms", "linear"]
    assert tool.main(asked) == 1
    lines = {line["name"]: line for line in lines_of(tmp_path) if line["part"] == "correctness"}
    assert lines["linear default causal: float32"]["ok"] is False
    assert lines["linear default causal: float32"]["error"] == pytest.approx(1e-3, rel=0.01)
    assert "linear default causal: float32" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        return 2 * ops.flow_attention(q, k, v, causal=causal)

    monkeypatch.setattr(tool, "flow", doubled)
    assert tool.main(["--dry-run", "--out", str(tmp_path), "--only", "times"]) == 1
    point = next(line for line in lines_of(tmp_path) if line.get("name", "").startswith("causal forward,"))
    assert point["ok"] is False
    assert "ms" not in point["contenders"]["flow"]
    assert "ms" in point["contenders"]["linear"]
    assert "wrong, not timed" in capsys.readouterr().out


def test_an_exception_is_a_failure_with_its_place(tool: ModuleType) -> None:
    q = torch.zeros(1, 2, 1, 3)
    figures = tool.attempt(lambda: {"ok": ops.flow_attention(q, q, q[:, :1]) is None})
    assert figures["ok"] is False
    assert figures["error"].startswith("ValueError: flow_attention")
    assert figures["where"].startswith("checks.py:")


@pytest.fixture
def on_card(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What times on a GPU, with a stand-in for its runtime, on tensors of the CPU."""
    card = Card()
    card.patch(monkeypatch)
    bench = tool.Bench(tool.DRY, {})
    bench.device, bench.card = Cuda(torch.device("cpu")), card
    return bench


def test_a_call_is_timed_by_events_and_its_memory_by_the_allocator(on_card: Any) -> None:
    def call() -> None:
        on_card.card.now += 7.0
        on_card.card.allocate(512)
        on_card.card.held -= 512

    calls = {"slow": call}
    figures = {"slow": on_card.memory(calls, "slow")}
    assert figures["slow"] == {"peak_bytes": 512}
    found = on_card.timed(calls, figures)["contenders"]["slow"]
    assert (found["ms"], found["least_ms"], found["calls"]) == (pytest.approx(7.25), pytest.approx(7.25), 3)


def test_what_does_not_fit_leaves_the_race(on_card: Any) -> None:
    def call() -> None:
        raise torch.OutOfMemoryError

    calls = {"huge": call}
    assert on_card.memory(calls, "huge") == {"skipped": "out of memory"}
    assert not calls


def test_limits_are_those_of_bench(on_card: Any) -> None:
    found = on_card.limits()
    assert set(found) == {"ok", "copy_TB_s", "bf16_TFLOP_s", "fp32_TFLOP_s", "fp16_TFLOP_s"}
    # An event of the stand-in comes 0.25 ms after the one before.
    assert found["copy_TB_s"] == pytest.approx(2 * 4 * 8 * 64**2 / 0.25e-3 / 1e12)
    assert found["bf16_TFLOP_s"] == pytest.approx(2 * 64**3 / 0.25e-3 / 1e12)


def test_without_a_gpu_it_says_so(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        tool.main([])
    assert "--dry-run does without" in capsys.readouterr().err
