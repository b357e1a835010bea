"""Episodes in a simulator: seeds, limits, workers, and simulators that fail."""

import sys

import gymnasium
import numpy as np
import pytest
from decision_environments import DIES, RAISES, Line

from flowformer.common.errors import DataError, RunError
from flowformer.tasks.decision.policies import FunctionPolicy, RandomPolicy
from flowformer.tasks.decision.rollout import Episode, open_environment, run_episodes, summarise

LINE = "decision_environments:Line-v0"
PLAIN = "decision_environments:Plain-v0"


def random_policy(name):
    return RandomPolicy(open_environment(name)[1])


def constant(action, name=LINE):
    return FunctionPolicy(lambda observation: action, open_environment(name)[1])


@pytest.mark.parametrize("name", [LINE, "decision_environments:Choices-v0", "CartPole-v1"])
def test_an_episode_is_the_same_whatever_runs_beside_it(name):
    policy = random_policy(name)
    together = run_episodes(policy, name, [1.0] * 5, [3, 1, 4, 15, 9])
    assert len({episode.return_ for episode in together}) > 2
    for episode in together:
        assert run_episodes(policy, name, [1.0], [episode.seed]) == [episode]
    assert run_episodes(policy, name, [1.0] * 5, [3, 1, 4, 15, 9], workers=2) == together


def test_a_seed_is_that_of_the_environment():
    seen = []
    policy = FunctionPolicy(lambda observation: seen.append(observation.copy()) or 3.0, open_environment(LINE)[1])
    run_episodes(policy, LINE, [0.0], [7], max_steps=1)
    wanted, _ = Line().reset(seed=7)
    np.testing.assert_array_equal(seen[0], wanted.astype(np.float32))


def test_actions_are_clipped_and_rewards_added():
    (episode,) = run_episodes(constant(3.0), LINE, [8.0], [0])
    assert (episode.target, episode.seed, episode.failed) == (8.0, 0, "")
    assert episode.return_ == 2.0 * episode.length
    assert episode.length in (3, 2)  # it ends above 5


@pytest.mark.parametrize(("most", "length"), [(None, 12), (5, 5), (40, 12)])
def test_time_limits(most, length):
    assert run_episodes(constant(0.0), LINE, [0.0] * 2, [1, 2], max_steps=most)[1].length == length


def test_an_environment_without_a_limit_ends():
    name = "decision_environments:Endless-v0"
    assert [one.length for one in run_episodes(constant(0.0, name), name, [0.0], [0])] == [1000]


def test_what_has_ended_is_not_stepped_again():
    # An environment that ends at once beside one that runs on: its action is no longer asked for.
    asked = []

    class Counting(FunctionPolicy):
        def act(self, observations, running):
            asked.append(running.copy())
            return super().act(observations, running)

    policy = Counting(lambda observation: 2.0 if observation[2] > 0.5 else 0.0, open_environment(LINE)[1])
    episodes = run_episodes(policy, LINE, [0.0] * 6, list(range(6)))
    lengths = np.array([episode.length for episode in episodes])
    assert len(set(lengths)) > 1
    np.testing.assert_array_equal(np.sum(asked, 0), lengths)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_simulator_that_raises_ends_its_episode_only(workers):
    episodes = run_episodes(constant(0.5), LINE, [0.0] * 4, [1, RAISES, 2, 3], workers=workers)
    assert [bool(episode.failed) for episode in episodes] == [False, True, False, False]
    assert episodes[1].failed == "RuntimeError: unstable simulation"
    assert (episodes[1].length, episodes[1].return_) == (2, 1.0)
    clean = run_episodes(constant(0.5), LINE, [0.0] * 3, [1, 2, 3])
    assert [episodes[i] for i in (0, 2, 3)] == clean


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_worker_that_is_killed_loses_its_own_episodes_only():
    episodes = run_episodes(constant(0.0), LINE, [0.0] * 5, [1, DIES, 2, 3, 4], workers=2)
    assert [bool(episode.failed) for episode in episodes] == [False, True, False, True, False]
    assert "its exit status is -9" in episodes[1].failed
    assert episodes[0].length == 12


