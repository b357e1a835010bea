"""Your own text, a file or folder of files; by default a slice of Wikipedia contained in the gensim wheel."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import IO, Any

from flowformer.common.errors import DataError
from flowformer.tasks.encodings import COMPRESSED, DAMAGE, find_mark, find_undecodable, open_binary
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.tokenizers import FITTED, BytesTokenizer, Tokenizer, create_tokenizer, read_tokenizer
from flowformer.tasks.token_cache import keep, open_bytes, open_tokens, write_tokens

# Files of a folder that are taken; a file that is named itself may be called anything.
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".htm", ".html", ".xml", ".raw", ".tokens")
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
    does not end in one. A byte order mark is no part of a text; text in UTF-16 or UTF-32 that has one is converted to
    UTF-8. Tokens are made once, and kept in the folder ``tokens`` of the cache, which is in the folder that the
    environment variable FLOWFORMER_DATA names, or in ``flowformer`` in the user's cache folder.

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
        what = "is neither a file nor a folder" if path.exists() else "not found"
        raise DataError(f"file or folder {path} {what}")
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
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    return name.suffix.lower() in TEXT_SUFFIXES


def _join(name: str, path: Path, files: Sequence[Path]) -> Path:
    """One file with the bytes of all: the file itself where it is one, not compressed and without a byte order mark."""
    if len(files) == 1 and files[0].suffix.lower() not in COMPRESSED and not _mark(files[0])[0]:
        return files[0]

    def build(folder: Path) -> None:
        with (folder / "text").open("wb") as target:
            for file in files:
                _append(file, target, last=file == files[-1])

    return keep(f"{name}-text", path, files, build) / "text"


def _mark(file: Path) -> tuple[bytes, str]:
    with _reading(file), open_binary(file) as source:
        return find_mark(source.read(4))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise DataError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def _append(file: Path, target: IO[bytes], *, last: bool) -> None:
    end = b"\n"
    for block in _blocks(file):
        target.write(block)
        end = block[-1:] or end
    if end != b"\n" and not last:
        target.write(b"\n")


def _blocks(file: Path) -> Iterator[bytes]:
    """The bytes of a file without its byte order mark; of UTF-16 and UTF-32, the same text in UTF-8."""
    mark, name = _mark(file)
    decoder = None if name in ("utf-8", "utf-8-sig") else codecs.getincrementaldecoder(name)()
    with _reading(file), open_binary(file) as source:
        source.read(len(mark) if decoder is None else 0)
        while True:
            block = source.read(PIECE_BYTES)
            try:
                yield block if decoder is None else decoder.decode(block, final=not block).encode()
            except UnicodeDecodeError as error:
                raise DataError(find_undecodable(file) or f"{file}: {error}") from error
            if not block:
                return


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
            found = next(filter(None, map(find_undecodable, files)), f"the text is not UTF-8: {error.reason}")
            raise DataError(f"{found}; with --tokenizer bytes any file is read") from error
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
            if not piece:
                raise DataError(f"{text} has become shorter while it was read: {file.tell():,} of {stop:,} bytes")
            yield (piece + file.readline(stop - file.tell())).decode("utf-8")
