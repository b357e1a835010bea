"""Which form a path has is told by its content; what cannot be used is refused."""

import os
import pickle
import re

import pytest
from decision_writers import assert_same, d4rl_arrays, make_episodes, write_hdf5

from flowformer.common.errors import DataError
from flowformer.tasks.decision.episodes import Episodes
from flowformer.tasks.decision.files import read_episodes


@pytest.fixture
def medium(tmp_path):
    return write_hdf5(tmp_path / "medium", d4rl_arrays(make_episodes([5, 3])))


def test_sets_are_joined(medium, tmp_path):
    expert = write_hdf5(tmp_path / "expert.npz", d4rl_arrays(make_episodes([7], seed=1)))
    joined = read_episodes(f"{medium}, {expert}", "Hopper-v4")
    assert_same(joined, Episodes.join([make_episodes([5, 3]), make_episodes([7], seed=1)]))
    assert (joined.source, joined.environment) == (f"{medium}, {expert}", "Hopper-v4")


def test_sets_of_two_versions_are_not_joined(medium, tmp_path):
    expert = write_hdf5(tmp_path / "expert", d4rl_arrays(make_episodes([7])), environment="Hopper-v5")
    with pytest.raises(DataError, match=r"of Hopper-v4, and .*/expert, of Hopper-v5: another version"):
        read_episodes(f"{medium},{expert}", "Hopper-v4")
    assert read_episodes(f"{medium},{expert}").environment == "Hopper-v5"


def test_file_with_a_comma_in_its_name_is_one_file(medium):
    assert len(read_episodes(medium.rename(medium.with_name("a,b")))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; expected HDF5 in the layout of D4RL"),
        (pickle.dumps([1]), "a pickle, which could run code when it is read, and is not"),
        (b"observations,actions\n", r"neither HDF5 nor .npz: it starts with b'observat'"),
        (b"PK\x03\x04 nothing", r"not a readable .npz file"),
        (b"\x89HDF\r\n\x1a\n nothing", "not a readable HDF5 file"),
    ],
)
@pytest.mark.parametrize("name", ["a.hdf5", "a.npz", "a.pkl"])
def test_other_files_are_refused_whatever_their_names(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        read_episodes(tmp_path / name)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match=r"nothing.hdf5: no such file or folder; expected HDF5"):
        read_episodes(tmp_path / "nothing.hdf5")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataError, match=r"folder: a folder without .*; it is empty; expected"):
        read_episodes(folder)
    (folder / "a.hdf5").touch()
    with pytest.raises(DataError, match=r"it has a.hdf5; expected"):
        read_episodes(folder)
    for text in (",", ""):
        with pytest.raises(DataError):
            read_episodes(text)


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: a pipe or device, expected a file"):
        read_episodes(tmp_path / "pipe")


def test_file_that_cannot_be_opened_is_named(medium, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=re.escape(f"{medium}: Permission denied")):
        read_episodes(medium)
