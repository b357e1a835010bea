"""Commands that measure and describe."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flowformer
from flowformer.cli.parser import Parser, usable
from flowformer.common.names import nearest

_RUNS = ("lightning", "rich", "safetensors", "matplotlib")  # what training and its pictures want, whatever the data
EXTRAS = {
    "timeseries": (*_RUNS, "aeon", "pandas", "sklearn"),
    "text": (*_RUNS, "transformers", "tokenizers", "accelerate", "pyarrow", "gensim"),
    "vision": (*_RUNS, "PIL", "pyarrow", "sklearn", "timm", "torchvision"),
    "rl": ("lightning", "rich", "gymnasium", "minari"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "bench": ("matplotlib", "rich"),
}


def _bench(words: Sequence[str]) -> int:
    """Measure speed and memory against peers, or against another commit."""
    from flowformer.bench import command

    parser = Parser(prog="flowformer bench", description=_bench.__doc__, epilog=command.describe())
    command.add_arguments(parser)
    return usable(command.main, parser.parse(words))


def _list(words: Sequence[str]) -> int:
    """Show recipes, models and attention mechanisms."""
    from flowformer.recipes import list_recipes

    parser = Parser(prog="flowformer list", description=_list.__doc__)
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

    parser = Parser(prog="flowformer info", description=_info.__doc__)
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
        parser.error(f"nothing is called {name!r}{nearest(name, known)}")
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

    Parser(prog="flowformer doctor", description=_doctor.__doc__).parse(words)
    chosen, why = usable(backend.choose_and_say_why, "flow_attention")
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
    "bench": _bench,
    "list": _list,
    "info": _info,
    "doctor": _doctor,
}
