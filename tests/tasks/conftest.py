"""Fixtures of the tests of tasks."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the cache: an empty one. Where it is not asked for, no test may write into the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLOWFORMER_DATA", str(folder))
    return folder
