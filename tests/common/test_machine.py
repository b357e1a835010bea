"""Facts about the machine."""

from __future__ import annotations

import torch

import flowformer
from flowformer.common.machine import environment, peak_memory_bytes


def test_environment_names_versions_and_hardware():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["cpus"] >= 1
    assert found["cpu"]
    assert found["flowformer"] == flowformer.__version__


def test_peak_memory_is_that_of_a_process_with_torch():
    peak = peak_memory_bytes()
    assert peak is None or peak > 50e6
