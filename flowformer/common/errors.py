"""Errors for users: the message states the cause and, if known, the remedy."""

from __future__ import annotations


class DataError(ValueError):
    """Invalid data; the message names the file, the line if known, and the cause."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # one line, whatever a library's error within it looks like


class RunError(RuntimeError):
    """A run that cannot be started, finished, resumed or read; the message states the cause or the remedy."""


def describe(error: OSError) -> str:
    """Return one line for an error of the system: what is wrong, and with which file."""
    what = error.strerror or str(error) or type(error).__name__
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' and '.join(files)}: {what}" if files else what
