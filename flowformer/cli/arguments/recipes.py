"""Options of a recipe on the command line and in YAML or JSON files, parsed by jsonargparse.

A field of a recipe is an option by its own name, ``--learning-rate``; its type, choices, range, group and help come
from :mod:`flowformer.common.fields`. ``null`` stands for ``None``. An option of the mechanism is written
``--attention-options.NAME VALUE``, its value as in YAML.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from flowformer.cli.arguments.parser import UsageError, usable
from flowformer.cli.output.paths import check_folder
from flowformer.common.fields import GROUPS, Option, check_names, options_of
from flowformer.common.files import check_regular
from flowformer.common.names import find_nearest, nearest
from flowformer.recipes.registry import check_given, find_recipe
from flowformer.training.recipe import Recipe

_METAVARS: Mapping[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", dict: "MAPPING"}
_MECHANISM = "--attention-options"
_DEEPEST = 20  # levels of a file of options


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed ``flowformer train`` command.

    Attributes:
        recipe: What to run.
        folder: The folder of the run.
        resume: Whether to continue the run in the folder.
        data_changed_ok: Whether to continue it on other data than that it began with.
    """

    recipe: Recipe
    folder: Path
    resume: bool
    data_changed_ok: bool


def read_command(name: str, words: Sequence[str]) -> Command:
    """Parse the words after ``flowformer train NAME``.

    Values are taken from the recipe, then from the file of ``--config``, then from the other options.

    Raises:
        UsageError: for an unknown recipe or option, or a value that an option does not take.
    """
    function = usable(find_recipe, name)
    given = _parser(name, function).parse(words)
    folder, resume, changed, path = (given.pop(key, None) for key in ("out", "resume", "data_changed_ok", "config"))
    config = {} if path is None else _read_config(name, function, path)
    recipe = usable(_resolve, function, config, given, whole=_gives_mapping(words))
    folder = folder or Path("runs") / recipe.name / recipe.label
    if not (resume and (folder / "result.json").is_file()):  # a complete run is only shown
        check_folder(folder)
    return Command(recipe, folder, bool(resume), bool(changed))


def _resolve(function: Callable[..., Recipe], config: dict[str, Any], given: dict[str, Any], *, whole: bool) -> Recipe:
    """The recipe with the fields of a file, and over them those of the command line.

    Options of a mechanism go with it: naming another mechanism drops those of the file, as recipes drop their own.
    Single options of the command line are added to those that are there.
    """
    if "attention" in given and given["attention"] != config.get("attention", getattr(function(), "attention", None)):
        config = {key: value for key, value in config.items() if key != "attention_options"}
    single = {} if whole else given.pop("attention_options", {})
    check_names(type(function()), {**config, **given})
    recipe = function(**{**config, **given})
    if single:
        merged = {**recipe.attention_options, **single}  # pyright: ignore[reportAttributeAccessIssue] - it has the option
        recipe = function(**{**config, **given, "attention_options": merged})
    # A file may have all fields, as the recipe.json of a run: those that the recipe has by itself are not given.
    own = function()
    check_given(recipe, [*given, *(name for name in config if getattr(recipe, name) != getattr(own, name))])
    return recipe


def _gives_mapping(words: Sequence[str]) -> bool:
    return any(word.split("=")[0] == _MECHANISM for word in words)


def _read_config(name: str, function: Callable[..., Recipe], path: Path) -> dict[str, Any]:
    parser = _ConfigParser(path, type(function()))
    parser.add_argument("--name", type=str)
    _add_options(parser, function())
    values = parser.read()
    if values.pop("name", name) != name:
        written = parser.read()["name"]
        raise UsageError(f"{path} contains options of the recipe {written}, not of {name}")
    return values


class _Parser(jsonargparse.ArgumentParser):
    """Turns every error into a UsageError of one line."""

    def __init__(self, kind: type[Recipe], **arguments: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **arguments)
        self.fields = options_of(kind)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong, in the words of the recipe's fields where it is about one of them."""
        raise UsageError(self.explain(message)) from ex

    def explain(self, message: str) -> str:
        """One line for a message of jsonargparse."""
        named = re.match(r'Parser key "(\w+)', message)
        value = re.search(r"(?:Got|Given) value: (.*)", message)
        if named and value and named[1] in self.fields:
            return str(self.fields[named[1]].refuse(_literal(value[1])))
        return " ".join(message.split())


