"""``flowformer collect``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowformer.cli.arguments.options import number, whole_number
from flowformer.cli.arguments.parser import Parser, UsageError, usable
from flowformer.cli.arguments.trained import CHECKPOINTS, is_run, open_run, require
from flowformer.cli.output.paths import check_file, check_folder, output_path

NOTE = """policies:
  random                random actions
  RUN                   a run of ours: asks for the return --target
  sb3:FILE              a model of Stable-Baselines3, as model.save wrote it; only its weights are read, nothing is run
  MODULE:FUNCTION       a Python function of the observation, which is imported and run

example: a data set whose actions are all random in the first episode and none in the last
  flowformer collect Hopper-v5 --policy runs/hopper --random 1:0 --episodes 500 --out data/hopper-mixed-v0"""


def main(words: Sequence[str]) -> int:
    """Record episodes of a policy as a data set."""
    parser = Parser(prog="flowformer collect", description=main.__doc__, epilog=NOTE)
    _add_arguments(parser)
    values = parser.parse(words)
    for path in values.out:
        _check_output(path)
    _check_apart([path.resolve() for path in values.out])

    from rich.console import Console

    from flowformer.common.progress import progress_bar
    from flowformer.tasks.decision.collecting import collect

    policy, algorithm, target = _make_policy(values)
    console = Console(stderr=True)
    with progress_bar("episodes", values.episodes, console if console.is_terminal else None) as advance:
        episodes = usable(
            collect, policy, values.environment, values.out, episodes=values.episodes, seed=values.seed, target=target,
            shares=values.random or (0.0, 0.0), max_steps=values.max_steps, workers=values.workers, algorithm=algorithm,
            advance=advance,
        )  # fmt: skip
    _report(episodes, values.environment, values.out)
    return 0


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("environment", help="identifier of Gymnasium, or MODULE:IDENTIFIER")
    parser.add_argument("--policy", required=True, help="what chooses the actions: see below")
    parser.add_argument("--episodes", type=_count, required=True, metavar="N", help="number of episodes")
    parser.add_argument(
        "--out", type=output_path, required=True, action="append", metavar="FILE",
        help="a folder for Minari, or a file .hdf5 in the layout of D4RL; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--random", type=_shares, metavar="FIRST[:LAST]",
        help="share of random actions in the first and in the last episode (default: 0)",
    )  # fmt: skip
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the first episode")
    parser.add_argument("--max-steps", type=_count, metavar="N", help="most steps (default: those of the environment)")
    parser.add_argument("--workers", type=_seed, default=0, metavar="N", help="processes in which environments run")
    parser.add_argument("--target", type=number, metavar="X", help="return to ask a run for (default: its first)")
    parser.add_argument("--evaluation", choices=("window", "recurrent"), help="what a run sees (default: as in it)")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, help="which weights of a run (default: last)")


def _count(text: str) -> int:
    if (value := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seed(text: str) -> int:
    if not 0 <= (value := whole_number(text)) < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**31 - 1}, got {value}")
    return value


def _shares(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    found = number(first), number(last or first)
    if not all(0 <= share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"shares must be from 0 to 1, got {text}")
    return found


def _check_output(path: Path) -> None:
    from flowformer.tasks.decision.collecting import HDF5

    if path.suffix.lower() in HDF5:
        check_file(path)
        return
    check_folder(path)
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty: pass --out for a new folder")


def _check_apart(paths: Sequence[Path]) -> None:
    for i, one in enumerate(paths):
        for other in paths[i + 1 :]:
            if one == other or one in other.parents or other in one.parents:
                raise UsageError(f"--out: {other} and {one} are the same, or one is within the other")


def _make_policy(values: argparse.Namespace) -> tuple[Any, str, float]:
    """A policy, its name for the description of the data, and the return to ask for."""
    from flowformer.tasks.decision.policies import FunctionPolicy, RandomPolicy
    from flowformer.tasks.decision.rollout import open_environment

    name, target = values.policy, values.target or 0.0
    if is_run(name):
        recipe, model, form = open_run(Path(name), values.checkpoint or "last")
        require(Path(name), form, "collect")
        if values.target is None and form.targets:
            target = form.targets[0]
        return (
            usable(form.policy, model, values.evaluation or getattr(recipe, "evaluation", None)),
            f"{name}, asked for {target:g}",
            target,
        )
    for flag in ("target", "evaluation", "checkpoint"):
        if getattr(values, flag) is not None:
            raise UsageError(f"--{flag} has no effect with --policy {name}, which is not the folder of a run")
    spaces = usable(open_environment, values.environment)[1]
    if name == "random":
        return RandomPolicy(spaces), "random", target
    kind, colon, rest = name.partition(":")
    if kind == "sb3" and colon:
        from flowformer.interop.stable_baselines import load_policy

        return usable(load_policy, Path(rest), spaces), f"Stable-Baselines3, {Path(rest).name}", target
    if colon:
        return FunctionPolicy(_find_function(kind, rest), spaces), name, target
    raise UsageError(f"--policy {name} is neither random, the folder of a run, sb3:FILE nor MODULE:FUNCTION")


def _find_function(module: str, name: str) -> Any:
    from flowformer.tasks.decision.simulators.environments import import_module

    found = getattr(import_module(module, f"--policy {module}:{name}"), name, None)
    if not callable(found):
        raise UsageError(f"--policy {module}:{name}: module {module} has no function {name}")
    return found


def _report(episodes: Sequence[Any], environment: str, out: Sequence[Path]) -> None:
    from flowformer.tasks.decision.playing import describe_returns

    print(describe_returns(episodes, environment), end="")
    print(f"The data is in {', '.join(map(str, out))}")
