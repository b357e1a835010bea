"""``flowformer bench``."""

from __future__ import annotations

from collections.abc import Sequence

from flowformer.cli.arguments.parser import Parser, usable


def main(words: Sequence[str]) -> int:
    """Measure speed and memory against peers, or against another commit."""
    from flowformer.bench import command

    parser = Parser(prog="flowformer bench", description=main.__doc__, epilog=command.describe())
    command.add_arguments(parser)
    return usable(command.main, parser.parse(words))
