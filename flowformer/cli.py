"""The command ``flowformer``."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import flowformer

_RUNS = ("lightning", "rich", "safetensors", "matplotlib")  # what training and its pictures want, whatever the data
EXTRAS = {
    "timeseries": (*_RUNS, "aeon", "pandas", "sklearn"),
    "text": (*_RUNS, "transformers", "tokenizers", "accelerate", "pyarrow", "gensim"),
    "vision": (*_RUNS, "PIL", "pyarrow", "timm", "torchvision"),
    "rl": ("lightning", "rich", "gymnasium", "minari"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "bench": ("matplotlib", "rich"),
}


class UsageError(Exception):
    """A command line that cannot be carried out; the message says why."""


class _Parser(argparse.ArgumentParser):
    """Argparse that takes no abbreviations and suggests the nearest option for an unknown one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n`{self.prog} --help` shows what there is.")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse all words; an unknown option is an error that names the nearest."""
        values, unknown = self.parse_known_args(words)
        if not unknown:
            return values
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], options, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return self.error(f"unknown argument {unknown[0]}{hint}")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "") or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if words is None else list(words)
    listed = "\n".join(f"  {name:10} {inspect.getdoc(function)}" for name, function in COMMANDS.items())
    parser = _Parser(
        prog="flowformer",
        description=f"Attention in linear time: train, evaluate and inspect.\n\ncommands:\n{listed}",
        epilog="`flowformer COMMAND --help` tells more of each.",
    )
    parser.add_argument("--version", action="version", version=f"flowformer {flowformer.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those above")
    try:
        if not words or words[0] not in COMMANDS:
            if words and not words[0].startswith("-"):
                near = difflib.get_close_matches(words[0], COMMANDS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                parser.error(f"no command {words[0]!r}{hint} There is {', '.join(COMMANDS)}.")
            parser.parse(words or ["--help"])
        status = COMMANDS[words[0]](words[1:])
        sys.stdout.flush()  # where nobody reads on, say so here
        return status
    except BrokenPipeError:
        # As `flowformer list | head` does. What is left to say goes nowhere, lest closing it fails once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # what the shell makes of SIGPIPE
    except UsageError as error:
        print(f"flowformer: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        needed = [extra for extra, modules in EXTRAS.items() if (error.name or "").split(".")[0] in modules]
        if not needed:
            raise
        print(f"flowformer: {error.name} is not installed: pip install 'flowformer[{needed[0]}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flowformer: interrupted", file=sys.stderr)
        return 130


def _train(words: Sequence[str]) -> int:
    """Run a recipe and write its folder."""
    from flowformer.recipes import find_recipe

    parser = _Parser(
        prog="flowformer train",
        description="Run a recipe. `flowformer list` shows them all; `flowformer train RECIPE --help` one's options.",
    )
    parser.add_argument("recipe", help="name of the recipe, for example uea/JapaneseVowels")
    if words and not words[0].startswith("-"):
        parser = _recipe_parser(words[0], _usable(find_recipe, words[0]))
    values = vars(parser.parse(words))
    name, out, resume = values.pop("recipe"), values.pop("out"), values.pop("resume")
    recipe = _usable(find_recipe(name), **values)
    folder = Path(out) if out else Path("runs") / recipe.name / recipe.label

    from rich.console import Console

    from flowformer.report.tables import protocol_table
    from flowformer.training.fit import train

    console = Console()
    command = shlex.join(["flowformer", "train", *words])
    try:
        result = _usable(train, recipe, folder, resume=resume, command=command, console=console)
    except KeyboardInterrupt:
        again = command if resume else f"{command} --resume"
        print(f"\nInterrupted. To go on from the last checkpoint: {again}", file=sys.stderr)
        return 130
    console.print(protocol_table(result))
    console.print(f"The run is in {folder}", highlight=False, soft_wrap=True)
    return 0


def _recipe_parser(name: str, recipe: Any) -> _Parser:
    described = inspect.getdoc(getattr(recipe, "func", recipe))  # the function that a partial stands for
    parser = _Parser(prog=f"flowformer train {name}", description=described)
    parser.add_argument("recipe", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the run; runs/RECIPE/ATTENTION-seedN if absent", default=""
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, if there is one")
    defaults = recipe()
    for field in dataclasses.fields(defaults):
        if field.name == "name":
            continue
        default = getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        shown = field.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=shown)
        else:
            kind = type(default)
            parser.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=shown)
    return parser


def _usable(function: Any, *words: Any, **values: Any) -> Any:
    """Call a function whose ValueError or RunError is the user's to mend."""
    from flowformer.training.files import RunError

    try:
        return function(*words, **values)
    except (ValueError, RunError) as error:
        raise UsageError(str(error)) from error


def _run_arguments(parser: _Parser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--checkpoint", default="last", help="last, best-test or best-validation")


def _open_run(folder: Path, checkpoint: str) -> tuple[Any, Any, Any]:
    """Recipe, model and data format of a run."""
    from flowformer.recipes import read_recipe
    from flowformer.training.files import read_json
    from flowformer.training.fit import load

    if not (folder / "recipe.json").exists():
        raise UsageError(f"{folder} is no run's folder: it has no recipe.json")
    recipe = _usable(read_recipe, read_json(folder / "recipe.json"))
    return recipe, *_usable(load, recipe, folder, checkpoint)


def _evaluate(words: Sequence[str]) -> int:
    """Measure a run's model on its test set again."""
    parser = _Parser(prog="flowformer evaluate", description=_evaluate.__doc__)
    _run_arguments(parser)
    parser.add_argument("--data", "--data-dir", help="folder of the data, if it has moved", default="")
    values = parser.parse(words)
    recipe, model, _ = _open_run(values.run, values.checkpoint)
    if values.data:
        named = [field.name for field in dataclasses.fields(recipe) if field.name in ("data", "data_dir")]
        if not named:
            raise UsageError(f"{recipe.name} has no folder of data; what it reads is said in {values.run}/recipe.json")
        recipe = dataclasses.replace(recipe, **{named[0]: values.data})

    from flowformer.training.fit import evaluate

    task = _usable(recipe.build_task)
    values = _usable(evaluate, recipe, task, model)
    for name, value in values.items():
        print(f"{name}: {value:.4f}")
    print(f"test {task.metric}: {task.metric.shown(values[f'test/{task.metric.key}']):.{task.metric.digits}f}")
    return 0


def _predict(words: Sequence[str]) -> int:
    """Classify series or pictures with a run's model; CSV to standard output or a file."""
    parser = _Parser(prog="flowformer predict", description=_predict.__doc__)
    _run_arguments(parser)
    files = "series as .ts or as .csv in long form, which need no labels; or pictures, and folders of them"
    parser.add_argument("files", type=Path, nargs="+", metavar="file", help=files)
    parser.add_argument("--out", type=Path, help="file to write", default=None)
    values = parser.parse(words)
    _, model, form = _open_run(values.run, values.checkpoint)

    import csv
    import io

    from flowformer.tasks.images import ImageFormat, classify_files
    from flowformer.tasks.series import SeriesFormat, classify_tables
    from flowformer.training.files import write_whole

    kinds = {SeriesFormat: ("series", classify_tables), ImageFormat: ("picture", classify_files)}
    found = next((kinds[kind] for kind in kinds if isinstance(form, kind)), None)
    if found is None:
        what = type(model).__name__
        raise UsageError(f"{values.run} is no run of a classifier of series or pictures, but of a {what}")
    names, probabilities = _usable(found[1], model, form, values.files)
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
    parser = _Parser(prog="flowformer generate", description=_generate.__doc__)
    _run_arguments(parser)
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
    recipe, model, form = _open_run(values.run, values.checkpoint)

    from flowformer.tasks.density import PixelFormat
    from flowformer.tasks.writing import write

    if isinstance(form, PixelFormat):
        return _draw(values, recipe, model, form)
    _check_text(values.run, model, form)
    _refuse(values, "text", "out", "count")
    prompts = values.prompt or ["\n"]
    pieces = _usable(
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
    images = _usable(
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

    parser = _Parser(prog="flowformer visualize", description=_visualize.__doc__)
    pictures.add_arguments(parser)
    values = parser.parse(words)
    print(_usable(pictures.visualize, values, lambda folder, checkpoint: _open_run(folder, checkpoint)[1:]))
    return 0


def _export(words: Sequence[str]) -> int:
    """Write a run's model for others to use."""
    parser = _Parser(prog="flowformer export", description=_export.__doc__)
    _run_arguments(parser)
    parser.add_argument("--to", choices=["hf"], required=True, help="hf: a folder for Hugging Face's from_pretrained")
    parser.add_argument("--out", type=Path, help="folder to write; RUN/hf if absent", default=None)
    values = parser.parse(words)
    _, model, form = _open_run(values.run, values.checkpoint)

    from flowformer.interop.hf.export import save_run

    _check_text(values.run, model, form)
    folder = values.out or values.run / "hf"
    _usable(save_run, model, form.tokenizer, folder)
    print(f"{folder}: import flowformer.interop.hf, then AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    return 0


def _data(words: Sequence[str]) -> int:
    """Fetch a data set and verify it, or say what there is to fetch."""
    from flowformer.tasks import downloads

    parser = _Parser(prog="flowformer data", description=_data.__doc__)
    parser.add_argument("name", nargs="?", help="data set to fetch; none lists them", default="")
    parser.add_argument("--dir", type=Path, help="folder to put it in; where recipes look if absent", default=None)
    values = parser.parse(words)
    if not values.name:
        for dataset in downloads.DATASETS.values():
            print(f"{dataset.name:10} {dataset.title}, {dataset.size_bytes:,} bytes from {dataset.addresses[0]}")
        return 0

    from rich.console import Console

    _usable(downloads.fetch, values.name, values.dir, console=Console())
    return 0


def _bench(words: Sequence[str]) -> int:
    """Measure speed and memory against peers, or against another commit."""
    from flowformer.bench import command

    parser = _Parser(prog="flowformer bench", description=_bench.__doc__, epilog=command.describe())
    command.add_arguments(parser)
    return _usable(command.main, parser.parse(words))


def _list(words: Sequence[str]) -> int:
    """Show recipes, models and attention mechanisms."""
    from flowformer.recipes import list_recipes

    parser = _Parser(prog="flowformer list", description=_list.__doc__)
    parser.parse(words)
    for title, names in (
        ("Recipes (flowformer train NAME)", list_recipes()),
        ("Models (flowformer.create_model(NAME, ...))", flowformer.list_models()),
        ("Attention (flowformer.create_attention(NAME, ...), --attention NAME)", flowformer.list_attentions()),
    ):
        print(title)
        for name in names:
            print(f"  {name}")
    return 0


def _info(words: Sequence[str]) -> int:
    """Describe a recipe, a model or an attention mechanism."""
    from flowformer.models.registry import find_model
    from flowformer.recipes import find_recipe, list_recipes

    parser = _Parser(prog="flowformer info", description=_info.__doc__)
    parser.add_argument("name", help="a name that `flowformer list` shows")
    name = parser.parse(words).name
    if name in flowformer.list_attentions():
        _info_attention(name)
    elif name in flowformer.list_models():
        print(f"{name}\n\n{inspect.getdoc(find_model(name))}")
    elif name in list_recipes():
        _info_recipe(name, find_recipe(name))
    else:
        known = [*flowformer.list_attentions(), *flowformer.list_models(), *list_recipes()]
        near = difflib.get_close_matches(name, known, 1)
        parser.error(f"nothing is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return 0


def _info_attention(name: str) -> None:
    from flowformer.attention import find_attention

    row = find_attention(name)
    print(f"{name}: {row.module.__name__}\n\n{inspect.getdoc(row.module)}\n")
    print(f"Time: {row.complexity}; memory {'linear' if row.linear else 'not linear'} in length\nSource: {row.source}")


def _info_recipe(name: str, function: Any) -> None:
    print(f"{name}: {inspect.getdoc(getattr(function, 'func', function))}\n")
    recipe = function()
    for field in dataclasses.fields(recipe):
        print(f"  {field.name:20} {getattr(recipe, field.name)!r:14} {field.metadata['help']}")
    published = recipe.published_table()
    if published is not None:
        figure, values = published
        print(f"\nPublished {figure}:")
        for method, value in values.items():
            print(f"  {method:22} {value:g}")


def _doctor(words: Sequence[str]) -> int:
    """Show what is installed here, and what would run."""
    import torch

    from flowformer.ops import backend

    _Parser(prog="flowformer doctor", description=_doctor.__doc__).parse(words)
    chosen, why = _usable(backend.choose_and_say_why, "flow_attention")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows = {
        "flowformer": f"{flowformer.__version__} in {Path(flowformer.__file__).parent}",
        "python": f"{platform.python_version()} in {sys.prefix}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs",
        "GPUs": ", ".join(gpus) or "none",
        "backend": f"{chosen}: {why}",
    }
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        install = f"missing {', '.join(missing)}: pip install 'flowformer[{extra}]'"
        rows[f"extra {extra}"] = install if missing else "installed"
    for name, value in rows.items():
        print(f"{name:18} {value}")
    return 0


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "generate": _generate,
    "visualize": _visualize,
    "export": _export,
    "data": _data,
    "bench": _bench,
    "list": _list,
    "info": _info,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
