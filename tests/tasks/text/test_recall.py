"""Associative recall: the rules of its sequences."""

import numpy as np
import pytest
import torch

from flowformer.tasks.text.format import IGNORED
from flowformer.tasks.text.recall import Sequences, recall


def read_back(tokens, pairs):
    """The value to recall at each position, -100 elsewhere: found by reading the sequence from left to right."""
    known = {}
    for place in range(0, 2 * pairs, 2):
        known[tokens[place]] = tokens[place + 1]
    assert len(known) == pairs
    return [IGNORED if place < 2 * pairs else known.get(token, IGNORED) for place, token in enumerate(tokens)]


@pytest.mark.parametrize(
    ("pairs", "length", "vocab_size"), [(8, 64, 128), (1, 4, 4), (4, 16, 10), (3, 17, 8), (2, 64, 8_192)]
)
def test_each_key_is_asked_once_and_its_value_is_the_target(pairs, length, vocab_size):
    examples = 5 if vocab_size == 4 else 50
    task = recall(pairs, length, vocab_size, train_examples=examples, test_examples=1 if vocab_size == 4 else 20)
    assert task.format.vocab_size == vocab_size
    for tokens, targets in [*task.train, *task.test]:
        tokens, targets = tokens.tolist(), targets.tolist()
        assert len(tokens) == len(targets) == length
        assert targets == read_back(tokens, pairs)
        places = [place for place, target in enumerate(targets) if target != IGNORED]
        assert len(places) == pairs
        assert all(place % 2 == 0 for place in places)
        assert all(1 <= key < vocab_size // 2 for key in tokens[: 2 * pairs : 2])
        values = tokens[1 : 2 * pairs : 2]
        assert len(set(values)) == pairs
        assert all(vocab_size // 2 <= value < vocab_size for value in values)


def test_words_name_the_tokens():
    tokenizer = recall(train_examples=1, test_examples=1).format.tokenizer
    assert tokenizer.encode("k1 v64 k63 v127\n").tolist() == [1, 64, 63, 127, 0]


def test_queries_are_near_with_a_power_law_and_other_tokens_are_random():
    task = recall(train_examples=4_000, test_examples=1)
    tokens, targets = task.train.tokens, task.train.targets
    share = (targets[:, 16:] != IGNORED).mean(0)
    assert np.all(share[1::2] == 0)
    # A draw of 8 of 24 gaps without repetition, by weights 1 / gap^0.99: made here by drawing one after the other.
    rng, weights = np.random.default_rng(1), np.arange(1, 25) ** -0.99
    wanted = np.zeros(24)
    for _ in range(4_000):
        wanted[rng.choice(24, 8, replace=False, p=weights / weights.sum())] += 1 / 4_000
    assert np.abs(share[::2] - wanted).max() < 0.05
    others = tokens[:, 16:][targets[:, 16:] == IGNORED]
    counts = np.bincount(others, minlength=128) / len(others)
    assert counts.min() > 0.5 / 128
    assert counts.max() < 1.5 / 128


def test_sequences_are_fixed_and_sets_are_disjoint():
    first, second = (recall(2, 8, 16, train_examples=count, test_examples=300) for count in (500, 3_000))
    assert first.test.fingerprint() == second.test.fingerprint()
    assert first.train.fingerprint() == recall(2, 8, 16, train_examples=500, test_examples=300).train.fingerprint()
    assert first.train.fingerprint() != second.train.fingerprint()
    assert (
        first.test.fingerprint() != recall(2, 8, 16, train_examples=500, test_examples=300, seed=1).test.fingerprint()
    )
    rows = [tuple(row.tolist()) for row, _ in [*second.train, *second.test]]
    assert len(set(rows)) == len(rows) == 3_300


def test_fingerprint_knows_tokens_and_targets():
    one = recall(train_examples=2, test_examples=1).train
    changed = one.targets.copy()
    changed[0, np.argmax(changed[0] > 0)] += 1
    others = [Sequences(one.tokens[::-1], one.targets), Sequences(one.tokens, changed)]
    assert len({other.fingerprint() for other in [one, *others]}) == 3


class Fixed(torch.nn.Module):
    """Answers that are given."""

    def __init__(self, answers, vocab_size):
        super().__init__()
        self.logits = torch.nn.functional.one_hot(answers, vocab_size).float()

    def forward(self, tokens, mask=None):
        return self.logits


def test_accuracy_counts_queries_and_nothing_else():
    task = recall(4, 16, 32, train_examples=2, test_examples=1)
    batch = task.format.collate(list(task.train))
    asked = batch["targets"] != IGNORED
    answers = batch["targets"].where(asked, 0)
    row, place = asked.nonzero()[0].tolist()
    answers[row, place] = 0  # one of eight is wrong
    values = task.step(Fixed(answers, 32), batch)
    assert int(values["accuracy"]) == 7
    assert task.size(batch) == 8
    logits = Fixed(answers, 32).logits
    wanted = torch.nn.functional.cross_entropy(logits[asked], batch["targets"][asked])
    torch.testing.assert_close(values["loss"], wanted)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"pairs": 8, "length": 31}, "length must be at least 32 for 8 pairs .*, got 31"),
        ({"pairs": 8, "vocab_size": 16}, "vocab_size must be even and at least 18 for 8 pairs .*, got 16"),
        ({"vocab_size": 129}, "vocab_size must be even .*, got 129"),
        ({"train_examples": 0}, "number of examples must be at least 1, got 0"),
        ({"pairs": 1, "length": 4, "vocab_size": 4, "train_examples": 6}, "7 examples must differ .* only 6 different"),
    ],
)
def test_impossible_sizes_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        recall(**{"test_examples": 1, "train_examples": 1, **sizes})
