"""The rows of tests, here and in the processes that a benchmark starts."""

import sys
from pathlib import Path

import pytest

from flowformer.bench import registry

HERE = str(Path(__file__).parent)


@pytest.fixture
def rows(monkeypatch):
    """The module that adds an operation "toy" with contenders, for this test only."""
    monkeypatch.setenv("PYTHONPATH", HERE)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.delitem(sys.modules, "bench_rows", raising=False)
    registry.load()
    for name in ("OPERATIONS", "ADDED", "SOURCES"):
        monkeypatch.setattr(registry, name, getattr(registry, name).copy())
    return "bench_rows"


@pytest.fixture
def small():
    """Sizes that take no time."""
    return {"heads": 2, "channels": 8, "value_channels": 8, "seconds": 0.003, "memory": False, "limit_size": 32}
