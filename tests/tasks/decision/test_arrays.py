"""``.npz`` files of a user's own."""

import contextlib
import io
import zipfile

import numpy as np
import pytest
from decision_writers import assert_same, make_episodes

from flowformer.common.errors import DataError
from flowformer.tasks.decision.arrays import read_npz
from flowformer.tasks.decision.files import read_episodes


def parts_of(episodes):
    """The arrays of each episode."""
    for index in range(len(episodes)):
        one = episodes.subset([index])
        yield {"observations": one.observations, "actions": one.actions, "rewards": one.rewards,
               "terminated": one.terminated[0]}  # fmt: skip


@pytest.fixture
def episodes():
    return make_episodes([5, 1, 12, 7] * 3)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_folder_of_episodes_is_read_in_the_order_of_its_numbers(save, discrete, tmp_path):
    episodes = make_episodes([5, 1, 12, 7] * 3, discrete)
    for number, arrays in enumerate(parts_of(episodes)):
        save(tmp_path / f"episode_{number}.npz", **arrays, num_actions=3)
    (tmp_path / "notes.txt").write_text("not read")
    (tmp_path / ".hidden.npz").write_text("not read")
    found = read_episodes(tmp_path, "CartPole-v1")
    assert_same(found, episodes)
    assert (found.source, found.environment) == (str(tmp_path), "CartPole-v1")


@pytest.mark.parametrize("end", [slice(-1), slice(None)])
def test_one_file_of_several_episodes_is_read(end, episodes, tmp_path):
    path = tmp_path / "all.npz"
    np.savez(path, observations=episodes.observations, actions=episodes.actions, rewards=episodes.rewards,
             starts=episodes.starts[end], terminated=episodes.terminated, environment="Own-v3",
             action_low=[-1, -1], action_high=[1, 1.0])  # fmt: skip
    found = read_episodes(path)
    assert_same(found, episodes)
    assert (found.environment, found.action_low, found.action_high) == ("Own-v3", (-1, -1), (1, 1))


def test_flags_of_every_step_and_the_last_observation_are_understood(tmp_path):
    episodes = make_episodes([5])
    flags, last = np.arange(5) == 4, np.ones((1, 4))
    for key in ("terminals", "terminations", "terminated"):
        arrays = next(parts_of(episodes))
        del arrays["terminated"]
        arrays |= {"observations": np.concatenate([arrays["observations"], last]), key: flags}
        np.savez(tmp_path / "a.npz", **arrays)
        assert_same(read_npz(tmp_path / "a.npz"), episodes)
    np.savez(tmp_path / "a.npz", **{**arrays, "terminated": np.zeros(5)})
    assert not read_npz(tmp_path / "a.npz").terminated[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "no 'rewards'; it has actions, observations, terminated; expected observations, actions"),
        ({"observations": np.zeros((7, 4))}, r"observations: shape \(7, 4\), float64; expected \(5, size\) numbers"),
        ({"observations": np.zeros(5)}, r"observations: shape \(5,\), float64; expected \(steps, size\) numbers"),
        ({"actions": np.zeros((4, 2))}, r"actions: shape \(4, 2\), float64; expected \(5, size\)"),
        ({"rewards": np.zeros((5, 2))}, r"rewards: shape \(5, 2\), float64; expected \(5,\) numbers"),
        ({"rewards": np.float32(3)}, r"observations: shape \(5, 4\), float32; expected \(0, size\)"),
        ({"rewards": np.array([1, 2, None, 4, 5])}, "rewards: pickled objects, which are not read; expected an array"),
        ({"observations": np.array([{}] * 5)}, "observations: pickled objects, which are not read"),
        ({"rewards": np.array([0, 1, np.nan, 3, 4])}, r"rewards\[2\] is nan"),
        ({"terminated": np.array([0, 1, 0, 0, 0])}, r"terminated\[1\] is true, but the episode has 5 steps"),
        ({"terminated": np.zeros(4, bool)}, r"terminated: shape \(4,\), bool; expected \(5,\) flags"),
        ({"terminated": 2}, "terminated: .*expected true and false"),
        ({"starts": [1, 3]}, "starts: expected ascending numbers from 0, below the 5 steps"),
        ({"starts": [0, 3, 3]}, "starts: expected ascending numbers"),
        ({"starts": [0, 9]}, "starts: expected ascending numbers"),
        ({"starts": [0.0, 3.0]}, r"starts: shape \(2,\), float64; expected \(episodes,\) integers"),
        ({"starts": [0, 3]}, r"terminated: shape \(1,\), bool; expected \(2,\) flags"),
        ({"observations": np.zeros((0, 4)), "actions": np.zeros((0, 2)), "rewards": []}, "no steps"),
        ({"environment": "a:b\n"}, r"environment 'a:b\\n'; expected a name such as 'Hopper-v5'"),
        ({"environment": np.array([None])}, "environment: pickled objects"),
    ],
)
def test_wrong_arrays_are_named(change, message, tmp_path):
    arrays = {**next(parts_of(make_episodes([5]))), **change}
    path = tmp_path / "a.npz"
    np.savez(path, **{name: one for name, one in arrays.items() if one is not None})
    with pytest.raises(DataError, match=f"a.npz: .*{message}"):
        read_episodes(path)


def test_actions_beyond_their_number_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **next(parts_of(make_episodes([50], True))), num_actions=2)
    with pytest.raises(DataError, match=r"a.npz: action 2; expected 0 to 1"):
        read_npz(tmp_path / "a.npz")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **next(parts_of(make_episodes([50]))))
    whole = path.read_bytes()
    for size in range(3, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a.npz"):
            read_episodes(path)
    for place in range(40, len(whole), 131):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with contextlib.suppress(DataError):  # or it is in a byte of no importance
            read_episodes(path)


def test_archive_of_other_things_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("observations.npy", "actions.npy", "rewards.npy"):
            archive.writestr(name, b"text")
    with pytest.raises(DataError, match=r"a.npz: observations is no array|a.npz: observations: damaged"):
        read_episodes(path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50, 4)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("observations.npy", "actions.npy", "rewards.npy"):
            archive.writestr(name, header.getvalue())
    with pytest.raises(DataError, match=r"a.npz: observations: damaged: .*"):
        read_episodes(path)


@pytest.mark.parametrize("key", ["timeouts", "truncated", "truncations", "dones", "terminals"])
def test_ends_within_a_file_are_not_ignored(tmp_path, key):
    ends = np.isin(np.arange(10), (4, 9))
    arrays = {"observations": np.zeros((10, 3)), "actions": np.zeros((10, 1)), "rewards": np.ones(10)}
    np.savez(tmp_path / "a.npz", **arrays, **{key: ends})
    with pytest.raises(
        DataError, match=rf"{key}\[4\] is true, but the episode has 10 steps; of several episodes, starts"
    ):
        read_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", **arrays, **{key: ends}, starts=[0, 5]) if key != "terminals" else None
    if key != "terminals":
        assert len(read_npz(tmp_path / "b.npz")) == 2
