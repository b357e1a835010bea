"""``flowformer evaluate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flowformer.cli.arguments.parser import Parser, UsageError, usable
from flowformer.cli.arguments.trained import open_run, run_arguments


def main(words: Sequence[str]) -> int:
    """Evaluate the model of a run on its test set."""
    parser = Parser(prog="flowformer evaluate", description=main.__doc__)
    run_arguments(parser)
    parser.add_argument("--data", "--data-dir", help="folder of the data, if it was moved", default="")
    parser.add_argument(
        "--data-changed-ok", action="store_true", help="evaluate even if the data is not that of the run"
    )
    values = parser.parse(words)
    recipe, model, form = open_run(values.run, values.checkpoint)
    if values.data:
        recipe = _move_data(recipe, values.data, f"{values.run}/recipe.json")

    from flowformer.report.tables import show_part
    from flowformer.training.fit import build_task, evaluate, recount
    from flowformer.training.folder import RunFolder

    task, _ = usable(build_task, recipe, RunFolder(values.run), form, data_changed_ok=values.data_changed_ok)
    found = usable(evaluate, recipe, task, model)
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    for part in recount(task).get("parts", ()):
        print(f"test {task.metric}, {part['name']}: {show_part(part, task.metric.digits)}")
    print(f"test {task.metric}: {task.metric.shown(found[f'test/{task.metric.key}']):.{task.metric.digits}f}")
    return 0


def _move_data(recipe: Any, data: str, written: str) -> Any:
    """The recipe with its data in another folder."""
    named = [field.name for field in dataclasses.fields(recipe) if field.name in ("data", "data_dir")]
    if not named:
        raise UsageError(f"{recipe.name} does not read a data folder; {written} lists what it reads")
    return dataclasses.replace(recipe, **{named[0]: data})
