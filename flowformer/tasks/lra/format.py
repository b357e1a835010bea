"""Formats of token sequences, and of pairs of them: how they are cut, padded, and read from files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flowformer.common.errors import DataError
from flowformer.common.fields import option
from flowformer.common.values import read_flag, read_integer, read_texts
from flowformer.models.sequence import SequenceClassifier
from flowformer.tasks.encodings import check_file
from flowformer.tasks.lra.readings import READINGS, Named, Reading
from flowformer.tasks.scenes import Scene, View, find_mechanisms, locate, model_strips

_BATCH = 16  # sequences that are classified at a time
_CLASS_TOKEN = "class token"


@dataclass(frozen=True, kw_only=True)
class SequenceChoice:
    """Selection of a sequence in a file."""

    index: int = option(0, "index of the sequence in the file, from 0", at_least=0)


@dataclass(frozen=True)
class SequenceFormat:
    """Sequence format: everything needed to use a trained classifier on new sequences.

    Attributes:
        reading: What sequences are made of, a name of :data:`flowformer.tasks.lra.readings.READINGS`.
        classes: Names; class index i means ``classes[i]``.
        max_length: Tokens that a sequence is cut to.
        trim: Pad batches to their longest sequence; False pads to ``max_length``.
    """

    kind: ClassVar[str] = "sequences"
    show_options: ClassVar[type] = SequenceChoice

    reading: str
    classes: tuple[str, ...]
    max_length: int
    trim: bool = True

    def __post_init__(self) -> None:
        """Check the name of the reading.

        Raises:
            ValueError: for an unknown one.
        """
        if self.reading not in READINGS:
            raise ValueError(f"reading must be one of {', '.join(READINGS)}, got {self.reading!r}")

    @property
    def how(self) -> Reading:
        """How sequences are read."""
        return READINGS[self.reading]

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.how.vocab_size

    @property
    def item(self) -> str:
        """What one example is called."""
        return self.how.item

    @property
    def files(self) -> str:
        """Which files are accepted."""
        return self.how.files

    def collate(self, items: Sequence[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
        """Make a batch: cut sequences to ``max_length``, and pad shorter ones with token 0 on the right.

        Args:
            items: (tokens, label) pairs.

        Returns:
            "tokens": (batch, length) int64; "mask": (batch, length) bool, True = real; "y": (batch,) int64.

        Raises:
            ValueError: no items.
        """
        tokens, mask = _pad([one for one, _ in items], self.max_length, trim=self.trim)
        return {"tokens": tokens, "mask": mask, "y": _labels(items)}

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        return {
            "reading": self.reading, "classes": list(self.classes), "max_length": self.max_length, "trim": self.trim,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SequenceFormat:
        """Read a format that ``to_json`` wrote.

        Raises:
            ValueError: for values of another kind.
        """
        return cls(str(values.get("reading")), *_read(values))

    def classify_files(self, model: SequenceClassifier, paths: Sequence[Path]) -> tuple[list[str], np.ndarray]:
        """Return class probabilities of the sequences in files by a trained model.

        Args:
            model: The model, in evaluation mode.
            paths: Files as :attr:`files` says, and folders of them.

        Returns:
            Names of the sequences, and (n, classes) float64.

        Raises:
            DataError: for a path that is not there, or files that cannot be read.
        """
        found = [one for path in paths for one in self._read_file(path)]
        return _classify(model, self, [name for name, _ in found], [(tokens, 0) for _, tokens in found])

    def _read_file(self, path: Path) -> list[Named]:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        check_file(path)
        found = list(self.how.read(path, self.max_length))
        if not found:
            raise DataError(f"{path} contains no {self.item}; expected {self.files}")
        for name, tokens in found:
            if not len(tokens):
                raise DataError(f"{name}: this {self.item} is empty")
        return found

    def show(self, model: SequenceClassifier, file: Path | None, options: SequenceChoice, view: View) -> Scene:
        """Return the attention maps of a classifier for a sequence in a file.

        Raises:
            ValueError: for a sequence, query, layer or head that is not there.
            DataError: for a file that cannot be read.
        """
        if file is None:
            raise ValueError(f"a file is required: {self.files}")
        found = self._read_file(file)
        if not 0 <= options.index < len(found):
            raise ValueError(
                f"{file}: {len(found)} found, from 0 to {len(found) - 1}; got --index {options.index}"
            )  # fmt: skip
        return self.scene(model, found[options.index][1], view)

    def scene(self, model: SequenceClassifier, tokens: np.ndarray, view: View) -> Scene:
        """Return the attention maps of a classifier for a sequence.

        Args:
            model: The model, in evaluation mode.
            tokens: (length,) integers.
            view: What to show; the class token is the query if it names none, or the centre without one.

        Raises:
            ValueError: for a query, layer or head that is not there.
        """
        batch = self.collate([(tokens, 0)])
        length = int(batch["mask"].sum()) if model.mask_padding else batch["tokens"].shape[1]
        seen, first = batch["tokens"][0, :length].numpy(), int(model.class_token is not None)
        side = round(length**0.5)
        sides = (side, side) if self.how.picture and side * side == length else (length,)
        points = [locate(point, sides, class_token=bool(first)) for point in view.at or _default(first, len(sides))]
        rows = [first + int(np.ravel_multi_index(point, sides)) if point else 0 for point in points]
        names = [", ".join(map(str, point)) if point else _CLASS_TOKEN for point in points]
        places = [_place(point, sides) if point else None for point in points]
        strips = model_strips(
            model, (batch["tokens"], batch["mask"]), lambda *_: rows,
            lambda _, maps: maps[:, first:].reshape(len(maps), *sides), list(zip(names, places, strict=True)), view,
        )  # fmt: skip
        title = ", ".join(find_mechanisms(model))
        if len(sides) == 2:
            return Scene(title, strips, image=seen.reshape(*sides, 1) / 255)
        return Scene(title, strips, tokens=self.how.write(seen))


@dataclass(frozen=True)
class PairFormat:
    """Format of pairs of texts: everything needed to use a trained classifier on new pairs.

    Attributes:
        classes: Names; class index i means ``classes[i]``.
        max_length: Bytes that each text is cut to.
        trim: Pad batches to their longest text; False pads to ``max_length``.
    """

    kind: ClassVar[str] = "pairs"
    item: ClassVar[str] = "pair"
    files: ClassVar[str] = "texts, two for each pair"

    classes: tuple[str, ...]
    max_length: int
    trim: bool = True

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return READINGS["bytes"].vocab_size

    def collate(self, items: Sequence[tuple[Sequence[np.ndarray], int]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            items: (two arrays of tokens, label) pairs.

        Returns:
            "tokens": (batch, 2, length) int64; "mask": likewise, bool, True = real; "y": (batch,) int64.

        Raises:
            ValueError: no items.
        """
        texts = [text for pair, _ in items for text in pair]
        tokens, mask = (one.unflatten(0, (-1, 2)) for one in _pad(texts, self.max_length, trim=self.trim))
        return {"tokens": tokens, "mask": mask, "y": _labels(items)}

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        return {"classes": list(self.classes), "max_length": self.max_length, "trim": self.trim}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PairFormat:
        """Read a format that ``to_json`` wrote.

        Raises:
            ValueError: for values of another kind.
        """
        return cls(*_read(values))

    def classify_files(self, model: SequenceClassifier, paths: Sequence[Path]) -> tuple[list[str], np.ndarray]:
        """Return class probabilities of pairs of texts by a trained model.

        Args:
            model: The model, in evaluation mode.
            paths: Texts; the first two are a pair, the next two another.

        Returns:
            Names of the pairs, and (n, classes) float64.

        Raises:
            DataError: for an odd number of texts, or one that cannot be read.
        """
        single = SequenceFormat("bytes", self.classes, self.max_length)
        found = [one for path in paths for one in single._read_file(path)]
        if len(found) % 2:
            raise DataError(f"expected two texts for each pair, got {len(found)} texts")
        pairs = list(zip(found[0::2], found[1::2], strict=True))
        names = [f"{a}, {b}" for (a, _), (b, _) in pairs]
        return _classify(model, self, names, [((a, b), 0) for (_, a), (_, b) in pairs])


