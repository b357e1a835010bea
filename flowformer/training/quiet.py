"""Keep Lightning's advice to itself while models are trained, in any number of threads."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

# The recipe decided what these advise about.
_ADVICE: tuple[tuple[str, type[Warning]], ...] = (
    (".*does not have many workers.*", Warning),
    (".*number of training batches .* is smaller than the logging interval.*", Warning),
    (".*GPU available but not used.*", Warning),
    # Lightning 2.6 (pytorch/utilities/_pytree.py) builds a class that newer torch deprecates.
    (".*LeafSpec.* is deprecated", FutureWarning),
)
_LOGGERS = ("lightning.pytorch", "lightning.fabric")


class _Quiet:
    """Filters and levels that the first of several threads sets, and the last one takes back.

    ``warnings.catch_warnings`` would put back all filters that it found, those of other threads included.
    """

    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0
        self.filters: list[Any] = []
        self.levels: dict[str, int] = {}

    def enter(self) -> None:
        with self.lock:
            self.count += 1
            if self.count > 1:
                return
            for message, category in _ADVICE:
                before = len(warnings.filters)
                warnings.filterwarnings("ignore", message, category)
                if len(warnings.filters) > before:  # else the program has the same filter, which was moved
                    self.filters.append(warnings.filters[0])
            for name in _LOGGERS:
                logger = logging.getLogger(name)
                self.levels[name] = logger.level
                logger.setLevel(logging.ERROR)

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count:
                return
            there: Any = warnings.filters  # a list, which its type hides
            for entry in self.filters:
                if entry in there:  # else the program has put back the filters of before
                    there.remove(entry)
            self.filters.clear()
            for name, level in self.levels.items():
                logging.getLogger(name).setLevel(level)


_quiet = _Quiet()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore Lightning's advice within ``with``; safe in threads."""
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()
