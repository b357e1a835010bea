"""Standard output and standard error: of any encoding, closed, or on a full disk; and what is printed to a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, cast

from flowformer.cli.arguments.parser import UsageError


@contextlib.contextmanager
def writable_output() -> Iterator[None]:
    """Make standard output and standard error take any text, and report output that cannot be written.

    A character that the encoding of a stream does not have is written as an escape. A closed standard error is replaced
    by the null device.

    Raises:
        UsageError: before the block, if standard output is closed; in it and after it, if the output cannot be written.
        BrokenPipeError: if nobody reads standard output.
    """
    if sys.stderr is None:
        sys.stderr = _null_device()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        sys.stdout = _null_device()  # files that are opened later do not take its number
        raise UsageError("standard output is closed: redirect it to a file, or to /dev/null")
    before, output = sys.stdout, _Output(sys.stdout)
    sys.stdout = cast("TextIO", output)
    try:
        yield
        output.flush()
    except SystemExit:  # of --help
        output.flush()
        raise
    finally:
        sys.stdout = before


class _Output:
    """Standard output, whose errors say that they are its own: an OSError of a full disk does not."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def writelines(self, lines: Iterable[str]) -> None:
        self._try(self._stream.writelines, lines)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            discard(self._stream)
            raise UsageError(f"standard output cannot be written: {error.strerror}") from error


def discard(stream: Any) -> None:
    """Send what a stream holds, and all that follows, to the null device: closing it would fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def escape(text: str, keep: str = "") -> str:
    """Return a text with an escape for each character that a terminal does not print, as escape codes begin with.

    Args:
        text: What may hold control characters: the name of a file or a class, generated text.
        keep: Characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(text: str, end: str = "\n") -> None:
    """Print a text; on a terminal, control characters other than new lines and tabs are escaped."""
    print(escape(text, keep="\n\t") if sys.stdout.isatty() else text, end=end, flush=True)


def show_all(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come."""
    for piece in pieces:
        show(piece, end="")


def track(steps: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """Show progress on standard error: a :data:`flowformer.tasks.protocols.Track`."""
    from rich.console import Console
    from rich.progress import track as track_steps

    return track_steps(steps, total=total, description=what, console=Console(stderr=True))


def _null_device() -> Any:
    stream: Any = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - it stays open
    return stream
