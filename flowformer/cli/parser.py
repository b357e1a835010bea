"""What commands share: their parser, errors that are the user's to mend, and opening the folder of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flowformer.common.errors import RunError
from flowformer.common.names import find_nearest


class UsageError(Exception):
    """A command line that cannot be carried out; the message says why."""


class Parser(argparse.ArgumentParser):
    """Argparse that takes no abbreviations and suggests the nearest option for an unknown one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **arguments)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, with where to look."""
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse all words; an unknown option is an error that names the nearest."""
        values, unknown = self.parse_known_args(words)
        if not unknown:
            return values
        options = [option for action in self._actions for option in action.option_strings]
        near = find_nearest(unknown[0].split("=")[0], options)
        hint = f" (did you mean {near}?)" if near else ""
        return self.error(f"unknown argument {unknown[0]}{hint}")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "") or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def usable(function: Any, *words: Any, **values: Any) -> Any:
    """Call a function whose ValueError or RunError is the user's to mend."""
    try:
        return function(*words, **values)
    except (ValueError, RunError) as error:
        raise UsageError(str(error)) from error


def run_arguments(parser: Parser) -> None:
    """Add what every command takes that uses a run."""
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--checkpoint", default="last", help="last, best-test or best-validation")


def open_run(folder: Path, checkpoint: str) -> tuple[Any, Any, Any]:
    """Recipe, model and data format of a run."""
    from flowformer.common.files import read_json
    from flowformer.recipes import read_recipe
    from flowformer.training.fit import load

    if not (folder / "recipe.json").exists():
        raise UsageError(f"{folder} is no run's folder: it has no recipe.json")
    recipe = usable(read_recipe, read_json(folder / "recipe.json"))
    return recipe, *usable(load, recipe, folder, checkpoint)
