"""``flowformer generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowformer.cli.arguments.options import add_options, read_options
from flowformer.cli.arguments.parser import Parser, usable
from flowformer.cli.arguments.trained import find_run, open_format, open_run, parse_for_run, require, run_arguments
from flowformer.cli.output.paths import check_file
from flowformer.cli.output.streams import show_all, track

NOTE = "Options depend on the run: `flowformer generate RUN --help` shows them."


def main(words: Sequence[str]) -> int:
    """Generate samples with the model of a run: text with a language model, images with a model of images."""
    run = find_run(words)
    parser = Parser(prog="flowformer generate", description=main.__doc__, epilog=None if run else NOTE)
    run_arguments(parser)
    if run is None:
        parser.parse(words)
        return 0
    form = open_format(run)
    require(run, form, "generate")
    flags = add_options(parser, form.generate_options)
    values = parse_for_run(parser, words, run, flags)
    options = read_options(values, form.generate_options)
    if isinstance(out := getattr(options, "out", None), Path):
        check_file(out)
    _, model, form = open_run(values.run, values.checkpoint)
    usable(show_all, form.generate(model, options, track=track))
    return 0
