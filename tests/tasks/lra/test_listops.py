"""ListOps: which expressions are generated, and that they are kept whole or not at all."""

import io
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from plain_listops import draw_tree
from rich.console import Console

from flowformer.tasks.list_operations import evaluate
from flowformer.tasks.lra import listops
from flowformer.tasks.lra.listops import CLASSES, SIZES, VOCABULARY, Grammar, generate
from flowformer.tasks.lra.listops.blocks import draw_block

pytestmark = pytest.mark.usefixtures("cache")

SMALL = {"train": 30, "validation": 10, "test": 10}
TINY = Grammar(max_depth=3, max_args=2, min_length=3, max_length=9)
END = VOCABULARY.index("]")

# A process that generates with two workers, and says when it has begun.
GENERATOR = """
from flowformer.tasks.lra import listops

different = listops._different
def tell(blocks, advance):
    for number, one in enumerate(different(blocks, advance)):
        if number == 1_500:
            print("begun", flush=True)
        yield one
listops._different = tell
listops.generate(workers=2)
"""


def texts(part):
    return [" ".join(VOCABULARY[token] for token in part[index][0]) for index in range(len(part))]


def fingerprints(splits):
    return [part.fingerprint() for part in splits]


def leftovers(cache):
    return [path for path in (cache / "tokens").iterdir() if path.is_dir()]


def test_labels_are_values_and_types_are_those_of_classes():
    splits = generate(**SMALL, workers=1)
    assert [len(part) for part in splits] == [30, 10, 10]
    for part in splits:
        assert part.labels.dtype == part.lengths.dtype == np.int64
        assert part[0][0].dtype == np.uint8
        assert [evaluate(text) for text in texts(part)] == part.labels.tolist()
        assert part.lengths.min() > 500
        assert part.lengths.max() < 2_000
    assert tuple("0123456789") == CLASSES
    assert len(VOCABULARY) == 16
    assert (VOCABULARY[0], VOCABULARY[1], VOCABULARY[10], VOCABULARY[11], VOCABULARY[15]) == (
        "<pad>", "0", "9", "[MIN", "]",
    )  # fmt: skip
    assert dict(SIZES) == {"train": 96_000, "validation": 2_000, "test": 2_000}


def test_data_are_fixed():
    """What was generated once stays: on other machines, with other versions of NumPy."""
    assert generate(**SMALL, workers=1).test.fingerprint() == (
        "fe66e1442fb2bd0d2cea1e5292c640320785db061bc39788b3191e7e7e3fba6f"
    )


def test_one_worker_and_two_give_the_same(monkeypatch, tmp_path):
    found = []
    for workers in (1, 2):
        monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path / str(workers)))
        found.append(fingerprints(generate(train=1_000, validation=50, test=50, workers=workers)))
    assert found[0] == found[1]


def test_seeds_and_sizes():
    first = fingerprints(generate(**SMALL, workers=1))
    more = fingerprints(generate(**{**SMALL, "train": 40}, workers=1))
    other = fingerprints(generate(**SMALL, seed=1, workers=1))
    assert more[1:] == first[1:]
    assert more[0] != first[0]
    assert not set(other) & set(first)


def test_all_expressions_differ():
    """A grammar with few expressions: those of five tokens, [MIN 0 1 ] and the like, are drawn again and again."""
    splits = generate(train=900, validation=100, test=100, grammar=TINY, workers=1)
    everything = [text for part in splits for text in texts(part)]
    assert len(set(everything)) == len(everything) == 1_100
    assert all(3 < length < 9 for part in splits for length in part.lengths)
    assert [evaluate(text) for text in everything] == np.concatenate([part.labels for part in splits]).tolist()


def test_more_expressions_than_there_are(cache, monkeypatch):
    monkeypatch.setattr(listops, "_MOST_FAILURES", 5)
    grammar = Grammar(max_depth=2, max_args=2, min_length=3, max_length=5)  # 4 operations, 10 digits, 10 digits
    splits = generate(train=200, validation=100, test=100, grammar=grammar, workers=1)
    assert len({text for part in splits for text in texts(part)}) == 400
    with pytest.raises(ValueError, match=r"401 expressions must differ .* too few: Grammar\(max_depth=2"):
        generate(train=201, validation=100, test=100, grammar=grammar, workers=1)
    with pytest.raises(ValueError, match="too few"):
        generate(**SMALL, grammar=Grammar(max_depth=2, max_args=2), workers=1)
    assert len(leftovers(cache)) == 1


def count_arguments(tokens):
    """Numbers of arguments of all operations of an expression, and the largest number of open ones."""
    open_, counts, deepest = [0], [], 0
    for token in tokens.tolist():
        if VOCABULARY[token].startswith("["):
            open_.append(0)
        else:
            if token == END:
                counts.append(open_.pop())
            open_[-1] += 1
        deepest = max(deepest, len(open_) - 1)
    return counts, deepest


