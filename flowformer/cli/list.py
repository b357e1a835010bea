"""``flowformer list``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flowformer.cli.arguments.parser import Parser, UsageError
from flowformer.common.names import nearest

Row = dict[str, Any]  # "kind", "name", "about", and what this kind has besides
_DATA = {"here": "here", "absent": "to be fetched", "unknown": "give its path"}


def main(words: Sequence[str]) -> int:
    """List recipes, models, attention mechanisms and data sets, optionally those that match a word."""
    parser = Parser(prog="flowformer list", description=main.__doc__, epilog=_EPILOG)
    parser.add_argument("kind", nargs="?", help=f"{', '.join(_KINDS)} (default: all)")
    parser.add_argument("word", nargs="?", help="show only rows with this word in their name or description")
    parser.add_argument("--json", action="store_true", help="print a JSON list of all fields")
    values = parser.parse(words)
    kinds, word = ([values.kind], values.word) if values.kind in _KINDS else (list(_KINDS), values.kind)
    if values.kind not in _KINDS and values.word is not None:
        parser.error(f"no kind {values.kind!r}{nearest(values.kind, _KINDS)}; there is {', '.join(_KINDS)}")
    rows = [row for kind in kinds for row in _KINDS[kind][1]() if _matches(row, word)]
    if values.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        _show(rows)
    else:
        raise UsageError(f"no {' or '.join(kinds)} with {word!r} in its name or description{nearest(word, _KINDS)}")
    return 0


def _matches(row: Row, word: str | None) -> bool:
    return word is None or word.casefold() in f"{row['name']} {row['about']}".casefold()


def _show(rows: Sequence[Row]) -> None:
    for kind, (title, _) in _KINDS.items():
        members = [(row["name"], _second(row), row["about"]) for row in rows if row["kind"] == kind]
        if members:
            widths = [max(len(row[column]) for row in members) for column in (0, 1)]
            print(title)
            for name, second, about in members:
                print(f"  {name:{widths[0]}}  {second + '  ' if widths[1] else '':{widths[1] + 2}}{about}".rstrip())


def _second(row: Row) -> str:
    """The column between name and description."""
    if row["kind"] == "recipes":
        published = "" if row["published"] is None else f"{row['published']:g}"
        return f"{published:5}  {_DATA[row['data']]}"
    return {"data": _DATA.get(row.get("data", ""), ""), "attentions": row.get("time", "")}.get(row["kind"], "")


def _first_line(thing: Any) -> str:
    text = inspect.getdoc(getattr(thing, "func", thing)) or ""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text.partition("\n")[0])  # without Sphinx's roles


def _recipes() -> Iterator[Row]:
    from flowformer.recipes import find_recipe, list_recipes

    for name in list_recipes():
        function = find_recipe(name)
        recipe = function()
        figure, values = recipe.published_table() or (None, {})
        published = values.get(recipe.row)
        yield {
            "kind": "recipes", "name": name, "about": _first_line(function), "published": published,
            "figure": None if published is None else figure, "data": recipe.data_state,
        }  # fmt: skip


def _models() -> Iterator[Row]:
    from flowformer.models.registry import find_model, list_models

    for name in list_models():
        yield {"kind": "models", "name": name, "about": _first_line(find_model(name))}


def _attentions() -> Iterator[Row]:
    from flowformer.mechanisms import find_attention, list_attentions

    for name in list_attentions():
        row = find_attention(name)
        about = {"about": _first_line(row.module), "time": row.cost, "source": row.source}
        yield {"kind": "attentions", "name": name, **about}


def _data() -> Iterator[Row]:
    from flowformer.tasks import downloads
    from flowformer.tasks.lra.made import MADE

    for one in downloads.DATASETS.values():
        yield {
            "kind": "data", "name": one.name, "about": f"{one.title}, {one.size_bytes:,} bytes",
            "data": "here" if downloads.is_here(one) else "absent", "source": one.addresses[0], "licence": one.licence,
        }  # fmt: skip
    for name, made in MADE.items():
        yield {"kind": "data", "name": name, "about": made.title, "data": "here", "source": "generated here"}


_KINDS: Mapping[str, tuple[str, Callable[[], Iterator[Row]]]] = {
    "recipes": ("Recipes (flowformer train NAME): name, published value, data", _recipes),
    "models": ("Models (flowformer.create_model(NAME, ...))", _models),
    "attentions": ("Attention (flowformer.create_attention(NAME, ...), --attention NAME): name, time", _attentions),
    "data": ("Data sets (flowformer data NAME)", _data),
}
_EPILOG = "Data: here; to be fetched, by `flowformer data` or by the run itself; or at a path that an option names."
