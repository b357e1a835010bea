"""Facts about the machine."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys

import pytest
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept():
    """A large tensor made again and again touches new pages once, not each time."""
    lines = [
        "import resource, sys, torch",
        "from flowformer.common.machine import keep_freed_memory",
        "if sys.argv[1] == 'keep': keep_freed_memory()",
        "for _ in range(20): torch.ones(16_000_000)",
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)",
    ]
    faults = {}
    for how in ("keep", "return"):
        done = subprocess.run([sys.executable, "-c", "\n".join(lines), how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    pages = 64_000_000 // mmap.PAGESIZE
    assert faults["return"] - faults["keep"] > 10 * pages
