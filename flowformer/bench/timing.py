"""Contenders by turns, so that the noise of a machine hits all alike."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

ROUNDS = 10
LEAST_ROUNDS = 3  # that a contender takes part in, however slow
Round = list[tuple[str, int]]
Clock = Callable[[Callable[[], Any]], float]


def time_call(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, by the clock of the host."""
    start = time.perf_counter_ns()
    out = call()
    stop = time.perf_counter_ns()
    del out  # given back outside the measured time
    return (stop - start) / 1e9


def estimate(call: Callable[[], Any], seconds: float, clock: Clock = time_call) -> float:
    """Seconds that a call takes, from the second one, or from the first if that takes longer than ``seconds``.

    The first call loads code and fills caches. ``clock`` gives the seconds of a call.
    """
    took = clock(call)
    return took if took > seconds else clock(call)


def schedule(estimates: Mapping[str, float], seconds: float, repeats: int = 0, seed: int = 0) -> list[Round]:
    """Who is called how often in which round.

    Each contender gets about ``seconds`` in all, spread evenly over the rounds; a slow one takes part in fewer, but
    in no fewer than :data:`LEAST_ROUNDS`. Each round has an order of its own, so that nobody always follows the same.

    Args:
        estimates: Seconds of one call, by name.
        seconds: Budget of each.
        repeats: The most calls of each; 0 for no bound.
        seed: Of the orders.

    Returns:
        Rounds of (name, calls).
    """
    rounds: list[Round] = [[] for _ in range(ROUNDS)]
    for name, each in estimates.items():
        calls = max(LEAST_ROUNDS, math.ceil(seconds / max(each, 1e-9)))
        calls = min(calls, repeats) if repeats else calls
        turns = min(calls, ROUNDS)
        for turn in range(turns):
            share = calls * (turn + 1) // turns - calls * turn // turns
            rounds[turn * ROUNDS // turns].append((name, share))
    order = random.Random(seed)
    for entries in rounds:
        order.shuffle(entries)
    return rounds


def interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: list[Round], tell: Callable[[str], None] = lambda text: None,
    clock: Clock = time_call,
) -> dict[str, list[float]]:  # fmt: skip
    """Carry out a schedule, with ``clock`` for the seconds of a call.

    Returns:
        Seconds of each call, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _no_collection():
        for number, entries in enumerate(rounds):
            for name, count in entries:
                tell(f"round {number + 1} of {len(rounds)}: {name}")
                samples[name].extend(clock(calls[name]) for _ in range(count))
    return samples


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a call."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
