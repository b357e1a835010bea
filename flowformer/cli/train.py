"""``flowformer train``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from flowformer.cli.arguments.parser import Parser, usable


def main(words: Sequence[str]) -> int:
    """Run a recipe and write its folder."""
    if not words or words[0].startswith("-"):
        parser = Parser(
            prog="flowformer train",
            description="Run a recipe: see `flowformer list recipes`, and `flowformer train RECIPE --help`.",
        )
        parser.add_argument("recipe", help="name of the recipe, for example uea/JapaneseVowels")
        parser.parse(words)

    from flowformer.cli.arguments.recipes import read_command

    asked = read_command(words[0], words[1:])

    from rich.console import Console

    from flowformer.report.tables import protocol_table
    from flowformer.training.fit import train

    console = Console()
    command = shlex.join(["flowformer", "train", *words])
    try:
        result = usable(train, asked.recipe, asked.folder, resume=asked.resume, command=command, console=console)
    except KeyboardInterrupt:
        again = command if asked.resume else f"{command} --resume"
        print(f"\nInterrupted. To continue from the last checkpoint: {again}", file=sys.stderr)
        return 130
    console.print(protocol_table(result))
    console.print(f"The run is in {asked.folder}", highlight=False, soft_wrap=True)
    return 0
