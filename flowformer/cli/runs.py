"""Commands that use a run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flowformer.cli.parser import Parser, UsageError, open_run, run_arguments, usable


def _evaluate(words: Sequence[str]) -> int:
    """Measure a run's model on its test set again."""
    parser = Parser(prog="flowformer evaluate", description=_evaluate.__doc__)
    run_arguments(parser)
    parser.add_argument("--data", "--data-dir", help="folder of the data, if it has moved", default="")
    values = parser.parse(words)
    recipe, model, _ = open_run(values.run, values.checkpoint)
    if values.data:
        named = [field.name for field in dataclasses.fields(recipe) if field.name in ("data", "data_dir")]
        if not named:
            raise UsageError(f"{recipe.name} has no folder of data; what it reads is said in {values.run}/recipe.json")
        recipe = dataclasses.replace(recipe, **{named[0]: values.data})

    from flowformer.training.fit import evaluate

    task = usable(recipe.build_task)
    values = usable(evaluate, recipe, task, model)
    for name, value in values.items():
        print(f"{name}: {value:.4f}")
    print(f"test {task.metric}: {task.metric.shown(values[f'test/{task.metric.key}']):.{task.metric.digits}f}")
    return 0


def _predict(words: Sequence[str]) -> int:
    """Classify series or pictures with a run's model; CSV to standard output or a file."""
    parser = Parser(prog="flowformer predict", description=_predict.__doc__)
    run_arguments(parser)
    files = "series as .ts or as .csv in long form, which need no labels; or pictures, and folders of them"
    parser.add_argument("files", type=Path, nargs="+", metavar="file", help=files)
    parser.add_argument("--out", type=Path, help="file to write", default=None)
    values = parser.parse(words)
    _, model, form = open_run(values.run, values.checkpoint)

    import csv
    import io

    from flowformer.common.files import write_whole
    from flowformer.tasks.images import ImageFormat, classify_files
    from flowformer.tasks.series import SeriesFormat, classify_tables

    kinds = {SeriesFormat: ("series", classify_tables), ImageFormat: ("picture", classify_files)}
    found = next((kinds[kind] for kind in kinds if isinstance(form, kind)), None)
    if found is None:
        what = type(model).__name__
        raise UsageError(f"{values.run} is no run of a classifier of series or pictures, but of a {what}")
    names, probabilities = usable(found[1], model, form, values.files)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([found[0], "label", *(f"p_{name}" for name in form.classes)])
    for name, row in zip(names, probabilities, strict=True):
        writer.writerow([name, form.classes[int(row.argmax())], *(f"{value:.6f}" for value in row)])
    if values.out is None:
        print(text.getvalue(), end="")
    else:
        write_whole(values.out, text.getvalue())
        print(f"{len(names)} predictions in {values.out}")
    return 0


def _generate(words: Sequence[str]) -> int:
    """Let a run's language model go on from prompts, as it writes; or draw images with a model of those."""
    parser = Parser(prog="flowformer generate", description=_generate.__doc__)
    run_arguments(parser)
    parser.add_argument("--prompt", action="append", help="text to go on from; more than one may be given", default=[])
    parser.add_argument("--tokens", type=int, help="tokens to write for each prompt, at most; 200 if absent")
    parser.add_argument("--out", type=Path, help="PNG file for images")
    parser.add_argument("--count", type=int, help="images to draw; 16 if absent")
    parser.add_argument(
        "--temperature", type=float, help="0 always takes the likeliest token; 0.8 for text and 1 for images if absent"
    )
    parser.add_argument("--top-k", type=int, help="choose among so many likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest tokens of this probability together")
    parser.add_argument("--seed", type=int, help="of the random numbers; another each time if absent")
    parser.add_argument("--stop", action="append", help="text to end before; more than one may be given", default=[])
    values = parser.parse(words)
    recipe, model, form = open_run(values.run, values.checkpoint)

    from flowformer.tasks.density import PixelFormat
    from flowformer.tasks.writing import write

    if isinstance(form, PixelFormat):
        return _draw(values, recipe, model, form)
    _check_text(values.run, model, form)
    _refuse(values, "text", "out", "count")
    prompts = values.prompt or ["\n"]
    pieces = usable(
        write, model, form.tokenizer, prompts, stop=values.stop,
        max_tokens=200 if values.tokens is None else values.tokens,
        temperature=0.8 if values.temperature is None else values.temperature,
        top_k=values.top_k, top_p=values.top_p, seed=values.seed,
    )  # fmt: skip
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for _, text in pieces:
            print(text, end="", flush=True)
        print()
        return 0
    texts = list(prompts)  # rows are written together: each is shown when it is whole
    for row, text in pieces:
        texts[row] += text
    print("\n---\n".join(texts))
    return 0


