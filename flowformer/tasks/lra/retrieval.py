"""Retrieval of Long Range Arena: pairs of papers, byte by byte, which cite each other or not (Radev et al., 2013)."""

from __future__ import annotations

import hashlib
import io
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.classes import as_number
from flowformer.tasks.downloads import data_folder
from flowformer.tasks.encodings import DAMAGE, check_file, find_mark, open_binary, open_text
from flowformer.tasks.lra.sequences import TokenPairs
from flowformer.tasks.lra.texts import DTYPE, encode_bytes, read_json_lines, read_text, to_bytes
from flowformer.tasks.token_cache import keep, open_tokens, write_tokens

logger = logging.getLogger(__name__)

CLASSES = ("unrelated", "cited")
FILES: Mapping[str, str] = {
    "train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv",
}  # fmt: skip
# Pairs of the published files (Gu et al., "Efficiently Modeling Long Sequences with Structured State Spaces", 2022).
SIZES: Mapping[str, int] = {"train": 147_086, "validation": 18_090, "test": 17_437}
MOST_BYTES = 10_000  # of a text, the first ones; the published pipeline encodes no more

LICENCE = (
    "ACL Anthology Network (Radev et al. 2013), in the release of Long Range Arena "
    "(https://github.com/google-research/long-range-arena): no licence is stated for the papers."
)

_COLUMNS = ("label", "id1", "id2", "text1", "text2")
_FOLDERS = ("", "tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data")
_MOST_LINE_BYTES = 2**26  # what a compressed file unpacks to may be of any size
_TRIES = 100  # to find by chance a cited paper that another does not cite, before all are looked at

Pair = tuple[bytes, bytes, int]
Papers = Mapping[str, bytes]


def load(path: str | Path | None = None, *, check_counts: bool = True) -> tuple[TokenPairs, TokenPairs, TokenPairs]:
    """Load the published pairs from a folder with ``new_aan_pairs.train.tsv``, ``.eval.tsv`` and ``.test.tsv``.

    Their columns are label (``0.0`` or ``1.0``), two identifiers and two texts, without a header and without quoting.
    The texts are spelled there as bytes of Python (``b'...'``); as in the published pipeline, the tokens are what the
    file has, so the escapes are tokens too. Tokens are kept in the folder ``tokens`` of the cache.

    Args:
        path: The folder, or one that contains it as the release does. If absent, the folder ``aan`` of the cache, which
            is in the folder that the environment variable FLOWFORMER_DATA names, or in ``flowformer`` in the user's
            cache folder. Files may be compressed (``.gz``).
        check_counts: Whether other numbers of pairs than the published ones are an error; ``False`` for pairs of your
            own in the same form.

    Returns:
        The training, validation and test set, classes :data:`CLASSES`. A token is a byte plus 1; of a text the first
        10,000 bytes are.

    Raises:
        DataError: for files that are not there, damaged, or not in this form, with the line; for other numbers of
            pairs.
    """
    folder = data_folder("aan") if path is None else Path(path)
    files = _find(folder)

    def build(place: Path) -> None:
        _write(place, {part: _read_pairs(file) for part, file in files.items()})

    parts = _open(keep("lra-retrieval", next(iter(files.values())).parent, list(files.values()), build))
    counts = {part: len(pairs) for part, pairs in parts.items()}
    wrong = [f"{part} {counts[part]:,} instead of {SIZES[part]:,}" for part in SIZES if counts[part] != SIZES[part]]
    if check_counts and wrong:
        raise DataError(
            f"{folder}: not the published pairs: {', '.join(wrong)}: incomplete? flowformer.tasks.lra.retrieval.load"
            "(path, check_counts=False) reads pairs of your own in the same form."
        )
    return parts["train"], parts["validation"], parts["test"]


def is_here(path: str | Path | None = None) -> bool:
    """Return whether :func:`load` would find the files."""
    try:
        return bool(_find(data_folder("aan") if path is None else Path(path)))
    except DataError:
        return False


