"""Data sets that Minari made are read as Minari reads them; wrong ones are refused."""

import json
import shutil
import warnings
from dataclasses import replace

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from decision_writers import assert_same, last_observations, make_episodes
from minari.data_collector import EpisodeBuffer

from flowformer.common.errors import DataError
from flowformer.tasks.decision.files import read_episodes
from flowformer.tasks.decision.minari import read_minari

ID = "test/cart/mixed-v0"
BOX = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
ARMS = gymnasium.spaces.Box(-1.5, 1.5, (2,), np.float32)


def write_minari(episodes, observation_space=BOX, action_space=ARMS, name=ID, **options):
    """Have Minari write episodes to its store."""
    buffers = []
    for start, stop, terminated, last in zip(
        episodes.starts[:-1], episodes.starts[1:], episodes.terminated, last_observations(episodes), strict=True
    ):
        flags = np.arange(stop - start) == stop - start - 1
        buffers.append(
            EpisodeBuffer(
                observations=list(np.concatenate([episodes.observations[start:stop], last[None]]).astype(np.float64)),
                actions=list(episodes.actions[start:stop]),
                rewards=episodes.rewards[start:stop].astype(np.float64).tolist(),
                terminations=(flags & terminated).tolist(),
                truncations=(flags & ~terminated).tolist(),
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends to name author, environment and more
        return minari.create_dataset_from_buffers(
            name, buffers, observation_space=observation_space, action_space=action_space, **options
        )


@pytest.fixture
def store(monkeypatch, tmp_path):
    folder = tmp_path / "store"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    return folder


@pytest.fixture
def episodes():
    return make_episodes([5, 1, 12, 7])


@pytest.fixture
def folder(store, episodes):
    write_minari(episodes)
    return store / ID


def test_data_set_is_read_as_minari_reads_it(folder, episodes):
    found = read_episodes(ID)
    assert_same(found, episodes)
    theirs = list(minari.load_dataset(ID))
    assert len(theirs) == len(found)
    for index, episode in enumerate(theirs):
        own = found.subset([index])
        np.testing.assert_array_equal(own.observations, episode.observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(own.actions, episode.actions)
        np.testing.assert_array_equal(own.rewards, episode.rewards.astype(np.float32))
        assert own.terminated[0] == episode.terminations[-1]
    assert (found.source, found.environment, found.partial_steps) == (ID, "", 0)
    assert (found.action_low, found.action_high) == ((-1.5, -1.5), (1.5, 1.5))


@pytest.mark.parametrize("inner", ["", "data", "data/main_data.hdf5"])
def test_folders_and_the_file_in_them_are_read(inner, folder, episodes):
    found = read_episodes(folder / inner)
    assert_same(found, episodes)
    assert found.action_low == (-1.5, -1.5)


def test_file_by_itself_is_read(folder, episodes, tmp_path):
    alone = shutil.copy(folder / "data" / "main_data.hdf5", tmp_path / "moved.hdf5")
    found = read_episodes(alone)
    assert_same(found, episodes)
    assert found.action_low is None


def test_discrete_actions_and_the_environment_are_read(store):
    episodes = make_episodes([5, 3], discrete=True)
    write_minari(episodes, action_space=gymnasium.spaces.Discrete(3), env="CartPole-v1")
    found = read_episodes(ID)
    assert_same(found, episodes)
    assert (found.environment, found.num_actions) == ("CartPole-v1", 3)
    with pytest.raises(DataError, match=f"{ID}: episodes of CartPole-v1; expected Hopper-v5"):
        read_episodes(ID, "Hopper-v5")
    assert read_episodes(ID, "CartPole-v0").environment == "CartPole-v1"


def test_first_discrete_action_becomes_0(store):
    episodes = make_episodes([5, 3], discrete=True)
    write_minari(replace(episodes, actions=episodes.actions - 1), action_space=gymnasium.spaces.Discrete(3, start=-1))
    assert_same(read_episodes(ID), episodes)
    write_minari(episodes, action_space=gymnasium.spaces.Discrete(3, start=1), name="from-v1")
    with pytest.raises(DataError, match=r"episode_0: actions\[\d\] is 0; expected discrete actions from 1"):
        read_episodes("from-v1")


def test_many_episodes_stay_in_order(store):
    episodes = make_episodes([2] * 12)
    write_minari(episodes)
    assert_same(read_episodes(ID), episodes)


# ----------------------------------------------------------------------------------------------------- wrong ones


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"observation_space": gymnasium.spaces.Dict({"a": BOX})}, "observation space Dict; expected a Box with"),
        ({"observation_space": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)}, r"Box of shape \[64, 64, 3\]"),
        ({"action_space": gymnasium.spaces.MultiDiscrete([2, 2])}, "action space MultiDiscrete; expected a Box"),
    ],
)  # fmt: skip
def test_other_spaces_are_refused(space, message, folder):
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata |= {name: minari.serialization.serialize_space(one) for name, one in space.items()}
    path.write_text(json.dumps(metadata))
    with pytest.raises(DataError, match=message):
        read_minari(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_episodes": 5}, "4 episodes, but metadata.json says 5: incomplete"),
        ({"data_format": "arrow"}, "data in the format 'arrow'.*expected the format 'hdf5'"),
        ({"env_spec": '{"id": "Cart Pole"}'}, "environment 'Cart Pole'; expected a name"),
        (
            {"action_space": '{"type": "Discrete", "start": 0.5}'},
            "action space Discrete from 0.5; expected from a whole",
        ),
        ({"action_space": "Box"}, "action_space in metadata.json is not JSON"),
        ({"action_space": "[1]"}, r"action_space in metadata.json: expected an object of JSON, got \[1\]"),
    ],
)
def test_other_metadata_is_refused(change, message, folder):
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        read_minari(folder)
    for text, wanted in (("{", "is not JSON"), ("", "is empty"), ("[1]", "expected an object of JSON")):
        path.write_text(text)
        with pytest.raises(DataError, match=f"metadata.json.* {wanted}"):
            read_minari(folder)


