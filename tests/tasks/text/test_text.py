"""Blocks of a text, batches, and what is measured on them."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import flowformer
from flowformer.tasks.protocols import Format, Task
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.format import IGNORED, TextFormat
from flowformer.tasks.text.task import TokenBlocks, build_task
from flowformer.tasks.text.tokenizers import BytesTokenizer, CharacterTokenizer, WordTokenizer

TEXT = np.arange(1, 24)


def corpus(tokens=TEXT, tokenizer=None, **parts):
    return Corpus("made", tokenizer or BytesTokenizer(), tokens, parts.get("validation"), tokens, "", "")


@pytest.mark.parametrize(("length", "context"), [(5, 0), (8, 5), (23, 0), (40, 3), (4, 3)])
def test_every_token_is_a_target_once_after_its_own_past(length, context):
    blocks = TokenBlocks(TEXT, length, context, start=99)
    counted = []
    for seen, targets in blocks:
        assert len(seen) == len(targets) <= length
        counted += [int(token) for token in targets if token != IGNORED]
        # Tokens are their own places in the text, so that what is seen before token n must be n - 1.
        known = targets != IGNORED
        assert (seen[known] == np.where(targets[known] == 1, 99, targets[known] - 1)).all()
        assert (np.diff(seen[1:]) == 1).all()
    assert counted == TEXT.tolist()


def test_context_is_as_much_as_there_is():
    blocks = TokenBlocks(TEXT, 8, 5)  # 3 targets a block, after up to 5 tokens that do not count
    assert [int((targets == IGNORED).sum()) for _, targets in blocks] == [0, 3, 5, 5, 5, 5, 5, 5]
    assert [len(seen) for seen, _ in blocks] == [3, 6, 8, 8, 8, 8, 8, 7]


def test_whole_blocks_only_for_training():
    assert [len(seen) for seen, _ in TokenBlocks(TEXT, 5, whole=True)] == [5, 5, 5, 5]
    assert [len(seen) for seen, _ in TokenBlocks(TEXT, 50, whole=True)] == [23]
    with pytest.raises(IndexError):
        TokenBlocks(TEXT, 5)[5]


@pytest.mark.parametrize("context", [-1, 5, 6])
def test_context_must_leave_something_to_foretell(context):
    with pytest.raises(
        ValueError, match=f"context must be at least 0 and below length, got context {context} and length 5"
    ):
        TokenBlocks(TEXT, 5, context)


def test_batches_say_where_lengths_differ():
    form = TextFormat(BytesTokenizer(), 5)
    batch = form.collate(list(TokenBlocks(TEXT, 5)))
    assert batch["tokens"].shape == batch["targets"].shape == (5, 5)
    assert batch["mask"].sum(1).tolist() == [5, 5, 5, 5, 3]
    assert (batch["targets"][4, 3:] == IGNORED).all()
    assert "mask" not in form.collate(list(TokenBlocks(TEXT, 5, whole=True)))


@torch.no_grad()
def test_loss_is_that_of_the_text_however_it_is_cut():
    """With as much context as there is, blocks foretell what one pass over the text does."""
    torch.manual_seed(0)
    model = flowformer.create_model(
        "flowformer_gpt_nano", vocab_size=256, max_length=30, positions="sinusoidal", attention="aft_simple"
    ).eval()
    whole = build_task(corpus(), 23, start=7)
    batch = whole.format.collate(list(whole.test))
    alone = float(whole.step(model, batch)["loss"])
    assert whole.size(batch) == 23
    logits = model(batch["tokens"])
    direct = torch.nn.functional.cross_entropy(logits[0], torch.from_numpy(TEXT))
    assert alone == pytest.approx(float(direct), rel=1e-6)
    short = build_task(corpus(), 23, context=20, start=7)
    batches = [short.format.collate([item]) for item in short.test]
    assert len(batches) == 8
    sums = [float(short.step(model, each)["loss"]) * short.size(each) for each in batches]
    # Later blocks begin later in the text: their positions, and so the values, differ; the count of targets does not.
    assert sum(short.size(each) for each in batches) == 23
    assert sums[0] / 3 == pytest.approx(float(model.loss(batch["tokens"][:, :3], batch["targets"][:, :3])), rel=1e-6)


@pytest.mark.parametrize(
    ("tokenizer", "name", "value"),
    [
        (BytesTokenizer(), "bits per byte", 2.0),
        (CharacterTokenizer("ab\n"), "bits per character", 2.0),
        (WordTokenizer(["<eos>", "<unk>", "a"]), "perplexity", 4.0),
    ],
)
def test_metric_is_the_usual_one(tokenizer, name, value):
    task = build_task(corpus(np.array([0, 1, 2, 0]), tokenizer), 4)
    assert str(task.metric) == name
    assert task.metric.shown(math.log(4)) == pytest.approx(value)
    records = [{"test/loss": 2.0}, {"test/loss": 1.0}, {"test/loss": 3.0}]
    assert task.metric.best(records, "test") is records[1]
    assert build_task(corpus(np.array([0, 1]), WordTokenizer(["<eos>", "a"])), 2).metric.shown(1e9) < math.inf


def test_first_token_follows_a_new_line():
    assert build_task(corpus(), 5).test[0][0][0] == 10
    assert build_task(corpus(np.array([2, 1]), CharacterTokenizer("abc\n")), 2).test[0][0][0] == 3
    assert build_task(corpus(np.array([2, 1]), WordTokenizer(["<eos>", "<unk>", "a"])), 2).test[0][0][0] == 0
    assert build_task(corpus(np.array([4, 1]), CharacterTokenizer("0123456789")), 2).test[0][0][0] == 4


def test_sets_evaluated_during_training():
    assert list(build_task(corpus(), 5).evaluated) == ["test"]
    chosen = build_task(corpus(validation=TEXT[:7]), 5)
    assert list(chosen.evaluated) == ["validation"]
    assert len(chosen.validation) == 2


def test_a_corpus_without_a_part_is_refused():
    with pytest.raises(ValueError, match="made: the test text is empty"):
        build_task(replace(corpus(), test=None), 5)
    with pytest.raises(ValueError, match="made: the training text is empty"):
        build_task(replace(corpus(), train=TEXT[:0]), 5)
    build_task(corpus(), len(TEXT))
    with pytest.raises(ValueError, match=f"the training text has {len(TEXT)} tokens, fewer than a sequence of length"):
        build_task(corpus(), len(TEXT) + 1)


def test_format_is_read_as_it_was_written():
    form = TextFormat(CharacterTokenizer("abc"), 7)
    again = TextFormat.from_json(form.to_json())
    assert (again.length, again.tokenizer.encode("cab").tolist()) == (7, [2, 0, 1])


def test_task_survives_pickling():
    task = pickle.loads(pickle.dumps(build_task(corpus(), 5)))
    assert len(list(torch.utils.data.DataLoader(task.train, 2, collate_fn=task.format.collate))) == 2


@pytest.mark.parametrize("protocol", [Task, Format])
def test_task_offers_what_training_asks_for(protocol):
    task = build_task(corpus(), 5)
    for name in (name for name in vars(protocol) if not name.startswith("_")):
        assert hasattr(task if protocol is Task else task.format, name), name
