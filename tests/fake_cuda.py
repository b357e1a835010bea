"""A stand-in for the runtime of a GPU, with which the tests run what is for one on tensors of the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flowformer.bench import device


class Card:
    """Stands for ``torch.cuda``: writes down what is asked of it; its clock moves when the test says so."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0  # milliseconds
        self.held = self.peak = 100
        self.free = 10**9
        self.name = "Test Card"

    def allocate(self, count: int) -> None:
        self.held += count
        self.peak = max(self.peak, self.held)

    def reset(self) -> None:
        self.log.append("reset")
        self.peak = self.held

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        made = SimpleNamespace(at=None)

        def record() -> None:
            self.log.append("record")
            self.now += 0.25  # no two events are at one time
            made.at = self.now

        made.record = record
        made.elapsed_time = lambda other: other.at - made.at
        return made

    def properties(self) -> SimpleNamespace:
        return SimpleNamespace(
            name=self.name, major=9, minor=0, total_memory=80 * 10**9, multi_processor_count=132, L2_cache_size=50
        )

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        functions = {
            "is_available": lambda: True,
            "Event": self.event,
            "synchronize": lambda: self.log.append("wait"),
            "reset_peak_memory_stats": self.reset,
            "memory_allocated": lambda: self.held,
            "max_memory_allocated": lambda: self.peak,
            "memory_reserved": lambda: self.held + 50,
            "mem_get_info": lambda: (self.free, 80 * 10**9),
            "empty_cache": lambda: self.log.append("clear"),
            "get_device_properties": self.properties,
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(device, "LEAST_CACHE", 256)
        monkeypatch.setattr(device, "driver_version", lambda: "580.159")
