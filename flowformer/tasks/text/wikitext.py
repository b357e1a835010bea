"""WikiText-103, word by word: the vocabulary of its training part, the published counts."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import IO

from flowformer.common.errors import DataError
from flowformer.tasks.downloads import DATASETS, describe_missing, search_folders
from flowformer.tasks.encodings import open_text
from flowformer.tasks.parquet import find_shards, read_columns
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.tokenizers import Tokenizer, WordTokenizer, read_tokenizer
from flowformer.tasks.token_cache import keep, open_tokens, write_tokens

# Tokens of each part, with one <eos> for each line, and the vocabulary of train with <eos> and <unk>: what fairseq and
# Transformer-XL count. Words of one part are called as its files are.
COUNTS: Mapping[str, int] = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
VOCABULARY = 267_735

# Perplexity by method: the WikiText-103 table of the Flowformer paper (ICML 2022). "softmax" is the Transformer,
# "linear" the Linear Transformer, "trf" TRF-Transformer, which is RFA, and "trf-gate" the same with its gate.
PUBLISHED: Mapping[str, float] = {
    "softmax": 33.0,
    "linear": 38.4,
    "reformer": 33.6,
    "performer": 37.5,
    "trf": 33.6,
    "trf-gate": 31.3,
    "cosformer": 34.1,
    "flow-no-competition": 31.2,
    "flow-no-allocation": 32.2,
    "flow": 30.8,
}
# Their figures are those that Peng et al., "Random Feature Attention", ICLR 2021, print for the development set. The
# test perplexity of softmax attention is 34.5 there.
OF_DEVELOPMENT = ("softmax", "linear", "trf", "trf-gate")

# What is made tokens of at a time.
PIECE_CHARACTERS = 2**20


@dataclass(frozen=True)
class _Found:
    """Files in one of the forms that people have, and how to read a part's text in pieces that end where lines end."""

    files: tuple[Path, ...]
    read: Callable[[str], Iterator[str]]

    @property
    def source(self) -> str:
        """The files, for messages and results."""
        first, *others = self.files
        return f"{first.parent} ({', '.join(file.name for file in self.files)})" if others else str(first)


