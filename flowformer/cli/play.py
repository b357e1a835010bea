"""``flowformer play``."""

from __future__ import annotations

from collections.abc import Sequence

from flowformer.cli.arguments.options import add_options, fill_options, read_options
from flowformer.cli.arguments.parser import Parser, usable
from flowformer.cli.arguments.trained import (
    find_run,
    open_format,
    open_run,
    parse_for_run,
    require,
    run_arguments,
    run_files,
)
from flowformer.cli.output.paths import check_file
from flowformer.cli.output.streams import show_all, track

NOTE = "Options depend on the run: `flowformer play RUN --help` shows them."


def main(words: Sequence[str]) -> int:
    """Film an episode of the model of a run in its environment."""
    run = find_run(words)
    parser = Parser(prog="flowformer play", description=main.__doc__, epilog=None if run else NOTE)
    run_arguments(parser)
    if run is None:
        parser.parse(words)
        return 0
    form = open_format(run)
    require(run, form, "play")
    flags = add_options(parser, form.play_options)
    values = parse_for_run(parser, words, run, flags)
    options = read_options(values, form.play_options)
    check_file(options.out, inputs=run_files(values.run))
    recipe, model, form = open_run(values.run, values.checkpoint)
    options = fill_options(options, recipe)
    usable(show_all, form.play(model, options, track=track))
    return 0
