"""Recipes of Long Range Arena: published numbers, and runs on small data of every form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from flowformer import create_model, list_attentions
from flowformer.common.errors import DataError
from flowformer.recipes import create_recipe
from flowformer.recipes.lra_published import OPTIONS
from flowformer.recipes.registry import check_given
from flowformer.tasks.lra.format import PairFormat, SequenceFormat
from flowformer.tasks.lra.task import PUBLISHED
from flowformer.training.fit import train
from flowformer.training.schedules import learning_rate_factor

TASKS = ("lra/listops", "lra/text", "lra/text-4000", "lra/retrieval", "lra/image", "lra/pathfinder")
SMALL = {"dim": 16, "num_heads": 2, "head_dim": None, "ffn_dim": 16, "num_layers": 1, "steps": 2, "eval_every": 1}

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lra/listops", (1, 2, 512, 256, 1024, 32, 5_000, 50, 2_000, 0.005, 1_000)),
        ("lra/text", (1, 4, 256, 64, 1024, 32, 20_000, 100, 1_000, 0.005, 8_000)),
        ("lra/text-4000", (1, 4, 256, 64, 1024, 32, 20_000, 100, 4_000, 0.005, 8_000)),
        ("lra/retrieval", (4, 4, 128, 32, 512, 32, 5_000, 100, 4_000, 0.05, 8_000)),
    ],
)
def test_published_numbers_of_texts(name, wanted):
    recipe = create_recipe(name)
    fields = ("num_layers", "num_heads", "dim", "head_dim", "ffn_dim", "batch_size", "steps", "eval_every", "length")
    assert tuple(getattr(recipe, field) for field in fields) == wanted[:-2]
    base, warmup = wanted[-2:]
    factor = learning_rate_factor(recipe.schedule, recipe.warmup_steps, recipe.steps)
    for step in (warmup, 3 * warmup, 4 * warmup):
        assert recipe.learning_rate * factor(step) == pytest.approx(base / step**0.5)
    assert (recipe.optimizer, recipe.beta2, recipe.optimizer_eps, recipe.clip_grad_norm) == ("adamw", 0.98, 1e-9, None)
    assert (recipe.weight_decay, recipe.decayed, recipe.dropout, recipe.pool) == (0.1, "all", 0.1, "class")


def test_published_numbers_of_image():
    recipe = create_recipe("lra/image")
    assert (recipe.num_layers, recipe.dim, recipe.num_heads * recipe.head_dim, recipe.ffn_dim) == (1, 128, 64, 128)
    assert (recipe.num_heads, recipe.positions, recipe.dropout, recipe.batch_size) == (4, "learned", 0.3, 256)
    assert (recipe.steps, recipe.eval_every, recipe.learning_rate, recipe.weight_decay) == (35_000, 175, 5e-4, 0)


def test_baselines_have_their_own_configurations():
    performer = create_recipe("lra/image", attention="performer")
    assert (performer.num_heads, performer.head_dim, performer.pool) == (8, 8, "class")
    assert performer.attention_options == {"kernel": "relu", "projected": False, "scale": 1.0}
    assert create_recipe("lra/image", attention="local").attention_options == {"window": 64}
    assert create_recipe("lra/listops", attention="local").attention_options == {"window": 50}
    assert create_recipe("lra/image", attention="sinkhorn").weight_decay == 0.7
    assert create_recipe("lra/image", attention="sinkhorn", weight_decay=0.1).weight_decay == 0.1
    assert create_recipe("lra/text", attention="local", attention_options={"window": 9}).attention_options == {
        "window": 9
    }


@pytest.mark.parametrize("name", TASKS)
def test_every_published_row_has_a_recipe(name):
    for attention in PUBLISHED["text"]:
        if attention not in list_attentions():
            continue  # an ablation
        recipe = create_recipe(name, attention=attention, released=True)
        assert recipe.row == attention
        assert create_recipe(name, **{key: value for key, value in recipe.to_json().items() if key != "name"}) == recipe


@pytest.mark.parametrize("attention", list_attentions())
def test_every_mechanism_is_built(attention):
    recipe = create_recipe("lra/listops", attention=attention)
    assert recipe.build_model(SequenceFormat("listops", ("a", "b"), 64)) is not None


FORMATS = {
    "listops": SequenceFormat("listops", tuple("0123456789"), 2_000),
    "text": SequenceFormat("bytes", ("a", "b"), 1_000),
    "text-4000": SequenceFormat("bytes", ("a", "b"), 4_000),
    "retrieval": PairFormat(("a", "b"), 4_000),
    "image": SequenceFormat("grey", tuple("0123456789"), 1_024),
    "pathfinder": SequenceFormat("grey", ("a", "b"), 1_024),
}


def count_parameters(task, attention, monkeypatch):
    monkeypatch.setattr("flowformer.recipes.lra.build_model", create_model)  # which does not draw parameters on meta
    with torch.device("meta"):
        model = create_recipe(f"lra/{task}", attention=attention).build_model(FORMATS[task])
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_table_of_parameters(monkeypatch):
    """That of docs/lra.md: every mechanism on every task, and by how much it differs from the Transformer."""
    lines = (Path(__file__).parents[2] / "docs" / "lra.md").read_text(encoding="utf-8").splitlines()
    found = {
        line.split("`")[1]: line.split("|")[2:-1] for line in lines if line.startswith("| `") and line.count("|") == 8
    }
    assert list(found) == list_attentions()
    plain = {task: count_parameters(task, "softmax", monkeypatch) for task in FORMATS}
    for attention, cells in found.items():
        for task, cell in zip(FORMATS, cells, strict=True):
            count = count_parameters(task, attention, monkeypatch)
            more = 100 * (count / plain[task] - 1)
            assert cell.strip() == (f"{count:,} ({more:+.1f} %)" if abs(more) >= 0.05 else f"{count:,}"), (
                attention,
                task,
            )


def test_rows_of_the_published_table():
    assert create_recipe("lra/text").row == "flow"
    assert create_recipe("lra/text", attention_options={"competition": None}).row == "flow-no-competition"
    assert create_recipe("lra/text", attention_options={"allocation": False}).row == "flow-no-allocation"
    assert create_recipe("lra/text", attention_options={"preset": "core"}).row == ""
    assert create_recipe("lra/text", dim=128, head_dim=32).row == ""
    assert create_recipe("lra/text", length=999).row == ""
    assert create_recipe("lra/text", attention="local", released=True).row == "local"
    assert create_recipe("lra/text", attention="mobile").row == "mobile"
    assert create_recipe("lra/text", attention="mobile").published_table()[1].get("mobile") is None
    assert set(OPTIONS) <= set(list_attentions())


def run(recipe, folder: Path) -> dict:
    train(recipe, folder, console=Console(quiet=True))
    return json.loads((folder / "result.json").read_text())


def test_listops_is_generated_and_trained(tmp_path):
    recipe = create_recipe(
        "lra/listops", **SMALL, batch_size=2, train_examples=12, test_examples=4, attention="linear"
    )  # fmt: skip
    result = run(recipe, tmp_path / "run")
    assert result["protocols"]["paper"]["published"] is None  # not the published size
    assert "test set" in result["protocols"]["paper"]["selection"]
    assert "validation set" in result["protocols"]["honest"]["selection"]


def reviews(folder: Path, count: int) -> Path:
    path = folder / "reviews.jsonl"
    texts = ("good film" * 3, "bad")
    rows = [
        {"file": f"train/{kind}/{number}_1.txt", "label": 1 - i, "rating": 1, "text": texts[i]}
        for number in range(count)
        for i, kind in enumerate(("pos", "neg"))
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_texts_without_a_test_set_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr("flowformer.tasks.lra.imdb.COUNT", 10)
    path = reviews(tmp_path, 10)
    recipe = create_recipe("lra/text", **SMALL, data=path, length=12, batch_size=4, validation_fraction=0.3)
    task = recipe.build_task()
    assert [len(part) for part in (task.train, task.test, task.validation)] == [12, 2, 6]
    assert task.format.collate([task.train[0]])["tokens"].shape[1] <= 12
    assert "held out" in task.name
    assert task.published == {}  # the published figures are of another test set
    assert run(recipe, tmp_path / "run")["protocols"]["honest"]["value"] >= 0


def test_papers_become_pairs(tmp_path):
    papers, citations = tmp_path / "papers.jsonl", tmp_path / "citations.tsv"
    papers.write_text("".join(f'{{"id": "p{n}", "text": "paper {n} on rivers"}}\n' for n in range(60)))
    citations.write_text("".join(f"p{n}\tp{n + 1}\n" for n in range(59)))
    recipe = create_recipe("lra/retrieval", **SMALL, papers=papers, citations=citations, batch_size=2, length=16)
    result = run(recipe, tmp_path / "run")
    assert "tested once" in result["protocols"]["honest"]["selection"]
    assert result["protocols"]["honest"]["published"] is None
    with pytest.raises(ValueError, match="papers and citations are needed together, got no citations"):
        create_recipe("lra/retrieval", papers=papers)


def test_pictures_become_grey_sequences(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10, dtype=np.uint8), 3)[:, None]
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        records = np.concatenate([labels, rng.integers(0, 256, (30, 3 * 32 * 32), np.uint8)], 1)
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    recipe = create_recipe("lra/image", **SMALL, data=tmp_path, batch_size=16, validation_fraction=0.1)
    task = recipe.build_task()
    assert [len(part) for part in (task.train, task.validation, task.test)] == [130, 20, 30]
    assert task.format.collate([task.train[0]])["tokens"].shape == (1, 1024)
    assert "tested once" in run(recipe, tmp_path / "run")["protocols"]["honest"]["selection"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]  # no evaluation before training


def test_cifar10_is_read_from_the_cache_if_no_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path))
    recipe = create_recipe("lra/image")
    assert recipe.data_state == "absent"
    with pytest.raises(DataError, match="`flowformer data cifar10` downloads it"):
        recipe.build_task()
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    assert recipe.data_state == "here"
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
        recipe.build_task()


@pytest.mark.parametrize(
    ("name", "fields", "misfit"),
    [
        ("lra/listops", {"data_dir": "x", "train_examples": 50}, "train_examples has no effect with data_dir"),
        ("lra/pathfinder", {"data_dir": "x", "num_images": 50}, "num_images has no effect with data_dir"),
        ("lra/retrieval", {"papers": "x", "citations": "y", "data_dir": "z"}, "data_dir has no effect with papers"),
    ],
)
def test_options_without_effect_are_refused(name, fields, misfit):
    with pytest.raises(ValueError, match=misfit):
        check_given(create_recipe(name, **fields), fields)


def test_sinkhorn_as_released_where_its_blocks_divide_the_length():
    assert "sort" not in create_recipe("lra/listops", attention="sinkhorn", released=True).attention_options
    assert (
        create_recipe("lra/pathfinder", attention="sinkhorn", released=True).attention_options["sort"] == "lra_softmax"
    )


def test_pathfinder_is_generated_and_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("flowformer.recipes.lra.available_cpus", lambda: 1)
    recipe = create_recipe("lra/pathfinder", **SMALL, difficulty="easy", num_images=20, batch_size=8)
    assert create_recipe("lra/pathfinder").learning_rate == 1e-4
    assert create_recipe("lra/pathfinder", attention="linear").learning_rate == 1e-3
    result = run(recipe, tmp_path / "run")
    assert result["protocols"]["paper"]["published"] is None  # of hard pictures
    assert create_recipe("lra/pathfinder-128").published_table() is None


@pytest.mark.parametrize("attention", ["flow", "local", "softmax"])
def test_released_code_lets_padding_take_part(attention):
    for released in (False, True):
        recipe = create_recipe("lra/text", **SMALL, attention=attention, released=released, length=30)
        form = recipe.fit_format(recipe.read_format(
            {"reading": "bytes", "classes": ["a", "b"], "max_length": 30, "trim": True}
        ))  # fmt: skip
        model = recipe.build_model(form).eval()
        items = [(np.arange(1, 9, dtype=np.uint16), 0), (np.arange(1, 31, dtype=np.uint16), 0)]
        alone = recipe.read_format({**form.to_json(), "trim": True}).collate(items[:1])
        both = form.collate(items)
        got = model(both["tokens"], both["mask"])[0]
        want = model(alone["tokens"], alone["mask"])[0]
        assert torch.allclose(got, want, atol=1e-5) != released
        assert form.collate(items[:1])["tokens"].shape[1] == (30 if released else 8)
