"""``flowformer predict``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowformer.cli.arguments.parser import Parser, usable
from flowformer.cli.arguments.trained import open_run, require, run_arguments, run_files
from flowformer.cli.output.paths import check_file, output_path
from flowformer.cli.output.streams import show


def main(words: Sequence[str]) -> int:
    """Classify files with the model of a run; writes CSV to standard output or a file."""
    parser = Parser(prog="flowformer predict", description=main.__doc__)
    run_arguments(parser)
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="file", help="files of the same kind as the training data"
    )
    parser.add_argument("--out", type=output_path, metavar="FILE", help="file to write", default=None)
    values = parser.parse(words)
    if values.out is not None:
        check_file(values.out, inputs=(*run_files(values.run), *values.files))
    _, model, form = open_run(values.run, values.checkpoint)
    require(values.run, form, "predict")
    names, probabilities = usable(form.classify_files, model, values.files)
    text = to_csv(form, names, probabilities)
    if values.out is None:
        show(text, end="")
        return 0

    from flowformer.common.files import write_whole

    usable(write_whole, values.out, text)
    show(f"{len(names)} predictions in {values.out}")
    return 0


def to_csv(form: Any, names: Sequence[str], probabilities: Any) -> str:
    """Predictions as CSV: name, most probable label, and the probability of each class.

    Args:
        form: A :class:`flowformer.tasks.protocols.Classifies`.
        names: Names of the examples.
        probabilities: (n, classes).
    """
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([form.item, "label", *(f"p_{name}" for name in form.classes)])
    for name, row in zip(names, probabilities, strict=True):
        writer.writerow([name, form.classes[int(row.argmax())], *(f"{value:.6f}" for value in row)])
    return text.getvalue()
