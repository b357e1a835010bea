"""Read files of weights that others wrote: safetensors, or pickles of plain tensors; no code in them is run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowformer.common.errors import DataError
from flowformer.common.files import read_json

_NAMES = ("model.safetensors", "pytorch_model.bin")


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read settings and weights as transformers' ``save_pretrained`` writes them, in one file or in parts.

    Args:
        folder: Holds ``config.json``, and ``model.safetensors`` or ``pytorch_model.bin``, or the index of one.

    Returns:
        The settings, and tensors by name.

    Raises:
        FileNotFoundError: for a file that is missing.
        DataError: for a damaged file; the message names it.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}/config.json not found: expected a folder that save_pretrained wrote")
    config = _read_object(folder / "config.json")
    for name in _NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return config, {key: tensor for part in _read_parts(index) for key, tensor in read_weights(part).items()}
        if (folder / name).is_file():
            return config, read_weights(folder / name)
    raise FileNotFoundError(f"{folder} has neither {_NAMES[0]} nor {_NAMES[1]}, whole or sharded")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a file of tensors by name: safetensors, or what ``torch.save(state_dict)`` wrote.

    Raises:
        FileNotFoundError: if there is none.
        DataError: for a damaged file, or one that contains anything but tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found")
    try:
        weights = load_file(file) if file.suffix == ".safetensors" else _unpickle(file)
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if getattr(error, "filename", None) is not None:  # not the file's contents: it may not be read, for example
            raise
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise DataError(f"{file} is damaged, or holds no weights: {reason}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise DataError(f"{file} must contain tensors by name, got {type(weights).__name__}")
    other = next((name for name, value in weights.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise DataError(f"{file} must contain tensors by name, got {type(weights[other]).__name__} at {other!r}")
    return dict(weights)


def _unpickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to run the code.
        raise ValueError("it contains more than tensors, which is not read, since it could run code") from error


def _read_parts(index: Path) -> list[Path]:
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{index} must contain a weight_map from names of weights to files")
    for name in names.values():
        if Path(name).name != name:
            raise DataError(f"{index}: a part must be a file beside it, got {name!r}")
    return [index.parent / name for name in sorted(set(names.values()))]


def _read_object(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise DataError(f"{file} must contain a JSON object, got {type(found).__name__}")
    return found