def make_pairs(
    papers: str | Path,
    citations: str | Path,
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> tuple[TokenPairs, TokenPairs | None, TokenPairs | None]:
    """Make pairs of any collection of papers with citations: as many that cite as that do not.

    The papers that cite or are cited are split first, so that no paper is in two parts: they are put in an order in
    which those linked by citations follow each other, which is then cut. Citations across a cut are left out. To each
    pair of a citing and a cited paper comes another of the same citing paper and one that others in its part cite,
    drawn at random, neither of which cites the other. (Of a paper that cites all of them, another citing paper stands
    in for it.) The same arguments give the same pairs; they are kept in the folder ``tokens`` of the cache.

    Args:
        papers: JSON lines (``.jsonl``, ``.jsonl.gz``) with the fields ``id`` (or ``acl_id``) and ``text``.
        citations: A file of two columns with a tab between: identifiers of the citing and of the cited paper. A first
            line ``citing``, ``cited`` is skipped. Of two papers that cite each other, the first citation counts.
        fractions: Of the papers, in the training, validation and test set; their sum is 1. 0 for none.
        seed: Decides the order of the papers, and which pairs do not cite.

    Returns:
        The training, validation and test set, classes :data:`CLASSES`; ``None`` where the fraction is 0. A token is a
        byte of the text in UTF-8 plus 1; of a text the first 10,000 bytes are.

    Raises:
        DataError: for files that are not there or damaged; papers without a text; a paper or a citation that is there
            twice; a citation of an unknown paper, or of itself; parts without any citation, or with fewer pairs
            that do not cite than that do.
        ValueError: for fractions that are not three of a sum of 1, or nothing to train on.
    """
    papers, citations = Path(papers), Path(citations)
    given = _check_fractions(fractions)

    def build(place: Path) -> None:
        texts = _read_papers(papers)
        cited = _read_citations(citations, texts)
        _write(place, _pair(citations, texts, cited, given, seed))

    options = {"citations": str(citations.resolve()), "fractions": given, "seed": seed}
    for file in (papers, citations):
        if not file.is_file():
            check_file(file)
            raise DataError(f"{file}: {'a folder, expected a file' if file.is_dir() else 'no such file'}")
    parts = _open(keep("retrieval", papers, [papers, citations], build, options=options))
    validation, test = (parts[part] if len(parts[part]) else None for part in ("validation", "test"))
    return parts["train"], validation, test


# ------------------------------------------------------------------------------------------------- published files


def _find(folder: Path) -> dict[str, Path]:
    places = [folder / name for name in _FOLDERS]
    for place in places:
        found = {
            part: file
            for part, name in FILES.items()
            for file in (place / name, place / f"{name}.gz")
            if file.is_file()
        }
        if missing := [FILES[part] for part in FILES if part not in found]:
            if found:
                raise DataError(f"{place}: no {' and no '.join(missing)}")
            continue
        return found
    raise DataError(
        f"{folder}: no {', '.join(FILES.values())}. They are in lra_release.gz of Long Range Arena "
        f"(https://github.com/google-research/long-range-arena), folder tsv_data: put them into {data_folder('aan')}, "
        "or into any folder, and pass that. flowformer.tasks.lra.retrieval.make_pairs makes pairs of other papers."
    )


def _read_pairs(path: Path) -> Iterator[Pair]:
    """Read the pairs of a file one by one. Texts are bytes, which need not be UTF-8."""
    try:
        with open_binary(path) as source:
            lines = source if isinstance(source, io.BufferedReader) else io.BufferedReader(source)  # pyright: ignore[reportArgumentType] - it reads bytes
            mark, encoding = find_mark(lines.peek(4)[:4])
            if encoding not in ("utf-8", "utf-8-sig"):
                raise DataError(f"{path}: in {encoding.upper()}, which its byte order mark states; expected UTF-8")
            lines.read(len(mark))
            for number, line in enumerate(iter(lambda: lines.readline(_MOST_LINE_BYTES), b""), 1):
                if line.strip(b"\r\n"):
                    yield _parse(f"{path}, line {number}", line)
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _parse(origin: str, line: bytes) -> Pair:
    if len(line) == _MOST_LINE_BYTES:
        raise DataError(f"{origin}: more than {_MOST_LINE_BYTES:,} bytes")
    values = line.rstrip(b"\r\n").split(b"\t")
    if len(values) != len(_COLUMNS):
        raise DataError(f"{origin}: expected {len(_COLUMNS)} columns, {', '.join(_COLUMNS)}, got {len(values)}")
    if empty := [name for name, value in zip(_COLUMNS, values, strict=True) if not value.strip()]:
        raise DataError(f"{origin}: {' and '.join(empty)}: empty")
    label = as_number(values[0].decode("ascii", "replace"))
    if label not in (0, 1):
        raise DataError(f"{origin}: expected a label 0 or 1, also written 0.0 or 1.0, got {values[0][:40]!r}")
    return values[3][:MOST_BYTES], values[4][:MOST_BYTES], int(label)


# --------------------------------------------------------------------------------------------------------- storage


def _write(folder: Path, parts: Mapping[str, Iterable[Pair]]) -> None:
    """Write the tokens of all different texts to one file, and of each part where the texts of its pairs are."""
    places: dict[bytes, tuple[int, int]] = {}
    rows: dict[str, list[tuple[int, ...]]] = {part: [] for part in FILES}

    def pieces() -> Iterator[np.ndarray]:
        place = 0
        for part, pairs in parts.items():
            for *texts, label in pairs:
                keys = [hashlib.blake2b(text, digest_size=16).digest() for text in texts]
                for key, text in zip(keys, texts, strict=True):
                    if key not in places:
                        places[key] = (place, place := place + len(text))
                        yield encode_bytes(text)
                rows[part].append((*places[keys[0]], *places[keys[1]], label))

    write_tokens(folder / "tokens.npy", pieces(), DTYPE)
    for part, found in rows.items():
        np.save(folder / f"{part}-rows.npy", np.array(found, np.int64).reshape(-1, 5))


def _open(folder: Path) -> dict[str, TokenPairs]:
    tokens = open_tokens(folder / "tokens.npy")
    rows = {part: np.load(folder / f"{part}-rows.npy") for part in FILES}
    return {part: TokenPairs(tokens, one[:, 0:4:2], one[:, 1:4:2], one[:, 4]) for part, one in rows.items()}


# ----------------------------------------------------------------------------------------- pairs of any collection


def _check_fractions(fractions: Sequence[float]) -> list[float]:
    given = [float(one) for one in fractions]
    if len(given) != len(FILES) or not min(given) >= 0 or abs(sum(given) - 1) > 1e-6:
        raise ValueError(f"fractions must be three numbers from 0 with a sum of 1, got {tuple(fractions)}")
    if not given[0]:
        raise ValueError(f"fractions must leave papers to train on, got {tuple(fractions)}")
    return given


def _read_papers(path: Path) -> Papers:
    texts: dict[str, bytes] = {}
    for origin, values in read_json_lines(path):
        name = read_text(origin, values, "acl_id" if "acl_id" in values and "id" not in values else "id")
        if name in texts:
            raise DataError(f"{origin}: paper {name!r} is there twice")
        texts[name] = to_bytes(origin, read_text(origin, values, "text"))[:MOST_BYTES]
    if not texts:
        raise DataError(f"{path}: no papers")
    return texts


def _read_citations(path: Path, papers: Papers) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], int] = {}
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            names = line.rstrip("\n").split("\t")
            if names == [""] or (number == 1 and [name.lower() for name in names] == ["citing", "cited"]):
                continue
            _check_citation(f"{path}, line {number}", names, papers)
            citing, cited = names
            if (citing, cited) in found:
                raise DataError(f"{path}, line {number}: as line {found[citing, cited]}: {citing} cites {cited}")
            found[citing, cited] = number
    if not found:
        raise DataError(f"{path}: no citations")
    return [(a, b) for (a, b), number in found.items() if found.get((b, a), number) >= number]