def _default(first: int, axes: int) -> tuple[tuple[float, ...], ...]:
    return ((),) if first else ((0.5,) * axes,)


def _place(point: tuple[int, ...], sides: tuple[int, ...]) -> tuple[float, ...]:
    """Where a query is drawn: a position of a sequence, shares of the sides of a picture."""
    return point if len(sides) == 1 else tuple((p + 0.5) / n for p, n in zip(point, sides, strict=True))


def _read(values: Mapping[str, Any]) -> tuple[tuple[str, ...], int, bool]:
    classes = read_texts(values, "classes", distinct=True)
    return classes, read_integer(values, "max_length"), read_flag(values, "trim")


def _pad(rows: Sequence[np.ndarray], max_length: int, *, trim: bool) -> tuple[Tensor, Tensor]:
    """Make tokens and mask of rows, (rows, length) int64 and bool; at least one position."""
    if not rows:
        raise ValueError("a batch must contain at least one sequence, got none")
    rows = [row[:max_length] for row in rows]
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), max(int(lengths.max()), 1) if trim else max_length), dtype=np.int64)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def _labels(items: Iterable[tuple[Any, int]]) -> Tensor:
    return torch.tensor([label for _, label in items], dtype=torch.int64)


def _classify(
    model: SequenceClassifier, form: SequenceFormat | PairFormat, names: list[str], items: Sequence[tuple[Any, int]]
) -> tuple[list[str], np.ndarray]:
    device = next(model.parameters()).device
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(items), _BATCH):
            batch = form.collate(items[start : start + _BATCH])
            logits = model(batch["tokens"].to(device), batch["mask"].to(device))
            pieces.append(logits.double().softmax(-1).cpu().numpy())
    probabilities = np.concatenate(pieces)
    if len(bad := np.flatnonzero(~np.isfinite(probabilities).all(axis=1))):
        raise DataError(f"{names[bad[0]]}: the model gives no finite probabilities for this {form.item}")
    return names, probabilities
