"""What ``flowformer bench`` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from flowformer.bench.compare import compare
from flowformer.bench.device import DEVICES
from flowformer.bench.registry import OPERATIONS, contenders, load
from flowformer.bench.results import WIDTH, claim, write_records, write_report, write_tables
from flowformer.bench.runner import DTYPES, Plan, Record, run
from flowformer.bench.tables import comparison_table, describe_run, point_tables
from flowformer.common.errors import RunError

SIZES = {"batch": "sequences", "heads": "heads", "channels": "channels of a query or key of one head",
         "value_channels": "channels of a value of one head"}  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word for word in text.split(",") if word)
    if not words:
        raise argparse.ArgumentTypeError(f"expects words separated by commas, got {text!r}")
    return words


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expects whole numbers separated by commas, got {text!r}") from error


def describe() -> str:
    """Operations and contenders, for help."""
    load()
    lines = ["operations:", *(f"  {row.name:24} {row.about}" for row in OPERATIONS.values()), "", "contenders:"]
    about = {name: row.about for (_, name), row in contenders().items()}
    return "\n".join([*lines, *(f"  {name:24} {text}" for name, text in about.items())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    plan = Plan()
    add = parser.add_argument
    add("operations", nargs="*", metavar="OPERATION", help="what to measure; everything by default")
    add("--lengths", type=_lengths, default=(), metavar="N,N", help="by default those of each operation")
    for name, about in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(plan, name), metavar="N", help=about)
    add("--device", choices=DEVICES, default=plan.device, help="where to measure; the CPU by default")
    add("--dtype", choices=DTYPES, default=plan.dtype, help="by default float32, if a contender does not say otherwise")
    add("--contenders", type=_words, default=(), metavar="A,B", help="all by default; ratios are to the first")
    add("--threads", type=int, default=0, metavar="N", help="threads; by default as many as torch takes")
    add("--seconds", type=float, default=plan.seconds, metavar="S", help="time of each contender at each length")
    add("--repeats", type=int, default=0, metavar="N", help="the most calls of each contender at each length")
    add("--no-memory", action="store_true", help="do not measure memory, which takes a process for each point")
    add("--no-limits", action="store_true", help="do not measure matrix products and copies too")
    add("--memory-gb", type=float, default=0.0, metavar="GB",
        help="memory that a contender may need above its inputs; by default half of what is available")  # fmt: skip
    add(
        "--longest",
        type=float,
        default=plan.longest_s,
        metavar="S",
        help="leave out contenders of which one call takes longer",
    )
    add("--import", dest="imports", type=_words, default=(), metavar="MODULE", help="modules with further contenders")
    add("--compare", default="", metavar="REV", help="run here and at this commit by turns, and show the ratios")


def default_folder() -> Path:
    """Return the folder of results where none is given: the time in runs/bench."""
    return Path("runs") / "bench" / datetime.now().strftime("%Y%m%d-%H%M%S")


def main(values: argparse.Namespace) -> int:
    """Carry out a parsed command line.

    Returns:
        0; 1 if a contender was wrong or failed; 130 if interrupted.

    Raises:
        ValueError, RunError: for mistakes of the user, and where a commit cannot be measured.
    """
    plan = _plan(values)
    plan.rows()  # unknown names are refused before anything is written
    folder = values.out
    claim(folder)
    records: list[Record] = []

    def keep(record: Record) -> None:
        records.append(record)
        write_records(folder, records)

    interrupted = False
    try:
        with _progress() as tell:
            if values.compare:
                compare(values.compare, plan, keep, tell)
            else:
                run(plan, keep, tell)
    except KeyboardInterrupt:
        interrupted = True
    if values.compare:
        _show_comparison(folder, records, values.compare)
    else:
        _show(folder, records)
    if interrupted:
        kept = f"{folder} holds what was measured" if records else "nothing was measured"
        print(f"flowformer: interrupted; {kept}", file=sys.stderr)
        return 130
    return _complain(records)


def _plan(values: argparse.Namespace) -> Plan:
    fields = {name: getattr(values, name) for name in SIZES}
    if not 0 <= values.memory_gb < 1e6:
        raise ValueError(f"memory_gb must be at least 0 and below 1,000,000, got {values.memory_gb}")
    return Plan(
        operations=tuple(values.operations), lengths=values.lengths, contenders=values.contenders,
        device=values.device, dtype=values.dtype,
        threads=values.threads, seconds=values.seconds, repeats=values.repeats, longest_s=values.longest,
        memory=not values.no_memory, limits=not values.no_limits, memory_budget_bytes=int(values.memory_gb * 1e9),
        imports=values.imports, **fields,
    )  # fmt: skip


def _rich() -> Any:
    try:
        from rich import console, progress
    except ModuleNotFoundError as error:
        raise RunError("rich is not installed: pip install 'flowformer[bench]'") from error
    return console, progress


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line of progress, on a terminal."""
    console, progress = _rich()
    columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda text: shown.update(task, description=text)


def _print(*tables: Any, heading: str) -> None:
    console = _rich()[0]
    out = console.Console(width=max(console.Console().width, WIDTH))  # rather wrapped than cut short
    out.print(heading, highlight=False, markup=False, soft_wrap=True)
    for table in tables:
        out.print(table)


def _show(folder: Path, records: list[Record]) -> None:
    if not records:
        return
    _print(*point_tables(records), heading=describe_run(records))
    why = write_report(folder, records)
    if why:
        print(why)
    print(f"The results are in {folder}")


def _show_comparison(folder: Path, records: list[Record], revision: str) -> None:
    ratios = [record for record in records if record["record"] == "ratio"]
    if not ratios:
        return
    table, heading = comparison_table(ratios, revision), describe_run(records)
    _print(table, heading=heading)
    write_tables(folder, [table], heading)
    print(f"The results are in {folder}")


def _complain(records: list[Record]) -> int:
    bad = [record for record in records if record.get("status") in ("wrong", "failed")]
    for text in dict.fromkeys(f"{record['contender']}: {record['reason']}" for record in bad):
        print(f"flowformer: {text}", file=sys.stderr)
    return 1 if bad else 0