def _check_citation(origin: str, names: Sequence[str], papers: Papers) -> None:
    if len(names) != 2:
        raise DataError(f"{origin}: expected two columns, citing and cited, got {len(names)}")
    if unknown := [name for name in names if name not in papers]:
        raise DataError(f"{origin}: unknown paper {' and '.join(map(repr, unknown))}")
    if names[0] == names[1]:
        raise DataError(f"{origin}: {names[0]} cites itself")


def _pair(
    origin: Path, papers: Papers, citations: Sequence[tuple[str, str]], fractions: Sequence[float], seed: int
) -> dict[str, list[Pair]]:
    generator = np.random.default_rng(seed)
    links: dict[str, set[str]] = {}
    for citing, cited in citations:
        links.setdefault(citing, set()).add(cited)
        links.setdefault(cited, set()).add(citing)
    order = _order(links, generator)
    cuts = [round(sum(fractions[:count]) * len(order)) for count in range(len(fractions) + 1)]
    pairs: dict[str, list[Pair]] = {}
    for part, fraction, (start, stop) in zip(FILES, fractions, pairwise(cuts), strict=True):
        members = set(order[start:stop])
        cited = [pair for pair in citations if members.issuperset(pair)]
        if fraction and not cited:
            raise DataError(
                f"{origin}: no citation among the {len(members)} papers of the {part} part: enlarge its fraction, "
                f"{fraction:g}, or choose another seed than {seed}"
            )
        others = _draw(f"{origin}: {part} part", cited, links, generator)
        both = [(*pair, label) for two in zip(others, cited, strict=True) for label, pair in enumerate(two)]
        pairs[part] = [(papers[first], papers[second], label) for first, second, label in both]
    kept = sum(map(len, pairs.values())) // 2
    logger.info("%s: %d of %d citations are within a part", origin, kept, len(citations))
    return pairs


