"""The command ``flowformer``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence

import flowformer
from flowformer.cli import about, data, evaluate, export, generate, predict, runs, visualize
from flowformer.cli.about import EXTRAS
from flowformer.cli.parser import Parser, UsageError
from flowformer.common.names import nearest

COMMANDS = {
    **runs.COMMANDS,
    "evaluate": evaluate.main,
    "predict": predict.main,
    "generate": generate.main,
    "visualize": visualize.main,
    "export": export.main,
    "data": data.main,
    **about.COMMANDS,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if words is None else list(words)
    listed = "\n".join(f"  {name:10} {inspect.getdoc(function)}" for name, function in COMMANDS.items())
    parser = Parser(
        prog="flowformer",
        description=f"Attention in linear time: train, evaluate and inspect.\n\ncommands:\n{listed}",
        epilog="`flowformer COMMAND --help` tells more of each.",
    )
    parser.add_argument("--version", action="version", version=f"flowformer {flowformer.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those above")
    try:
        if not words or words[0] not in COMMANDS:
            if words and not words[0].startswith("-"):
                parser.error(f"no command {words[0]!r}{nearest(words[0], COMMANDS)}. There is {', '.join(COMMANDS)}.")
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
