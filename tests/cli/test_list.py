"""``flowformer list``: one line each, filtered, and as JSON."""

import json
import subprocess
import sys

import pytest

import flowformer
from flowformer import cli
from flowformer.recipes import list_recipes
from flowformer.tasks import downloads
from flowformer.tasks.lra.made import MADE
from flowformer.tasks.series import uea


def run(capsys, *words):
    status = cli.main(["list", *words])
    return status, *capsys.readouterr()


def rows(capsys, *words):
    status, out, _ = run(capsys, *words, "--json")
    assert status == 0
    return json.loads(out)


def test_every_name_has_one_line(capsys):
    out = run(capsys)[1].splitlines()
    names = [line.split()[0] for line in out if line.startswith("  ")]
    data = [*downloads.DATASETS, *MADE]
    listed = [*list_recipes(), *flowformer.list_models(), *flowformer.list_attentions(), *data]
    assert names == listed
    assert len(out) == len(listed) + 4  # the headings


@pytest.mark.parametrize("kind", ["recipes", "models", "attentions", "data"])
def test_kinds_are_alone_on_request(kind, capsys):
    assert {row["kind"] for row in rows(capsys, kind)} == {kind}
    assert all(row["about"] for row in rows(capsys, kind))


def test_word_is_sought_in_names_and_descriptions(capsys):
    vowels = [
        "uea/JapaneseVowels",
        *(f"uea/JapaneseVowels/{name}" for name in ("dtw", "lstm", "rocket", "tcn", "xgboost")),
    ]
    assert [row["name"] for row in rows(capsys, "recipes", "VOWELS")] == vowels
    assert "uea/PEMS-SF" in [row["name"] for row in rows(capsys, "recipes", "UEA subset")]
    assert {row["kind"] for row in rows(capsys, "aft")} == {"recipes", "models", "attentions"}
    status, _, err = run(capsys, "recipies")
    assert status == 2
    assert "did you mean 'recipes'" in err
    status, _, err = run(capsys, "model", "gpt")
    assert status == 2
    assert "did you mean 'models'" in err


def test_published_value_stands_beside_its_recipe(capsys):
    row = rows(capsys, "recipes", "JapaneseVowels")[0]
    assert row["published"] == 98.9
    assert row["figure"] == "accuracy, percent (Wu et al., ICML 2022)"
    assert "98.9" in run(capsys, "recipes", "JapaneseVowels")[1]
    by_name = {row["name"]: row["published"] for row in rows(capsys, "recipes")}
    assert by_name["wikitext103/flow-no-competition"] == 31.2
    assert by_name["uea/JapaneseVowels/rocket"] == 96.2
    assert by_name["density/aft-local-24-free"] == 2.84
    assert by_name["imagenet/softmax"] == 78.7
    assert by_name["text/own"] is None


def test_data_that_is_here_is_known(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path))
    monkeypatch.setattr(uea, "_find_aeon_data", lambda: None)

    def states():
        return {row["name"]: row["data"] for row in rows(capsys) if "data" in row}

    before = states()
    assert before["uea/Heartbeat"] == before["enwik8"] == before["enwik8/aft-simple"] == before["wikitext"] == "absent"
    assert before["toys/adder"] == before["images/digits"] == "here"
    assert before["text/own"] == "unknown"
    assert before["images/cifar10"] == before["lra/image"] == "absent"
    files = ["uea/Heartbeat/Heartbeat_TRAIN.ts", "uea/Heartbeat/Heartbeat_TEST.ts", "enwik8/enwik8.zip"]
    files += [f"wikitext-103/wiki.{part}.tokens" for part in ("train", "valid")]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    after = states()
    assert after["uea/Heartbeat"] == after["enwik8"] == after["enwik8/aft-simple"] == "here"
    assert after["uea/PEMS-SF"] == after["wikitext"] == after["wikitext103/flow"] == "absent"
    (tmp_path / "wikitext-103" / "wiki.test.tokens").touch()
    assert states()["wikitext"] == states()["wikitext103/flow"] == "here"


def test_data_sets_are_listed_without_torch():
    code = "import sys; from flowformer.cli import main; main(['list', 'data']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
