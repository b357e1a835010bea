"""Recipes of language models: the published models and numbers, and the real pipeline on real text."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from flowformer.models import create_model
from flowformer.recipes import create_recipe, find_recipe, list_recipes
from flowformer.tasks.text import enwik8, wikitext
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.format import TextFormat
from flowformer.tasks.text.task import build_task
from flowformer.tasks.text.tokenizers import BytesTokenizer, WordTokenizer
from flowformer.training.recipe import StepRecipe

LANGUAGE = [name for name in list_recipes() if name.split("/")[0] in ("wikitext103", "enwik8", "text", "toys")]


def words(count):
    return WordTokenizer(["<eos>", "<unk>", *(f"w{number}" for number in range(count - 2))])


def build(name, tokenizer, device="cpu", **fields):
    recipe = create_recipe(name, **fields)
    with torch.device(device):
        return recipe, recipe.build_model(TextFormat(tokenizer, recipe.length))


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_all_recipes_are_there():
    assert set(LANGUAGE) == {
        "wikitext103/flow", "wikitext103/softmax", "wikitext103/linear",
        "wikitext103/flow-no-competition", "wikitext103/flow-no-allocation",
        "wikitext103/reformer", "wikitext103/performer", "wikitext103/trf", "wikitext103/trf-gate",
        "wikitext103/cosformer", "enwik8/aft-local-12", "enwik8/aft-local-24", "enwik8/aft-simple",
        "enwik8/transformer", "enwik8/transformer-24", "enwik8/reformer", "enwik8/synthesizer", "enwik8/linear",
        "enwik8/performer", "text/bytes", "text/own",
        "toys/adder", "toys/sort", "toys/chars", "toys/recall", "toys/brackets",
    }  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_recipe_is_whole(name):
    recipe = create_recipe(name)
    assert recipe.name == name
    assert isinstance(recipe, StepRecipe)
    assert recipe.steps == recipe.rounds * recipe.eval_every
    assert len((getattr(find_recipe(name), "func", find_recipe(name))).__doc__) > 80


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("wikitext103/flow", 30.8), ("wikitext103/softmax", 33.0), ("wikitext103/linear", 38.4),
        ("wikitext103/flow-no-competition", 31.2), ("wikitext103/flow-no-allocation", 32.2),
        ("wikitext103/reformer", 33.6), ("wikitext103/performer", 37.5), ("wikitext103/trf", 33.6),
        ("wikitext103/trf-gate", 31.3), ("wikitext103/cosformer", 34.1),
        ("enwik8/aft-local-12", 1.180), ("enwik8/aft-local-24", 1.154), ("enwik8/aft-simple", 1.209),
        ("enwik8/transformer", 1.137), ("enwik8/transformer-24", 1.130), ("enwik8/reformer", 1.195),
        ("enwik8/synthesizer", 1.298), ("enwik8/linear", 1.207), ("enwik8/performer", 1.199),
    ],
)  # fmt: skip
def test_published_values_stand_beside_their_own_row(name, published):
    recipe = create_recipe(name)
    table = wikitext.PUBLISHED if name.startswith("wikitext") else enwik8.PUBLISHED
    text = np.zeros(9, np.uint8)
    task = build_task(Corpus("made", BytesTokenizer(), text, text, text, "", ""), 4, published=table)
    assert recipe.published(task) == published
    assert recipe.published_table()[1] is table
    for change in ({"attention": "mobile"}, {"dim": 128}, {"positions": None}, {"length": 500}):
        assert create_recipe(name, **change).published(task) is None


def test_a_published_row_is_known_however_its_options_are_written():
    ablation = create_recipe("wikitext103/flow", attention_options={"competition": None})
    assert ablation.row == create_recipe("wikitext103/flow-no-competition").row == "flow-no-competition"
    assert create_recipe("wikitext103/flow", attention_options={"clamp": 1}).row not in wikitext.PUBLISHED


@pytest.mark.parametrize(
    ("fields", "row", "bits"),
    [
        ({"attention_options": {"window": 4}}, "aft-local-24-window-4", 1.165),
        ({"attention_options": {"window": 1_024}}, "aft-local-24-window-1024", 1.173),
        ({"attention_options": {"window": 5}}, "", None),
        ({"length": 2_048}, "aft-local-24-length-2048", 1.135),
        ({"length": 2_048, "attention_options": {"window": 4}}, "", None),
    ],
)
def test_tables_of_windows_and_lengths_are_reached_by_options(fields, row, bits):
    recipe = create_recipe("enwik8/aft-local-24", **fields)
    assert (recipe.row, recipe.published_table()[1].get(recipe.row)) == (row, bits)


def test_heads_tell_a_row_of_enwik8():
    assert create_recipe("enwik8/transformer", attention="linear").row == "linear"
    assert create_recipe("enwik8/aft-local-12", attention="softmax").row == ""  # one head
    assert create_recipe("enwik8/aft-local-12", attention="softmax", num_heads=8).row == "transformer"


def test_rows_whose_figure_is_of_a_development_set_say_so():
    noted = {name for name in LANGUAGE if create_recipe(name).published_note}
    assert noted == {f"wikitext103/{row}" for row in ("softmax", "linear", "trf", "trf-gate")}
    assert "development set in Peng et al." in create_recipe("wikitext103/trf").published_note
    assert create_recipe("wikitext103/trf", attention="flow").published_note == ""


@pytest.mark.parametrize(
    ("row", "module", "options"),
    [
        ("reformer", "ReformerAttention", {"form": "paper", "sees_future": False, "shared_qk": True}),
        ("performer", "PerformerAttention", {"num_features": 266}),
        ("trf", "RFAAttention", {"num_features": 64, "gate": False}),
        ("trf-gate", "RFAAttention", {"num_features": 64, "gate": True}),
        ("cosformer", "CosformerAttention", {"max_length": 512}),
    ],
)
def test_wikitext_mechanisms_have_their_options(row, module, options):
    _, model = build(f"wikitext103/{row}", words(1000), device="meta")
    for block in model.decoder.layers:
        assert type(block.attention).__name__ == module
        assert {name: getattr(block.attention, name) for name in options} == options
        assert block.attention.num_heads == 8


def test_wikitext_model_is_the_published_one():
    recipe, model = build("wikitext103/flow", words(1000))
    attention = model.decoder.layers[0].attention
    assert (len(model.decoder.layers), model.dim, attention.num_heads, attention.options.clamp) == (6, 512, 8, 5.0)
    assert model.decoder.layers[0].linear1.out_features == 2_048
    assert model.head is None
    # 4 projections and 2 layers inside, with biases; 2 norms; a final norm; the embedding.
    block = 4 * (512 * 512 + 512) + 2 * 512 * 2048 + 2048 + 512 + 4 * 512
    assert size(model) == 6 * block + 2 * 512 + 1000 * 512
    tokens_of_a_step = recipe.batch_size * recipe.accumulate * recipe.length
    assert (tokens_of_a_step, recipe.context_window) == (65_536, 400)
    for name, option, value in (("competition", "competition", None), ("allocation", "allocation", False)):
        _, ablated = build(f"wikitext103/flow-no-{name}", words(1000))
        assert getattr(ablated.decoder.layers[0].attention.options, option) is value
        assert ablated.decoder.layers[0].attention.options.clamp == 5.0


@pytest.mark.parametrize(
    ("name", "layers", "dim", "heads"),
    [
        ("aft-local-12", 12, 512, 1), ("aft-local-24", 24, 256, 1), ("aft-simple", 24, 256, 1),
        ("transformer", 12, 512, 8), ("transformer-24", 24, 256, 4), ("reformer", 12, 512, 8),
        ("synthesizer", 12, 512, 8), ("linear", 12, 512, 8), ("performer", 12, 512, 8),
    ],
)  # fmt: skip
def test_enwik8_models_are_the_published_ones(name, layers, dim, heads):
    _, model = build(f"enwik8/{name}", BytesTokenizer(), device="meta")
    block = model.decoder.layers[0]
    assert (len(model.decoder.layers), model.dim, block.attention.num_heads) == (layers, dim, heads)
    assert block.linear1.out_features == 4 * dim
    if "local" in name:
        assert (block.attention.window, block.attention.position_dim) == (32, 256)
    if name == "synthesizer":
        assert [tuple(table.shape) for table in block.attention.tables] == [(8, 64, 1_024)]  # dense
        assert block.attention.projections == ("q",)  # and no dot product


def test_validation_text_of_wikitext_goes_through_the_pipeline(shared, tmp_path, monkeypatch):
    """The official validation text in the place of all parts; an untrained model is near the vocabulary's size."""
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path / "cache"))
    text = (shared / "data" / "wikitext" / "wiki103.valid.tokens").read_text(encoding="utf-8")
    for part in ("train", "valid", "test"):
        (tmp_path / f"wiki.{part}.tokens").write_text(text, encoding="utf-8")
    recipe = create_recipe("wikitext103/flow", data_dir=str(tmp_path), check_counts=False)
    task = recipe.build_task()
    assert len(task.test.tokens) == len(task.validation.tokens) == 217_646
    assert recipe.published(task) is None  # this is not the published text
    assert sum(
        task.size(task.format.collate([task.test[index]])) for index in (0, 1, len(task.test) - 1)
    ) == 112 * 2 + (217_646 % 112 or 112)
    vocabulary = task.format.tokenizer.vocab_size
    assert vocabulary == len(set(text.split()) | {"<eos>", "<unk>"})
    batch = task.format.collate([task.validation[index] for index in range(4)])
    perplexity = {}
    for tied in (False, True):
        torch.manual_seed(0)
        model = create_model("flowformer_wikitext", vocab_size=vocabulary, tied=tied).eval()
        with torch.no_grad():
            perplexity[tied] = task.metric.shown(float(task.step(model, batch)["loss"]))
    print(f"vocabulary {vocabulary}, perplexity untrained: {perplexity[False]:.0f}, tied: {perplexity[True]:.0f}")
    # Scores are N(0, 1) at first, which costs half a nat: a factor of 1.65.
    assert 1 < perplexity[False] / vocabulary < 2
    # Where the embedding is the head too, as published, each token foretells itself, and is wrong.
    assert perplexity[True] > 10 * vocabulary


