"""Options of a command from the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from flowformer.cli.arguments.options import add_options, read_options
from flowformer.cli.arguments.parser import Parser, UsageError
from flowformer.common.fields import option


@dataclass(frozen=True, kw_only=True)
class Everything:
    text: str | None = option(None, "a text")
    top_k: int = option(5, "a count")
    share: float | None = option(None, "a share")
    out: Path | None = option(None, "a file")
    stop: tuple[str, ...] = option((), "texts")
    flip: bool = option(True, "a switch")


def parse(*words: str) -> Everything:
    parser = Parser(prog="x")
    assert add_options(parser, Everything) == ["--text", "--top-k", "--share", "--out", "--stop", "--flip"]
    return read_options(parser.parse(words), Everything)


def test_fields_keep_their_defaults():
    assert parse() == Everything()


def test_values_have_the_types_of_their_fields():
    words = [
        "--text",
        "a",
        "--top-k",
        "3",
        "--share",
        "0.5",
        "--out",
        "b.png",
        "--stop",
        "x",
        "--stop",
        "y",
        "--no-flip",
    ]
    assert parse(*words) == Everything(text="a", top_k=3, share=0.5, out=Path("b.png"), stop=("x", "y"), flip=False)


def test_value_of_another_type_is_refused():
    with pytest.raises(UsageError, match="expects a whole number, got 'many'"):
        parse("--top-k", "many")
