"""Time and memory against length, on logarithmic axes. Matplotlib is imported when a figure is drawn."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
# Okabe and Ito's colours: told apart by the colour-blind too.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#000000", "#999999")
MARKERS = "osD^vPX*"
PANEL_INCHES = (4.6, 3.6)
PANELS_ABREAST = 3
CROWD = 9  # contenders of a figure that is not told apart by colours: each line has its name at its end
CROWDED_PANEL_INCHES = (6.2, 5.6)
NAME_HEIGHT = 0.031  # of a name at the end of a line, in heights of a panel


def draw(records: list[Record], kind: str) -> Any:
    """A figure with one panel for each operation.

    Args:
        records: Of a run.
        kind: ``"time"`` (the least, in milliseconds) or ``"memory"`` (the peak above inputs; for a step, the state).

    Returns:
        A matplotlib figure, or ``None`` where nothing of that kind was measured.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [point for point in records if point["record"] == "point" and _value(point, kind)]
    if not points:
        return None
    names = list(dict.fromkeys(point["operation"] for point in points))
    styles = _styles(points)
    crowded = len(styles) >= CROWD
    columns = min(len(names), 2 if crowded else PANELS_ABREAST)
    rows = -(-len(names) // columns)
    width, height = CROWDED_PANEL_INCHES if crowded else PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows + 1), layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        _panel(axes, name, [point for point in points if point["operation"] == name], kind, styles)
        if crowded:
            _name_ends(axes)
    if not crowded:
        lines = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 4), fontsize=8)
    figure.suptitle(_title(records), fontsize=8)
    return figure


def _value(point: Record, kind: str) -> float | None:
    if point["status"] != "timed":
        return None
    if kind == "time":
        return point["min_ms"]
    held = point["state_bytes"] or point.get("memory", {}).get("peak_bytes")
    return held / 1e6 if held else None


def _styles(points: list[Record]) -> dict[str, dict[str, Any]]:
    """Ours thick, bfloat16 dashed; a colour and a marker for each contender, whatever the panel."""
    ours = {point["contender"]: point for point in points}
    return {
        name: {
            "color": COLOURS[index % len(COLOURS)],
            # One further each time the colours are through: no two contenders look alike.
            "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
            "linestyle": "--" if point["dtype"] == "bfloat16" else "-",
            "linewidth": 2.2 if point["ours"] else 1.2,
            "markersize": 5 if point["ours"] else 4,
        }
        for index, (name, point) in enumerate(ours.items())
    }


def _panel(axes: Any, name: str, points: list[Record], kind: str, styles: dict[str, dict[str, Any]]) -> None:
    step = points[0]["state_bytes"] is not None
    axis = points[0]["axis"]
    for contender in dict.fromkeys(point["contender"] for point in points):
        own = sorted((point["length"], _value(point, kind)) for point in points if point["contender"] == contender)
        axes.plot(*zip(*own, strict=True), label=contender, **styles[contender])
    axes.set(xscale="log", yscale="log", title=name, xlabel=axis)
    held = "state, MB" if step else "peak above inputs, MB"
    axes.set_ylabel("time of one call, ms (least)" if kind == "time" else held)
    axes.grid(visible=True, which="major", alpha=0.3)


def _name_ends(axes: Any) -> None:
    """Write the name of each line to the right of the panel, level with its end or as near as names leave room."""
    to_panel = axes.transScale + axes.transLimits
    lines = sorted(axes.get_lines(), key=lambda line: line.get_ydata()[-1])
    ends = [tuple(to_panel.transform((line.get_xdata()[-1], line.get_ydata()[-1]))) for line in lines]
    levels = spread([level for _, level in ends], NAME_HEIGHT)
    for line, end, level in zip(lines, ends, levels, strict=True):
        axes.annotate(
            line.get_label(), end, xytext=(1.03, level), xycoords="axes fraction", textcoords="axes fraction",
            va="center", fontsize=7, color=line.get_color(), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.5, "alpha": 0.6},
        )  # fmt: skip


def spread(levels: list[float], gap: float) -> list[float]:
    """Return ascending levels at least ``gap`` apart, each group of those that were closer around its own middle."""
    groups: list[tuple[float, int]] = []  # sum of the wanted lowest levels of a group, and its size
    for level in levels:
        total, size = level, 1
        while groups and groups[-1][0] / groups[-1][1] + groups[-1][1] * gap > total / size:
            before, many = groups.pop()
            total, size = before + total - many * gap * size, many + size
        groups.append((total, size))
    return [total / size + place * gap for total, size in groups for place in range(size)]


def _title(records: list[Record]) -> str:
    start = next((record for record in records if record["record"] == "run"), None)
    if start is None:
        return ""
    here, plan = start["environment"], start["plan"]
    sizes = f"batch {plan['batch']}, {plan['heads']} heads, K {plan['channels']}, V {plan['value_channels']}"
    machine = here["device"]["name"] if "device" in here else f"{here['cpu']}, {here['threads']} threads"
    return f"{machine}; {sizes}; flowformer {here['flowformer']}, torch {here['torch']}"
