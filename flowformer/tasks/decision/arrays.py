"""Arrays of episodes: their checks, and ``.npz`` files of a user's own."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.decision.episodes import Episodes
from flowformer.tasks.encodings import check_file

PIECE = 2**22  # numbers that are read and checked at a time
_KEYS = ("observations", "actions", "rewards")
_TERMINATED = ("terminated", "terminations", "terminals")
_OTHER_ENDS = ("timeouts", "truncated", "truncations", "dones")
_DAMAGE = (OSError, EOFError, KeyError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


class Column(Protocol):
    """An array, in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102 - NumPy's
    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102
    def __getitem__(self, rows: slice, /) -> Any: ...


def describe(values: Column) -> str:
    """Return the shape and type of an array, for messages."""
    return f"shape {values.shape}, {values.dtype}"


def describe_absent(origin: str, key: str, present: Sequence[str], wanted: Sequence[str]) -> str:
    """Return the message about a key that a file does not have."""
    some = ", ".join(sorted(present)[:20]) or "nothing"
    return f"{origin}: no {key!r}; it has {some}; expected {', '.join(wanted)}"


def pieces(values: Column, origin: str) -> Iterator[tuple[int, np.ndarray]]:
    """Read an array of numbers piece by piece: the first row of each, and its rows as float32.

    Raises:
        DataError: for what is no number, and for numbers that are not finite in float32, with their place.
    """
    if values.dtype.kind not in "biuf":
        raise DataError(f"{origin}: {describe(values)}; expected numbers")
    chunk = (getattr(values, "chunks", None) or (1,))[0]  # of a compressed file, which is read whole or not at all
    wanted = max(PIECE // max(int(np.prod(values.shape[1:])), 1), 1)
    rows = -(-wanted // chunk) * chunk
    for start in range(0, values.shape[0], rows):
        piece = np.asarray(values[start : start + rows])
        with np.errstate(over="ignore"):
            numbers = piece.astype(np.float32, copy=False)
        if not np.isfinite(numbers).all():
            place = np.argwhere(~np.isfinite(numbers))[0]
            at = ", ".join(str(index) for index in (place[0] + start, *place[1:]))
            raise DataError(f"{origin}[{at}] is {piece[tuple(place)]}; expected numbers that are finite in float32")
        yield start, numbers


def read_floats(values: Column, origin: str, into: np.ndarray | None = None) -> np.ndarray:
    """Read an array of numbers as float32, checked as by :func:`pieces`.

    Args:
        values: The array.
        origin: File and key, for messages.
        into: Where to; as many of its first rows are read as it has. ``None`` for a new array.
    """
    found = np.empty(values.shape, dtype=np.float32) if into is None else into
    for start, numbers in pieces(values, origin):
        rows = found[start : start + len(numbers)]
        rows[...] = numbers[: len(rows)]
    return found


def check_column(values: Column, steps: int, origin: str, wanted: str) -> None:
    """Raise for an array that is not of shape (steps,) or (steps, 1).

    Raises:
        DataError: naming shape and type.
    """
    if values.shape not in ((steps,), (steps, 1)):
        raise DataError(f"{origin}: {describe(values)}; expected ({steps},) {wanted}, one for each step")


def read_flags(values: Column, steps: int, origin: str) -> np.ndarray:
    """Read (steps,) bool from an array of true and false, or of ones and zeros.

    Raises:
        DataError: for another shape, and other values.
    """
    check_column(values, steps, origin, "flags")
    flags = np.asarray(values[:]).reshape(-1)
    if flags.dtype != np.bool_:
        if flags.dtype.kind not in "iuf" or not np.isin(flags, (0, 1)).all():
            raise DataError(f"{origin}: {describe(values)}; expected true and false, or 1 and 0")
        flags = flags.astype(np.bool_)
    return flags


def read_rewards(values: Column, steps: int, origin: str) -> np.ndarray:
    """Read rewards, (steps,) float32, from an array of shape (steps,) or (steps, 1); errors as :func:`pieces`."""
    check_column(values, steps, origin, "numbers")
    return read_floats(values, origin).reshape(-1)


def check_observations(values: Column, origin: str, *, steps: int | None = None) -> None:
    """Raise for an array that is not of shape (steps, size), or has other steps than wanted.

    Raises:
        DataError: naming shape and type.
    """
    shape = values.shape or ()
    if len(shape) != 2 or shape[1] < 1 or (steps is not None and shape[0] != steps):
        raise DataError(f"{origin}: {describe(values)}; expected ({'steps' if steps is None else steps}, size) numbers")
    if not shape[0]:
        raise DataError(f"{origin}: {describe(values)}: no steps")


def is_discrete(values: Column, steps: int, origin: str) -> bool:
    """Return whether actions are integers, (steps,) or (steps, 1), or else numbers, (steps, size).

    Raises:
        DataError: if they are neither.
    """
    shape = values.shape
    if values.dtype.kind in "biu" and shape in ((steps,), (steps, 1)):
        return True
    if values.dtype.kind != "f" or len(shape) != 2 or shape[0] != steps or shape[1] < 1:
        raise DataError(
            f"{origin}: {describe(values)}; expected ({steps}, size) floating-point numbers, or ({steps},) integers "
            "for discrete actions"
        )
    return False


def read_actions(values: Column, steps: int, origin: str, first: int = 0) -> np.ndarray:
    """Read actions: (steps, A) float32, or (steps,) int64 from 0 where they are integers.

    Args:
        values: The array.
        steps: How many there are to be.
        origin: File and key, for messages.
        first: The integer that becomes 0.

    Raises:
        DataError: for another shape or type, and smaller integers.
    """
    if not is_discrete(values, steps, origin):
        return read_floats(values, origin)
    actions = np.asarray(values[:]).reshape(-1).astype(np.int64)
    if actions.min() < first:
        raise DataError(f"{origin}[{actions.argmin()}] is {actions.min()}; expected discrete actions from {first}")
    return actions - first


@dataclass(frozen=True)
class Space:
    """What a source says about its environment, where it does.

    Attributes:
        environment: Its name; "" if unknown.
        action_low: Smallest action by dimension.
        action_high: Largest action by dimension.
        num_actions: Number of discrete actions.
    """

    environment: str = ""
    action_low: tuple[float, ...] | None = None
    action_high: tuple[float, ...] | None = None
    num_actions: int | None = None

    def options(self, actions: np.ndarray, origin: str) -> dict[str, Any]:
        """Return the fields of :class:`Episodes` that go with these actions.

        Raises:
            DataError: for bounds of another size, and actions beyond the number of them.
        """
        if actions.ndim == 1:
            most = int(actions.max())
            if self.num_actions is not None and most >= self.num_actions:
                raise DataError(f"{origin}: action {most}; expected 0 to {self.num_actions - 1}")
            return {"environment": self.environment, "num_actions": self.num_actions or most + 1}
        low, high = self.action_low, self.action_high
        if low is None or high is None:
            return {"environment": self.environment}
        if not len(low) == len(high) == actions.shape[1]:
            raise DataError(f"{origin}: actions of {actions.shape[1]} numbers; bounds of {len(low)} and {len(high)}")
        return {"environment": self.environment, "action_low": low, "action_high": high}

    @classmethod
    def read(cls, values: Mapping[str, Any], origin: str) -> Space:
        """Read ``environment``, ``action_low``, ``action_high`` and ``num_actions``, those that are there.

        Raises:
            DataError: for values of other types.
        """
        name = np.asarray(values.get("environment", ""))
        low, high = (_read_bounds(values, key, origin) for key in ("action_low", "action_high"))
        count = np.asarray(values.get("num_actions", 0))
        if name.size != 1 or not isinstance(name.item(), (str, bytes)):
            raise DataError(f"{origin}: environment: {name.dtype} of shape {name.shape}; expected a name")
        if count.size != 1 or count.dtype.kind not in "iu" or count < 0:
            raise DataError(f"{origin}: num_actions: {count.dtype} of shape {count.shape}; expected a whole number")
        text = name.item()
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return cls(check_name(text, origin), low, high, int(count) or None)


def check_name(name: str, origin: str) -> str:
    """Return the name of an environment that a file states, without a module, which Gymnasium would import.

    Raises:
        DataError: for anything but letters, digits, and the signs of names.
    """
    found = name.rpartition(":")[2]
    if not re.fullmatch(r"[\w./-]*", found):
        raise DataError(f"{origin}: environment {name!r:.80}; expected a name such as 'Hopper-v5'")
    return found


def _read_bounds(values: Mapping[str, Any], key: str, origin: str) -> tuple[float, ...] | None:
    if key not in values:
        return None
    bounds = np.asarray(values[key])
    if bounds.ndim != 1 or bounds.dtype.kind not in "iuf" or np.isnan(bounds).any():
        raise DataError(f"{origin}: {key}: {describe(bounds)}; expected (size,) numbers")
    return tuple(bounds.astype(np.float64).tolist())


# ------------------------------------------------------------------------------------------------------- .npz files


def read_npz(path: Path) -> Episodes:
    """Read a ``.npz`` file of one episode, or of several with ``starts``.

    Keys: ``observations``, (steps, size), or with the one after the last step, (steps + 1, size); ``actions``, (steps,
    size) floating-point numbers or (steps,) integers; ``rewards``, (steps,); ``terminated`` (or ``terminations``, or
    ``terminals``), whether the episode ended in a terminal state, once or for every step, false where it is absent.
    Optional: ``environment``, a name; ``action_low`` and ``action_high``, (size,); ``num_actions``.

    For several episodes in one file ``starts`` has the first step of each, from 0, and may end with the number of
    steps; ``terminated`` is then one flag for each episode, and observations are exactly those of the steps. Without
    ``starts``, a flag of a step before the last in ``terminated``, ``timeouts``, ``truncated`` or ``dones`` is refused.

    Raises:
        DataError: for anything else, naming key, shape and what is wanted. Nothing is unpickled.
    """
    with _open(path) as found:
        return _read(found, str(path))


def read_folder(folder: Path) -> Episodes:
    """Read the ``.npz`` files of a folder, in the order of the numbers in their names; errors as :func:`read_npz`."""
    files = sorted((file for file in folder.glob("*.npz") if not file.name.startswith(".")), key=_order)
    joined = Episodes.join([read_npz(file) for file in files])
    return Episodes(**{**vars(joined), "source": str(folder)})


def _order(path: Path) -> list[tuple[int, str]]:
    """Numbers within names as numbers: episode_2 before episode_10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d{1,18})", path.name)]


@contextmanager
def _open(path: Path) -> Iterator[dict[str, np.ndarray]]:
    check_file(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            yield _Members(path, archive)
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{path}: not a readable .npz file: {type(error).__name__}: {error}") from error


class _Members(dict[str, np.ndarray]):
    """Arrays of an archive, each read when it is asked for."""

    def __init__(self, path: Path, archive: Any) -> None:
        super().__init__(dict.fromkeys(archive.files))
        self.path, self.archive = path, archive

    def __getitem__(self, key: str) -> np.ndarray:
        try:
            values = self.archive[key]
        except _DAMAGE as error:
            pickled = "allow_pickle" in str(error)
            cause = "pickled objects, which are not read" if pickled else f"damaged: {type(error).__name__}: {error}"
            raise DataError(f"{self.path}: {key}: {cause}; expected an array of numbers") from error
        if not isinstance(values, np.ndarray):
            raise DataError(f"{self.path}: {key} is no array")
        return values

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - that would be this method


def _read(found: Mapping[str, np.ndarray], origin: str) -> Episodes:
    for key in _KEYS:
        if key not in found:
            raise DataError(describe_absent(origin, key, list(found), _KEYS))
    observations = found["observations"]
    check_observations(observations, f"{origin}: observations")
    rewards = found["rewards"]
    steps = len(rewards) if rewards.ndim else 0
    starts = _read_starts(found["starts"], steps, f"{origin}: starts") if "starts" in found else np.array([0, steps])
    extra = int("starts" not in found and len(observations) == steps + 1)
    check_observations(observations, f"{origin}: observations", steps=steps + extra)
    actions = read_actions(found["actions"], steps, f"{origin}: actions")
    return Episodes(
        read_floats(observations, f"{origin}: observations")[:steps], actions,
        read_rewards(rewards, steps, f"{origin}: rewards"), starts, _read_terminated(found, starts, origin),
        source=origin, **Space.read(found, origin).options(actions, origin),
    )  # fmt: skip


def _read_starts(values: np.ndarray, steps: int, origin: str) -> np.ndarray:
    """Return (E + 1,) int64, the last of them the number of steps."""
    if values.ndim != 1 or values.dtype.kind not in "iu" or not len(values):
        raise DataError(f"{origin}: {describe(values)}; expected (episodes,) integers")
    starts = values.astype(np.int64)
    starts = starts if starts[-1] == steps else np.append(starts, steps)
    if starts[0] != 0 or (np.diff(starts) < 1).any():
        raise DataError(f"{origin}: expected ascending numbers from 0, below the {steps:,} steps")
    return starts


def _read_terminated(found: Mapping[str, np.ndarray], starts: np.ndarray, origin: str) -> np.ndarray:
    """Return one flag for each episode."""
    episodes, key = len(starts) - 1, next((key for key in _TERMINATED if key in found), None)
    if "starts" not in found:
        _check_single(found, int(starts[-1]), origin)
    if key is None:
        return np.zeros(episodes, dtype=np.bool_)
    values = found[key]
    if "starts" in found or not values.ndim:
        return read_flags(values.reshape(-1), episodes, f"{origin}: {key}")
    return read_end(values, int(starts[-1]), f"{origin}: {key}")


def _check_single(found: Mapping[str, np.ndarray], steps: int, origin: str) -> None:
    """Raise if flags of steps tell of an end before the last step: then there are several episodes."""
    for key in (*_TERMINATED, *_OTHER_ENDS):
        if key in found and found[key].ndim:
            try:
                read_end(found[key], steps, f"{origin}: {key}")
            except DataError as error:
                raise DataError(f"{error}; of several episodes, starts has the first step of each") from error


def read_end(values: Column, steps: int, origin: str) -> np.ndarray:
    """Return, from a flag for each step of an episode, that of the last: (1,) bool.

    Raises:
        DataError: for a flag that is true before the last step, and as :func:`read_flags`.
    """
    flags = read_flags(values, steps, origin)
    if flags[:-1].any():
        raise DataError(f"{origin}[{flags.argmax()}] is true, but the episode has {steps} steps")
    return flags[-1:]
