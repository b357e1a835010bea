"""ListOps: nested list operations of 500 to 2,000 tokens, classified by their value, a digit.

The expressions are generated here as the published program generates them, or read from the files that it wrote
(``basic_train.tsv``, ``basic_val.tsv``, ``basic_test.tsv``). Tokens are places in :data:`VOCABULARY`: 0 is padding,
digits are 1 to 10, the operations MIN, MAX, MED and SM 11 to 14, and "]" is 15. Parentheses, which the files have, are
no tokens, as in the published pipeline.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowformer.common.errors import DataError
from flowformer.common.processes import available_cpus, map_in_order
from flowformer.common.progress import progress_bar
from flowformer.tasks.lra.listops.blocks import VOCABULARY, Block, Grammar, draw_block
from flowformer.tasks.lra.listops.files import FILES, read_sequences
from flowformer.tasks.lra.sequences import Splits, open_splits, write_sequences
from flowformer.tasks.token_cache import keep

if TYPE_CHECKING:
    from rich.console import Console

CLASSES = tuple("0123456789")
SIZES: Mapping[str, int] = {"train": 96_000, "validation": 2_000, "test": 2_000}  # lra_benchmarks/data/listops.py
FOLDER = "listops-1000"  # of the published files, in lra_release
LICENCE = (
    "ListOps expressions are random; the published generator is Apache 2.0, Copyright 2021 Google LLC "
    "(google-research/long-range-arena)."
)
_TYPE = np.uint8
_MOST_FAILURES = 100  # blocks in succession that give nothing new
_DIGEST_BYTES = 16


def load(data_dir: str | Path | None = None, *, console: Console | None = None) -> Splits:
    """Load ListOps: the published files in ``data_dir``, or 96,000, 2,000 and 2,000 generated expressions.

    The files, ``basic_train.tsv``, ``basic_val.tsv`` and ``basic_test.tsv``, which may be compressed (``.gz``), are
    sought in the folder itself and in its folder ``listops-1000``. Generated expressions are those of
    :func:`generate`, seed 0. Both are kept in the folder ``tokens`` of the cache, where the second call finds them.

    Args:
        data_dir: A folder with the published files. Without it, expressions are generated.
        console: Where progress is shown.

    Returns:
        Training, validation and test part: tokens of sequences, of any length, and values, 0 to 9.

    Raises:
        DataError: for files that are not there, or are not as published; the message names the file and the line.
    """
    return generate(console=console) if data_dir is None else read(find_files(data_dir))


def find_files(data_dir: str | Path) -> dict[str, Path]:
    """Return the published files in a folder, or its folder ``listops-1000``, by part.

    Raises:
        DataError: if one is missing.
    """
    folders = (Path(data_dir), Path(data_dir) / FOLDER)
    for folder in folders:
        found = {
            part: path
            for part, name in FILES.items()
            for path in (folder / f"{name}.gz", folder / name)  # the last counts
            if path.is_file()
        }
        if len(found) == len(FILES):
            return found
    if folders[0].exists() and not folders[0].is_dir():
        raise DataError(f"{folders[0]}: a file, expected the folder with {', '.join(FILES.values())}")
    missing = [
        name
        for name in FILES.values()
        if not any((folder / one).is_file() for folder in folders for one in (name, f"{name}.gz"))
    ]
    raise DataError(
        f"ListOps: no {', '.join(missing or FILES.values())} (or .gz) in {' or '.join(map(str, folders))}. The three "
        "files are part of lra_release.gz of Long Range Arena; without a folder, expressions are generated"
    )


def read(files: Mapping[str, str | Path]) -> Splits:
    """Read the published files, each line once, into the cache.

    Args:
        files: Files by part: ``train``, ``validation`` and ``test``. Tab-separated, with a header line that has the
            columns Source and Target; compressed if they end in .gz, .bz2 or .xz.

    Raises:
        DataError: for a file that is not there, empty, damaged or no text, and for a line whose expression or value is
            wrong in form; whether values are right is what :func:`flowformer.tasks.lra.listops.files.check` tells.
        ValueError: for other parts.
    """
    if set(files) != set(FILES):
        raise ValueError(f"expected files for {', '.join(FILES)}, got {', '.join(files) or 'none'}")
    paths = {part: Path(files[part]) for part in FILES}
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}")

    def build(folder: Path) -> None:
        for part, path in paths.items():
            write_sequences(folder, part, read_sequences(path), _TYPE)

    return open_splits(keep("listops-files", paths["train"], list(paths.values()), build))


def generate(
    *,
    train: int = SIZES["train"],
    validation: int = SIZES["validation"],
    test: int = SIZES["test"],
    seed: int = 0,
    grammar: Grammar | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> Splits:
    """Generate random expressions, all different from each other, unless the cache has them.

    The same sizes, seed and grammar give the same data on every machine, with any number of workers. The test part
    depends on neither of the other sizes, and the validation part not on that of ``train``.

    Args:
        train: Number of expressions to train on.
        validation: Number of expressions to validate with.
        test: Number of expressions to test with.
        seed: Decides the expressions; not negative.
        grammar: Which expressions there are; as published if absent: at most 10 deep, 2 to 10 arguments, more than 500
            tokens and fewer than 2,000.
        workers: Processes that generate; one for each CPU if absent, and none besides this one with 1.
        console: Where progress is shown.

    Raises:
        ValueError: for sizes or ``workers`` below 1, a negative seed, or more expressions than the grammar has.
        RuntimeError: where a worker cannot start, or is killed.
    """
    # In the order in which they are drawn: test first, so that its expressions do not depend on the other sizes.
    sizes = {"test": test, "validation": validation, "train": train}
    for name, value, least in [
        *((part, size, 1) for part, size in sizes.items()),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ]:
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    grammar = grammar or Grammar()

    def build(folder: Path) -> None:
        total = sum(sizes.values())
        with (
            closing(_blocks(grammar, seed, workers or available_cpus())) as blocks,
            progress_bar("ListOps", total, console) as advance,
        ):
            expressions = _different(blocks, advance)
            for part, size in sizes.items():
                if write_sequences(folder, part, itertools.islice(expressions, size), _TYPE) < size:
                    raise ValueError(
                        f"{total:,} expressions must differ from each other, but there are too few: {grammar}"
                    )
            advance(total)

    options = {"sizes": sizes, "seed": seed, "grammar": asdict(grammar)}
    return open_splits(keep("listops", None, [], build, options=options))


def _blocks(grammar: Grammar, seed: int, workers: int) -> Generator[Block, None, None]:
    """All blocks of a seed, in order, endlessly."""
    draw = functools.partial(draw_block, grammar, seed)
    yield draw(0)  # here: a few expressions are not worth starting processes
    with closing(map_in_order(draw, itertools.count(1), workers)) as blocks:
        yield from blocks


def _different(blocks: Iterable[Block], advance: Callable[[int], object]) -> Iterator[tuple[np.ndarray, int]]:
    """The expressions and values of blocks that did not come before, until there is nothing new for long."""
    taken: set[bytes] = set()
    failures = 0
    for block in blocks:
        known = len(taken)
        for tokens, label in zip(np.split(block.tokens, np.cumsum(block.lengths))[:-1], block.labels, strict=True):
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=_DIGEST_BYTES).digest()
            if digest not in taken:
                taken.add(digest)
                yield tokens, int(label)
        advance(len(taken) - known)
        failures = failures + 1 if len(taken) == known else 0
        if failures == _MOST_FAILURES:
            return


__all__ = [
    "CLASSES", "FOLDER", "LICENCE", "SIZES", "VOCABULARY", "Grammar", "find_files", "generate", "load", "read",
]  # fmt: skip
