"""Recorded data sets: Minari reads them back, the layout of D4RL says the same, and nothing is half-written."""

import json

import gymnasium
import minari
import numpy as np
import pytest
from decision_environments import RAISES, Line

from flowformer.common.errors import DataError, RunError
from flowformer.tasks.decision.collecting import AT_ONCE, collect, name_dataset, record_episodes
from flowformer.tasks.decision.files import read_episodes
from flowformer.tasks.decision.policies import FunctionPolicy, RandomPolicy
from flowformer.tasks.decision.rollout import open_environment

LINE, CHOICES = "decision_environments:Line-v0", "decision_environments:Choices-v0"


def random_policy(name):
    return RandomPolicy(open_environment(name)[1])


def assert_same(one, other):
    for name in ("observations", "actions", "rewards", "starts", "terminated"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("name", ["CartPole-v1", LINE])
def test_minari_reads_what_is_recorded(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    folder, file = tmp_path / "mine" / "mixed-v3", tmp_path / "mixed.hdf5"
    episodes = collect(random_policy(name), name, [folder, file], episodes=5, seed=3, algorithm="random")
    assert [episode.seed for episode in episodes] == [3, 4, 5, 6, 7]
    found = minari.load_dataset("mine/mixed-v3")
    assert (found.total_episodes, found.total_steps) == (5, sum(episode.length for episode in episodes))
    for told, read in zip(episodes, found.iterate_episodes(), strict=True):
        assert len(read) == told.length
        assert read.observations.shape == (told.length + 1, found.observation_space.shape[0])
        assert read.rewards.sum() == pytest.approx(told.return_, rel=1e-5)
        assert all(map(found.action_space.contains, read.actions))
        assert (read.terminations | read.truncations).tolist() == [False] * (told.length - 1) + [True]
    seeds = [one["seed"] for one in found.storage.get_episode_metadata(range(5))]
    assert seeds == [3, 4, 5, 6, 7]
    environment = found.recover_environment()
    first = next(iter(found.iterate_episodes()))
    np.testing.assert_array_equal(environment.reset(seed=3)[0].astype(np.float32), first.observations[0])
    environment.close()
    assert "mine/mixed-v3" in minari.list_local_datasets()
    assert_same(read_episodes(folder), read_episodes(file))
    assert read_episodes(file).environment == name.rpartition(":")[2]


def test_memory_and_files_hold_the_same(tmp_path):
    policy = random_policy(CHOICES)
    collect(policy, CHOICES, [tmp_path / "a.h5"], episodes=4, seed=1)
    kept = record_episodes(policy, CHOICES, [1, 2, 3, 4])
    found = read_episodes(tmp_path / "a.h5")
    assert_same(kept, found)
    assert (found.num_actions, found.action_low, kept.num_actions) == (3, None, 3)


def test_bounds_are_told(tmp_path):
    collect(random_policy(LINE), LINE, [tmp_path / "a.hdf5"], episodes=2)
    found = read_episodes(tmp_path / "a.hdf5")
    assert (found.action_low, found.action_high) == ((-2.0,), (2.0,))


def test_the_share_of_random_actions_falls(tmp_path):
    policy = FunctionPolicy(lambda observation: 0.0, open_environment(LINE)[1])
    count = AT_ONCE + 1  # two batches
    collect(policy, LINE, [tmp_path / "a.hdf5"], episodes=count, shares=(1.0, 0.0))
    found = read_episodes(tmp_path / "a.hdf5")
    random = [
        (found.actions[start:stop] != 0).mean() for start, stop in zip(found.starts, found.starts[1:], strict=False)
    ]
    assert random[0] == 1
    assert random[-1] == 0
    assert np.mean(random[:20]) > 0.75
    assert np.mean(random[-20:]) < 0.25
    assert 0.3 < np.mean(random[40:60]) < 0.7


def test_episodes_that_fail_are_left_out(tmp_path):
    policy = FunctionPolicy(lambda observation: 0.5, open_environment(LINE)[1])
    episodes = collect(policy, LINE, [tmp_path / "a-v0"], episodes=3, seed=RAISES - 1)
    assert [bool(episode.failed) for episode in episodes] == [False, True, False]
    assert len(read_episodes(tmp_path / "a-v0")) == 2
    with pytest.raises(RunError, match="every episode failed, and nothing is recorded"):
        collect(policy, LINE, [tmp_path / "b-v0", tmp_path / "b.h5"], episodes=1, seed=RAISES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-v0"]


def test_an_interruption_leaves_nothing(tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    (tmp_path / "a.h5").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        collect(random_policy(LINE), LINE, [tmp_path / "a.h5", tmp_path / "b"], episodes=3, advance=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    assert (tmp_path / "a.h5").read_bytes() == b"old"


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        collect(random_policy(LINE), LINE, [tmp_path / "a"], episodes=1)
    (tmp_path / "b").mkdir()
    collect(random_policy(LINE), LINE, [tmp_path / "b"], episodes=1)
    metadata = json.loads((tmp_path / "b" / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == "b-v0"


def test_names_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert name_dataset(tmp_path / "own" / "hopper" / "mixed-v12") == "own/hopper/mixed-v12"
    assert name_dataset(tmp_path.parent / "my data.1") == "my-data-1-v0"


def test_minari_stores_no_class(tmp_path):
    gymnasium.register("Held-v0", Line, max_episode_steps=12)
    policy = RandomPolicy(open_environment("Held-v0")[1])
    with pytest.raises(DataError, match=r'register it as "module:Class", or record to a file \.hdf5'):
        collect(policy, "Held-v0", [tmp_path / "held-v0"], episodes=1)
    collect(policy, "Held-v0", [tmp_path / "held.hdf5"], episodes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["held.hdf5"]
