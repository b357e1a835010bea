"""Train, resume and evaluate; every run writes one folder.

A run's folder holds ``recipe.json`` (the resolved recipe), ``format.json`` (how data is prepared for the model),
``metrics.jsonl`` (one record per round), ``checkpoints/`` (``last.ckpt`` with everything needed to resume, and
``best-test.ckpt`` and ``best-validation.ckpt``, where there are such sets to choose by) and, when it is complete,
``result.json``.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn

from flowformer.common.errors import RunError
from flowformer.common.files import read_json, write_json
from flowformer.common.machine import environment, peak_memory_bytes
from flowformer.training.callbacks import History, RunProgress
from flowformer.training.module import TaskModule
from flowformer.training.recipe import Recipe, Task


def train(recipe: Recipe, folder: Path, *, resume: bool = False, command: str = "", console: Console) -> dict[str, Any]:
    """Run or resume a recipe, and write the folder of the run.

    Args:
        recipe: What to run.
        folder: Where to write. Must not hold a run unless ``resume``.
        resume: Continue the run in ``folder``, if there is one. A complete run is not run again.
        command: The command that started it, for the record.
        console: Where to show progress.

    Returns:
        What ``result.json`` holds.

    Raises:
        RunError: if the folder holds a run and ``resume`` is not given, or the run of another recipe.
        KeyboardInterrupt: when interrupted; the run can be resumed from its last complete round.
    """
    # For every further device Lightning starts this command once more, which then finds the folder in use.
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    if is_first:
        _check_folder(recipe, folder, resume)
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    with _quiet():
        _trainer(recipe, [], None)  # raises before anything is written, where this machine has no such device
    task = recipe.build_task()
    torch.manual_seed(recipe.seed)
    model = recipe.build_model(task.format)
    if is_first:
        write_json(folder / "recipe.json", recipe.to_json())
        write_json(folder / "format.json", task.format.to_json())
    records = fit(recipe, task, model, folder=folder, console=console if is_first else None)
    result = {
        "recipe": recipe.to_json(),
        "seed": recipe.seed,
        "command": command,
        "environment": environment(),
        "data": {"source": task.source, "licence": task.licence},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": sum(record["seconds"] for record in records),
        "peak_memory_bytes": peak_memory_bytes(),
        "protocols": protocols(recipe, task, records, folder),
    }
    if is_first:
        write_json(folder / "result.json", result)
    return result


def _check_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    path = folder / "recipe.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: pass --out for a folder")
    if not path.exists():
        return
    if not resume:
        raise RunError(f"{folder} already contains a run: pass --resume to continue it, or --out for another folder")
    before, now = read_json(path), recipe.to_json()
    binding = [field.name for field in fields(recipe) if not field.metadata.get("neutral")]
    differ = [
        f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in binding if before.get(name) != now[name]
    ]
    if differ:
        raise RunError(f"{folder} contains a run of another recipe: {'; '.join(differ)}. Pass --out for another folder")


def fit(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    *,
    folder: Path | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train a model in place.

    Args:
        recipe: How.
        task: On what.
        model: The model; left with the weights of the last round.
        folder: For checkpoints and metrics; training resumes from its last checkpoint. ``None`` writes none.
        console: Where to show progress; ``None`` for nowhere.

    Returns:
        One record of metrics per round; the first is before training, where there is something to evaluate on.
    """
    history = History(recipe, None if folder is None else folder / "metrics.jsonl")
    callbacks: list[Callback] = [history]
    if console is not None:
        callbacks.append(RunProgress(console, recipe, task.metric))
    last = None
    if folder is not None:
        callbacks += _checkpoints(folder, task)
        last = folder / "checkpoints" / "last.ckpt"
    module = TaskModule(recipe, task, model)
    with _quiet():
        trainer = _trainer(recipe, callbacks, folder, evaluating=bool(module.evaluated))
        if last is not None and last.exists():
            history.load()
        elif module.evaluated:
            trainer.validate(module, verbose=False)
            start = {name: float(value) for name, value in trainer.callback_metrics.items()}
            history.add(trainer, 0, start)
        try:
            trainer.fit(module, ckpt_path=last if last is not None and last.exists() else None, weights_only=False)
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from error
    return history.records


def _trainer(
    recipe: Recipe, callbacks: list[Callback], folder: Path | None, *, evaluating: bool = True
) -> lightning.Trainer:
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = recipe.accelerator == "cpu" or (recipe.accelerator == "auto" and not has_gpu)
    if recipe.used_precision == "16-mixed" and on_cpu:
        raise RunError("precision 16-mixed needs a GPU, and this run is on the CPU: pass bf16-mixed or 32-true")
    try:
        return lightning.Trainer(**_arguments(recipe, callbacks, folder, evaluating))
    except (MisconfigurationException, ModuleNotFoundError) as error:  # an accelerator that is not there, say
        raise RunError(f"accelerator {recipe.accelerator} with {recipe.devices} devices: {error}") from error


