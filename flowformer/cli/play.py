"""``flowformer play``."""

from __future__ import annotations

from collections.abc import Sequence

from flowformer.cli.arguments.options import fill_options
from flowformer.cli.arguments.parser import usable
from flowformer.cli.arguments.trained import open_with_options, parser_for
from flowformer.cli.output.streams import show_all, track


def main(words: Sequence[str]) -> int:
    """Film an episode of the model of a run in its environment."""
    found = parser_for("play", words, main.__doc__)
    if found is None:
        return 0
    parser, run, form = found
    recipe, model, form, options = open_with_options(parser, words, run, form.play_options)
    usable(show_all, form.play(model, fill_options(options, recipe), track=track))
    return 0
