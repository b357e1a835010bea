"""HDF5 files in the layout of D4RL, right ones and wrong ones."""

import sys
import tracemalloc

import h5py
import numpy as np
import pytest
from decision_writers import assert_same, d4rl_arrays, make_episodes, write_hdf5

from flowformer.common.errors import DataError
from flowformer.tasks.decision import arrays as arrays_module
from flowformer.tasks.decision.d4rl import read_d4rl

LENGTHS = [5, 9, 3, 9, 7, 9]  # the even ones end in a terminal state, the others are cut after 9 steps


@pytest.fixture
def episodes():
    return make_episodes(LENGTHS)


@pytest.fixture(params=[arrays_module.PIECE, 30])
def piece(request, monkeypatch):
    """Numbers read at a time: all, and a few steps."""
    monkeypatch.setattr(arrays_module, "PIECE", request.param)


@pytest.mark.usefixtures("piece")
def test_episodes_are_read_as_they_were(episodes, tmp_path):
    found = read_d4rl(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays(episodes)))
    assert_same(found, episodes)
    assert (found.source, found.environment, found.partial_steps) == (str(tmp_path / "a.hdf5"), "", 0)


def test_other_types_and_shapes_are_read(episodes, tmp_path):
    arrays = d4rl_arrays(episodes)
    arrays = {name: one.astype(np.float64) for name, one in arrays.items()}
    arrays = {name: one[:, None] if one.ndim == 1 else one for name, one in arrays.items()}
    assert_same(read_d4rl(write_hdf5(tmp_path / "a.hdf5", arrays)), episodes)


def test_files_are_not_twice_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_module, "PIECE", 2**14)
    episodes = make_episodes([1000] * 40)
    arrays = {
        name: one.astype(np.float64 if one.dtype != bool else bool) for name, one in d4rl_arrays(episodes).items()
    }
    path = write_hdf5(tmp_path / "a.hdf5", arrays, chunk=1000)
    read_d4rl(path)
    tracemalloc.start()
    found = read_d4rl(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * sum(getattr(found, name).nbytes for name in ("observations", "actions", "rewards"))


def test_discrete_actions_are_read(tmp_path):
    episodes = make_episodes(LENGTHS, discrete=True)
    arrays = d4rl_arrays(episodes)
    for actions in (arrays["actions"], arrays["actions"].astype(np.uint8)[:, None]):
        found = read_d4rl(write_hdf5(tmp_path / "a.hdf5", {**arrays, "actions": actions}))
        assert_same(found, episodes)
    assert read_d4rl(write_hdf5(tmp_path / "b.hdf5", arrays, num_actions=8)).num_actions == 8


def test_what_a_file_says_of_its_environment_is_read(episodes, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", d4rl_arrays(episodes), environment="Hopper-v5", action_low=[-1.0, -2.0],
                      action_high=np.array([1, 2]))  # fmt: skip
    found = read_d4rl(path)
    moduled = write_hdf5(tmp_path / "b.hdf5", d4rl_arrays(episodes), environment="os:Hopper-v5")
    assert read_d4rl(moduled).environment == "Hopper-v5"
    assert (found.environment, found.action_low, found.action_high) == ("Hopper-v5", (-1, -2), (1, 2))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"environment": 3}, "environment: int64 of shape .*expected a name"),
        ({"environment": "Hopper v5"}, "environment 'Hopper v5'; expected a name such as 'Hopper-v5'"),
        ({"action_low": [-1.0], "action_high": [1.0]}, "actions of 2 numbers; bounds of 1 and 1"),
        ({"action_low": "low", "action_high": [1.0, 1.0]}, r"action_low: shape \(\).*expected \(size,\) numbers"),
        ({"num_actions": -1}, "num_actions: .*expected a whole number"),
    ],
)
def test_attributes_that_are_wrong_are_refused(attributes, message, episodes, tmp_path):
    with pytest.raises(DataError, match=message):
        read_d4rl(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays(episodes), **attributes))


# ------------------------------------------------------------------------------------------------- partial episodes


def test_steps_after_the_last_end_are_left_out_and_counted(episodes, tmp_path, caplog):
    arrays = {name: one[:-2] for name, one in d4rl_arrays(episodes).items()}
    found = read_d4rl(write_hdf5(tmp_path / "a.hdf5", arrays))
    assert_same(found, episodes.subset(range(5)))
    assert found.partial_steps == 7
    assert "a.hdf5: the last 7 steps are left out" in caplog.text


@pytest.mark.parametrize(("left", "partial"), [(8, 8), (9, 0)])
def test_last_episode_that_the_recording_cut_short_is_left_out(left, partial, episodes, tmp_path):
    arrays = {name: one[: 33 + left] for name, one in d4rl_arrays(episodes).items()}
    arrays["timeouts"][-1] = True
    found = read_d4rl(write_hdf5(tmp_path / "a.hdf5", arrays))
    assert found.partial_steps == partial
    assert_same(found, episodes.subset(range(5 if partial else 6)))


