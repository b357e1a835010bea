"""``flowformer data``: what is listed, made and checked."""

from __future__ import annotations

import pytest

from flowformer.cli import main
from flowformer.tasks.lra import listops


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = main(["data", *words])
    return status, *capsys.readouterr()


def test_everything_is_listed(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    for name in ("wikitext", "enwik8", "cifar10", "lra-text", "lra-listops", "lra-pathfinder", "lra-pathfinder-128"):
        assert f"{name} " in out


def test_expressions_are_checked(capsys, tmp_path):
    right, wrong = tmp_path / "right.tsv", tmp_path / "wrong.tsv"
    right.write_text("Source\tTarget\n( ( ( [MAX 4 ) 3 ) ] )\t4\n")
    wrong.write_text("Source\tTarget\n( ( ( [MAX 4 ) 3 ) ] )\t3\n")
    assert run(capsys, "lra-listops", "--check", str(right))[:2] == (0, f"{right}: 1 expressions, 0 wrong\n")
    status, out, _ = run(capsys, "lra-listops", "--check", str(wrong))
    assert status == 1
    assert "line 2: Target is 3, the expression gives 4" in out


@pytest.mark.usefixtures("cache")
def test_expressions_are_written(capsys, tmp_path, monkeypatch):
    generate = listops.generate
    monkeypatch.setattr(listops, "generate", lambda **more: generate(train=8, validation=4, test=4, workers=1, **more))
    status, out, _ = run(capsys, "lra-listops", "--dir", str(tmp_path / "listops"))
    assert status == 0
    assert "class 9" in out
    assert len(listops.load(tmp_path / "listops").train) == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lra-listop"], "did you mean 'lra-listops'?"),
        (["nothing"], "known are wikitext, enwik8"),
        (["enwik8", "--check", "x"], "enwik8 has no files to check"),
        (["lra-pathfinder", "--check", "x"], "lra-pathfinder has no files to check"),
        (["--check", "x"], "--check requires the name of a data set"),
        (["--dir", "x"], "--dir requires the name of a data set"),
        (["lra-listops", "--dir", "x", "--check", "y"], "--dir has no effect with --check"),
        (["lra-listops", "--check", "absent.tsv"], "absent.tsv"),
        (["lra-pathfinder", "--dir", "x"], "leave --dir out"),
    ],
)
def test_what_cannot_be_done_is_said(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *words)
    assert status == 2
    assert says in err
    assert not any(tmp_path.iterdir())
