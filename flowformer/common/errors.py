"""Errors whose message is for the user: it says what is wrong and, where it is known, what to do."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line where there is one, and the cause."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # one line, whatever a library's error within it looks like


class RunError(RuntimeError):
    """A run that cannot be started, finished, resumed or read; the message says why or what to do."""
