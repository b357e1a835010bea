"""Work shared by several processes: order, errors, and that nothing is left."""

import functools
import itertools
import math
import os
import signal
import subprocess
import sys

import pytest

from flowformer.common.processes import available_cpus, map_in_order

# Two workers that sleep; a line is printed once both have begun.
SLEEPER = """
import itertools, time
from flowformer.common.processes import map_in_order

if __name__ == "__main__":
    for _ in map_in_order(time.sleep, itertools.chain([0, 0, 0, 0], itertools.repeat(0.2)), 2):
        print("begun", flush=True)
"""
posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_endless_items(workers):
    results = map_in_order(functools.partial(math.comb, 20), itertools.count(), workers)
    assert list(itertools.islice(results, 7)) == [1, 20, 190, 1140, 4845, 15504, 38760]
    results.close()


def test_few_items_an_error_in_its_turn_and_no_items():
    results = map_in_order(math.sqrt, [4, 9, -1, 16], 2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ValueError):  # noqa: PT011 (its message differs between versions of Python)
        next(results)
    assert list(map_in_order(math.sqrt, [], 2)) == []


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"could not start, or was killed.*__main__.*workers=1"):
        list(map_in_order(os._exit, [3], 2))


def test_cpus():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


def started():
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(4):
        assert process.stdout.readline() == "begun\n"
    return process


@posix
def test_an_interrupt_from_the_terminal_ends_all_processes_without_noise_from_workers():
    process = started()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]  # returns once all processes, which share its pipes, have ended
    assert process.returncode in (-signal.SIGINT, 130)
    assert said.count("Traceback") == 1


@posix
def test_workers_end_with_a_parent_that_is_killed():
    process = started()
    process.kill()
    process.communicate(timeout=60)
