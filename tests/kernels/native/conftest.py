"""Fixtures of the tests that build small kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_kernels import COMPILER, HEADER, KERNELS, LIBRARY

from flowformer.kernels.native import build, cache


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, text in {"names.h": HEADER, "kernels.cpp": KERNELS, "library.cpp": LIBRARY}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and none of the user's settings but the compiler."""
    for name in (build.SWITCH, build.LEVEL_VARIABLE, "FLOWFORMER_PURE_WHEEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """In place of the package's folder: where a wheel would ship a library."""
    folder = tmp_path / "beside"
    folder.mkdir()
    return folder


@pytest.fixture
def fresh(source: Path, beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has not loaded anything yet, and its package holds the small sources."""
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "FOLDER", beside)


@pytest.fixture
def wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes its calls in a file, and is slow while a file `slow` lies beside it."""
    script = tmp_path / "wrapped"
    slow = (
        f'if [ -e "{tmp_path}/slow" ]; then case "$1" in --version) ;; *) sleep "$(cat "{tmp_path}/slow")";; esac; fi'
    )
    script.write_text(f'#!/bin/sh\necho "$*" >> "{script}.calls"\n{slow}\nexec {COMPILER} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script
