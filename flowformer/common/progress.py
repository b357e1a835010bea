"""Bars that show how much of a long computation is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_bar(title: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Show a bar for the time of a ``with`` block.

    Args:
        title: What is done.
        total: Number of items.
        console: Where the bar is shown; ``None`` for nowhere.

    Yields:
        A function to call with the number of items that have been done since the last call. More than ``total`` count
        as all.
    """
    if console is None:
        yield lambda count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)

        def advance(count: int) -> None:
            bar.update(task, completed=min(total, bar.tasks[task].completed + count))

        yield advance
