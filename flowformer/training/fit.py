"""Train, resume and evaluate; every run writes one folder, see :mod:`flowformer.training.folder`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn

from flowformer.common.errors import DataError, RunError, describe
from flowformer.common.files import locked, remove_staged, write_json
from flowformer.common.machine import environment, peak_memory_bytes
from flowformer.models.classical.fitted import FittedModel
from flowformer.tasks.fingerprint import fingerprints
from flowformer.tasks.protocols import Recounts
from flowformer.training.callbacks import History, RunProgress
from flowformer.training.checkpoints import Checkpoints, PlainCheckpointIO
from flowformer.training.draws import Draws
from flowformer.training.fitted import evaluate_fitted, fit_at_once
from flowformer.training.folder import DATA, RunFolder, read_plain
from flowformer.training.module import TaskModule, read_metrics
from flowformer.training.quiet import quiet
from flowformer.training.recipe import GradientRecipe, Recipe, Task


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    data_changed_ok: bool = False,
    command: str = "",
    console: Console,
) -> dict[str, Any]:
    """Run or resume a recipe, and write the folder of the run.

    Args:
        recipe: What to run.
        folder: Where to write. Must not hold a run unless ``resume``.
        resume: Continue the run in ``folder``, if there is one. A complete run is not run again.
        data_changed_ok: Continue even if the data is not that of the run; it is prepared as that was.
        command: The command that started it, for the record.
        console: Where to show progress.

    Returns:
        What ``result.json`` holds.

    Raises:
        RunError: if the folder holds a run and ``resume`` is not given, the run of another recipe or of other data, or
            another process writes it. Nothing in the folder is changed then.
        KeyboardInterrupt: when interrupted; the run can be resumed from its last complete round.
    """
    run = RunFolder(folder)
    # For every further device Lightning starts this command once more, which then finds the folder in use.
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    if is_first:
        _check_folder(run, recipe, resume)
    if run.complete:
        return run.read_result()
    if isinstance(recipe, GradientRecipe):
        with quiet():
            _trainer(recipe, [], None)  # raises before anything is written, where this machine has no such device
    form = run.read_format(recipe) if run.exists and (folder / "format.json").exists() else None
    task, data = build_task(recipe, run, form, data_changed_ok=data_changed_ok)
    torch.manual_seed(recipe.seed)
    model = recipe.build_model(task.format)
    if isinstance(model, FittedModel):
        import_module(model.library)  # likewise, where it is not installed
    with _writing(run) if is_first else contextlib.nullcontext():
        if is_first:
            _check_folder(run, recipe, resume, lock=False)  # another process may have run it meanwhile
            remove_staged(run.path)
            if form is None:
                _write_start(run, recipe, task, data)
        with run.forgotten_unless_started() if is_first and form is None else contextlib.nullcontext():
            records = _train_model(recipe, task, model, run, console if is_first else None)
        result = _build_result(recipe, task, model, records, folder, command)
        if is_first:
            if form is not None:
                _write_start(run, recipe, task, data)  # what a resumed run may change: where its data is
            write_json(folder / "result.json", result)
    return result


def _train_model(
    recipe: Recipe, task: Task, model: nn.Module, run: RunFolder, console: Console | None
) -> list[dict[str, Any]]:
    """Train with Lightning, then fit what a library fits: of most models, one of these is all of it.

    Without a console this is not the first process, and only that one writes.
    """
    records: list[dict[str, Any]] = []
    if isinstance(recipe, GradientRecipe):
        records = fit(recipe, recipe.training_task(task), model, folder=run.path, console=console)
    if isinstance(model, FittedModel):
        records = fit_at_once(recipe, task, model, records, run=None if console is None else run, console=console)
    return records


def build_task(
    recipe: Recipe, run: RunFolder, form: Any, *, data_changed_ok: bool = False
) -> tuple[Task, dict[str, Any]]:
    """Read the data of a recipe, prepared as a run did.

    Args:
        recipe: The recipe.
        run: The folder of the run.
        form: The format of the run; ``None`` if it has not started.
        data_changed_ok: Accept other data than that of the run.

    Returns:
        The task, and the fingerprints of its data.

    Raises:
        RunError: if the data is not that of the run, or does not fit it.
        ValueError: if it cannot be read.
    """
    try:
        task = recipe.build_task(form)
    except DataError as error:
        if form is None:
            raise
        raise RunError(f"the data does not fit the run in {run.path}: {error}") from error
    data = fingerprints(task)
    if form is not None and not data_changed_ok:
        run.check_data(data, task.source)
    return task, data


@contextlib.contextmanager
def _writing(run: RunFolder) -> Iterator[None]:
    """Lock the folder of a run, which is created if necessary."""
    run.path.mkdir(parents=True, exist_ok=True)
    with locked(run.lock, f"the run in {run.path}"):
        yield


def _check_folder(run: RunFolder, recipe: Recipe, resume: bool, *, lock: bool = True) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise RunError(f"{run.path} is a file: pass --out for a folder")
    if not run.exists:
        if run.resume_state.exists():
            raise RunError(f"{run.path} has checkpoints and no recipe.json: pass --out for another folder")
        return
    if lock and not run.complete:
        with _writing(run):
            pass  # nobody else writes it
    if not resume:
        raise RunError(f"{run.path} already contains a run: pass --resume to continue it, or --out for another folder")
    run.check_recipe(recipe)


def _write_start(run: RunFolder, recipe: Recipe, task: Task, data: Mapping[str, Any]) -> None:
    write_json(run.path / "recipe.json", recipe.to_json())  # first: without format.json the run has not started
    write_json(run.path / "format.json", {**task.format.to_json(), DATA: data})


def _build_result(
    recipe: Recipe, task: Task, model: nn.Module, records: list[dict[str, Any]], folder: Path, command: str
) -> dict[str, Any]:
    return {
        "recipe": recipe.to_json(),
        "seed": recipe.seed,
        "command": command,
        "environment": environment(),
        "data": {"source": task.source, "licence": task.licence},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),  # those that have gradients
        "seconds": sum(record["seconds"] for record in records),
        "peak_memory_bytes": peak_memory_bytes(),
        "protocols": protocols(recipe, task, records, folder),
    }


def fit(
    recipe: GradientRecipe,
    task: Task,
    model: nn.Module,
    *,
    folder: Path | None = None,
    console: Console | None = None,
    draws: Draws | None = None,
) -> list[dict[str, Any]]:
    """Train a model in place.

    Args:
        recipe: How.
        task: On what.
        model: The model; left with the weights of the last round.
        folder: For checkpoints and metrics; training resumes from its last checkpoint. ``None`` writes none.
        console: Where to show progress; ``None`` for nowhere.
        draws: Where random numbers come from; PyTorch's global generators, which are seeded, if absent.

    Returns:
        One record of metrics per round; the first is before training, where that is evaluated.

    Raises:
        RunError: if training diverges, a checkpoint cannot be resumed, or the folder cannot be written.
        KeyboardInterrupt: when interrupted.
    """
    run = None if folder is None else RunFolder(folder)
    history = History(recipe, task.metric, None if folder is None else folder / "metrics.jsonl")
    callbacks: list[Callback] = [history]
    if console is not None:
        callbacks.append(RunProgress(console, recipe, task.metric))
    if run is not None:
        callbacks.append(Checkpoints(run, history, tuple(task.evaluated)))
    module = TaskModule(recipe, task, model, draws=draws)
    compiled = _compiled(model) if recipe.compile else contextlib.nullcontext()
    with draws or contextlib.nullcontext(), quiet(), _stopping_as_asked(), _explaining(run, history), compiled:
        trainer = _trainer(recipe, callbacks, folder, evaluating=bool(module.evaluated))
        last = run.resume_state if run is not None and run.resume_state.exists() else None
        if last is not None:
            read_plain(last)  # Lightning would report damage in its own words
        elif module.evaluated and 0 in recipe.evaluated_rounds:
            trainer.validate(module, verbose=False)
            history.add(trainer, 0, read_metrics(trainer))
        trainer.fit(module, ckpt_path=last, weights_only=True)
        history.write(trainer)  # a run that was complete has written no record
    return history.records


@contextlib.contextmanager
def _compiled(model: nn.Module) -> Iterator[None]:
    """Compile a model, which happens when it is first called, and say so where that fails."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second, and few need it

    model.compile()
    try:
        yield
    except TorchDynamoException as error:
        said = " ".join(str(error).strip().split("\n\n")[0].split())  # without what it says on logging
        raise RunError(f"torch.compile cannot compile the model, leave out --compile: {said}") from error


