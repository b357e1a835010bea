"""Folders and files that a command writes: tried before anything is computed."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from flowformer.cli.arguments.parser import UsageError


def output_path(text: str) -> Path:
    """Return a path given on the command line; the type of ``--out``.

    Raises:
        ArgumentTypeError: for an empty one, or one with a null character.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expects a path, got {text!r}")
    return Path(text)


def check_folder(folder: Path, flag: str = "--out") -> None:
    """Check that a folder can be written, by writing to it. Nothing stays behind.

    Args:
        folder: It need not be there yet.
        flag: The option that names it.

    Raises:
        UsageError: naming the folder and the reason.
    """
    with contextlib.suppress(OSError, ValueError):
        if folder.is_file():
            raise UsageError(f"{folder} is a file: pass {flag} for a folder")
    _try_to_write(folder, ".flowformer", folder, f"pass {flag} for another folder")


def check_file(file: Path, flag: str = "--out", *, inputs: Iterable[Path] = ()) -> None:
    """Check that a file can be written or replaced. Nothing is changed.

    Args:
        file: It need not be there yet.
        flag: The option that names it.
        inputs: Files and folders that are read: a file of theirs is not replaced.

    Raises:
        UsageError: naming the file and the reason.
    """
    with contextlib.suppress(OSError, ValueError):
        if read := next((one for one in inputs if _is_part(file, one)), None):
            raise UsageError(f"{file} would replace what is read, {read}: pass {flag} for another file")
    with contextlib.suppress(OSError, ValueError):
        if file.is_dir():
            raise UsageError(f"{file} is a folder: pass {flag} for a file")
    _try_to_write(file.parent, f".{file.name}", file, f"pass {flag} for another file")


def _is_part(file: Path, read: Path) -> bool:
    """Whether a file that exists is another one, or lies in a folder."""
    if not file.is_file():
        return False
    return file.samefile(read) or (read.is_dir() and file.resolve().is_relative_to(read.resolve()))


def _try_to_write(folder: Path, name: str, named: Path, advice: str) -> None:
    """Make a folder and a file of a name in it, and remove what was made."""
    made: list[Path] = []
    try:
        for part in reversed([folder, *folder.parents]):
            if not part.is_dir():
                if part.exists():
                    raise UsageError(f"{named} cannot be written: {part} is a file: {advice}")
                part.mkdir()
                made.append(part)
        probe = folder / f"{name}.{os.getpid()}"  # files are written beside their place first, under such a name
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{named} cannot be written: {reason}; {advice}") from error
    finally:
        for part in reversed(made):
            with contextlib.suppress(OSError):  # another process has begun to use it
                part.rmdir()
