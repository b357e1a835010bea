"""``flowformer generate``."""

from __future__ import annotations

from collections.abc import Sequence

from flowformer.cli.arguments.parser import usable
from flowformer.cli.arguments.trained import open_with_options, parser_for
from flowformer.cli.output.streams import show_all, track


def main(words: Sequence[str]) -> int:
    """Generate samples with the model of a run: text with a language model, images with a model of images."""
    found = parser_for("generate", words, main.__doc__)
    if found is None:
        return 0
    parser, run, form = found
    _, model, form, options = open_with_options(parser, words, run, form.generate_options)
    usable(show_all, form.generate(model, options, track=track))
    return 0