def test_an_environment_of_this_process_only():
    gymnasium.register("Here-v0", lambda **options: Line(**options), max_episode_steps=4)
    try:
        assert run_episodes(constant(0.0, "Here-v0"), "Here-v0", [0.0], [0])[0].length == 4
        with pytest.raises(DataError, match=r"Here-v0 cannot be made in a worker process: .*module:Class.*0 workers"):
            run_episodes(constant(0.0, "Here-v0"), "Here-v0", [0.0], [0], workers=1)
    finally:
        del gymnasium.registry["Here-v0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPol-v1", r"no environment 'CartPol-v1' \(did you mean 'CartPole-v1'\?\)"),
        ("Hopper", r"there is Hopper-v4, Hopper-v5"),
        ("Hopper-v3", r"Hopper-v3 needs mujoco-py.*pass Hopper-v5 or Hopper-v4"),
        ("Walker2d-v2", r"Walker2d-v2 needs mujoco-py"),
        ("no_such_module:A-v0", r"module no_such_module cannot be imported"),
        ("decision_environments:Lin-v0", r"no environment 'Lin-v0' \(did you mean 'Line-v0'\?\)"),
        ("decision_environments:Picture-v0", r"must be one vector, got pictures of shape \(8, 8, 3\)"),
        ("decision_environments:Two-v0", r"must be one vector, got Dict.*FlattenObservation"),
        ("decision_environments:Many-v0", r"actions must be one vector .*MultiDiscrete"),
        ("decision_environments:Broken-v0", r"Broken-v0 cannot be made: TypeError"),
    ],
)
def test_environments_that_cannot_be_used(name, message):
    with pytest.raises(DataError, match=message):
        open_environment(name)


def test_wrong_arguments():
    policy = constant(0.0)
    with pytest.raises(ValueError, match="two lists of one length"):
        run_episodes(policy, LINE, [0.0, 1.0], [0])
    with pytest.raises(ValueError, match="at least 0, got -1"):
        run_episodes(policy, LINE, [0.0], [-1])
    with pytest.raises(RunError, match="not finite"):
        run_episodes(constant(np.nan), LINE, [0.0], [0])
    assert run_episodes(policy, LINE, [], []) == []


def test_progress_counts_episodes():
    seen = []

    def track(steps, total, what):
        seen.append((total, what))
        return (seen.append(number) or (number, episode) for number, episode in steps)

    run_episodes(constant(0.0), LINE, [0.0] * 3, [0, 1, 2], track=track)
    assert seen == [(3, "episodes"), 0, 1, 2]


def test_summaries_count_what_failed():
    episodes = [
        Episode(2.0, 1, 10.0, 5),
        Episode(1.0, 1, 0.0, 1),
        Episode(2.0, 2, 14.0, 7),
        Episode(2.0, 3, 99.0, 9, "x"),
    ]
    first, second = summarise(episodes)
    assert (first.target, second.target) == (2.0, 1.0)
    assert (first.returns.tolist(), first.lengths.tolist()) == ([10.0, 14.0, 99.0], [5.0, 7.0, 9.0])
    assert [episode.seed for episode in first.failed] == [3]


def test_an_environment_may_take_no_arguments_and_misbehave():
    episodes = run_episodes(constant(0.0, PLAIN), PLAIN, [0.0] * 3, [RAISES, DIES, 1])
    assert episodes[0].failed == "SystemExit: 5"
    assert episodes[1].failed == "the simulator returned an observation of shape (7,); expected (3,)"
    assert (episodes[2].failed, episodes[2].length) == ("", 12)


def test_a_function_speaks_the_numbers_of_the_environment():
    choices = "decision_environments:Choices-v0"
    (episode,) = run_episodes(constant(6, choices), choices, [0.0], [0])
    assert (episode.failed, episode.return_) == ("", episode.length)


@pytest.mark.parametrize(
    ("name", "action", "said"),
    [
        ("Choices-v0", 0, "must return a whole number from 4 to 6, got array"),
        ("Choices-v0", 4.5, "must return a whole number"),
        ("Choices-v0", [4], "must return a whole number"),
        ("Line-v0", [1.0, 2.0], r"must return \(1,\) numbers"),
        ("Line-v0", "x", r"must return \(1,\) numbers"),
    ],
)
def test_what_a_function_returns_is_checked(name, action, said):
    name = f"decision_environments:{name}"
    with pytest.raises(RunError, match=said):
        run_episodes(constant(action, name), name, [0.0], [0])


def test_a_function_that_raises_is_named():
    policy = FunctionPolicy(lambda observation: 1 / 0, open_environment(LINE)[1])
    with pytest.raises(RunError, match="the policy function failed: ZeroDivisionError: division by zero"):
        run_episodes(policy, LINE, [0.0], [0])
