"""Parser and user errors shared by all commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from flowformer.common.errors import RunError, describe
from flowformer.common.names import find_nearest


class UsageError(Exception):
    """Error in a command line; the message states the cause."""


class Parser(argparse.ArgumentParser):
    """``argparse`` without abbreviations; suggests the nearest option for an unknown one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **arguments)

    def error(self, message: str) -> NoReturn:
        """Raise a usage error that refers to ``--help``."""
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse all words; for an unknown option the error suggests the nearest one."""
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
    """Call a function, and raise its ValueError, RunError or OSError as a usage error."""
    try:
        return function(*words, **values)
    except OSError as error:
        raise UsageError(describe(error)) from error
    except (ValueError, RunError) as error:
        raise UsageError(str(error)) from error
