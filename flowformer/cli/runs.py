"""The command that makes a run."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowformer.cli.parser import Parser, usable


def _train(words: Sequence[str]) -> int:
    """Run a recipe and write its folder."""
    from flowformer.recipes import find_recipe

    parser = Parser(
        prog="flowformer train",
        description="Run a recipe. `flowformer list` shows them all; `flowformer train RECIPE --help` one's options.",
    )
    parser.add_argument("recipe", help="name of the recipe, for example uea/JapaneseVowels")
    if words and not words[0].startswith("-"):
        parser = recipe_parser(words[0], usable(find_recipe, words[0]))
    values = vars(parser.parse(words))
    name, out, resume = values.pop("recipe"), values.pop("out"), values.pop("resume")
    recipe = usable(find_recipe(name), **values)
    folder = Path(out) if out else Path("runs") / recipe.name / recipe.label

    from rich.console import Console

    from flowformer.report.tables import protocol_table
    from flowformer.training.fit import train

    console = Console()
    command = shlex.join(["flowformer", "train", *words])
    try:
        result = usable(train, recipe, folder, resume=resume, command=command, console=console)
    except KeyboardInterrupt:
        again = command if resume else f"{command} --resume"
        print(f"\nInterrupted. To go on from the last checkpoint: {again}", file=sys.stderr)
        return 130
    console.print(protocol_table(result))
    console.print(f"The run is in {folder}", highlight=False, soft_wrap=True)
    return 0


def recipe_parser(name: str, recipe: Any) -> Parser:
    """The parser of ``flowformer train NAME``: every field of the recipe is an option."""
    described = inspect.getdoc(getattr(recipe, "func", recipe))  # the function that a partial stands for
    parser = Parser(prog=f"flowformer train {name}", description=described)
    parser.add_argument("recipe", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the run; runs/RECIPE/ATTENTION-seedN if absent", default=""
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, if there is one")
    defaults = recipe()
    for field in dataclasses.fields(defaults):
        if field.name == "name":
            continue
        default = getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        shown = field.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=shown)
        else:
            kind = type(default)
            parser.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=shown)
    return parser


COMMANDS = {
    "train": _train,
}