def test_expressions_are_distributed_as_those_of_the_published_program():
    rng, published = random.Random(0), []
    while len(published) < 100:
        _, length = draw_tree(rng, 1)
        if 500 < length < 2_000:
            published.append(length)
    block = draw_block(Grammar(), 0, 0)
    error = block.lengths.std() * (1 / len(published) + 1 / len(block.lengths)) ** 0.5
    assert abs(np.mean(published) - block.lengths.mean()) < 3 * error
    found = [count_arguments(tokens) for tokens in np.split(block.tokens, np.cumsum(block.lengths))[:-1]]
    assert {deepest for _, deepest in found} == {9}
    arguments = np.bincount(np.concatenate([counts for counts, _ in found]), minlength=12)
    assert arguments[:2].sum() == arguments[11:].sum() == 0
    # Given the length of the whole, all numbers of arguments are nearly, not exactly, equally frequent.
    assert abs(arguments[2:11] / arguments.sum() - 1 / 9).max() < 0.02
    words = np.bincount(block.tokens, minlength=16)
    assert words[0] == 0
    assert abs(words[1:11] / words[1:11].sum() - 0.1).max() < 0.005
    assert abs(words[11:15] / words[15] - 0.25).max() < 0.01
    # 0 and 9 are the most frequent values: minima and maxima of many digits.
    labels = np.bincount(block.labels, minlength=10) / len(block.labels)
    assert set(labels.argsort()[-2:].tolist()) == {0, 9}
    assert labels.min() > 0.04


def test_mean_length_is_what_the_probabilities_give():
    """Without limits of length; an argument is an operation with probability 1/4, and has 6 arguments on average."""
    node = 1.0
    for _ in range(8):
        node = 0.75 + 0.25 * (2 + 6 * node)
    block = draw_block(Grammar(min_length=1, max_length=10**9), 0, 0)
    assert len(block.lengths) == 1_024
    assert abs(block.lengths.mean() - (2 + 6 * node)) < 3 * block.lengths.std() / 32


def test_draws_are_uniform_and_exact():
    from flowformer.tasks.lra.listops.blocks import _draw

    drawn = _draw(np.random.PCG64(0), 100_001, 9)
    assert len(drawn) == 100_001
    assert abs(np.bincount(drawn.astype(int), minlength=9) / 100_001 - 1 / 9).max() < 0.004
    assert len(_draw(np.random.PCG64(0), 0)) == 0


def test_generated_data_are_kept(monkeypatch):
    first = generate(**SMALL, workers=1)
    monkeypatch.setattr(listops, "draw_block", None)
    assert fingerprints(generate(**SMALL)) == fingerprints(first)


def test_progress_is_shown_where_it_is_asked_for(capsys):
    screen = io.StringIO()
    generate(**SMALL, workers=1, console=Console(file=screen, force_terminal=True, width=80))
    assert "ListOps" in screen.getvalue()
    assert "50/50" in screen.getvalue()
    generate(**SMALL, seed=1, workers=1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(monkeypatch, cache, error):
    def draw(grammar, seed, number):
        if number == 1:
            assert leftovers(cache)
            raise error
        return draw_block(grammar, seed, number)

    sizes = {**SMALL, "train": 600}
    with monkeypatch.context() as patched:
        patched.setattr(listops, "draw_block", draw)
        with pytest.raises((KeyboardInterrupt, ValueError)):
            generate(**sizes, workers=1)
    assert leftovers(cache) == []
    assert len(generate(**sizes, workers=1).train) == 600


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_an_interrupt_from_the_terminal_leaves_neither_files_nor_processes(cache):
    process = subprocess.Popen(
        [sys.executable, "-c", GENERATOR],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "begun\n"
    assert leftovers(cache)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]  # returns once all processes, which share its pipes, have ended
    assert said.count("Traceback") == 1
    assert said.endswith("KeyboardInterrupt\n")
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"validation": -1}, "validation must be at least 1, got -1"),
        ({"test": 0}, "test must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_impossible_options(options, said):
    with pytest.raises(ValueError, match=said):
        generate(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_depth": 1}, "max_depth must be at least 2, got 1"),
        ({"max_args": 1}, "max_args must be at least 2, got 1"),
        ({"min_length": 0}, "min_length must be at least 1, got 0"),
        ({"max_length": 501}, r"max_length must be at least min_length \+ 2, .* got 501 and 500"),
    ],
)
def test_impossible_grammars(options, said):
    with pytest.raises(ValueError, match=said):
        Grammar(**options)


def test_without_a_folder_the_published_sizes_are_generated(monkeypatch):
    asked = {}
    monkeypatch.setattr(listops, "keep", lambda *words, options: asked.update(options) or stop())
    with pytest.raises(StopIteration):
        listops.load()
    assert asked == {
        "sizes": dict(SIZES),
        "seed": 0,
        "grammar": {"max_depth": 10, "max_args": 10, "min_length": 500, "max_length": 2_000},
    }


def stop():
    raise StopIteration
