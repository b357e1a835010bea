"""Results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]
COLUMNS = (
    "min",
    "median",
    "ratio",
    "to ours",
    "doubling",
    "tokens/s",
    "GFLOP/s",
    "of sgemm",
    "of gemm",
    "MB",
    "MB doubling",
    "B/token",
    "state B",
    "error",
)


def describe_run(records: list[Record]) -> str:
    """Machine, threads, versions and load in a few lines."""
    start = next(record for record in records if record["record"] == "run")
    end = next((record for record in records if record["record"] == "end"), {})
    here = start["environment"]
    lines = [
        *_card(here.get("device")),
        f"{here['cpu']}, {here['cpus']} CPUs, {start['cpu_capability']}; {here['threads']} threads",
        f"flowformer {here['flowformer']}, commit {here['commit'] or 'unknown'}, torch {here['torch']}, "
        f"Python {here['python']}; {start['time']}",
        f"load {_load(start['load_before'])} before, {_load(end.get('load_after'))} after",
    ]
    if start["plan"].get("dtype"):
        lines.append(f"in {start['plan']['dtype']}")
    if end.get("busy"):
        lines.append("The machine was busy with other work, or with a run just before: do not trust these times.")
    if not end.get("finished"):
        lines.append("Interrupted: the points measured before that are here.")
    return "\n".join(lines)


def _card(card: Record | None) -> list[str]:
    """The GPU that a run was on, in a line."""
    if card is None:
        return []
    versions = [f"{name} {card[key] or 'unknown'}" for name, key in (("driver", "driver"), ("Triton", "triton"))]
    return [
        f"{card['name']}, capability {card['capability']}, {', '.join(versions)}; L2 cache flushed before each call"
    ]


def _load(load: list[float] | None) -> str:
    return "unknown" if load is None else f"{load[0]:.2f}"


def point_tables(records: list[Record]) -> list[Table]:
    """One table for each operation, and one of the machine's limits."""
    points = [record for record in records if record["record"] == "point"]
    names = dict.fromkeys(point["operation"] for point in points)
    tables = [_point_table(name, [point for point in points if point["operation"] == name]) for name in names]
    limits = [record for record in records if record["record"] == "limit"]
    return [*tables, _limit_table(limits)] if limits else tables