def _arguments(recipe: Recipe, callbacks: list[Callback], folder: Path | None, evaluating: bool) -> dict[str, Any]:
    return {
        "accelerator": recipe.accelerator,
        "devices": recipe.devices,
        "precision": recipe.used_precision,
        "max_epochs": recipe.rounds,
        "accumulate_grad_batches": recipe.batches_of_a_step,
        "limit_val_batches": 1.0 if evaluating else 0,
        "gradient_clip_val": recipe.clip_grad_norm,
        "callbacks": callbacks,
        "logger": False,
        "default_root_dir": folder,
        "enable_checkpointing": folder is not None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the module's own samplers know about devices
    }


def _checkpoints(folder: Path, task: Task) -> list[Callback]:
    """The last round with everything needed to resume, and the weights of the best evaluations."""
    where: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    mode = "max" if task.metric.higher_is_better else "min"
    best = {"save_weights_only": True, "mode": mode, "save_top_k": 1, **where}
    callbacks: list[Callback] = [
        ModelCheckpoint(filename=f"best-{split}", monitor=f"{split}/{task.metric.key}", **best)
        for split in task.evaluated
    ]
    return [*callbacks, ModelCheckpoint(filename="last", save_top_k=1, every_n_epochs=1, **where)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice to itself: the recipe decided what it advises about."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*number of training batches .* is smaller than the logging interval.*")
            warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
            warnings.filterwarnings("ignore", ".*GPU available but not used.*")
            # A run resumed before an epoch without evaluation.
            warnings.filterwarnings("ignore", ".*could not find the monitored key.*")
            # Lightning 2.6 (pytorch/utilities/_pytree.py) builds a class that newer torch deprecates.
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def protocols(recipe: Recipe, task: Task, records: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the result of a run under the paper's protocol and under an honest one, without selection on test data.

    Where the test set is evaluated during training, the paper's is its best value; the honest one is that of the last
    round, or of the round that is best on a validation set. Where it is not, both are the test, made once, of the round
    that is best on the validation set.

    Args:
        recipe: The run's recipe.
        task: Its task.
        records: Its records.
        folder: Its folder, which has the checkpoint to be tested.

    Returns:
        For ``"paper"`` and ``"honest"``: metric, value, published value, the epoch or step, and how it was chosen.
    """
    metric, splits = task.metric, task.evaluated
    evaluated = [record for record in records if any(f"{split}/{metric.key}" in record for split in splits)]

    def entry(record: Mapping[str, Any], value: float, selection: str) -> dict[str, Any]:
        return {
            "metric": f"test {metric}",
            "value": metric.shown(value),
            "digits": metric.digits,
            "published": recipe.published(task),
            recipe.unit: record[recipe.unit],
            "selection": selection,
        }

    if "test" not in splits:
        trained = evaluated[1:]  # the model before training has no checkpoint
        chosen = metric.best(trained, "validation")
        how = f"{recipe.unit} {chosen[recipe.unit]}, best of {len(trained)} on the validation set; tested once"
        model, _ = load(recipe, folder, "best-validation")
        value = evaluate(recipe, task, model)[f"test/{metric.key}"]
        return {"paper": entry(chosen, value, how), "honest": entry(chosen, value, how)}
    best = metric.best(evaluated, "test")
    chosen, how = evaluated[-1], f"last {recipe.unit} ({evaluated[-1][recipe.unit]})"
    if "validation" in splits:
        chosen = metric.best(evaluated, "validation")
        how = f"{recipe.unit} {chosen[recipe.unit]}, best of {len(evaluated)} on the validation set"
    said = f"best of {len(evaluated)} evaluations on the test set ({recipe.unit} {best[recipe.unit]})"
    key = f"test/{metric.key}"
    return {"paper": entry(best, best[key], said), "honest": entry(chosen, chosen[key], how)}


def load(recipe: Recipe, folder: Path, checkpoint: str = "last") -> tuple[nn.Module, Any]:
    """Load the model of a run and the format of its data.

    Args:
        recipe: The run's recipe.
        folder: The run's folder.
        checkpoint: ``"last"``, ``"best-test"`` or ``"best-validation"``.

    Raises:
        RunError: if the folder has no such checkpoint.
    """
    path = folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not path.exists():
        there = sorted(found.stem for found in path.parent.glob("*.ckpt"))
        raise RunError(f"no checkpoint {checkpoint!r} in {path.parent}; available: {', '.join(there) or 'none'}")
    form = recipe.read_format(read_json(folder / "format.json"))
    model = recipe.build_model(form)
    state = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model.eval(), form


def evaluate(recipe: Recipe, task: Task, model: nn.Module) -> dict[str, float]:
    """Evaluate a model on the test set of a task: loss and the quantities of the metric."""
    module = TaskModule(recipe, task, model, {"test": task.test})
    with _quiet():
        trainer = _trainer(recipe, [], None)
        trainer.validate(module, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
