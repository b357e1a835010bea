"""The folder of a run: what is in it, how it is read, and how it is written.

==========================  ==========================================================================================
``recipe.json``             the recipe, with every field
``format.json``             how data is prepared for the model, and a fingerprint of the data
``metrics.jsonl``           one record of metrics per round
``checkpoints/*.safetensors`` the weights: ``last``, and ``best-test`` and ``best-validation`` where there are such sets
``checkpoints/last.ckpt``   what resuming needs: weights, optimizer, schedule, progress, records
``result.json``             the result, once the run is complete
==========================  ==========================================================================================

A model that a library fits at once has ``last`` and no ``last.ckpt``: an interrupted fit starts anew.

Every file is written whole or not at all. A folder may come from a stranger: only JSON, safetensors, and pickles of
tensors and plain values (``torch.load`` with ``weights_only=True``) are read.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors
import safetensors.torch
import torch
from torch import nn

from flowformer.common.errors import DataError, RunError
from flowformer.common.files import check_regular, read_json, replacing
from flowformer.models.classical.fitted import FittedModel
from flowformer.tasks.fingerprint import describe_changes, hash_values
from flowformer.training.recipe import Recipe

DATA = "data"  # the key of the fingerprints in format.json
_RESUME = "last.ckpt"
_METADATA = "flowformer"  # the key of what a file tells about its weights, as JSON: round, metrics, a hash of all


class RunFolder:
    """The folder of a run.

    Args:
        path: The folder. It need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.resume_state = self.checkpoints / _RESUME
        self.lock = self.path / ".lock"

    @property
    def exists(self) -> bool:
        """Whether the folder contains a run."""
        return (self.path / "recipe.json").exists()

    @property
    def complete(self) -> bool:
        """Whether the run has a result."""
        return (self.path / "result.json").exists()

    def read_fields(self) -> dict[str, Any]:
        """Read the fields of the recipe, which :func:`flowformer.recipes.read_recipe` takes.

        Raises:
            RunError: for a folder without a run, or with a damaged recipe.
        """
        if not self.exists:
            raise RunError(f"{self.path} is not the folder of a run: it has no recipe.json")
        values = self._read("recipe.json")
        if not isinstance(values, dict):
            raise RunError(f"{self.path / 'recipe.json'} is damaged: expected a mapping, got {type(values).__name__}")
        return values

    def read_format(self, recipe: Recipe) -> Any:
        """Read the format of the data.

        Raises:
            RunError: for a run that was never started, or a damaged file.
        """
        path = self.path / "format.json"
        if not path.exists():
            raise RunError(f"{self.path} contains a run that was never started: it has no format.json")
        values = self._read("format.json")
        if not isinstance(values, dict):
            raise RunError(f"{path} is damaged: expected a mapping, got {type(values).__name__}")
        values.pop(DATA, None)
        try:
            return recipe.read_format(values)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise RunError(f"{path} is damaged: {error}") from error

    def read_result(self) -> dict[str, Any]:
        """Read the result of a complete run.

        Raises:
            RunError: for a damaged file.
        """
        result = self._read("result.json")
        if not isinstance(result, dict) or not isinstance(result.get("protocols"), dict):
            raise RunError(f"{self.path / 'result.json'} is damaged: delete it, and pass --resume to make it again")
        return result

    def _read(self, name: str) -> Any:
        try:
            return read_json(self.path / name)
        except DataError as error:
            raise RunError(f"{error}: the run is damaged") from error

    @contextlib.contextmanager
    def forgotten_unless_started(self) -> Iterator[None]:
        """Remove what a new run has written if it turns out to be impossible before its first checkpoint.

        Some options are refused only when a model meets its data. Nothing is worth keeping then, and the same command
        with another value would find the folder in use.
        """
        try:
            yield
        except (ValueError, TypeError):
            if not self.resume_state.exists():
                for name in ("recipe.json", "format.json", "metrics.jsonl"):
                    (self.path / name).unlink(missing_ok=True)
            raise

    def check_recipe(self, recipe: Recipe) -> None:
        """Check that a recipe is that of the run, but for fields that do not change a result.

        A field that the run does not have, since a newer version has added it, must have its default.

        Raises:
            RunError: naming the fields that differ.
        """
        before, now = self.read_fields(), recipe.to_json()
        differ = [f"{name} is not known to this version" for name in before if name not in now]
        for one in fields(recipe):
            default = one.default if one.default is not MISSING else now[one.name]
            was = before.get(one.name, default)
            if was != now[one.name] and not one.metadata.get("neutral"):
                differ.append(f"{one.name} was {was!r}, now {now[one.name]!r}")
        if differ:
            raise RunError(
                f"{self.path} contains a run of another recipe: {'; '.join(differ)}. Pass --out for another folder"
            )

    def check_data(self, now: Mapping[str, Any], source: str) -> None:
        """Check that data is that of the run.

        Args:
            now: As :func:`flowformer.tasks.fingerprint.fingerprints` returns them.
            source: Where the data came from, for the message.

        Raises:
            RunError: if it is not; the message says what changed.
        """
        values = self._read("format.json") if (self.path / "format.json").exists() else None
        if not isinstance(values, dict) or DATA not in values:  # of a run of an earlier version
            return
        changes = describe_changes(values[DATA], now)
        if changes:
            raise RunError(
                f"the data ({source}) is not that of the run in {self.path}: {changes}. "
                "Pass --data-changed-ok to use it nevertheless"
            )

    def load_weights(self, model: nn.Module, checkpoint: str = "last") -> None:
        """Load the weights of a checkpoint into a model.

        Args:
            model: The model that the recipe describes.
            checkpoint: ``"last"``, ``"best-test"`` or ``"best-validation"``.

        Raises:
            RunError: if there is no such checkpoint, it is damaged, or does not fit the model.
        """
        if self.resume_state.exists():
            read_plain(self.resume_state, mapped=True)  # refused as a whole if there is something foreign in it
        path = self.checkpoints / f"{checkpoint}.safetensors"
        state = _read_weights(path) if path.exists() else self._read_older(checkpoint)
        fitted = isinstance(model, FittedModel)
        if fitted:
            model.resize_buffers(state)
        own = model.state_dict()
        wrong = [
            name for name in {**own, **state}
            if name not in own or name not in state or own[name].shape != state[name].shape
            or (fitted and own[name].dtype != state[name].dtype)  # counts and indices, which a cast would change
        ]  # fmt: skip
        if wrong:
            raise RunError(
                f"{path} does not fit the model that recipe.json describes: weights that are missing, unexpected or of "
                f"another shape or dtype: {len(wrong)}, the first {sorted(wrong)[0]}"
            )
        model.load_state_dict(state)
        if fitted:
            try:
                model.check_fitted()
            except ValueError as error:
                raise RunError(f"{path} cannot be used: {error}") from error

    def _read_older(self, checkpoint: str) -> dict[str, torch.Tensor]:
        """Weights as earlier versions wrote them, and those of a run that was killed in the first round."""
        path = self.checkpoints / f"{checkpoint}.ckpt"
        if not path.exists():
            found = {one.stem for one in self.checkpoints.glob("*") if one.suffix in (".safetensors", ".ckpt")}
            there = ", ".join(sorted(one for one in found if not one.startswith("."))) or "none"
            raise RunError(f"no checkpoint {checkpoint!r} in {self.checkpoints}; available: {there}")
        state = read_plain(path).get("state_dict")
        if not isinstance(state, dict) or not all(isinstance(one, torch.Tensor) for one in state.values()):
            raise RunError(f"{path} is damaged: it has no weights")
        return {name.removeprefix("model."): value for name, value in state.items()}


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the weights of a model as safetensors, whole or not at all.

    Args:
        model: The model. Weights that it uses twice are written twice, so that any reader finds them.
        path: The file.
        metadata: About the weights.
    """
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    told = json.dumps({**metadata, "sha256": _hash(state)})  # one entry: of several the order would be random
    content = safetensors.torch.save(state, {_METADATA: told})
    with replacing(path) as staged:
        staged.write_bytes(content)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    check_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    now = _hash(state)
    if not isinstance(told, dict) or told.get("sha256", now) != now:
        raise RunError(f"{path} is damaged: its weights are not those that were written")
    return state


def _hash(state: Mapping[str, torch.Tensor]) -> str:
    return hash_values((name, value.flatten().view(torch.uint8).numpy()) for name, value in sorted(state.items()))


def save_plain(content: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values with ``torch.save``, whole or not at all."""
    with replacing(path) as staged, staged.open("wb") as file:
        target = _Writer(file)
        try:
            torch.save(dict(content), cast("Any", target))
        except RuntimeError as error:
            raise target.error or error from error


class _Writer:
    """Remembers the error of a file, of which torch.save makes one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def read_plain(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read tensors and plain values that :func:`save_plain` wrote; nothing that the file contains is run.

    Args:
        path: The file.
        mapped: Map the tensors into memory and check no sums, which is fast for a look at them.

    Raises:
        OSError: for a file that cannot be opened.
        RunError: for a damaged file, or one that contains anything else.
    """
    check_regular(path)
    path.open("rb").close()  # whatever is wrong with the file itself
    try:
        if not mapped:
            _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path} is damaged, or contains more than tensors and plain values, which is not read: {_first(error)}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever damage makes of the format
        raise RunError(f"{path} is damaged: {type(error).__name__}: {_first(error)}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: expected a mapping, got {type(content).__name__}")
    return content


def _check_sums(path: Path) -> None:
    """Check the sum of every record; torch does not."""
    with zipfile.ZipFile(path) as file:
        if (bad := file.testzip()) is not None:
            raise ValueError(f"the sum of {bad} is wrong")


def _first(error: Exception) -> str:
    """The first sentence of a message of many lines."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
