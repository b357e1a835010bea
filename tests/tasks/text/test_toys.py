"""Adding and sorting."""

import numpy as np
import pytest
import torch

from flowformer.models.generation import stream_tokens
from flowformer.recipes import create_recipe
from flowformer.tasks.text.format import IGNORED
from flowformer.tasks.text.toys import adder, sorter


def rows(problems):
    return [np.concatenate((seen, targets[-1:])) for seen, targets in problems]


def test_adder_adds():
    task = adder()
    assert (len(task.train), len(task.test)) == (9_500, 500)
    every = rows(task.train) + rows(task.test)
    assert len({tuple(row) for row in every}) == 10_000
    for row in every[::37]:
        text = "".join(map(str, row))
        assert int(text[:2]) + int(text[2:4]) == int(text[:3:-1])
    assert (task.test[0][1] == IGNORED).tolist() == [True, True, True, False, False, False]
    assert len(adder(1).test) == 20


def test_sorter_sorts():
    task = sorter()
    assert (len(task.train), len(task.test)) == (547, 182)
    every = rows(task.train) + rows(task.test)
    assert len({tuple(row) for row in every}) == 3**6
    assert all(sorted(row[:6]) == row[6:].tolist() for row in every)
    assert (task.test[0][1] == IGNORED).sum() == 5


def test_which_problems_are_set_aside_is_fixed():
    assert [row.tolist() for row in rows(adder().test)] == [row.tolist() for row in rows(adder().test)]


@pytest.mark.parametrize("call", [lambda: adder(0), lambda: adder(4), lambda: sorter(0), lambda: sorter(6, 11)])
def test_sizes_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match=r"must be from 1 to [38]"):
        call()


def test_accuracy_is_that_of_decoding():
    """A model that is right now and then: what is counted is what decoding without the answers gives."""
    torch.manual_seed(0)
    recipe = create_recipe("toys/sort", size=2, kinds=4)
    task = recipe.build_task()
    model = recipe.build_model(task.format)
    batch = task.format.collate(list(task.train))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        task.step(model, batch)["loss"].backward()
        optimizer.step()
    model.eval()
    problems = rows(task.train) + rows(task.test)
    decoded = torch.stack(
        list(stream_tokens(model, [row[:2].tolist() for row in problems], max_new_tokens=2, temperature=0)), 1
    )
    right = [answer.tolist() == row[2:].tolist() for answer, row in zip(decoded, problems, strict=True)]
    whole = task.format.collate([*task.train, *task.test])
    assert 0 < sum(right) < len(right)
    assert int(task.step(model, whole)["accuracy"]) == np.sum(right)
