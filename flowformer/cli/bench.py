"""``flowformer bench``."""

from __future__ import annotations

from collections.abc import Sequence

from flowformer.cli.arguments.outputs import check_folder, output_path
from flowformer.cli.arguments.parser import Parser, usable


def main(words: Sequence[str]) -> int:
    """Measure speed and memory against peers, or against another commit."""
    from flowformer.bench import command

    parser = Parser(prog="flowformer bench", description=main.__doc__, epilog=command.describe())
    command.add_arguments(parser)
    parser.add_argument(
        "--out", type=output_path, metavar="DIR", help="folder to write; by default runs/bench/DATE-TIME", default=None
    )
    values = parser.parse(words)
    values.out = command.default_folder() if values.out is None else values.out
    check_folder(values.out)
    return usable(command.main, values)
