"""The order in which a training set is seen, and the learning rate over time."""

import math
from types import SimpleNamespace

import pytest
import torch

from flowformer.recipes import create_recipe
from flowformer.training.module import TaskModule
from flowformer.training.order import RoundSampler
from flowformer.training.schedules import learning_rate_factor


def rounds(sampler, count):
    seen = []
    for number in range(count):
        sampler.set_epoch(number)
        seen.append(list(sampler))
    return seen


@pytest.mark.parametrize("length", [3, 10, 25])
def test_each_example_is_seen_once_before_any_is_seen_twice(length):
    seen = [index for part in rounds(RoundSampler(10, length, seed=1), 20) for index in part]
    for start in range(0, len(seen) - 9, 10):
        assert sorted(seen[start : start + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_a_round_is_the_same_whenever_it_is_run():
    sampler = RoundSampler(10, 7, seed=3)
    first = rounds(sampler, 4)
    sampler.set_epoch(2)
    assert list(sampler) == first[2]
    assert rounds(RoundSampler(10, 7, seed=4), 4) != first


def test_devices_share_a_round():
    whole = rounds(RoundSampler(11, 8, seed=2), 3)
    parts = [rounds(RoundSampler(11, 4, world=2, rank=rank, seed=2), 3) for rank in range(2)]
    for number in range(3):
        assert whole[number][0::2] == parts[0][number]
        assert whole[number][1::2] == parts[1][number]
    assert len(RoundSampler(11, 4, world=2)) == 4


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="the training set is empty"):
        RoundSampler(0, 4)


def test_warm_up_rises_by_as_much_each_step():
    factor = learning_rate_factor("constant", 4, 100)
    assert [factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_schedules_after_warm_up():
    root = learning_rate_factor("inverse-sqrt", 100, 10_000)
    # Vaswani et al., 2017: step^-0.5, relative to that at the end of warm-up.
    assert [root(step) for step in (100, 400, 9_999)] == pytest.approx([1, 0.5, math.sqrt(100 / 9_999)])
    cosine = learning_rate_factor("cosine", 10, 110)
    assert [cosine(step) for step in (10, 60, 110)] == pytest.approx([1, 0.5, 0])
    linear = learning_rate_factor("linear", 10, 110)
    assert [linear(step) for step in (10, 35, 110, 200)] == pytest.approx([1, 0.75, 0, 0])


def test_schedules_may_begin_and_end_above_zero():
    rising = learning_rate_factor("constant", 4, 100, first=0.5)
    assert [rising(step) for step in range(5)] == pytest.approx([0.6, 0.7, 0.8, 0.9, 1])
    for schedule in ("cosine", "linear"):
        falling = learning_rate_factor(schedule, 10, 110, last=0.2)
        assert [falling(step) for step in (10, 60, 110)] == pytest.approx([1, 0.6, 0.2])
    # The others do not fall to an end.
    assert learning_rate_factor("inverse-sqrt", 100, 10_000, last=0.2)(400) == pytest.approx(0.5)


def test_schedule_drives_an_optimizer():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor("linear", 1, 5))
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.5])


def test_devices_draw_different_dropout_and_a_round_always_the_same():
    recipe = create_recipe("toys/sort")
    module = TaskModule(recipe, recipe.build_task(), torch.nn.Linear(1, 1))
    drawn = []
    for rank, epoch in ((0, 2), (1, 2), (0, 3), (0, 2)):
        module._trainer = SimpleNamespace(global_rank=rank, current_epoch=epoch)  # type: ignore[assignment]
        module.on_train_epoch_start()
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]
