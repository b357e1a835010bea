"""Recorded episodes: sums, subsets and joins."""

from types import SimpleNamespace

import numpy as np
import pytest
from decision_writers import assert_same, make_episodes

from flowformer.common.errors import DataError
from flowformer.tasks.decision.episodes import Episodes


def test_sums_of_rewards_equal_plain_ones():
    episodes = make_episodes([5, 1, 3])
    assert len(episodes) == 3
    assert episodes.num_steps == 9
    assert episodes.lengths.tolist() == [5, 1, 3]
    rewards = np.split(episodes.rewards, [5, 6])
    np.testing.assert_allclose(episodes.returns, [one.astype(np.float64).sum() for one in rewards])
    to_go = np.concatenate([[one[step:].sum() for step in range(len(one))] for one in rewards])
    np.testing.assert_allclose(episodes.returns_to_go(), to_go, rtol=1e-6)
    assert episodes.returns.dtype == np.float64


def test_sums_are_exact_in_long_episodes():
    steps = 1_000_000
    rewards = np.full(steps, 0.1, dtype=np.float32)
    zeros = np.zeros((steps, 1), dtype=np.float32)
    episodes = Episodes(zeros, zeros, rewards, np.array([0, steps]), np.array([False]))
    assert episodes.returns[0] == pytest.approx(float(rewards[0]) * steps, rel=1e-9)
    assert episodes.returns_to_go()[0] == np.float32(episodes.returns[0])


def test_returns_to_go_do_not_depend_on_other_episodes():
    first, second = make_episodes([4]), make_episodes([6], seed=1)
    huge = make_episodes([3], seed=2)
    huge.rewards[:] = 1e30
    joined = Episodes.join([first, huge, second]).returns_to_go()
    np.testing.assert_array_equal(joined[:4], first.returns_to_go())
    np.testing.assert_array_equal(joined[7:], second.returns_to_go())


def test_subset_has_the_chosen_episodes_in_order():
    episodes = make_episodes([5, 1, 3, 2], environment="Hopper-v5", source="a")
    found = episodes.subset([2, 0, 2])
    assert found.lengths.tolist() == [3, 5, 3]
    rows = [6, 7, 8, 0, 1, 2, 3, 4, 6, 7, 8]
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(found, name), getattr(episodes, name)[rows])
    assert found.terminated.tolist() == [True, True, True]
    assert (found.environment, found.source) == ("Hopper-v5", "a")
    assert_same(episodes.subset(range(4)), episodes)


def test_join_is_the_inverse_of_subsets():
    episodes = make_episodes([5, 1, 3, 2])
    joined = Episodes.join([episodes.subset([0, 1]), episodes.subset([2]), episodes.subset([3])])
    assert_same(joined, episodes)
    assert joined.fingerprint() == episodes.fingerprint()
    assert joined.fingerprint() != episodes.subset([1, 0, 2, 3]).fingerprint()


def test_join_keeps_what_is_known():
    unknown = make_episodes([2], source="a", partial_steps=3, action_low=(-1, -1), action_high=(1, 1))
    known = make_episodes([2], source="b", environment="Hopper-v5", partial_steps=4, action_low=(-2, -1),
                          action_high=(1, 3))  # fmt: skip
    joined = Episodes.join([unknown, known])
    assert (joined.environment, joined.source, joined.partial_steps) == ("Hopper-v5", "a, b", 7)
    assert (joined.action_low, joined.action_high) == ((-2, -1), (1, 3))
    assert Episodes.join([known, make_episodes([2])]).action_low is None
    two, three = make_episodes([2], True, num_actions=3), make_episodes([2], True, num_actions=5)
    assert Episodes.join([two, three]).num_actions == 5


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"environment": "Hopper-v4"}, {"environment": "Hopper-v5"}, "a, of Hopper-v4, and b, of Hopper-v5: another v"),
        ({"environment": "Hopper-v5"}, {"environment": "Ant-v5"}, "of Ant-v5: another environment"),
        ({}, {"discrete": True}, "actions of 2 numbers and of one integer"),
    ],
)  # fmt: skip
def test_sets_of_different_environments_are_not_joined(first, second, message):
    with pytest.raises(DataError, match=message):
        Episodes.join([make_episodes([3], source="a", **first), make_episodes([3], source="b", **second)])


def test_sets_of_different_sizes_are_not_joined():
    wide = Episodes(np.zeros((2, 5), np.float32), np.zeros((2, 2), np.float32), np.zeros(2, np.float32),
                    np.array([0, 2]), np.array([True]), source="wide")  # fmt: skip
    with pytest.raises(DataError, match="join a and wide: observations of 4 numbers and of 5 numbers"):
        Episodes.join([make_episodes([3], source="a"), wide])
    with pytest.raises(DataError, match="no sets"):
        Episodes.join([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": np.zeros((3, 4))}, r"file: expected observations, \(steps, size\) float32; got .*float64"),
        ({"actions": np.zeros(3, np.int64)}, r"expected actions, \(steps, size\) float32"),
        ({"num_actions": 3}, r"expected actions, \(steps,\) int64"),
        ({"rewards": np.zeros((3, 1), np.float32)}, r"expected rewards, \(steps,\) float32; got .* of shape \(3, 1\)"),
        ({"rewards": np.zeros(2, np.float32)}, "3 observations, 3 actions and 2 rewards"),
        ({"starts": np.array([0, 2])}, "from step 0 to 2, expected 0 to 3"),
        ({"starts": np.array([0, 3, 3]), "terminated": np.array([True, True])}, "episode 1 has no steps"),
        ({"starts": np.array([0, 2, 3])}, "3 starts for 1 episodes"),
        ({"starts": np.array([0]), "terminated": np.zeros(0, bool)}, "no episodes"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(change, message):
    right = make_episodes([3], source="file")
    with pytest.raises(DataError, match=message):
        Episodes(**{**vars(right), **change})


def test_spaces_of_an_environment_are_matched():
    box = SimpleNamespace(observation_dim=4, action_dim=2, num_actions=None, low=np.full(2, -1.0), high=np.full(2, 2.0))
    found = make_episodes([3], environment="A-v0").match(box, "B-v1")
    assert (found.action_low, found.action_high, found.environment) == ((-1, -1), (2, 2), "A-v0")
    discrete = SimpleNamespace(observation_dim=4, action_dim=None, num_actions=9, low=(), high=())
    assert make_episodes([9], True).match(discrete, "B-v1").num_actions == 9
    with pytest.raises(DataError, match="file: actions are of 2 numbers; in B-v1 they are discrete"):
        make_episodes([3], source="file").match(discrete, "B-v1")
    discrete.num_actions = 1
    with pytest.raises(DataError, match="file: action 2; B-v1 has 0 to 0"):
        make_episodes([9], True, source="file").match(discrete, "B-v1")
    box.observation_dim = 11
    with pytest.raises(DataError, match="file: observations of 4 numbers; B-v1 has 11"):
        make_episodes([3], source="file").match(box, "B-v1")
