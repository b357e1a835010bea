"""``flowformer evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowformer.cli.arguments.options import fill_options
from flowformer.cli.arguments.parser import Parser, UsageError, usable
from flowformer.cli.arguments.trained import find_run, open_format, open_run, open_with_options, run_arguments
from flowformer.cli.output.streams import show_all, track


def main(words: Sequence[str]) -> int:
    """Evaluate the model of a run on its test set, or in its environment."""
    run = find_run(words)
    if run is not None and _acts(form := open_format(run)):
        return _act(words, run, form)
    parser = Parser(prog="flowformer evaluate", description=main.__doc__)
    run_arguments(parser)
    parser.add_argument("--data", "--data-dir", help="folder of the data, if it was moved", default="")
    parser.add_argument(
        "--data-changed-ok", action="store_true", help="evaluate even if the data is not that of the run"
    )
    return _test(parser.parse(words))


def _acts(form: Any) -> bool:
    from flowformer.tasks.protocols import Acts

    return isinstance(form, Acts)


def _act(words: Sequence[str], run: Path, form: Any) -> int:
    """Run episodes of a policy, whose data is not needed."""
    parser = Parser(prog="flowformer evaluate", description=main.__doc__)
    run_arguments(parser)
    recipe, model, form, options = open_with_options(parser, words, run, form.evaluate_options)
    usable(show_all, form.evaluate(model, fill_options(options, recipe), track=track))
    return 0


def _test(values: argparse.Namespace) -> int:
    """Evaluate on the test set."""
    recipe, model, form = open_run(values.run, values.checkpoint)
    if values.data:
        recipe = _move_data(recipe, values.data, f"{values.run}/recipe.json")

    from flowformer.training.fit import build_task, evaluate
    from flowformer.training.folder import RunFolder

    task, _ = usable(build_task, recipe, RunFolder(values.run), form, data_changed_ok=values.data_changed_ok)
    found = usable(evaluate, recipe, task, model)
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    print(f"test {task.metric}: {task.metric.shown(found[f'test/{task.metric.key}']):.{task.metric.digits}f}")
    return 0


def _move_data(recipe: Any, data: str, written: str) -> Any:
    """The recipe with its data in another folder."""
    named = [field.name for field in dataclasses.fields(recipe) if field.name in ("data", "data_dir")]
    if not named:
        raise UsageError(f"{recipe.name} does not read a data folder; {written} lists what it reads")
    return dataclasses.replace(recipe, **{named[0]: data})