def _draw(values: argparse.Namespace, recipe: Any, model: Any, form: Any) -> int:
    import PIL  # noqa: F401 - if it is missing, say so before the images are drawn
    from rich.console import Console
    from rich.progress import track

    from flowformer.attention import find_attention
    from flowformer.tasks.density import sample, write_grid

    _refuse(values, "images", "prompt", "tokens", "stop")
    if values.out is None or values.out.suffix.lower() != ".png" or values.out.is_dir():
        raise UsageError(f"images want --out FILE.png, got {values.out}")
    if not find_attention(recipe.attention).fixed_state:
        print(f"{recipe.attention} remembers every sub-pixel: memory grows with each that is drawn", file=sys.stderr)
    watch = partial(track, total=form.length, description="sub-pixels", console=Console(stderr=True))
    images = usable(
        sample, model, form, 16 if values.count is None else values.count, watch=watch, seed=values.seed,
        temperature=1.0 if values.temperature is None else values.temperature, top_k=values.top_k, top_p=values.top_p,
    )  # fmt: skip
    write_grid(images, form.levels, values.out, scale=max(1, 64 // form.height))
    print(f"{len(images)} images in {values.out}")
    return 0


def _refuse(values: argparse.Namespace, kind: str, *names: str) -> None:
    """Refuse options that mean nothing to a model of this kind."""
    given = [f"--{name}" for name in names if getattr(values, name) not in (None, [])]
    if given:
        raise UsageError(f"{values.run} is the run of a model of {kind}: nothing to do for {', '.join(given)}")


def _check_text(run: Path, model: Any, form: Any) -> None:
    from flowformer.tasks.text import TextFormat

    if not isinstance(form, TextFormat):
        what = f"{type(model).__name__} ({type(form).__name__})"
        raise UsageError(f"{run} is no run of a language model, but of a {what}")


def _visualize(words: Sequence[str]) -> int:
    """Picture what runs attend to: over an image, a series or a text."""
    from flowformer.report import pictures

    parser = Parser(prog="flowformer visualize", description=_visualize.__doc__)
    pictures.add_arguments(parser)
    values = parser.parse(words)
    print(usable(pictures.visualize, values, lambda folder, checkpoint: open_run(folder, checkpoint)[1:]))
    return 0


def _export(words: Sequence[str]) -> int:
    """Write a run's model for others to use."""
    parser = Parser(prog="flowformer export", description=_export.__doc__)
    run_arguments(parser)
    parser.add_argument("--to", choices=["hf"], required=True, help="hf: a folder for Hugging Face's from_pretrained")
    parser.add_argument("--out", type=Path, help="folder to write; RUN/hf if absent", default=None)
    values = parser.parse(words)
    _, model, form = open_run(values.run, values.checkpoint)

    from flowformer.interop.hf.export import save_run

    _check_text(values.run, model, form)
    folder = values.out or values.run / "hf"
    usable(save_run, model, form.tokenizer, folder)
    print(f"{folder}: import flowformer.interop.hf, then AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    return 0


COMMANDS = {
    "evaluate": _evaluate,
    "predict": _predict,
    "generate": _generate,
    "visualize": _visualize,
    "export": _export,
}
