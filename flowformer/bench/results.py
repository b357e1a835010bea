"""The files of a run: records as JSON lines, tables as text, figures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from flowformer.bench.plots import draw
from flowformer.bench.tables import describe_run, point_tables
from flowformer.common.errors import RunError
from flowformer.common.files import replacing, write_whole

RECORDS = "results.jsonl"
WIDTH = 132  # of tables, in characters


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write ``results.jsonl``, whole or not at all."""
    write_whole(folder / RECORDS, "".join(json.dumps(record) + "\n" for record in records))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a ``results.jsonl``, or that of a folder."""
    path = path / RECORDS if path.is_dir() else path
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def claim(folder: Path) -> None:
    """Refuse a folder that holds results already.

    Raises:
        RunError: if it does.
    """
    if (folder / RECORDS).exists():
        raise RunError(f"{folder} holds the results of another run: give another --out")


def write_tables(folder: Path, tables: list[Any], heading: str) -> None:
    """Write ``table.txt``, whole or not at all."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=WIDTH)
    console.print(heading, highlight=False, markup=False, soft_wrap=True)
    for table in tables:
        console.print(table)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    write_whole(folder / "table.txt", "\n".join(lines) + "\n")


def write_report(folder: Path, records: list[dict[str, Any]]) -> str | None:
    """Write ``table.txt`` and the figures ``time`` and ``memory`` as PNG and SVG, each whole or not at all.

    Returns:
        Why there are no figures, or ``None`` if there are.
    """
    write_tables(folder, point_tables(records), describe_run(records))
    try:
        figures = {kind: draw(records, kind) for kind in ("time", "memory")}
    except ModuleNotFoundError as error:
        return f"no figures, since {error.name} is not installed: pip install 'flowformer[bench]'"
    for kind, figure in figures.items():
        if figure is None:
            continue
        for suffix in ("png", "svg"):
            _save(figure, folder / f"{kind}.{suffix}")
    return None


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
