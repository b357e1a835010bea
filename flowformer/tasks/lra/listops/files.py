"""Files of ListOps as Long Range Arena publishes them: tab-separated, with the columns Source and Target."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from flowformer.common.errors import DataError
from flowformer.common.progress import progress_bar
from flowformer.tasks.downloads import make_folder, sync, writing
from flowformer.tasks.encodings import open_text
from flowformer.tasks.list_operations import END, OPERATIONS, add_parentheses, evaluate
from flowformer.tasks.lra.listops.blocks import VOCABULARY
from flowformer.tasks.lra.sequences import Splits, TokenSequences

if TYPE_CHECKING:
    from rich.console import Console

FILES: Mapping[str, str] = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
_COLUMNS = ("Source", "Target")
_DIGITS = frozenset("0123456789")
_TOKENS = {word: token for token, word in enumerate(VOCABULARY) if token}
_OPENING = np.isin(np.arange(len(VOCABULARY)), [_TOKENS[name] for name in OPERATIONS])
_CLOSING = np.arange(len(VOCABULARY)) == _TOKENS[END]
_STEPS = _OPENING.astype(np.int64) - _CLOSING
# Published lines have less than 20,000 characters; a file without line ends must not fill the memory.
_MOST_CHARACTERS = 2**24
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Row:
    """A line of a file.

    Attributes:
        line: Its number, from 1; the header is line 1.
        source: The expression.
        target: Its value, as the file has it.
    """

    line: int
    source: str
    target: str


@dataclass(frozen=True)
class Checked:
    """What :func:`check` found.

    Attributes:
        count: Number of expressions in the file.
        wrong: Number of those whose value is not what the file says, or that cannot be evaluated.
        first: The first of these, each with its line.
    """

    count: int
    wrong: int
    first: tuple[str, ...]


def read_rows(path: str | Path) -> Iterator[Row]:
    """Read a file line by line; empty lines are skipped, and other columns than Source and Target are ignored.

    Raises:
        DataError: for a file that is not there, damaged, no text, or empty, a header without these columns, and a line
            that has fewer columns than the header.
    """
    path = Path(path)
    with open_text(path) as file:
        header = _read_line(file, path, 1)
        if not header:
            raise DataError(f"{path}: the file is empty")
        columns = header.rstrip("\n").split("\t")
        if missing := [name for name in _COLUMNS if name not in columns]:
            raise DataError(
                f"{path}, line 1: no column {' and no column '.join(missing)}; expected a header with Source and "
                f"Target, separated by a tab, got {_shorten(header)}"
            )
        source, target = (columns.index(name) for name in _COLUMNS)
        line = 1
        while text := _read_line(file, path, line := line + 1):
            fields = text.rstrip("\n").split("\t")
            if fields == [""]:
                continue
            if len(fields) < len(columns):
                raise DataError(
                    f"{path}, line {line}: {len(fields)} columns, the header has {len(columns)}: {_shorten(text)}"
                )
            yield Row(line, fields[source], fields[target].strip())


def read_sequences(path: str | Path) -> Iterator[tuple[np.ndarray, int]]:
    """Read a file as tokens, (length,) uint8, and values, one line at a time.

    Parentheses are skipped wherever they are, as in the published pipeline.

    Raises:
        DataError: as :func:`read_rows`, for a line that is no expression or has no value from 0 to 9, and for a file
            without any.
    """
    count = 0
    for row in read_rows(path):
        try:
            tokens = tokenize(row.source)
            label = _find_label(row)
        except ValueError as error:
            raise DataError(f"{path}, line {row.line}: {error}") from error
        count += 1
        yield tokens, label
    if not count:
        raise DataError(f"{path}: there is a header, but no expression")


def tokenize(expression: str) -> np.ndarray:
    """Return the tokens of an expression, (length,) uint8; parentheses are none.

    Raises:
        ValueError: as :func:`flowformer.tasks.list_operations.evaluate`, except that parentheses are not checked.
    """
    words = expression.replace("(", "").replace(")", "").split()
    try:
        tokens = np.array([_TOKENS[word] for word in words], np.uint8)
    except KeyError:
        tokens = np.zeros(0, np.uint8)
    depths = np.cumsum(_STEPS[tokens])
    if (
        not len(tokens)
        or depths[-1]
        or (depths[:-1] < 1).any()
        or (_OPENING[tokens[:-1]] & _CLOSING[tokens[1:]]).any()  # no arguments
    ):
        evaluate(expression)  # says what is wrong
        raise ValueError(f"no expression: {_shorten(expression)}")
    return tokens


def detokenize(tokens: np.ndarray) -> str:
    """Return an expression in the form of the published files, with parentheses."""
    return add_parentheses([VOCABULARY[token] for token in tokens.tolist()])


def check(path: str | Path, *, most: int = 10, progress: Callable[[], object] | None = None) -> Checked:
    """Evaluate every expression of a file, parentheses included, and compare it with its value in the file.

    Args:
        path: The file.
        most: How many mismatches are described.
        progress: Called after each expression.

    Raises:
        DataError: as :func:`read_rows`.
    """
    count = wrong = 0
    first: list[str] = []
    for row in read_rows(path):
        count += 1
        if problem := _find_problem(row):
            wrong += 1
            if len(first) < most:
                first.append(f"line {row.line}: {problem}")
        if progress is not None:
            progress()
    return Checked(count, wrong, tuple(first))


def print_check(path: str | Path, console: Console) -> bool:
    """Check a file, print a summary, and return whether all of its values are right; a file without any is not.

    Raises:
        DataError: as :func:`check`.
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,.0f} expressions"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(Path(path).name, total=None)
        checked = check(path, progress=lambda: bar.advance(task))
    none = "" if checked.count else ": there is a header, but no expression"
    lines = [f"{path}: {checked.count:,} expressions, {checked.wrong:,} wrong{none}", *checked.first]
    if checked.wrong > len(checked.first):
        lines.append(f"and {checked.wrong - len(checked.first):,} more")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return checked.count > 0 and not checked.wrong


