"""List operations: the rules of their expressions."""

import numpy as np
import pytest
import torch

from flowformer.recipes import create_recipe
from flowformer.tasks.text.brackets import brackets
from flowformer.tasks.text.format import IGNORED

# Written out, and by sorting: nothing of the generator's own.
RULES = {
    "MIN": lambda digits: sorted(digits)[0],
    "MAX": lambda digits: sorted(digits)[-1],
    "MED": lambda digits: (sorted(digits)[(len(digits) - 1) // 2] + sorted(digits)[len(digits) // 2]) // 2,
    "SM": lambda digits: int(str(sum(digits))[-1]),
}


def evaluate(text):
    """The value of an expression, its depth, and the numbers of arguments of its operations: with a stack."""
    stack, deepest, counts = [[]], 0, []
    for word in text.split():
        if word.startswith("["):
            stack.append([word[1:]])
            deepest = max(deepest, len(stack) - 1)
        elif word == "]":
            name, *digits = stack.pop()
            counts.append(len(digits))
            stack[-1].append(RULES[name](digits))
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return value, deepest, counts


def read(task):
    for seen, targets in [*task.train, *task.test]:
        text, end = task.format.tokenizer.decode(seen).split(" =")
        assert end == ""
        assert (targets[:-1] == IGNORED).all()
        yield text, int(task.format.tokenizer.decode(targets[-1:]))


def test_the_evaluator_of_these_tests():
    assert evaluate("[MAX 4 3 [MIN 2 3 ] 1 0 ]") == (4, 2, [2, 5])
    assert evaluate("[SM 9 8 [MED 1 4 ] ]") == (9, 2, [2, 3])
    assert evaluate("[MED 1 4 7 8 ]")[0] == 5


@pytest.mark.parametrize(("depth", "length"), [(4, 128), (1, 8), (2, 8), (6, 40), (20, 200)])
def test_answers_are_values_and_sizes_are_kept(depth, length):
    task = brackets(depth, length, train_examples=300, test_examples=50)
    deepest, names = set(), set()
    for text, answer in read(task):
        value, levels, counts = evaluate(text)
        assert answer == value
        words = text.split()
        assert len(words) + 1 <= length
        assert set(counts) <= {2, 3, 4, 5}
        deepest.add(levels)
        names |= {word for word in words if word.startswith("[")}
    assert names == {"[MIN", "[MAX", "[MED", "[SM"}
    assert deepest <= set(range(min(depth, 2), depth + 1))
    if length == 128:
        assert deepest == {2, 3, 4}


def test_answers_are_equally_frequent_and_expressions_differ():
    task = brackets(train_examples=1_000, test_examples=200)
    assert np.bincount([row[-1] for row in task.train.rows]).tolist() == [100] * 10
    assert np.bincount([row[-1] for row in task.test.rows]).tolist() == [20] * 10
    assert len({tuple(row.tolist()) for row in [*task.train.rows, *task.test.rows]}) == 1_200


def test_expressions_are_fixed():
    first, second = (brackets(train_examples=count, test_examples=50) for count in (100, 200))
    assert first.test.fingerprint() == second.test.fingerprint()
    assert first.train.fingerprint() == brackets(train_examples=100, test_examples=50).train.fingerprint()
    assert first.train.fingerprint() != second.train.fingerprint()
    assert first.test.fingerprint() != brackets(train_examples=100, test_examples=50, seed=1).test.fingerprint()


def test_padding_of_short_expressions_changes_nothing():
    task = brackets(train_examples=40, test_examples=10)
    recipe = create_recipe("toys/brackets")
    torch.manual_seed(0)
    model = recipe.build_model(task.format).eval()
    examples = list(task.train)
    batch = task.format.collate(examples)
    assert not batch["mask"].all()
    assert task.size(batch) == 40
    alone = [task.step(model, task.format.collate([example])) for example in examples]
    together = task.step(model, batch)
    torch.testing.assert_close(together["loss"], torch.stack([values["loss"] for values in alone]).mean())
    assert int(together["accuracy"]) == sum(int(values["accuracy"]) for values in alone)


class Recorder(torch.nn.Module):
    """A model that remembers the mask."""

    def forward(self, tokens, mask=None):
        self.mask = mask
        return torch.zeros(*tokens.shape, 17)


def test_models_are_told_the_padding():
    """Behind what counts it has no effect, but a model need not compute it."""
    task = brackets(train_examples=40, test_examples=10)
    batch, model = task.format.collate(list(task.train)), Recorder()
    task.step(model, batch)
    assert torch.equal(model.mask, batch["mask"])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"depth": 1, "length": 4}, "length must be at least 5 for depth 1 .*, got 4"),
        ({"depth": 3, "length": 7}, "length must be at least 8 for depth 3 .*, got 7"),
        ({"test_examples": 0}, "number of examples must be at least 1, got 0"),
        ({"depth": 1, "length": 5, "train_examples": 400}, "400 expressions must differ .* only .* depth 1"),
    ],
)
def test_impossible_sizes_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        brackets(**{"train_examples": 1, "test_examples": 1, **sizes})
