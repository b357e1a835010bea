"""The command line ``flowformer``: one file per command."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence

import flowformer
from flowformer.cli import (
    bench,
    collect,
    data,
    doctor,
    evaluate,
    export,
    generate,
    info,
    play,
    predict,
    train,
    visualize,
)
from flowformer.cli import list as listing
from flowformer.cli.arguments.parser import Parser
from flowformer.cli.output.failures import explain, failed
from flowformer.cli.output.streams import writable_output
from flowformer.common.interrupts import Interrupted, signals_raise
from flowformer.common.names import nearest

# Their modules import what they need when they run: `flowformer --help` does not wait for torch.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train.main,
    "evaluate": evaluate.main,
    "predict": predict.main,
    "generate": generate.main,
    "play": play.main,
    "collect": collect.main,
    "visualize": visualize.main,
    "export": export.main,
    "data": data.main,
    "bench": bench.main,
    "list": listing.main,
    "info": info.main,
    "doctor": doctor.main,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        words: What follows ``flowformer``; that of this process if absent.

    Returns:
        The exit status: 0 if the command did what was asked for; 2 for errors that a user can cause, which are printed
        as one line on standard error; 70 for a fault of the program, whose traceback is written to a file; 130 and 143
        if it was interrupted or terminated.
    """
    words = sys.argv[1:] if words is None else words
    try:
        with writable_output(), signals_raise():
            return _run(words)
    except BrokenPipeError:
        # As `flowformer list | head` does. The rest goes to the null device, or closing stdout would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # what the shell makes of SIGPIPE
    except KeyboardInterrupt as error:
        stop = Interrupted.of(error, getattr(error, "advice", ""))
        return failed(str(stop), stop.status)
    except Exception as error:
        return failed(*explain(error, words))


def _run(words: Sequence[str]) -> int:
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    listed = "\n".join(f"  {name:10} {inspect.getdoc(function)}" for name, function in COMMANDS.items())
    parser = Parser(
        prog="flowformer",
        description=f"Attention in linear time: train, evaluate and inspect.\n\ncommands:\n{listed}",
        epilog="`flowformer COMMAND --help` shows the options of each.",
    )
    parser.add_argument("--version", action="version", version=f"flowformer {flowformer.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of the commands above")
    if words and not words[0].startswith("-"):
        parser.error(f"no command {words[0]!r}{nearest(words[0], COMMANDS)}; there is {', '.join(COMMANDS)}")
    parser.parse(words or ["--help"])
    return 0
