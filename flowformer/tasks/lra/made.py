"""Data of Long Range Arena that is made here instead of downloaded, by name on the command line.

What makes it imports PyTorch, and is imported when it is asked for: listing the names takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowformer.common.processes import available_cpus

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Made:
    """A data set that is made.

    Attributes:
        title: What it is called in sentences.
        make: Makes it in the cache; in a folder too, if one is given. Raises DataError.
        check: Checks a file of it, prints a summary, and returns whether it is right; ``None`` where none can be.
    """

    title: str
    make: Callable[[Path | None, Console], None]
    check: Callable[[Path, Console], bool] | None = None


def _make_listops(folder: Path | None, console: Console) -> None:
    from flowformer.tasks.lra import listops
    from flowformer.tasks.lra.describing import describe
    from flowformer.tasks.lra.listops.files import write

    splits = listops.generate(console=console)
    if folder is not None:
        write(folder, splits, console=console)
    where = "the cache, where the recipe lra/listops finds it" if folder is None else folder
    _say(console, describe(splits._asdict(), listops.CLASSES), f"ListOps is in {where}")


def _check_listops(path: Path, console: Console) -> bool:
    from flowformer.tasks.lra.listops.files import print_check

    return print_check(path, console)


def _make_pathfinder(difficulty: str, side: int, folder: Path | None, console: Console) -> None:
    if folder is not None:
        raise ValueError("Pathfinder is kept in the cache only (FLOWFORMER_DATA names its folder): leave --dir out")
    from flowformer.tasks.lra.pathfinder.files import load

    parts = load(difficulty, side, workers=available_cpus(), console=console)
    counts = ", ".join(f"{len(part):,} ({name})" for name, part in parts._asdict().items())
    _say(console, f"Pathfinder, {difficulty}, {side} x {side}: {counts}, in the cache, where recipes find it")


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


MADE: Mapping[str, Made] = {
    "lra-listops": Made("ListOps, 100,000 generated expressions", _make_listops, _check_listops),
    **{
        f"lra-pathfinder{suffix}": Made(
            f"Pathfinder, 200,000 generated pictures of {side} x {side}, {difficulty}",
            partial(_make_pathfinder, difficulty, side),
        )
        for suffix, difficulty, side in (
            ("", "hard", 32), ("-intermediate", "intermediate", 32), ("-easy", "easy", 32), ("-128", "hard", 128),
        )
    },
}  # fmt: skip
