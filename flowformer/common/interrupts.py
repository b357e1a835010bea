"""Signals that end a program: Ctrl-C, the scheduler's SIGTERM, a closed terminal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_pending: list[int] = []


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Args:
        number: The signal.
        advice: How to continue.

    Attributes:
        status: The exit status that a shell expects: 130 for Ctrl-C, otherwise 143, that of SIGTERM.
    """

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__()
        self.number, self.advice = number, advice
        self.status = 130 if number == signal.SIGINT else 143

    def __str__(self) -> str:
        words: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
        said = words.get(self.number, "the terminal was closed")
        return f"{said}. {self.advice}" if self.advice else said

    @classmethod
    def of(cls, error: KeyboardInterrupt, advice: str = "") -> Interrupted:
        """Return an interruption with advice; one that is no signal counts as Ctrl-C."""
        return cls(error.number if isinstance(error, Interrupted) else signal.SIGINT, advice)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn the signals into :class:`Interrupted` for the time of a ``with`` block.

    Signals that the process was started to ignore, as ``nohup`` has it, stay ignored. Outside the main thread nothing
    is changed, since Python delivers signals to that thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _pending.clear()
    owner, before = os.getpid(), {}

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker process that inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        _pending.append(number)
        raise Interrupted(number)

    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _pending.clear()  # it has ended what it was sent to


def check_signals() -> None:
    """Raise :class:`Interrupted` if there was a signal whose exception was lost, as in a destructor."""
    if _pending:
        raise Interrupted(_pending[-1])
