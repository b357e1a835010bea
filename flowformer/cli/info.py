"""``flowformer info``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from flowformer.cli.arguments.parser import Parser
from flowformer.common.names import nearest


def main(words: Sequence[str]) -> int:
    """Describe a recipe, a model or an attention mechanism."""
    parser = Parser(prog="flowformer info", description=main.__doc__)
    parser.add_argument("name", help="a name that `flowformer list` shows")
    name = parser.parse(words).name

    import flowformer
    from flowformer.models.registry import find_model
    from flowformer.recipes import find_recipe, list_recipes

    if name in flowformer.list_attentions():
        _describe_attention(name)
    elif name in flowformer.list_models():
        print(f"{name}\n\n{inspect.getdoc(find_model(name))}")
    elif name in list_recipes():
        _describe_recipe(name, find_recipe(name))
    else:
        known = [*flowformer.list_attentions(), *flowformer.list_models(), *list_recipes()]
        parser.error(f"no recipe, model or attention {name!r}{nearest(name, known)}")
    return 0


def _describe_attention(name: str) -> None:
    from flowformer.mechanisms import LIMITS, find_attention

    row = find_attention(name)
    print(f"{name}: {row.module.__name__}\n\n{inspect.getdoc(row.module)}\n")
    print(f"Time: {row.cost}\nSource: {row.source}")
    for limit, reason in row.cannot.items():
        print(f"No {LIMITS[limit]}: {reason}")


def _describe_recipe(name: str, function: Any) -> None:
    from flowformer.common.fields import options_of

    print(f"{name}: {inspect.getdoc(getattr(function, 'func', function))}\n")
    recipe = function()
    for option in options_of(type(recipe)).values():
        print(f"  {option.name:20} {getattr(recipe, option.name)!r:14} {option.help}")
    published = recipe.published_table()
    if published is not None:
        figure, values = published
        print(f"\nPublished {figure}:")
        for method, value in values.items():
            print(f"  {method:22} {value:g}")
