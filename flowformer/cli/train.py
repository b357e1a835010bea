"""``flowformer train``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from flowformer.cli.arguments.parser import Parser, usable
from flowformer.common.interrupts import Interrupted


def main(words: Sequence[str]) -> int:
    """Run a recipe and write its folder."""
    if not words or words[0].startswith("-"):
        parser = Parser(
            prog="flowformer train",
            description="Run a recipe: see `flowformer list recipes`, and `flowformer train RECIPE --help`.",
        )
        parser.add_argument("recipe", help="name of the recipe, for example uea/JapaneseVowels")
        parser.parse(words)
    command = shlex.join(["flowformer", "train", *words])
    try:
        return _train(words, command)
    except KeyboardInterrupt as error:
        again = command if "--resume" in words else f"{command} --resume"
        raise Interrupted.of(error, f"To continue: {again}") from None


def _train(words: Sequence[str], command: str) -> int:
    from flowformer.cli.arguments.recipes import read_command

    asked = read_command(words[0], words[1:])

    from rich.console import Console

    from flowformer.report.tables import protocol_table
    from flowformer.training.fit import train

    console = Console()
    result = usable(
        train, asked.recipe, asked.folder, resume=asked.resume, data_changed_ok=asked.data_changed_ok,
        command=command, console=console,
    )  # fmt: skip
    console.print(protocol_table(result))
    console.print(f"The run is in {asked.folder}", highlight=False, soft_wrap=True, markup=False)
    return 0