def write(folder: str | Path, splits: Splits, *, console: Console | None = None) -> Path:
    """Write all parts in the form of the published files: all of them or none.

    Lines end in CR LF, as the published program writes them.

    Args:
        folder: The folder to make. It may exist if it is empty.
        splits: As :func:`flowformer.tasks.lra.listops.generate` returns them.
        console: Where progress is shown.

    Returns:
        The folder.

    Raises:
        DataError: for a folder that contains something, or cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, expected a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} contains files, expected a new folder or an empty one")
    make_folder(folder.parent)
    with (
        writing(folder.parent),
        _replacing_folder(folder) as staged,
        progress_bar("writing", sum(map(len, splits)), console) as advance,
    ):
        for part, name in FILES.items():
            _write_file(staged / name, getattr(splits, part), advance)
    return folder


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside another one, which becomes that one at the end of the block, or is removed if it raises."""
    staged = folder.with_name(f".{folder.name}-{os.getpid()}.part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        for path in staged.iterdir():
            sync(path)
        if folder.is_dir():
            folder.rmdir()  # it is empty
        staged.replace(folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _write_file(path: Path, part: TokenSequences, advance: Callable[[int], object]) -> None:
    with path.open("w", encoding="ascii", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(_COLUMNS)
        for index in range(len(part)):
            tokens, label = part[index]
            writer.writerow((detokenize(tokens), label))
            advance(1)


def _read_line(file: IO[str], path: Path, line: int) -> str:
    text = file.readline(_MOST_CHARACTERS)
    if len(text) == _MOST_CHARACTERS:
        raise DataError(f"{path}, line {line}: longer than {_MOST_CHARACTERS:,} characters, not a file of ListOps")
    return text


def _find_label(row: Row) -> int:
    if row.target not in _DIGITS:
        raise ValueError(f"Target is {_shorten(row.target)}, expected a digit from 0 to 9")
    return int(row.target)


def _find_problem(row: Row) -> str:
    """What is wrong with a line, "" if nothing is."""
    try:
        value, label = evaluate(row.source), _find_label(row)
    except ValueError as error:
        return str(error)
    return "" if value == label else f"Target is {label}, the expression gives {value}: {_shorten(row.source)}"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")
