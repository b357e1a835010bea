"""``flowformer visualize``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowformer.cli.arguments.options import add_options, read_options
from flowformer.cli.arguments.parser import Parser, UsageError, usable
from flowformer.cli.arguments.trained import (
    CHECKPOINTS,
    find_run,
    is_run,
    open_format,
    open_run,
    parse_for_run,
    require,
    run_files,
)
from flowformer.cli.output.paths import check_file, output_path
from flowformer.cli.output.streams import show

NOTE = "Further options depend on the run: `flowformer visualize RUN --help` shows them."


def main(words: Sequence[str]) -> int:
    """Plot the attention maps of one or more runs for an example from a file."""
    from flowformer.report import drawing

    run = find_run(words)
    parser = Parser(prog="flowformer visualize", description=main.__doc__, epilog=None if run else NOTE)
    flags = _add_arguments(parser)
    if run is None:
        parser.parse(words)
        raise UsageError("expected RUN ... FILE: one run or more, and the file to visualize")
    form = open_format(run)
    require(run, form, "visualize")
    flags += add_options(parser, form.show_options)
    values = parse_for_run(parser, words, run, flags)
    usable(drawing.check_path, values.out)
    runs, file = _split(values.paths)
    check_file(values.out, inputs=[*(one for folder in runs for one in run_files(folder)), *([file] if file else [])])
    scenes = _scenes(runs, file, values, form.show_options)
    usable(drawing.write, scenes, values.out)
    strips = sum(len(scene.strips) for scene in scenes)
    show(f"{strips} strips of {', '.join(scene.title for scene in scenes)} in {values.out}")
    return 0


def _add_arguments(parser: Parser) -> list[str]:
    """Add what applies to every run; returns the options."""
    parser.usage = "%(prog)s RUN [RUN ...] [FILE] --out PICTURE [options]"
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="RUN FILE", help="folders of runs, and the file to visualize")
    actions = [
        add("--out", type=output_path, metavar="FILE", required=True, help="figure to write: .png, .pdf or .svg"),
        add("--checkpoint", default="last", choices=CHECKPOINTS, help="which weights"),
        add("--at", action="append", metavar="PLACE", help=(
            "position of the query; may be repeated: ROW,COLUMN of an image, else a step or token; whole numbers count "
            "from 0 (pixels of the preprocessed image), fractions are relative; 'class' is the class token"
        )),
        add("--layer", action="append", type=int, help="layer to show, from 0; may be repeated (default: all)"),
        add("--head", action="append", help="head to show, from 0, or mean; may be repeated (default: all)"),
        add("--flows", action="store_true", help="also show the flows of Flow-Attention and Mobile-Attention"),
    ]  # fmt: skip
    return [action.option_strings[0] for action in actions]


def _split(paths: Sequence[Path]) -> tuple[list[Path], Path | None]:
    """The runs, and the file after them if there is one."""
    runs = [path for path in paths if is_run(path)]
    others = [path for path in paths if not is_run(path)]
    if len(others) > 1:
        raise UsageError(f"{others[0]} is not the folder of a run: it has no recipe.json")
    if others and paths[-1] != others[0]:
        raise UsageError(f"expected RUN ... FILE: the file {others[0]} must come after the runs")
    return runs, others[0] if others else None


def _scenes(runs: Sequence[Path], file: Path | None, values: argparse.Namespace, kind: type) -> list[Any]:
    """One scene for each run; those of one title are told apart by their folders."""
    from flowformer.tasks.scenes import has_flows

    view, scenes = usable(_view, values), []
    for run in runs:
        _, model, form = open_run(run, values.checkpoint)
        require(run, form, "visualize")
        if form.show_options is not kind:
            raise UsageError("all runs must use the same kind of data: images, series or text")
        scenes.append(usable(form.show, model, file, read_options(values, kind), view))
    if view.flows and not any(map(has_flows, scenes)):
        raise UsageError("--flows requires Flow-Attention or Mobile-Attention: other mechanisms have no flows")
    titles = [scene.title for scene in scenes]
    return [
        scene._replace(title=f"{scene.title}: {run}") if titles.count(scene.title) > 1 else scene
        for scene, run in zip(scenes, runs, strict=True)
    ]


def _view(values: argparse.Namespace) -> Any:
    from flowformer.tasks.scenes import View, parse_point

    return View(
        tuple(parse_point(text) for text in values.at or ()),
        tuple(values.layer or ()),
        tuple(int(head) if head.isdigit() else head for head in values.head or ()),
        values.flows,
    )
