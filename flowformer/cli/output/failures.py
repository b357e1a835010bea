"""What becomes of errors: one line for those that a user can cause, a report for those of the program."""

from __future__ import annotations

import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import flowformer
from flowformer.cli.arguments.parser import UsageError
from flowformer.cli.output.streams import discard, escape
from flowformer.common.errors import DataError, RunError, describe
from flowformer.common.extras import find_extra

USAGE, FAULT = 2, 70  # exit statuses; 70 is EX_SOFTWARE of sysexits.h
# How torch says that memory is short, besides torch.OutOfMemoryError.
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


def explain(error: Exception, words: Sequence[str]) -> tuple[str, int]:
    """Return one line for an error, and the exit status.

    Args:
        error: What a command raised.
        words: The words of the command.
    """
    if isinstance(error, (UsageError, DataError, RunError)):
        return str(error), USAGE
    if isinstance(error, ModuleNotFoundError) and (extra := find_extra(error.name or "")):
        return f"{error.name} is not installed: pip install 'flowformer[{extra}]'", USAGE
    if isinstance(error, OSError):
        return describe(error), USAGE
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(m in str(error) for m in _MEMORY)):
        first = str(error).strip().split("\n")[0]
        return f"not enough memory: {first or 'make the model, the batch or the data smaller'}", USAGE
    return _report(error, words), FAULT


def failed(message: str, status: int) -> int:
    """Print a message as one line on standard error, if anybody can read it, and return the exit status."""
    try:
        print(f"flowformer: {escape(' '.join(message.split()))}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # closed or full
        discard(sys.stderr)
    return status


def _report(error: Exception, words: Sequence[str]) -> str:
    """Write the traceback of a fault to a file; the message says where it is."""
    lines = [
        f"flowformer {flowformer.__version__}, Python {sys.version}\n",
        f"flowformer {shlex.join(words)}\n\n",
        *traceback.format_exception(error),
    ]
    said = f"a fault of flowformer: {type(error).__name__}: {error}."
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="flowformer-error-", suffix=".txt", dir=Path.cwd(),
            delete=False,
        ) as file:  # fmt: skip
            file.writelines(lines)
    except OSError as unwritten:
        return f"{said} Please report it. The traceback could not be written: {describe(unwritten)}"
    return f"{said} Please report it, with the file {file.name}"
