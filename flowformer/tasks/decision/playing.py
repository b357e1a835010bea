"""What can be done with a trained model of decisions: evaluate it in a simulator, and film an episode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flowformer.common.errors import DataError, RunError
from flowformer.common.fields import option
from flowformer.common.files import write_json
from flowformer.tasks.decision.policies import Evaluation, make_policy
from flowformer.tasks.decision.rollout import Episode, Summary, describe_episode, run_episodes, summarise
from flowformer.tasks.decision.scores import caution, normalise
from flowformer.tasks.decision.simulators.environments import find_environment, make_environment
from flowformer.tasks.decision.simulators.filming import Filmed, check_film, choose_frames, open_film
from flowformer.tasks.decision.trials import Trials
from flowformer.tasks.protocols import Track

if TYPE_CHECKING:
    from flowformer.tasks.decision.format import DecisionFormat


@dataclass(frozen=True, kw_only=True)
class ActingOptions:
    """Where and how a model acts."""

    env: str = option("", "environment, an identifier of Gymnasium or MODULE:IDENTIFIER (default: that of the run)")
    target: tuple[float, ...] = option((), "return to ask for (default: those of the run)")
    evaluation: Evaluation | None = option(
        None, "what the model sees: a window of the last steps, as published, or by its recurrent state the whole "
        "episode (default: as in the run)",
    )  # fmt: skip
    seed: int | None = option(
        None, "the first episode has seed + 100 (default: the seed of the run)", at_least=0, largest=2**31 - 1
    )
    max_steps: int | None = option(
        None, "most steps of an episode (default: the limit of the environment)", at_least=1, largest=1_000_000_000
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ActingOptions):
    """Options of ``flowformer evaluate`` for decisions."""

    episodes: int = option(100, "episodes of each target", at_least=1, largest=1_000_000)
    workers: int = option(0, "processes in which the environments run; 0 for this one", at_least=0, largest=1024)
    each: bool = option(False, "print a line for each episode")
    out: Path | None = option(None, "JSON file to write, with the return of each episode")


@dataclass(frozen=True, kw_only=True)
class PlayOptions(ActingOptions):
    """Options of ``flowformer play``."""

    out: Path = option(Path("episode.gif"), "film to write, .gif or .mp4")
    fps: float | None = option(None, "most frames of a second (default: 30)", above=0, largest=1000)


def find_setting(form: DecisionFormat, options: ActingOptions) -> tuple[str, tuple[float, ...]]:
    """Return the environment and the targets: those asked for, or those of the run.

    Raises:
        RunError: for a run that has none, or names a module to import.
    """
    environment, targets = options.env or form.environment, options.target or form.targets
    if ":" in form.environment and not options.env:  # a folder may come from a stranger, and is not to have it imported
        raise RunError(
            f"the run is of {environment}, whose module is imported only if you ask: pass --env {environment}"
        )
    if not environment:
        raise RunError("the data of the run does not say which environment it is of: pass --env")
    if not targets:
        raise RunError("the run has no returns to ask for: pass --target")
    return environment, targets


def _seed(options: ActingOptions) -> int:
    return 1 if options.seed is None else options.seed  # that of published runs


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate(model: nn.Module, form: DecisionFormat, options: EvaluationOptions, track: Track) -> Iterator[str]:
    """Run episodes of each target; yields a table, and what must be said beside its scores.

    Raises:
        DataError, RunError: for an environment or a model that cannot be used; and, after the table, if every episode
            failed.
    """
    environment, targets = find_setting(form, options)
    trials = Trials.of(targets, options.episodes, _seed(options))
    episodes = run_episodes(
        make_policy(model, form, options.evaluation), environment, trials.targets, trials.seeds,
        max_steps=options.max_steps, workers=options.workers, track=track,
    )  # fmt: skip
    if options.out is not None:
        write_json(options.out, to_json(episodes, environment, options.evaluation))
    yield f"{environment}, {_seen(form, options.evaluation)}, seeds {trials.seeds[0]} to {trials.seeds[-1]}\n"
    if options.each:
        yield from (_row(episode, environment) for episode in episodes)
    yield table(episodes, environment)
    yield from _remarks(episodes, environment)


def _seen(form: DecisionFormat, evaluation: Evaluation | None) -> str:
    return f"window of {form.context} steps" if evaluation != "recurrent" else "recurrent state over the episode"


def describe_returns(episodes: Sequence[Episode], environment: str) -> str:
    """Return a few lines about episodes that were recorded: how many, their returns, and their scores, if any."""
    part = Summary(math.nan, tuple(episode for episode in episodes if not episode.failed))
    returns, steps = part.returns, int(part.lengths.sum())
    found = f"{len(returns)} episodes, {steps:,} steps; return {returns.mean():.1f} (std {returns.std():.1f}, " + (
        f"from {returns.min():.1f} to {returns.max():.1f})\n"
    )
    scores = normalise(returns, environment)
    if scores is not None:
        found += f"score {scores.mean():.1f}. {caution(environment)}\n"
    return found + "".join(_failures(episodes, "are not recorded"))


def _failures(episodes: Sequence[Episode], handled: str) -> Iterator[str]:
    failed = [episode for episode in episodes if episode.failed]
    if failed:
        yield f"{len(failed)} of {len(episodes)} episodes failed and {handled}; the first: {failed[0].failed}\n"


def _row(episode: Episode, environment: str) -> str:
    score = normalise(episode.return_, environment)
    scored = "" if score is None else f", score {score:.1f}"
    failed = f", failed: {episode.failed}" if episode.failed else ""
    return (
        f"target {episode.target:g}, seed {episode.seed}: return {episode.return_:.1f}{scored}, "
        f"{episode.length} steps{failed}\n"
    )


def table(episodes: Sequence[Episode], environment: str) -> str:
    """Return the means and standard deviations of each target, and of all where there are several, as a text."""
    parts = [(f"{part.target:g}", part) for part in summarise(episodes)]
    if len(parts) > 1:
        parts.append(("all", Summary(math.nan, tuple(episodes))))
    scored = normalise(0.0, environment) is not None
    rows = [["target", "episodes", "failed", "return", "std", *(["score", "std"] if scored else []), "steps"]]
    rows += [_cells(name, part, environment) for name, part in parts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + "\n" for row in rows)


def _cells(name: str, part: Summary, environment: str) -> list[str]:
    scores = normalise(part.returns, environment)
    scored = [] if scores is None else [f"{scores.mean():.1f}", f"{scores.std():.1f}"]
    return [
        name, str(len(part.episodes)), str(len(part.failed)), f"{part.returns.mean():.1f}",
        f"{part.returns.std():.1f}", *scored, f"{part.lengths.mean():.1f}",
    ]  # fmt: skip


def _remarks(episodes: Sequence[Episode], environment: str) -> Iterator[str]:
    if all(episode.failed for episode in episodes):
        raise RunError(f"every episode failed; the first: {episodes[0].failed}")
    yield from _failures(episodes, "count with their return until then")
    if said := caution(environment):
        yield f"{said}\n"


def to_json(episodes: Sequence[Episode], environment: str, evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the results as JSON values: by target, with the return of each seed."""
    return {
        "environment": environment, "evaluation": evaluation or "window", "caution": caution(environment),
        "targets": [_describe(part, environment) for part in summarise(episodes)],
    }  # fmt: skip