def test_only_episode_that_was_cut_stays(tmp_path):
    episodes = make_episodes([5, 3])
    found = read_d4rl(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays(episodes)))
    assert_same(found, episodes)


def test_file_without_any_end_is_refused(episodes, tmp_path):
    arrays = {name: one[:4] for name, one in d4rl_arrays(episodes).items()}
    with pytest.raises(DataError, match="none of the 4 steps ends an episode, neither in terminals nor in timeouts"):
        read_d4rl(write_hdf5(tmp_path / "a.hdf5", arrays))


# ------------------------------------------------------------------------------------------------ without timeouts


@pytest.mark.usefixtures("piece")
def test_cuts_are_derived_from_next_observations(episodes, tmp_path):
    arrays = {**d4rl_arrays(episodes), "timeouts": None}
    assert_same(read_d4rl(write_hdf5(tmp_path / "a.hdf5", arrays)), episodes)
    short = {name: None if one is None else one[:-1] for name, one in arrays.items()}
    found = read_d4rl(write_hdf5(tmp_path / "b.hdf5", short))
    assert_same(found, episodes.subset(range(5)))
    assert found.partial_steps == 8
    ended = {name: None if one is None else one[:33] for name, one in arrays.items()}
    found = read_d4rl(write_hdf5(tmp_path / "c.hdf5", ended))
    assert_same(found, episodes.subset(range(5)))
    assert found.partial_steps == 0


def test_cuts_are_derived_from_the_limit_of_a_file(episodes, tmp_path):
    arrays = {**d4rl_arrays(episodes), "timeouts": None, "next_observations": None}
    assert_same(read_d4rl(write_hdf5(tmp_path / "a.hdf5", arrays, max_episode_steps=9)), episodes)
    found = read_d4rl(write_hdf5(tmp_path / "b.hdf5", arrays, max_episode_steps=4))
    assert found.lengths.tolist() == [4, 1, *[4] * 9]  # 5; 9 + 3 to a terminal state; 9 + 7; 9
    with pytest.raises(
        DataError, match=r"attribute max_episode_steps must be a whole number of at least 1, got array\(4\.\)"
    ):
        read_d4rl(write_hdf5(tmp_path / "c.hdf5", arrays, max_episode_steps=4.0))


@pytest.mark.parametrize(("environment", "limit"), [("Hopper-v2", 1000), ("CartPole-v1", 500)])
def test_cuts_are_derived_from_the_limit_of_an_environment(environment, limit, tmp_path):
    episodes = make_episodes([7, limit, 3, limit, 5])
    arrays = {**d4rl_arrays(episodes), "timeouts": None, "next_observations": None}
    path = write_hdf5(tmp_path / "a.hdf5", arrays)
    assert_same(read_d4rl(path, environment), episodes)
    for unknown in ("", "Nowhere-v0"):
        with pytest.raises(DataError, match="no 'timeouts', and nothing else to tell where episodes were cut"):
            read_d4rl(path, unknown)


def test_last_episode_is_compared_with_the_limit_of_its_environment(tmp_path):
    episodes = make_episodes([5, 500])  # the first ends in a terminal state
    path = write_hdf5(tmp_path / "a.hdf5", {**d4rl_arrays(episodes), "timeouts": None})
    assert_same(read_d4rl(path, "CartPole-v1"), episodes)
    found = read_d4rl(path)
    assert_same(found, episodes.subset([0]))
    assert found.partial_steps == 500


def test_next_observations_that_go_on_into_the_next_episode_tell_nothing(tmp_path):
    episodes = make_episodes([5, 500, 7, 500])
    arrays = {**d4rl_arrays(episodes), "timeouts": None}
    arrays["next_observations"] = np.roll(episodes.observations, -1, axis=0)
    path = write_hdf5(tmp_path / "a.hdf5", arrays)
    assert_same(read_d4rl(path, "CartPole-v1"), episodes)
    assert_same(read_d4rl(path, "own:CartPole-v1"), episodes)
    with pytest.raises(DataError, match="expected 'next_observations' that differ from the observations after the end"):
        read_d4rl(path)


def test_limit_is_not_known_without_gymnasium(episodes, tmp_path, monkeypatch):
    arrays = {**d4rl_arrays(episodes), "timeouts": None, "next_observations": None}
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(DataError, match="CartPole-v1 has none known"):
        read_d4rl(write_hdf5(tmp_path / "a.hdf5", arrays), "CartPole-v1")


# ----------------------------------------------------------------------------------------------------- wrong files