def _order(links: Mapping[str, set[str]], generator: np.random.Generator) -> list[str]:
    """Papers in a random order, but those that citations link near one another: each group breadth first."""
    order: list[str] = []
    seen: set[str] = set()
    for start in _shuffle(links, generator):
        waiting = deque([start] if start not in seen else [])
        seen.add(start)
        while waiting:
            paper = waiting.popleft()
            order.append(paper)
            found = _shuffle(links[paper] - seen, generator)
            waiting.extend(found)
            seen.update(found)
    return order


def _shuffle(names: Iterable[str], generator: np.random.Generator) -> list[str]:
    # Sorted first: the order of a set of texts is another in every process.
    ordered = sorted(names)
    return [ordered[index] for index in generator.permutation(len(ordered))]


def _draw(
    origin: str, cited: Sequence[tuple[str, str]], links: Mapping[str, set[str]], generator: np.random.Generator
) -> list[tuple[str, str]]:
    """For each pair, one of the same citing paper and a paper that others cite; no pair is drawn twice.

    Both classes have citing papers first and cited ones second, and often cited ones as often: otherwise a model could
    tell the class by one text alone.
    """
    drawn: set[frozenset[str]] = set()
    pairs: list[tuple[str, str]] = []
    firsts, seconds = ([pair[which] for pair in cited] for which in range(2))

    def find_free(first: str, candidates: Iterable[str]) -> Iterator[tuple[str, str]]:
        for second in candidates:
            if second != first and second not in links[first] and frozenset((first, second)) not in drawn:
                yield first, second

    for citing in firsts:
        guesses = [seconds[int(index)] for index in generator.integers(len(seconds), size=_TRIES)]
        found = next(find_free(citing, guesses), None)
        if found is None:
            # Of one that cites nearly all of them, what is left; else another citing paper stands in for it.
            others = [citing, *_shuffle(set(firsts), generator)]
            free = next(filter(None, (list(find_free(one, sorted(set(seconds)))) for one in others)), None)
            if free is None:
                raise DataError(
                    f"{origin}: {len(cited)} pairs that cite, but only {len(pairs)} of a citing and a cited paper "
                    "that do not: enlarge its fraction, or choose another seed"
                )
            found = free[int(generator.integers(len(free)))]
        drawn.add(frozenset(found))
        pairs.append(found)
    return pairs
