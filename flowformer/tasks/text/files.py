"""Your own text, a file or folder of files; by default a slice of Wikipedia contained in the gensim wheel."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata, util
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any

from flowformer.common.errors import DataError
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.token_cache import keep, open_bytes, open_tokens, write_tokens
from flowformer.tasks.text.tokenizers import FITTED, BytesTokenizer, Tokenizer, create_tokenizer, read_tokenizer

# Files of a folder that are taken; a file that is named itself may be called anything.
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".htm", ".html", ".xml", ".raw", ".tokens")
COMPRESSED: Mapping[str, Callable[[Path], BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
REFUSED_SUFFIXES = (".zst", ".zip", ".tar", ".tgz", ".7z", ".parquet")

# What is made of text at a time.
PIECE_BYTES = 2**20

OWN_LICENCE = "Text of your own: its terms are yours to know."
WIKIPEDIA_SLICE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKIPEDIA_LICENCE = (
    "Text of the English Wikipedia (https://en.wikipedia.org): Creative Commons Attribution-ShareAlike, and the GNU "
    "Free Documentation License; its authors are named in the histories of its articles."
)


def load(path: str | Path | None = None, *, tokenizer: str | Tokenizer = "bytes", held_out: float = 0.1) -> Corpus:
    """Load a text, the end of which becomes the test part.

    A folder is all its text files in the order of their paths, those of folders within included; hidden ones are left
    out. Files may be compressed: ``.gz``, ``.bz2``, ``.xz``. Between two of them comes a line feed, where the first
    does not end in one. Tokens are made once, and kept in the folder ``tokens`` of the cache, which is in the folder
    that the environment variable FLOWFORMER_DATA names, or in ~/.cache/flowformer.

    Args:
        path: A file or a folder. If absent, a slice of Wikipedia, 6 MB of XML, from the gensim wheel.
        tokenizer: ``"bytes"``, ``"characters"``, ``"words"``, a folder or a ``tokenizer.json`` of Hugging Face, or a
            name on its hub, which sees the text in pieces of about 1 MB, that end where lines end. Characters and words
            are those of the training part; others become one unknown token. Or a tokenizer itself, as a run has it.
        held_out: The test part: a share of the text below 1, or that many bytes. With any tokenizer but bytes it begins
            where the first line there begins, if one does, and with a whole character otherwise. 0 for none.

    Raises:
        DataError: for files that are not there, empty, damaged, or not UTF-8 where the tokenizer needs text; without
            gensim where its slice is asked for.
        ValueError: for a share that leaves nothing to train on; as
            :func:`flowformer.tasks.text.tokenizers.create_tokenizer`.
    """
    if path is None:
        path, name = _find_wikipedia(), "wikipedia-slice"
        source, licence = f"{path} (in gensim {metadata.version('gensim')})", WIKIPEDIA_LICENCE
    else:
        path = Path(path)
        name, source, licence = path.resolve().stem[:40], str(path), OWN_LICENCE
    files = _find_files(path)
    text = _join(name, path, files)
    in_bytes = tokenizer == "bytes" or isinstance(tokenizer, BytesTokenizer)
    cut = _cut(text, held_out, source, exact=in_bytes)
    whole = text.stat().st_size
    if in_bytes:
        made = BytesTokenizer()
        train, test = open_bytes(text, 0, cut), open_bytes(text, cut) if cut < whole else None
    else:
        folder = _tokenize(name, path, files, text, cut, tokenizer, {"held_out": float(held_out)})
        made = read_tokenizer(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
        train = open_tokens(folder / "train.npy")
        test = open_tokens(folder / "test.npy") if cut < whole else None
    return Corpus(name, made, train, None, test, source, licence)


def _find_wikipedia() -> Path:
    # By the module's location: importing gensim takes seconds.
    spec = util.find_spec("gensim")
    path = Path(spec.origin).parent / WIKIPEDIA_SLICE if spec and spec.origin else None
    if path is None or not path.is_file():
        what = "gensim is not installed" if path is None else f"this gensim has no {path}"
        raise DataError(
            f"without a file, the text is the slice of Wikipedia in the gensim wheel, but {what}: "
            "pip install 'flowformer[text]', or pass a file or folder of text"
        )
    return path


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in REFUSED_SUFFIXES:
            raise DataError(f"{path}: expected plain text or {', '.join(COMPRESSED)}: unpack it first")
        return [path]
    if not path.is_dir():
        raise DataError(f"file or folder {path} not found")
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and _is_text(file) and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise DataError(
            f"{path} contains no text: expected files that end in {', '.join(TEXT_SUFFIXES)}, or one of these and "
            f"{', '.join(COMPRESSED)}"
        )
    return files


def _is_text(file: Path) -> bool:
    name = file.with_suffix("") if file.suffix in COMPRESSED else file
    return name.suffix.lower() in TEXT_SUFFIXES


def _open(file: Path) -> BufferedIOBase:
    return COMPRESSED[file.suffix](file) if file.suffix in COMPRESSED else file.open("rb")


def _join(name: str, path: Path, files: Sequence[Path]) -> Path:
    """One file with the bytes of all: the file itself where it is one that is not compressed."""
    if len(files) == 1 and files[0].suffix not in COMPRESSED:
        return files[0]

    def build(folder: Path) -> None:
        with (folder / "text").open("wb") as target:
            for file in files:
                _append(file, target, last=file == files[-1])

    return keep(f"{name}-text", path, files, build) / "text"


def _append(file: Path, target: IO[bytes], *, last: bool) -> None:
    end = b"\n"
    try:
        with _open(file) as source:
            while block := source.read(PIECE_BYTES):
                target.write(block)
                end = block[-1:]
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:  # as bz2 and gzip call damage
        raise DataError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if end != b"\n" and not last:
        target.write(b"\n")


def _cut(text: Path, held_out: float, source: str, *, exact: bool) -> int:
    """Bytes of the training part."""
    whole = text.stat().st_size
    if not whole:
        raise DataError(f"{source}: the text is empty")
    if not held_out >= 0 or (held_out > 1 and held_out != int(held_out)):
        raise ValueError(f"held_out must be a fraction below 1 or a number of bytes, got {held_out}")
    cut = whole - round(held_out * whole if held_out < 1 else held_out)
    if cut <= 0:
        raise ValueError(f"held_out must leave some of {whole:,} bytes for training, got {held_out}")
    return cut if exact else _next_line(text, cut)


def _next_line(text: Path, place: int) -> int:
    """Where the first line at ``place`` or after it begins; without any, where the next character does."""
    with text.open("rb") as file:
        file.seek(place - 1)
        while line := file.readline(PIECE_BYTES):
            if line.endswith(b"\n"):
                begin = file.tell()
                # A line feed at the very end would leave nothing to hold out.
                return begin if file.read(1) else _next_character(text, place)
    return _next_character(text, place)


def _next_character(text: Path, place: int) -> int:
    with text.open("rb") as file:
        file.seek(place)
        following = file.read(4)
    # Bytes 10xxxxxx continue a UTF-8 character.
    return place + next((index for index, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _tokenize(
    name: str,
    path: Path,
    files: Sequence[Path],
    text: Path,
    cut: int,
    tokenizer: str | Tokenizer,
    options: Mapping[str, Any],
) -> Path:
    """The folder with the tokens of both parts, and the tokenizer that made them."""
    ready = tokenizer if not isinstance(tokenizer, str) else _find_tokenizer(tokenizer)
    whole = text.stat().st_size

    def build(folder: Path) -> None:
        try:
            made = ready or create_tokenizer(str(tokenizer), _pieces(text, 0, cut))
            for part, start, stop in (("train", 0, cut), ("test", cut, whole)):
                tokens = map(made.encode, _pieces(text, start, stop))
                write_tokens(folder / f"{part}.npy", tokens, made.dtype)
        except UnicodeDecodeError as error:
            raise DataError(_describe_undecodable(files, error)) from error
        (folder / "tokenizer.json").write_text(json.dumps(made.to_json()), encoding="utf-8")

    options = {**options, "tokenizer": ready.to_json() if ready else tokenizer}
    return keep(f"{name}-{ready.kind if ready else tokenizer}", path, files, build, options=options)


def _find_tokenizer(name: str) -> Tokenizer | None:
    """A tokenizer by name; None where it is fitted to the text."""
    return None if name in FITTED else create_tokenizer(name)


def _pieces(text: Path, start: int, stop: int) -> Iterator[str]:
    """The text from one byte to another, in pieces that end where lines end."""
    with text.open("rb") as file:
        file.seek(start)
        while (left := stop - file.tell()) > 0:
            piece = file.read(min(PIECE_BYTES, left))
            yield (piece + file.readline(stop - file.tell())).decode("utf-8")


def _describe_undecodable(files: Sequence[Path], error: UnicodeDecodeError) -> str:
    for file in files:
        decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
        with _open(file) as source:
            try:
                while block := source.read(PIECE_BYTES):
                    decoder.decode(block)
                    place += len(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as here:
                return f"{file} is not UTF-8 near byte {place + here.start:,}: {here.reason}; as bytes any file is read"
    return f"the text is not UTF-8: {error.reason}; as bytes any file is read"