def broken(name, value):
    """A change of an array: one number in its eighth row."""

    def change(arrays):
        changed = arrays[name].astype(np.float64)
        changed[7 if changed.ndim == 1 else (7, 1)] = value
        return {name: changed}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"observations": None}, "no 'observations'; it has actions, next_observations, rewards, terminals, "
                                           "timeouts; expected observations, actions, rewards, terminals, timeouts"),
        (lambda _: {"rewards": None}, "no 'rewards'"),
        (lambda _: {"terminals": None}, "no 'terminals'"),
        (lambda a: {"observations": a["rewards"]}, r"observations: shape \(42,\), float32; expected \(steps, size\)"),
        (lambda a: {"observations": a["observations"][:0]}, r"observations: shape \(0, 4\), float32: no steps"),
        (lambda a: {"rewards": a["rewards"][:-1]}, r"rewards: shape \(41,\), float32; expected \(42,\) numbers"),
        (lambda a: {"actions": a["actions"][:-1]}, r"actions: shape \(41, 2\), float32; expected \(42, size\)"),
        (lambda a: {"actions": a["actions"][:, 0]}, r"actions: shape \(42,\), float32; .* or \(42,\) integers"),
        (lambda a: {"actions": -np.arange(42)}, r"actions\[41\] is -41; expected discrete actions from 0"),
        (lambda a: {"terminals": a["terminals"][1:]}, r"terminals: shape \(41,\), bool; expected \(42,\) flags"),
        (lambda a: {"timeouts": np.arange(42)}, "timeouts: .*expected true and false, or 1 and 0"),
        (lambda a: {"rewards": np.array([b"one"] * 42)}, r"rewards: shape \(42,\), \|S3; expected numbers"),
        (lambda a: {"rewards": a["rewards"].astype(np.complex64)}, "rewards: .*complex64; expected numbers"),
        (broken("observations", np.nan), r"observations\[7, 1\] is nan; expected numbers that are finite in float32"),
        (broken("actions", np.inf), r"actions\[7, 1\] is inf"),
        (broken("rewards", -1e300), r"rewards\[7\] is -1e\+300"),
        (lambda a: {"timeouts": None, "next_observations": a["observations"][:, :3]},
         r"next_observations: shape \(42, 3\); expected \(42, 4\)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("piece")
def test_wrong_arrays_are_named(change, message, episodes, tmp_path):
    arrays = d4rl_arrays(episodes)
    path = write_hdf5(tmp_path / "a.hdf5", {**arrays, **change(arrays)})
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        read_d4rl(path)


def test_objects_are_refused(episodes, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", {**d4rl_arrays(episodes), "rewards": None})
    with h5py.File(path, "a") as file:
        file.create_dataset("rewards", data=["a"] * 42, dtype=h5py.string_dtype())
    with pytest.raises(DataError, match=r"rewards: shape \(42,\), object; expected numbers"):
        read_d4rl(path)


def test_arrays_elsewhere_are_refused(episodes, tmp_path):
    whole = write_hdf5(tmp_path / "whole.hdf5", d4rl_arrays(episodes))
    path = tmp_path / "a.hdf5"

    def put(make, message):
        write_hdf5(path, {**d4rl_arrays(episodes), "rewards": None})
        with h5py.File(path, "a") as file:
            make(file)
        with pytest.raises(DataError, match=message):
            read_d4rl(path)

    def virtual(file):
        layout = h5py.VirtualLayout((42,), "f4")
        layout[:] = h5py.VirtualSource(whole, "rewards", (42,))
        file.create_virtual_dataset("rewards", layout)

    raw = [(str(whole), 0, 168)]
    put(lambda file: file.__setitem__("rewards", h5py.ExternalLink(str(whole), "rewards")), "link to another file")
    put(lambda file: file.__setitem__("rewards", h5py.SoftLink("/nowhere")), "a.hdf5: not a readable HDF5 file")
    put(lambda file: file.create_dataset("rewards", (42,), "f4", external=raw), "rewards is stored in another file")
    put(virtual, "rewards is stored in another file")
    put(lambda file: file.create_group("rewards").create_group("a"), "rewards is a group of a; expected an array")
    put(lambda file: file.create_dataset("rewards", data=h5py.Empty("f4")), "rewards is empty")
    put(lambda file: file.create_dataset("rewards", (2**40,), "f4", chunks=(2**20,)), "4,398,046,511,104 bytes of")


def test_damaged_files_are_refused(episodes, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", d4rl_arrays(episodes))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a.hdf5: not a readable HDF5 file: .*truncated"):
        read_d4rl(path)
    with h5py.File(write_hdf5(path, d4rl_arrays(episodes))) as file:
        chunk = file["observations"].id.get_chunk_info(2)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.hdf5: not a readable HDF5 file: .*(filter|inflate)"):
        read_d4rl(path)
    path.write_text("no data")
    with pytest.raises(DataError, match=r"not a readable HDF5 file: .*signature"):
        read_d4rl(path)
    with pytest.raises(DataError, match=r"b.hdf5: no such file"):
        read_d4rl(tmp_path / "b.hdf5")


def test_cut_anywhere_a_file_is_refused(episodes, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", d4rl_arrays(episodes))
    whole = path.read_bytes()
    for size in range(1, len(whole), 997):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a.hdf5"):
            read_d4rl(path)


def test_missing_h5py_is_said(episodes, tmp_path, monkeypatch):
    from flowformer.common.extras import find_extra

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError) as error:
        read_d4rl(tmp_path / "a.hdf5")
    assert find_extra(error.value.name or "") == "rl"
