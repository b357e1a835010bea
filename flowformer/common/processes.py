"""Work shared by several processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # items that each worker has
_PROGRAM = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from flowformer.common.processes import serve; serve()"
)


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` of each item, in the order of the items, computed by several processes.

    Items may be endless: each worker has at most two. An error of the function is raised here in its turn. The
    processes end when the iterator is closed, or left by an exception such as Ctrl-C, and when this process is killed.
    They do not import the script that is running, as those of :mod:`multiprocessing` do: it needs no
    ``if __name__ == "__main__":``.

    Args:
        function: A function of a module, not of the script that is running, or a :func:`functools.partial` of one.
        items: What can be pickled. They should take about the same time, since workers take turns.
        workers: Number of processes; with 1 this process computes everything.

    Raises:
        RuntimeError: where a process cannot start, or is killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    processes: list[Worker] = []
    left = iter(items)
    try:
        processes.extend(Worker(function) for _ in range(workers))
        turns = itertools.cycle(processes)
        waiting = deque(next(turns).send(item) for item in itertools.islice(left, _AHEAD * workers))
        while waiting:
            process = waiting.popleft()
            result = process.receive()
            waiting.extend(process.send(item) for item in itertools.islice(left, 1))
            yield result
    finally:
        for process in processes:
            process.end()


class Worker:
    """A process that computes a function of what it is sent, in order.

    It ends with :meth:`end`, and when this process ends or is killed. See :func:`map_in_order` for what it can compute.

    Args:
        function: What it computes.

    Raises:
        RuntimeError: here and in the methods, where the process cannot start, or was killed.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        # In a session of its own, which the terminal's Ctrl-C does not reach; isolated, or a file pickle.py in the
        # current folder would be imported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.send(sys.path).send(function)
        except BaseException:
            self.end()
            raise

    def send(self, item: Any) -> Worker:
        """Send an item, and return this worker."""
        assert self._process.stdin is not None
        data = pickle.dumps(item)
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return self

    def receive(self) -> Any:
        """Wait for the result of the first item that has none yet; the function's error is raised here."""
        assert self._process.stdout is not None
        try:
            result, trace = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._ended() from error
        if trace is not None:
            raise result from RuntimeError(f"in a worker process:\n{trace}")
        return result

    def end(self) -> None:
        """End the process at once, whatever it computes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not sent yet
                if pipe is not None:
                    pipe.close()

    def _ended(self) -> RuntimeError:
        status = self._process.wait()
        return RuntimeError(f"a worker process could not start, or was killed: its exit status is {status}")


def serve() -> None:
    """Be a worker: compute what comes through standard input until it is closed, and write it to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows Ctrl-C reaches workers too
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # of what a function prints nothing may come between results
    with contextlib.suppress(EOFError, BrokenPipeError):
        function = pickle.load(source)
        while True:
            target.write(_answer(function, pickle.load(source)))
            target.flush()
    os._exit(0)  # a result that cannot be written any more is no error


def _answer(function: Callable[[Any], Any], item: Any) -> bytes:
    """A result and None, or an error and its traceback."""
    try:
        return pickle.dumps((function(item), None))
    except Exception as error:
        try:
            return pickle.dumps((error, traceback.format_exc()))
        except Exception:  # an error that cannot be pickled
            return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc()))
