"""docs/published.md and the recipes agree: each row of the papers' tables, its number, and what runs it."""

import functools
import re
import shlex
from pathlib import Path

import pytest

from flowformer.cli.arguments.recipes import read_command
from flowformer.recipes import create_recipe, list_recipes
from flowformer.tasks.decision import task
from flowformer.tasks.images import density, imagenet
from flowformer.tasks.series import uea
from flowformer.tasks.text import enwik8, wikitext

PAGE = Path(__file__).parents[2] / "docs" / "published.md"
TABLES = {
    "wikitext103": wikitext.PUBLISHED, "imagenet": imagenet.PUBLISHED, "density": density.PUBLISHED,
    "enwik8": enwik8.PUBLISHED,
}  # fmt: skip
NUMBER = re.compile(r"\d+\.\d+")


def rows():
    """The cells of every row of the page's tables, without headings."""
    text = PAGE.read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if len(cells) > 2 and cells[0] != "row"]


def command_of(cell):
    found = re.match(r"`((?:wikitext103|imagenet|density|enwik8)/.+?)`", cell)
    return found and found.group(1)


@functools.cache
def recipe_of(command):
    name, *options = shlex.split(command)
    return read_command(name, options).recipe


COMMANDS = list(dict.fromkeys((command, cells[1]) for cells in rows() if (command := command_of(cells[2]))))


@pytest.mark.parametrize(("command", "cell"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_run_shows_the_number_of_the_page(command, cell):
    recipe = recipe_of(command)
    assert str(recipe.published_table()[1][recipe.row]) in [str(float(one)) for one in NUMBER.findall(cell)]
    assert ("development" in cell) == bool(recipe.published_note)


def test_every_published_value_has_a_row():
    found = {family: set() for family in TABLES}
    for command, _ in COMMANDS:
        found[command.split("/")[0]].add(recipe_of(command).row)
    quoted = {float(cells[1]) for cells in rows() if cells[2].startswith("cited") and NUMBER.fullmatch(cells[1])}
    for family, table in TABLES.items():
        assert {row: value for row, value in table.items() if row not in found[family] and value not in quoted} == {}


def test_every_recipe_is_on_the_page():
    named = set(re.findall(r"`(\w+/[\w-]+)[` ]", PAGE.read_text(encoding="utf-8")))
    for name in list_recipes():
        if name.split("/")[0] in TABLES and name != "density/digits":
            assert name in named, name
    assert {name for name in named if name.split("/")[0] in TABLES} <= set(list_recipes())


def test_rows_of_series():
    of_series = [cells for cells in rows() if len(cells) == 3 + len(uea.SUBSETS)]
    assert len(of_series) == len(uea.PUBLISHED)
    for (method, accuracies), cells in zip(uea.PUBLISHED.items(), of_series, strict=True):
        assert [float(cell) for cell in cells[2:-1]] == list(accuracies.values())
        command = re.match("`(.+?)`", cells[1])
        assert command
        recipe = recipe_of(command.group(1).replace("SUBSET", "Heartbeat"))
        assert (recipe.row, recipe.published_table()[1][recipe.row]) == (method, accuracies["Heartbeat"])


def test_rows_of_decisions():
    shown = {}
    for cells in rows():
        if len(figures := cells[1].split(", ")) == len(task.SETS):
            shown[cells[0]] = [float(figure) for figure in figures]
            command = re.match("`(decision/.+?)`", cells[2])
            if cells[0] == "AWAC":
                assert command is None
                continue
            assert command
            for name, figure in zip(task.SETS, shown[cells[0]], strict=True):
                recipe = recipe_of(command.group(1).replace("SET", name))
                assert recipe.published_table()[1][recipe.row] == figure
    assert list(shown.values()) == [
        [task.PUBLISHED[name][row] for name in task.SETS] for row in task.PUBLISHED["hopper-medium"]
    ]


@pytest.mark.parametrize(("attention", "options"), [("flow", {"preset": "core"}), ("yoso", {"num_hashes": 8})])
def test_series_with_other_options_are_no_row(attention, options):
    assert create_recipe("uea/Heartbeat", attention=attention, attention_options=options).row == ""


def test_models_of_timm_exist():
    timm = pytest.importorskip("timm")
    names = re.findall(r"timm `(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(names) == 4
    assert all(timm.is_model(name) for name in names)