_STEP = """
import resource, sys, time, torch
from flowformer.models import create_model
from flowformer.recipes import create_recipe
from flowformer.tasks.text.format import TextFormat
from flowformer.tasks.text.task import build_task
from flowformer.tasks.text.corpus import Corpus
from flowformer.training.module import TaskModule
import numpy as np

class Words:
    kind, vocab_size = "words", 267_735
    def encode(self, text): return np.zeros(1, np.int32)

recipe = create_recipe("wikitext103/flow")
text = np.random.default_rng(0).integers(267_735, size=5_000).astype(np.int32)
task = build_task(Corpus("made", Words(), text, None, text, "", ""), recipe.length)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = recipe.build_model(task.format)
module = TaskModule(recipe, task, model)
optimizer = torch.optim.AdamW(module._parameter_groups(), lr=1e-3, betas=(0.9, 0.98), fused=True)
batch = task.format.collate([task.train[index] for index in range(4)])
assert batch["tokens"].numel() == 2_048
for _ in range(2):  # the optimizer's state is made by the first
    optimizer.zero_grad()
    task.step(model, batch)["loss"].backward()
    optimizer.step()
held = 4 * 4 * sum(p.numel() for p in model.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"{(peak - before) / held:.3f} {(peak - before) / 1e9:.2f} {held / 1e9:.2f}")
"""


@pytest.mark.slow
def test_memory_of_a_step_of_wikitext():
    """2,048 tokens, 267,735 words: under 1.5 times the parameters, their gradients and the optimizer's two means."""
    done = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=True)
    ratio, peak, held = map(float, done.stdout.split())
    print(f"peak {peak} GB, {ratio} of the {held} GB of parameters, gradients and optimizer")
    assert ratio < 1.5
