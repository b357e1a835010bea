"""Fingerprints of data: sizes and hashes, by which a run recognises the data that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flowformer.tasks.protocols import Task

_PIECE = 2**24  # elements that are hashed at a time


def fingerprints(task: Task) -> dict[str, dict[str, Any]]:
    """Return the fingerprint of every part of a task, by name: ``"size"`` and ``"sha256"``.

    A part with a method ``fingerprint`` is hashed by it. Of any other all items are hashed, as its data set gives them.
    """
    parts = {"train": task.train, "test": task.test, **task.evaluated}
    return {
        name: {"size": len(part), "sha256": _hash(part)} for name, part in parts.items() if part is not None
    }  # fmt: skip


def describe_changes(before: Any, now: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what changed between two results of :func:`fingerprints`; "" if nothing did."""
    if not isinstance(before, Mapping):
        return "format.json has no readable fingerprint of it"
    return "; ".join(
        filter(None, (_describe_change(name, before.get(name), now.get(name)) for name in {**before, **now}))
    )


def _describe_change(name: str, before: Any, now: Any) -> str:
    if before == now:
        return ""
    if not isinstance(before, Mapping) or now is None:
        return f"its {name} set is {'missing' if now is None else 'new'}"
    if before.get("size") != now["size"]:
        return f"its {name} set had {before.get('size')} examples and has {now['size']}"
    return f"its {name} set has the same size, {now['size']}, and other contents"


def _hash(part: Any) -> str:
    method = getattr(part, "fingerprint", None)
    return method() if method is not None else hash_values(part[index] for index in range(len(part)))


def hash_values(values: Iterable[Any]) -> str:
    """Return the SHA-256 of arrays, numbers and texts, and of sequences of them, in hexadecimal."""
    digest = hashlib.sha256()
    for value in values:
        _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        digest.update(f"sequence {len(value)}".encode())
        for one in value:
            _update(digest, one)
    elif isinstance(value, (str, bytes)):
        data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        digest.update(f"text {len(data)}".encode())
        digest.update(data)
    else:
        # Tokens in a file have a type too, and are read piece by piece.
        array = value if isinstance(getattr(value, "dtype", None), np.dtype) else np.asarray(value)
        digest.update(f"array {array.dtype.str} {array.shape}".encode())
        flat = array if array.ndim == 1 else array.reshape(-1)
        for start in range(0, len(flat), _PIECE):
            digest.update(np.ascontiguousarray(flat[start : start + _PIECE]).data)