@contextlib.contextmanager
def _stopping_as_asked() -> Iterator[None]:
    """Pass on an interruption, of which Lightning makes an exit."""
    try:
        yield
    except SystemExit as error:
        before = error.__context__
        raise before if isinstance(before, KeyboardInterrupt) else KeyboardInterrupt from None


@contextlib.contextmanager
def _explaining(run: RunFolder | None, history: History) -> Iterator[None]:
    """Say which checkpoint is kept when the disk fails, and which file when its contents cannot be restored."""
    try:
        yield
    except OSError as error:
        if run is None:
            raise
        kept = "The last checkpoint is kept" if run.resume_state.exists() else "There is no checkpoint yet"
        raise RunError(f"{describe(error)}. {kept}: pass --resume to continue") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if history.started or isinstance(error, RunError) or run is None or not run.resume_state.exists():
            raise
        first = str(error).strip().split("\n")[0]
        raise RunError(
            f"{run.resume_state} cannot be resumed, it is damaged or of another model: {type(error).__name__}: {first}"
        ) from error


def _trainer(
    recipe: GradientRecipe, callbacks: list[Callback], folder: Path | None, *, evaluating: bool = True
) -> lightning.Trainer:
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = recipe.accelerator == "cpu" or (recipe.accelerator == "auto" and not has_gpu)
    if recipe.used_precision == "16-mixed" and on_cpu:
        raise RunError("precision 16-mixed needs a GPU, and this run is on the CPU: pass bf16-mixed or 32-true")
    try:
        return lightning.Trainer(**_arguments(recipe, callbacks, folder, evaluating))
    except (MisconfigurationException, ModuleNotFoundError) as error:  # an accelerator that is not there, say
        raise RunError(f"accelerator {recipe.accelerator} with {recipe.devices} devices: {error}") from error


