"""Trained runs: find the folder of a run, load it, and check which commands its data format supports."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowformer.cli.arguments.options import add_options, read_options
from flowformer.cli.arguments.parser import Parser, UsageError, usable
from flowformer.cli.output.paths import check_file

CHECKPOINTS = ("last", "best-test", "best-validation")


def run_arguments(parser: Parser) -> None:
    """Add the arguments shared by all commands that use one run."""
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--checkpoint", default="last", choices=CHECKPOINTS, help="which weights")


def is_run(folder: str | Path) -> bool:
    """Return whether a folder contains a run."""
    return (Path(folder) / "recipe.json").exists()


def run_files(folder: Path) -> list[Path]:
    """Return what belongs to a run: files, and the folder of checkpoints."""
    return [folder / name for name in ("recipe.json", "format.json", "metrics.jsonl", "result.json", "checkpoints")]


def find_run(words: Sequence[str]) -> Path | None:
    """Return the first run among the words of a command line; ``None`` if only help is requested.

    Raises:
        UsageError: if there is none, naming the first word that could be meant.
    """
    found = next((word for word in words if not word.startswith("-") and is_run(word)), None)
    if found is not None:
        return Path(found)
    named = [word for word in words if not word.startswith("-")]
    if named and not {"-h", "--help"} & set(words):
        raise UsageError(f"{named[0]} is not the folder of a run: it has no recipe.json")
    return None


def open_recipe(folder: Path) -> Any:
    """Load the recipe of a run.

    Raises:
        UsageError: for a folder that holds no run.
    """
    from flowformer.recipes import read_recipe
    from flowformer.training.folder import RunFolder

    fields = usable(RunFolder(folder).read_fields)
    try:
        return read_recipe(fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / 'recipe.json'} is damaged, or of another version: {error}") from error


def open_format(folder: Path) -> Any:
    """Load the data format of a run, without its model.

    Raises:
        UsageError: for a folder that holds no run, or one that did not start.
    """
    from flowformer.training.folder import RunFolder

    return usable(RunFolder(folder).read_format, open_recipe(folder))


def open_run(folder: Path, checkpoint: str) -> tuple[Any, Any, Any]:
    """Load recipe, model and data format of a run.

    Raises:
        UsageError: for a folder that holds no run, or no such checkpoint.
    """
    from flowformer.training.fit import load

    recipe = open_recipe(folder)
    return recipe, *usable(load, recipe, folder, checkpoint)


def require(folder: Path, form: Any, command: str) -> None:
    """Check that a command applies to a run.

    Raises:
        UsageError: if it does not; the message names the commands that do.
    """
    known = _commands()
    if not isinstance(form, known[command]):
        others = [name for name, protocol in known.items() if isinstance(form, protocol)]
        kind = getattr(form, "kind", type(form).__name__)
        raise UsageError(
            f"`flowformer {command}` does not apply to {folder}, whose data is {kind}; "
            f"available: {', '.join(['evaluate', *others])}"
        )


def _commands() -> Mapping[str, type]:
    """What a command asks of a format."""
    from flowformer.tasks.protocols import Acts, Classifies, Generates, Shows, Tokenizes

    return {
        "predict": Classifies, "generate": Generates, "visualize": Shows, "export": Tokenizes, "play": Acts,
        "collect": Acts,
    }  # fmt: skip


def parser_for(command: str, words: Sequence[str], description: str | None) -> tuple[Parser, Path, Any] | None:
    """Return the parser of a command whose options depend on a run, the run, and its format.

    ``None`` where there is no run: only help was requested, and is printed.

    Raises:
        UsageError: for a run that the command does not apply to.
    """
    run = find_run(words)
    note = f"Options depend on the run: `flowformer {command} RUN --help` shows them."
    parser = Parser(prog=f"flowformer {command}", description=description, epilog=None if run else note)
    run_arguments(parser)
    if run is None:
        parser.parse(words)
        return None
    form = open_format(run)
    require(run, form, command)
    return parser, run, form


def open_with_options(parser: Parser, words: Sequence[str], run: Path, kind: type) -> tuple[Any, Any, Any, Any]:
    """Parse the options of a run, a dataclass, and load its recipe, model and format.

    Returns:
        Recipe, model, format and options. A file to write, ``out``, can be written, and is none of the run's own.

    Raises:
        UsageError: for options that the run does not take, a file that cannot be written, a run that is damaged.
    """
    values = parse_for_run(parser, words, run, add_options(parser, kind))
    options = read_options(values, kind)
    if isinstance(out := getattr(options, "out", None), Path):
        check_file(out, inputs=run_files(values.run))
    return *open_run(values.run, values.checkpoint), options


def parse_for_run(parser: Parser, words: Sequence[str], run: Path, options: Sequence[str]) -> argparse.Namespace:
    """Parse words whose options depend on a run.

    Raises:
        UsageError: for an option that the run does not take; the message names those that it takes.
    """
    values, unknown = parser.parse_known_args(words)
    if unknown:
        flags = ", ".join([word.split("=")[0] for word in unknown if word.startswith("-")] or unknown)
        parser.error(f"{flags} does not apply to {run}; its options are {', '.join(options) or 'none'}")
    return values
