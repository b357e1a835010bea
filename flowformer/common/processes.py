"""Work shared by several processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from flowformer.common.interrupts import check_signals

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # items of each worker that are computed or wait while the caller uses a result


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` of each item, in the order of the items, computed by several processes.

    Items may be endless: each worker is at most two ahead. An error of the function is raised here in its turn. When
    the iterator is closed, or is left by an exception such as Ctrl-C, the processes end once they have finished what
    they compute; when this process is killed, they end at once.

    Args:
        function: A function of a module, or a :func:`functools.partial` of one. Each process imports its module.
        items: What can be pickled.
        workers: Number of processes; with 1 this process computes everything.

    Raises:
        RuntimeError: where a process cannot start, or is killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Forking would copy the locks of other threads, PyTorch's among them, in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    left = iter(items)
    try:
        with _signals_are_ours():
            waiting = deque(pool.submit(function, item) for item in itertools.islice(left, _AHEAD * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(left, 1))
    except BrokenProcessPool as error:
        check_signals()
        raise RuntimeError(
            "a worker process could not start, or was killed: a script that starts them needs "
            "`if __name__ == '__main__':` around its code; with workers=1 there are none"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_are_ours() -> Iterator[None]:
    """Context for starting processes: Ctrl-C and a closed terminal, which reach every process, interrupt only this one.

    Blocked signals stay blocked in processes that are started, from their first instruction.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """Prepare a worker: Ctrl-C does not interrupt it, and it ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