def _arguments(
    recipe: GradientRecipe, callbacks: list[Callback], folder: Path | None, evaluating: bool
) -> dict[str, Any]:
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
        "plugins": [PlainCheckpointIO()],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the module's own samplers know about devices
    }


def protocols(recipe: Recipe, task: Task, records: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the result of a run under the paper's protocol and under an honest one, without selection on test data.

    Where the test set is evaluated during training, the paper's is its best value; the honest one is that of the last
    round, or of the round that is best on a validation set. A run with a single evaluation leaves no choice: both are
    its value. Where the test set is not evaluated during training, both are the test, made once, of the round
    that is best on the validation set; or the paper's is that of the last round (``recipe.paper_round``).

    Args:
        recipe: The run's recipe.
        task: Its task.
        records: Its records.
        folder: Its folder, which has the checkpoint to be tested.

    Returns:
        For ``"paper"`` and ``"honest"``: metric, value, published value and what is to be said of it, the epoch or
        step, and how it was chosen.
    """
    metric, splits = task.metric, task.evaluated
    evaluated = [record for record in records if any(f"{split}/{metric.key}" in record for split in splits)]

    def entry(record: Mapping[str, Any], value: float, selection: str) -> dict[str, Any]:
        return {
            "metric": f"test {metric}",
            "value": metric.shown(value),
            "digits": metric.digits,
            "published": recipe.published(task),
            "published_note": recipe.published_note,
            recipe.unit: record[recipe.unit],
            "selection": selection,
        }

    def tested(record: Mapping[str, Any], checkpoint: str, selection: str) -> dict[str, Any]:
        model, _ = load(recipe, folder, checkpoint)
        value = evaluate(recipe, task, model)[f"test/{metric.key}"]
        return {**entry(record, value, selection), **_recount(task)}

    if "test" not in splits:
        trained = [record for record in evaluated if record[recipe.unit]]  # before training there is no checkpoint
        chosen = metric.best(trained, "validation")
        how = f"{recipe.unit} {chosen[recipe.unit]}, best of {len(trained)} on the validation set; tested once"
        honest = tested(chosen, "best-validation", how)
        if recipe.paper_round == "best":
            return {"paper": {**honest}, "honest": honest}
        how = f"last {recipe.unit} ({trained[-1][recipe.unit]})"
        same = chosen is trained[-1]
        return {"paper": {**honest, "selection": how} if same else tested(trained[-1], "last", how), "honest": honest}
    best = metric.best(evaluated, "test")
    chosen, how = evaluated[-1], f"last {recipe.unit} ({evaluated[-1][recipe.unit]})"
    if "validation" in splits:
        chosen = metric.best(evaluated, "validation")
        how = f"{recipe.unit} {chosen[recipe.unit]}, best of {len(evaluated)} on the validation set"
    said = f"best of {len(evaluated)} evaluations on the test set ({recipe.unit} {best[recipe.unit]})"
    if len(evaluated) == 1:
        said = how = "the only evaluation: nothing was chosen"
    key = f"test/{metric.key}"
    return {"paper": entry(best, best[key], said), "honest": entry(chosen, chosen[key], how)}


def load(recipe: Recipe, folder: Path, checkpoint: str = "last") -> tuple[nn.Module, Any]:
    """Load the model of a run and the format of its data.

    Args:
        recipe: The run's recipe.
        folder: The run's folder.
        checkpoint: ``"last"``, ``"best-test"`` or ``"best-validation"``.

    Raises:
        RunError: if the folder has no such checkpoint, or something in it is damaged.
    """
    run = RunFolder(folder)
    form = run.read_format(recipe)
    model = recipe.build_model(form)
    run.load_weights(model, checkpoint)
    return model.eval(), form


def evaluate(recipe: Recipe, task: Task, model: nn.Module) -> dict[str, float]:
    """Evaluate a model on the test set of a task: loss, if it has one, and the quantities of the metric."""
    _recount(task)  # what earlier evaluations left
    if isinstance(model, FittedModel):
        return evaluate_fitted(task, model)
    if not isinstance(recipe, GradientRecipe):
        raise TypeError(f"{recipe.name} trains no {type(model).__name__}: its models are fitted at once")
    module = TaskModule(recipe, task, model, {"test": task.test})
    with quiet(), _stopping_as_asked():
        trainer = _trainer(recipe, [], None)
        trainer.validate(module, verbose=False)
    return read_metrics(trainer)


def _recount(task: Any) -> dict[str, Any]:
    """Return what a task tells of its last evaluation besides means, see :class:`flowformer.tasks.protocols.Recounts`.

    Empty for other tasks.
    """
    return task.recount() if isinstance(task, Recounts) else {}
