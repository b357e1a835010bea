"""Fixtures of every test."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

TESTS = Path(__file__).parent

# PyTorch keeps the set of functions that `with torch.device(...)` acts on from its first use, which must not find them
# replaced by those of `poisoned_memory`.
_device_constructors()

# The tensors of tests are small: threads would only wait for each other, and for the other test processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import interpret_faster

    interpret_faster()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start long processes come first: at the end, one worker would be waiting for the other."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """A million objects of modules and tests stay: going through them would take each `gc.collect` half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared() -> Path:
    """Real data that is not part of the repository: the folder `shared` beside it."""
    folder = TESTS.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: it is not part of the repository")
    return folder


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the cache: an empty one. Where it is not asked for, no test may write into the user's.

    It is here for all tests, since pytest has a fixture of that name too, which would be used where this is not seen.
    """
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLOWFORMER_DATA", str(folder))
    return folder


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN in tests of the mathematics, so that reading it before writing cannot pass."""
    mathematics = {TESTS / "core", TESTS / "kernels", TESTS / "mechanisms"}
    if mathematics.isdisjoint(request.path.parents) and request.path != TESTS / "laws.py":
        return

    def poison(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def _write_waves(path: Path, count: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    rows = ["series,time,label,a,b"]
    for number in range(count):
        phase = generator.uniform(0, 6)
        for time in range(generator.integers(6, 12)):
            a, b = np.sin((1 + number % 3) * time / 2 + phase) + generator.normal(0, 0.1, 2)
            rows.append(f"{number},{time},{'xyz'[number % 3]},{a:.4f},{b:.4f}")
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def waves(tmp_path_factory) -> dict[str, str]:
    """Fields of a recipe: noisy waves of three frequencies and unequal lengths, as CSV files in long form."""
    folder = tmp_path_factory.mktemp("waves")
    return {
        "train_file": _write_waves(folder / "train.csv", 45, seed=0),
        "test_file": _write_waves(folder / "test.csv", 18, seed=1),
    }