def _describe(part: Summary, environment: str) -> dict[str, Any]:
    scores = normalise(part.returns, environment)
    values = {"return": part.returns, "steps": part.lengths} | ({} if scores is None else {"score": scores})
    found: dict[str, Any] = {"target": part.target, "failed": len(part.failed)}
    for name, array in values.items():
        found |= {f"{name}_mean": float(array.mean()), f"{name}_std": float(array.std())}
    return {**found, "episodes": [describe_episode(each, environment) for each in part.episodes]}


# -------------------------------------------------------------------------------------------------------------- film


def play(model: nn.Module, form: DecisionFormat, options: PlayOptions, track: Track) -> Iterator[str]:
    """Film one episode; yields what came of it.

    Raises:
        DataError, RunError: for an environment that cannot be used or rendered, and an episode that failed, of which
            no film is kept.
    """
    environment, targets = find_setting(form, options)
    trial = Trials.of(targets[:1], 1, _seed(options))[0]
    spec = find_environment(environment)
    check_film(options.out, spec)
    example = make_environment(spec, "rgb_array")
    every, fps = choose_frames(example, options.fps)
    renders = "rgb_array" in (example.metadata.get("render_modes") or ())
    example.close()
    if not renders:
        raise DataError(f"{environment} cannot be filmed: it does not render frames (render_modes has no rgb_array)")
    with open_film(options.out, fps) as film:
        episode = run_episodes(
            make_policy(model, form, options.evaluation), environment, [trial.target], [trial.seed],
            max_steps=options.max_steps, track=track, host=Filmed(spec, film, every),
        )[0]  # fmt: skip
        if episode.failed:
            raise DataError(f"{environment} failed after {episode.length} steps, and no film is kept: {episode.failed}")
    yield _row(episode, environment)
    if said := caution(environment):
        yield f"{said}\n"
    yield f"The film is in {options.out}\n"