def replaced(group, key, values):
    del group[key]
    group[key] = values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("rewards"), "no 'rewards'; it has actions, observations, terminations, truncations"),
        (lambda g: replaced(g, "rewards", np.zeros(11)), r"observations: shape \(13, 4\), float64; expected \(12, s"),
        (lambda g: replaced(g, "rewards", np.zeros(0)), r"rewards: shape \(0,\), float64; expected at least one step"),
        (lambda g: replaced(g, "rewards", 3.0), r"rewards: shape \(\), float64; expected at least one step"),
        (lambda g: replaced(g, "rewards", [np.nan] * 12), r"rewards\[0\] is nan"),
        (lambda g: replaced(g, "observations", np.zeros((13, 3))), r"observations: shape \(13, 3\), float64; the f"),
        (lambda g: replaced(g, "observations", g["observations"][:-1]), r"observations: shape \(12, 4\), float64; exp"),
        (lambda g: replaced(g, "actions", np.zeros(12, int)), r"actions: shape \(12,\), int64; the first episode has"),
        (lambda g: replaced(g, "actions", np.zeros((11, 2))), r"actions: shape \(11, 2\), float64; expected \(12, s"),
        (lambda g: replaced(g, "terminations", np.ones(12, bool)), r"terminations\[0\] is true, but the episode"),
    ],
)  # fmt: skip
def test_wrong_arrays_are_named(change, message, folder):
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        change(file["episode_2"])
    with pytest.raises(DataError, match=f"main_data.hdf5: episode_2: {message}"):
        read_minari(folder)


def test_incomplete_data_sets_are_refused(folder, store, tmp_path):
    main = folder / "data" / "main_data.hdf5"
    with h5py.File(main, "a") as file:
        file["elsewhere"] = file.pop("episode_2")
        file["episode_2"] = h5py.ExternalLink("other.hdf5", "episode_2")
    with pytest.raises(DataError, match="episode_2 is no group of this file"):
        read_minari(folder)
    main.write_bytes(main.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"main_data.hdf5: not a readable HDF5 file"):
        read_minari(folder)
    main.unlink()
    with pytest.raises(DataError, match=r"main_data.hdf5 is not there"):
        read_minari(folder)
    with pytest.raises(DataError, match="neither here nor in the folder data"):
        read_minari(tmp_path)
    with pytest.raises(
        DataError, match=f"no such data set in Minari's store {store}: download it by `minari download no"
    ):
        read_episodes("no/set-v0")