def load(
    data_dir: str | Path | None = None, *, check_counts: bool = True, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Load WikiText-103 from ``data_dir`` if given, else from the cache.

    It is sought as ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens``, as ``wikitext-103-v1.zip``,
    or as the parquet files of the Hugging Face hub (``train-00000-of-00002.parquet`` and so on, with a column
    ``text``); in the folder itself, and in its folders ``wikitext-103`` and ``wikitext-103-v1``. The cache is the
    folder that the environment variable FLOWFORMER_DATA names, or ``flowformer`` in the user's cache folder.

    Words are what whitespace parts; every line ends with ``<eos>``, empty ones too. The vocabulary is that of train,
    most frequent words first; a word that train lacks becomes ``<unk>``. Tokens are made once, which takes a minute or
    two, and kept in the folder ``tokens`` of the cache.

    Args:
        data_dir: The folder.
        check_counts: Whether other counts than the published ones are an error; ``False`` for a text of your own in the
            same form.
        tokenizer: The tokenizer of a run. ``None`` for the vocabulary of the training part.

    Raises:
        DataError: if it is not found, with a message how to get it; if files are damaged; if counts are
            not the published ones.
        ModuleNotFoundError: for parquet files without pyarrow.
    """
    dataset = DATASETS["wikitext"]
    folders = _search_folders(data_dir)
    found = next((found for folder in folders if (found := _find(folder))), None)
    if found is None:
        wanted = f"wiki.{{{','.join(COUNTS)}}}.tokens, {dataset.archive} or train-*.parquet"
        raise DataError(describe_missing(dataset, wanted, folders))
    folder = _tokenize(found, tokenizer)
    used = read_tokenizer(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    train, valid, test = (open_tokens(folder / f"{part}.npy") for part in COUNTS)
    if check_counts:
        _check(found.source, [len(train), len(valid), len(test)], used.vocab_size)
    return Corpus("wikitext103", used, train, valid, test, found.source, dataset.licence)


def is_here(data_dir: str | Path | None = None) -> bool:
    """Return whether :func:`load` would find the files."""
    return any(_find(folder) for folder in _search_folders(data_dir))


def _search_folders(data_dir: str | Path | None) -> list[Path]:
    folders = search_folders(DATASETS["wikitext"], data_dir)
    return [*folders, *(folder / "wikitext-103-v1" for folder in folders)]  # as a clone of the hub's repository has it


def _find(folder: Path) -> _Found | None:
    return _find_tokens(folder) or _find_zip(folder) or _find_parquet(folder)


def _find_tokens(folder: Path) -> _Found | None:
    files = {part: folder / f"wiki.{part}.tokens" for part in COUNTS}
    if not all(file.is_file() for file in files.values()):
        return None

    def read(part: str) -> Iterator[str]:
        with open_text(files[part]) as text:
            yield from _pieces(text)

    return _Found(tuple(files.values()), read)


def _find_zip(folder: Path) -> _Found | None:
    archive = folder / DATASETS["wikitext"].archive
    if not archive.is_file():
        return None

    def read(part: str) -> Iterator[str]:
        with zipfile.ZipFile(archive) as zipped, zipped.open(f"wikitext-103/wiki.{part}.tokens") as member:
            yield from _pieces(TextIOWrapper(member, encoding="utf-8-sig"))

    return _Found((archive,), read)


def _find_parquet(folder: Path) -> _Found | None:
    # The hub's name for the part that the files call valid.
    names = {"train": "train", "valid": "validation", "test": "test"}
    if not any(any(folder.glob(f"{name}-*-of-*.parquet")) for name in names.values()):
        return None
    shards = {part: find_shards(folder, name) for part, name in names.items()}
    return _Found(tuple(chain(*shards.values())), lambda part: chain.from_iterable(map(_read_parquet, shards[part])))


def _read_parquet(file: Path) -> Iterator[str]:
    for (lines,) in read_columns(file, ["text"]):
        # A row is a line, on the hub with its line feed but where it is empty.
        yield "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _pieces(text: IO[str]) -> Iterator[str]:
    while piece := text.read(PIECE_CHARACTERS):
        piece += text.readline()
        yield piece if piece.endswith("\n") else f"{piece}\n"


def _tokenize(found: _Found, ready: Tokenizer | None) -> Path:
    """The folder with the tokens of each part, and the tokenizer that made them."""

    def build(folder: Path) -> None:
        try:
            tokenizer = ready or WordTokenizer.fit(found.read("train"))
            for part in COUNTS:
                write_tokens(folder / f"{part}.npy", map(tokenizer.encode, found.read(part)), tokenizer.dtype)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, UnicodeDecodeError, RuntimeError) as error:
            raise DataError(f"{found.source} cannot be read: {type(error).__name__}: {error}") from error
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()), encoding="utf-8")

    options = {} if ready is None else {"tokenizer": ready.to_json()}
    return keep("wikitext103", found.files[0].parent, found.files, build, options=options)


def _check(source: str, counts: Iterable[int], vocabulary: int) -> None:
    came = {**dict(zip(COUNTS, counts, strict=True)), "vocabulary": vocabulary}
    wanted = {**COUNTS, "vocabulary": VOCABULARY}
    if wrong := [f"{name} {came[name]:,} instead of {wanted[name]:,}" for name in wanted if came[name] != wanted[name]]:
        raise DataError(
            f"{source}: not the tokens of WikiText-103: {', '.join(wrong)}: incomplete, or the raw version? "
            "flowformer.tasks.text.wikitext.load(folder, check_counts=False) reads your own text in the same form."
        )