class _CommandParser(_Parser):
    """Reads the words of a command."""

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of the options that are given."""
        if any(word == "" or re.fullmatch(r"--[^=]*=", word) for word in words):
            self.error("an option has an empty value: write null for None")
        if any(re.fullmatch(r"(--[^=]*=)?None", word) for word in words):
            self.error("an option has the value None: write null for None")
        if sum(word.split("=")[0] == "--config" for word in words) > 1:
            self.error("--config is given more than once: put all fields into one file")
        return vars(self.parse_args(list(words), defaults=False))

    def explain(self, message: str) -> str:
        """One line for a message of jsonargparse, with a hint for an unknown option."""
        unknown = re.match(r"[Uu]nrecognized arguments: (\S+)", message)
        if unknown:
            message = f"unknown argument {unknown[1]}{self._hint(unknown[1])}"
        return f"{super().explain(message)}; see `{self.prog} --help`"

    def _hint(self, word: str) -> str:
        option, dot, rest = word.split("=")[0].partition(".")
        near = find_nearest(option, [known for action in self._actions for known in action.option_strings])
        return f" (did you mean {near}{dot}{rest}?)" if near else ""


class _ConfigParser(_Parser):
    """Reads a file."""

    def __init__(self, path: Path, kind: type[Recipe]) -> None:
        super().__init__(kind)
        self.path = path

    def read(self) -> dict[str, Any]:
        """The values that the file has."""
        usable(check_regular, self.path)
        _check_yaml(self.path)
        try:
            return vars(self.parse_path(str(self.path), defaults=False))
        except (OSError, UnicodeError) as error:
            raise UsageError(f"{self.path} cannot be read: {error}") from error

    def explain(self, message: str) -> str:
        """One line for a message of jsonargparse, with a hint for an unknown field."""
        if message.startswith("Unexpected config"):
            message = "expected a mapping from fields of the recipe to their values"
        unknown = re.match(r"Option '([^']*)' is not accepted", message)
        if unknown:
            message = f"unknown field {unknown[1]!r}{nearest(unknown[1], self.fields)}"
        return f"{self.path}: {super().explain(message)}"


def _check_yaml(path: Path) -> None:
    """Raise for YAML that takes any amount of memory or time: aliases, and deep nesting."""
    depth = 0
    with contextlib.suppress(yaml.YAMLError, OSError, UnicodeError), path.open("rb") as file:  # reported later
        for token in yaml.scan(file, Loader=yaml.SafeLoader):
            name = type(token).__name__
            depth += ("Start" in name and name != "StreamStartToken") - ("End" in name and name != "StreamEndToken")
            if isinstance(token, yaml.AliasToken) or depth > _DEEPEST:
                what = "aliases of YAML are" if depth <= _DEEPEST else f"nesting of more than {_DEEPEST} levels is"
                raise UsageError(f"{path}, line {token.start_mark.line + 1}: {what} not supported")


def _literal(text: str) -> Any:
    """A value as Python writes it; words stay words."""
    return {"None": None, "True": True, "False": False}.get(text, text)


def _parser(name: str, function: Callable[..., Recipe]) -> _CommandParser:
    """The parser of ``flowformer train NAME``."""
    defaults = function()
    described = inspect.getdoc(getattr(function, "func", function))  # the function that a partial stands for
    parser = _CommandParser(
        type(defaults), prog=f"flowformer train {name}", usage=f"flowformer train {name} [option ...]",
        description=described, epilog="null stands for None. `flowformer info NAME` describes a mechanism.",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument(
        "--config", type=Path, metavar="FILE",
        help="YAML or JSON file with fields of the recipe, for example the recipe.json of a run",
    )  # fmt: skip
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (default: runs/RECIPE/ATTENTION-seedN, or seedN)"
    )
    run.add_argument("--resume", action="store_true", help="continue the run in the folder, if there is one")
    run.add_argument(
        "--data-changed-ok", action="store_true", help="continue the run even if the data is not that it began with"
    )
    _add_options(parser, defaults)
    return parser


def _add_options(parser: _Parser, defaults: Recipe) -> None:
    for heading in GROUPS:
        members = [one for one in parser.fields.values() if one.group == heading]
        if members:
            group = parser.add_argument_group(heading)
            for one in members:
                _add_option(group, one, getattr(defaults, one.name))


def _add_option(group: Any, one: Option, default: Any) -> None:
    flag, allowed = "--" + one.name.replace("_", "-"), str(one.allowed)
    notes = "; ".join([*([allowed] if allowed else []), f"default: {_show(default)}"])
    text = f"{one.help} ({notes})".replace("%", "%%")
    if one.type is bool:
        action = jsonargparse.ActionYesNo(yes_prefix="", no_prefix="no-")
        group.add_argument(flag, action=action, default=default, help=text)
        return
    kind = "{" + ",".join(one.choices) + "}" if one.choices else _METAVARS[one.type]
    if one.type is dict:
        text = text.replace(" (", f", each as {flag}.NAME VALUE (", 1)
    metavar = f"{kind}|null" if one.optional else kind
    group.add_argument(flag, type=one.hint, default=default, metavar=metavar, help=text)


def _show(value: Any) -> str:
    """A value as it is written on the command line."""
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **arguments: Any) -> None:
        super().__init__(prog, **{**arguments, "max_help_position": 36, "width": 110})
