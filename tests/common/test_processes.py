"""Work shared by several processes: order, errors, and that nothing is left."""

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from flowformer.common.processes import available_cpus, map_in_order

# Two workers that sleep; a line is printed for each item.
SLEEPER = """
import itertools, time
from flowformer.common.processes import map_in_order

for _ in map_in_order(time.sleep, itertools.chain([0, 0, 0, 0], itertools.repeat(0.2)), 2):
    print("begun", flush=True)
"""
posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_endless_items(workers):
    results = map_in_order(functools.partial(math.comb, 20), itertools.count(), workers)
    assert list(itertools.islice(results, 7)) == [1, 20, 190, 1140, 4845, 15504, 38760]
    results.close()


def test_few_items_and_none():
    assert list(map_in_order(math.sqrt, [4], 3)) == [2]
    assert list(map_in_order(math.sqrt, [], 2)) == []


def test_an_error_comes_in_its_turn_with_its_traceback():
    results = map_in_order(json.loads, ["1", "[2]", "{", "4"], 2)
    assert [next(results), next(results)] == [1, [2]]
    with pytest.raises(json.JSONDecodeError, match="line 1 column 2") as raised:
        next(results)
    assert "in decode" in str(raised.value.__cause__)
    assert list(results) == []


def test_what_cannot_be_pickled_is_an_error():
    with pytest.raises(TypeError, match="pickle"):
        list(map_in_order(memoryview, [b"1"], 2))


def test_what_a_function_prints_is_no_result(capfd):
    assert list(map_in_order(print, ["a", "b"], 2)) == [None, None]
    assert sorted(capfd.readouterr().err.split()) == ["a", "b"]


@pytest.mark.parametrize("status", [0, 3])
def test_a_worker_that_ends_is_an_error(status):
    with pytest.raises(RuntimeError, match=f"could not start, or was killed: its exit status is {status}"):
        list(map_in_order(os._exit, [status], 2))


def test_a_script_needs_no_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from flowformer.common.processes import map_in_order\nprint(*map_in_order(abs, [-1, -2, -3], 2))\n"
    )
    assert subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout == "1 2 3\n"


def test_a_file_in_the_current_folder_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert list(map_in_order(abs, [-1, 2, -3], 2)) == [1, 2, 3]


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
def test_workers_are_not_reached_by_signals_of_the_terminal():
    assert os.getsid(0) not in map_in_order(os.getsid, [0, 0], 2)
    handlers = list(map_in_order(signal.getsignal, [signal.SIGINT, signal.SIGINT], 2))
    assert handlers == [signal.SIG_IGN, signal.SIG_IGN]


@posix
def test_an_interrupt_from_the_terminal_ends_all_processes():
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