def _table(title: str, columns: tuple[str, ...], left: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", caption_style="")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def _point_table(operation: str, points: list[Record]) -> Table:
    first = points[0]
    sizes = f"batch {first['batch']}, {first['heads']} heads, K {first['channels']}, V {first['value_channels']}"
    growth = _growth(points, lambda point: point["min_ms"]), _growth(points, _peak)
    rows = [(point, _cells(point, *growth)) for point in points if point["status"] == "timed"]
    columns = [name for name in COLUMNS if any(cells[name] != "-" for _, cells in rows)]
    shown_as = {"tokens/s": f"{first['unit']}s/s", "B/token": f"B/{first['unit']}"}
    headers = [shown_as.get(name, name) for name in columns]
    table = _table(f"{operation}: {sizes}", ("length", "contender", *headers), ("contender",))
    length = None
    for point, cells in rows:
        if length not in (None, point["length"]):
            table.add_section()
        shown = "" if length == point["length"] else f"{point['length']:,}"
        length = point["length"]
        table.add_row(shown, point["contender"], *(cells[name] for name in columns))
    table.caption = "\n".join(_remarks(points)) or None
    return table


Growth = dict[tuple[str, int], float]


def _growth(points: list[Record], value: Callable[[Record], float | None]) -> Growth:
    """By contender and length, what doubling the length multiplies a value by, from the length before to this one."""
    before: dict[str, tuple[int, float]] = {}
    found = {}
    for point in sorted(points, key=lambda point: point["length"]):
        name, length = point["contender"], point["length"]
        here = value(point) if point["status"] == "timed" else None
        if here:
            if name in before and length > before[name][0]:
                was, there = before[name]
                found[name, length] = 2 ** (math.log2(here / there) / math.log2(length / was))
            before[name] = length, here
    return found


def _peak(point: Record) -> float | None:
    return point.get("memory", {}).get("peak_bytes")


def _cells(point: Record, of_time: Growth, of_memory: Growth) -> dict[str, str]:
    memory, check = point.get("memory", {}), point["check"]
    error = "unchecked" if check["error"] is None else f"{check['error']:.0e}"
    return {
        "min": format_time(point["min_ms"]),
        "median": format_time(point["median_ms"]),
        "ratio": f"{point['ratio']:.2f}x",
        "to ours": _number(point.get("ratio_to_ours"), ".2f"),
        "doubling": _number(of_time.get((point["contender"], point["length"])), ".2f"),
        "tokens/s": _rate(point.get("tokens_per_s")),
        "GFLOP/s": _number(point.get("gflops"), ".1f"),
        "of sgemm": _number(point.get("share_of_sgemm"), ".0%"),
        "of gemm": _number(point.get("share_of_gemm"), ".0%"),
        "MB": _number(memory.get("peak_bytes"), ".1f", 1e-6),
        "MB doubling": _number(of_memory.get((point["contender"], point["length"])), ".2f"),
        "B/token": _number(memory.get("bytes_per_token"), ",.0f"),
        "state B": _number(point["state_bytes"], ",.0f"),
        "error": error,
    }


def _remarks(points: list[Record]) -> list[str]:
    """What the cells have no room for, each said once with the lengths it holds for."""
    lengths: dict[str, list[int]] = {}
    for point in points:
        for text in _remarks_of(point):
            lengths.setdefault(text, []).append(point["length"])
    return [f"{text} ({', '.join(f'{n:,}' for n in dict.fromkeys(where))})" for text, where in lengths.items()]


def _remarks_of(point: Record) -> list[str]:
    if point["status"] != "timed":
        return [f"{point['contender']} {point['status']}: {point['reason']}"]
    check, found = point["check"], []
    if check["error"] is None:
        found.append(f"{point['contender']} {check['note']}")
    elif check["note"] != "checked":
        found.append(check["note"])
    if check["length"] != point["length"]:
        found.append(f"checked at {check['length']:,}")
    if "reason" in point.get("memory", {}):
        found.append(f"{point['contender']}, memory: {point['memory']['reason']}")
    return found


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else f"{value * scale:{form}}"


def _rate(value: float | None) -> str:
    return _number(value, ",.0f" if value is None or value >= 100 else ".3g")


def format_time(milliseconds: float) -> str:
    """With a unit that suits: microseconds, milliseconds or seconds."""
    for unit, size in (("s", 1e3), ("ms", 1.0)):
        if milliseconds >= size:
            return f"{milliseconds / size:.3g} {unit}" if milliseconds < 1000 * size else f"{milliseconds / size:.0f} s"
    return f"{milliseconds * 1e3:.3g} µs"


def _limit_table(limits: list[Record]) -> Table:
    units = {limit["name"]: f"{limit['name']}, {limit['unit']}" for limit in limits}
    table = _table("limits in the same run", ("operation", "length", *units.values()), ("operation",))
    places: dict[tuple[str, int], dict[str, float]] = {}
    for limit in limits:
        places.setdefault((limit["operation"], limit["length"]), {})[limit["name"]] = limit["value"]
    for (operation, length), values in places.items():
        table.add_row(operation, f"{length:,}", *(_number(values.get(name), ".1f") for name in units))
    return table


def comparison_table(ratios: list[Record], revision: str) -> Table:
    """Times here beside those of another commit."""
    columns = ("operation", "length", "contender", "here", revision[:12], "ratio", "by pairs", "memory ratio")
    title = f"here against {revision}; a ratio above 1 means slower here"
    table = _table(title, columns, ("operation", "contender"))
    for row in ratios:
        times = [format_time(row[side]) if row[side] is not None else "-" for side in ("here_ms", "there_ms")]
        pairs = row["pair_ratios"]
        spread = f"{min(pairs):.2f} to {max(pairs):.2f}" if pairs else "-"
        ratio, memory = _number(row["ratio"], ".2f"), _number(row["memory_ratio"], ".2f")
        table.add_row(row["operation"], f"{row['length']:,}", row["contender"], *times, ratio, spread, memory)
    return table
