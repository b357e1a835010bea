"""The fuzzer of the command line in a short form, and that it finds what it looks for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("fuzz_cli")


@pytest.fixture(scope="module")
def material(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("FLOWFORMER_BACKEND", "torch")
        folder = tmp_path_factory.mktemp("fuzz") / "material"
        folder.mkdir()
        tool.prepare(folder)
        yield folder


def test_a_few_wrong_calls(tool, material):
    tally = tool.fuzz(32, 1, material)
    assert [f"{wrong}: {call.words}" for wrong, call, _ in tally.found] == []
    assert sum(tally.calls.values()) == 32


@pytest.mark.slow
def test_many_wrong_calls(tool, material):
    tally = tool.fuzz(300, 2, material)
    assert [f"{wrong}: {call.words}" for wrong, call, _ in tally.found] == []
    tally = tool.processes(material, 9, 2)
    assert [wrong for wrong, _, _ in tally.found] == []


@pytest.mark.parametrize(
    ("main", "wrong"),
    [
        (lambda words: 0, "is accepted"),
        (lambda words: print("flowformer: no", file=sys.stderr) or 2, "the message does not name dim"),
        (lambda words: print("flowformer: dim\nmore", file=sys.stderr) or 2, "2 lines on standard error"),
        (lambda words: 1 // 0, "status 1: Traceback: ZeroDivisionError"),
        (lambda words: Path("left").touch() or print("flowformer: dim", file=sys.stderr) or 2, "leaves left behind"),
        (lambda words: print("flowformer: dim", file=sys.stderr) or 2, ""),
    ],
)
def test_what_is_wrong_is_found(tool, tmp_path, monkeypatch, main, wrong):
    monkeypatch.setattr("flowformer.cli.main", main)
    call = tool.Call("number", ["train", "text/own", "--dim=-1"], refused=True, names="dim")
    outcome = tool.run_here(call.words, tmp_path, 5)
    assert tool.judge(call, outcome, tmp_path, set()).startswith(wrong)
    assert bool(tool.judge(call, outcome, tmp_path, set())) == bool(wrong)
    shutil.rmtree(tmp_path)


def test_a_call_that_hangs_is_ended(tool, tmp_path, monkeypatch):
    monkeypatch.setattr("flowformer.cli.main", lambda words: [None for _ in iter(int, 1)])
    call = tool.Call("number", ["list"])
    assert tool.judge(call, tool.run_here(call.words, tmp_path, 1), tmp_path, set()) == "hangs"
