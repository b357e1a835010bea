"""Results as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def protocol_table(result: dict[str, Any]) -> Table:
    """Return a table of a run's results under each protocol, with the published value.

    Args:
        result: What a run's ``result.json`` holds.
    """
    recipe = result["recipe"]
    parts = [recipe["name"]]
    if "attention" in recipe:
        parts.append(f"attention {recipe['attention'] or 'of ' + recipe['model']}")
    parts.append(f"seed {result['seed']}")
    parts += [f"{recipe[unit]} {unit}" for unit in ("epochs", "steps") if unit in recipe]
    title = ", ".join(parts)
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("protocol", "metric"):
        table.add_column(name)
    for name in ("ours", "published"):
        table.add_column(name, justify="right")
    table.add_column("how the model was chosen", overflow="fold")
    for name, entry in result["protocols"].items():
        published = "-" if entry["published"] is None else f"{entry['published']:g}"
        table.add_row(name, entry["metric"], f"{entry['value']:.{entry['digits']}f}", published, entry["selection"])
        for part in entry.get("parts", ()):
            table.add_row("", part["name"], _show_part(part, entry["digits"]), "", "")
    notes = {entry.get("published_note") for entry in result["protocols"].values() if entry["published"] is not None}
    table.caption = "; ".join(sorted(note for note in notes if note)) or None
    return table


def _show_part(part: dict[str, Any], digits: int) -> str:
    """Return the value of a part of an evaluation with its standard deviation."""
    return f"{part['value']:.{digits}f} ± {part['spread']:.{digits}f}"
