"""How long the sequences of a data set are, and how frequent its classes: tables in plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flowformer.tasks.lra.sequences import TokenSequences

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent
_BINS = 12
_BAR = 40  # characters


def describe(parts: Mapping[str, TokenSequences], classes: Sequence[str]) -> str:
    """Return three tables: quantiles of lengths, a histogram of lengths, and shares of classes, of each part.

    Args:
        parts: By name; the histogram is that of the first.
        classes: Names of the classes.

    Raises:
        ValueError: for no part, or a part without sequences.
    """
    if not parts or not all(map(len, parts.values())):
        raise ValueError("expected parts with sequences, got none")
    first, sequences = next(iter(parts.items()))
    return "\n\n".join(
        (
            _align([["part", "sequences", "mean", *(f"{share} %" for share in _QUANTILES)], *_lengths(parts)]),
            _align([[f"tokens ({first})", "sequences", ""], *_histogram(sequences.lengths)]),
            _align([["part", *(f"class {name}" for name in classes)], *_shares(parts, len(classes))]),
        )
    )


def _lengths(parts: Mapping[str, TokenSequences]) -> list[list[str]]:
    return [
        [
            name,
            f"{len(part):,}",
            f"{part.lengths.mean():,.1f}",
            *(f"{length:,.0f}" for length in np.percentile(part.lengths, _QUANTILES)),
        ]
        for name, part in parts.items()
    ]


def _histogram(lengths: np.ndarray) -> list[list[str]]:
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high + 1 - low) // _BINS)
    counts = np.bincount((lengths - low) // width)
    return [
        [f"{start:,} to {start + width - 1:,}", f"{count:,}", "#" * round(_BAR * count / counts.max())]
        for start, count in zip(range(low, high + 1, width), counts.tolist(), strict=True)
    ]


def _shares(parts: Mapping[str, TokenSequences], count: int) -> list[list[str]]:
    return [
        [name, *(f"{100 * share:.1f} %" for share in np.bincount(part.labels, minlength=count) / len(part))]
        for name, part in parts.items()
    ]


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first flush left, numbers flush right; a bar is the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if not place or cell.startswith("#") else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
