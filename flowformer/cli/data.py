"""``flowformer data``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowformer.cli.arguments.parser import Parser, UsageError, usable
from flowformer.cli.output.paths import check_folder, output_path


def main(words: Sequence[str]) -> int:
    """Download or generate a data set and verify it, or list the data sets."""
    from flowformer.common.names import nearest
    from flowformer.tasks import downloads
    from flowformer.tasks.lra.made import MADE

    parser = Parser(prog="flowformer data", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="data set to prepare; lists all of them if absent", default="")
    parser.add_argument(
        "--dir",
        type=output_path,
        metavar="DIR",
        help="folder to store it in (default: the cache, where recipes look for it)",
        default=None,
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="check this file of the data set instead (lra-listops)", default=None
    )
    values = parser.parse(words)
    if not values.name:
        for flag, value in (("--check", values.check), ("--dir", values.dir)):
            if value is not None:
                raise UsageError(f"{flag} requires the name of a data set")
        print("\n".join(_list(downloads.DATASETS.values(), MADE)))
        return 0
    if values.name not in (known := [*downloads.DATASETS, *MADE]):
        raise UsageError(f"unknown data set {values.name!r}{nearest(values.name, known) or _available(known)}")
    made = MADE.get(values.name)
    if values.check is not None and (made is None or made.check is None):
        raise UsageError(f"--check: {values.name} has no files to check")
    if values.check is not None and values.dir is not None:
        raise UsageError("--dir has no effect with --check")
    if values.dir is not None:
        check_folder(values.dir, "--dir")

    from rich.console import Console

    console = Console()
    if made is None:
        usable(downloads.fetch, values.name, values.dir, console=console)
        return 0
    if values.check is not None and made.check is not None:
        return 0 if usable(made.check, values.check, console) else 1
    usable(made.make, values.dir, console)
    return 0


def _list(downloaded: Iterable[Any], made: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{one.name:15} {one.title}, {one.size_bytes:,} bytes from {one.addresses[0]}" for one in downloaded
    ]  # fmt: skip
    return [*lines, *(f"{name:15} {one.title}" for name, one in made.items())]


def _available(known: Sequence[str]) -> str:
    return f"; known are {', '.join(known)}"
