"""The user's cache folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from flowformer.common.folders import cache_folder, make_private


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / "home"


def test_is_in_the_home_folder(home: Path) -> None:
    assert cache_folder() == home / ".cache" / "flowformer"


def test_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "größe mit leer"))
    assert cache_folder() == tmp_path / "größe mit leer" / "flowformer"


@pytest.mark.parametrize("given", ["", "relative", "./relative", "../relative", "~/cache", "$HOME/cache"])
def test_a_variable_that_is_not_absolute_is_ignored(given: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == home / ".cache" / "flowformer"


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(FileNotFoundError, match="no home folder found for the cache: set XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flowformer"


def test_missing_folders_are_created_for_the_user_alone(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    before = os.umask(0)
    try:
        for _ in range(2):
            make_private(there / "one" / "two")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (there, there / "one", there / "one" / "two")]
    assert modes == [0o755, 0o700, 0o700]


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            make_private(path)
