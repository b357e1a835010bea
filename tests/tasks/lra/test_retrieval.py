"""Pairs of papers: the published files as they are, and pairs made of any collection with citations."""

from __future__ import annotations

import gzip
import json
import pickle
from itertools import combinations
from threading import Thread

import numpy as np
import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.lra import retrieval
from flowformer.tasks.lra.sequences import TokenPairs
from flowformer.tasks.stored import StoredTokens

pytestmark = pytest.mark.usefixtures("cache")

ROWS = [
    ("1.0", "P1", "P2", r"b'Parsing\nwith \xc3\xa9 \"quotes\"'", "b'Parsing trees'"),
    ("0.0", "P1", "P3", r"b'Parsing\nwith \xc3\xa9 \"quotes\"'", '"b"'),
    ("1", "P2", "P3", "b'Parsing trees'", '"b"'),
]


def table(rows=ROWS, end="\n"):
    return "".join("\t".join(row) + end for row in rows).encode()


def write(folder, train=None, *, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name in retrieval.FILES.values():
        data = table() if train is None or "train" not in name else train
        (folder / f"{name}{'.gz' * compress}").write_bytes(gzip.compress(data) if compress else data)
    return folder


def text(tokens):
    return (np.asarray(tokens) - 1).astype(np.uint8).tobytes()


def pairs(found):
    return [(text(first), text(second), label) for (first, second), label in (found[at] for at in range(len(found)))]


def load(folder):
    return retrieval.load(folder, check_counts=False)


# ------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("place", ["mine", "mine/tsv_data", "mine/lra_release/lra_release/tsv_data", "cache/aan"])
def test_the_published_form(tmp_path, place, compress):
    write(tmp_path / place, compress=compress)
    parts = load(tmp_path / "mine" if place.startswith("mine") else None)
    for part in parts:
        assert pairs(part) == [(row[3].encode(), row[4].encode(), int(row[0] != "0.0")) for row in ROWS]
        assert part.lengths.tolist() == [[len(row[3]), len(row[4])] for row in ROWS]
        assert part.tokens.dtype == np.uint16
        assert isinstance(part.tokens, StoredTokens)
        assert len(part.tokens) == sum(len(one) for one in {one for row in ROWS for one in row[3:]})  # each text once


@pytest.mark.parametrize(
    "data",
    [b"\xef\xbb\xbf" + table(), table(end="\r\n"), table(end="\n\n"), table().rstrip(b"\n")],
    ids=["byte order mark", "CRLF", "empty lines", "no last line feed"],
)
def test_spellings(tmp_path, data):
    train, _, test = load(write(tmp_path, data))
    assert train.fingerprint() == test.fingerprint()


def test_a_text_is_cut_and_may_be_any_bytes(tmp_path):
    train = load(write(tmp_path, b"0.0\ta\tb\t" + b"x" * 10_001 + b"\t\xff\xfe\x00y\n"))[0]
    assert train.lengths.tolist() == [[10_000, 4]]
    assert train[0][0][1].tolist() == [256, 255, 1, 122]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (table() + b"1.0\tP1\ttext\n", "line 4: expected 5 columns, label, id1, id2, text1, text2, got 3"),
        (table([(*ROWS[0], "more")]), "line 1: expected 5 columns, .* got 6"),
        (table([("2.0", *ROWS[0][1:])]), r"line 1: expected a label 0 or 1, also written 0.0 or 1.0, got b'2.0'"),
        (table([("0.5", *ROWS[0][1:])]), "expected a label 0 or 1"),
        (table([("nan", *ROWS[0][1:])]), "expected a label 0 or 1"),
        (table([("label", "id1", "id2", "text1", "text2")]), "line 1: expected a label 0 or 1, .* got b'label'"),
        (table([("\u0661", *ROWS[0][1:])]), "expected a label 0 or 1"),
        (table([("", *ROWS[0][1:])]), "line 1: label: empty"),
        (table([("1.0", "", " ", *ROWS[0][3:])]), "line 1: id1 and id2: empty"),
        (table([(*ROWS[0][:4], "")]), "line 1: text2: empty"),
        (table().decode().encode("utf-16"), r"in UTF-16, which its byte order mark states; expected UTF-8"),
    ],
)
def test_wrong_lines(tmp_path, data, message):
    with pytest.raises(DataError, match=rf"new_aan_pairs\.train\.tsv.*{message}"):
        load(write(tmp_path, data))


def test_damaged_and_missing_files(tmp_path, cache, monkeypatch):
    folder = write(tmp_path / "a", compress=True)
    (folder / "new_aan_pairs.eval.tsv.gz").write_bytes(gzip.compress(table())[:-6])
    with pytest.raises(DataError, match=r"new_aan_pairs.eval.tsv.gz: cannot be read"):
        load(folder)
    (folder / "new_aan_pairs.eval.tsv.gz").unlink()
    with pytest.raises(DataError, match=r"a: no new_aan_pairs.eval.tsv$"):
        load(folder)
    with pytest.raises(DataError) as caught:
        load(None)
    for part in (str(cache / "aan"), "new_aan_pairs.train.tsv", "lra_release.gz", "make_pairs"):
        assert part in str(caught.value)
    monkeypatch.setattr(retrieval, "_MOST_LINE_BYTES", 100)
    with pytest.raises(DataError, match="line 1: more than 100 bytes"):
        load(write(tmp_path / "b", b"x" * 1_000))


def test_counts_are_checked(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="not the published pairs: train 3 instead of 147,086, validation 3 instead"):
        retrieval.load(write(tmp_path))
    monkeypatch.setattr(retrieval, "SIZES", dict.fromkeys(retrieval.FILES, 3))
    retrieval.load(tmp_path)
    with pytest.raises(DataError, match="not the published pairs: train 0 instead of 3: incomplete"):
        retrieval.load(write(tmp_path, b""))


# ------------------------------------------------------------------------------------------------------------ pairs


def test_a_subset_shares_its_tokens_and_fingerprints_tell_contents(tmp_path):
    whole = load(write(tmp_path))[0]
    assert whole.subset([2, 0]).labels.tolist() == [1, 1]
    assert pairs(whole.subset([2, 0])) == [pairs(whole)[2], pairs(whole)[0]]
    in_memory = TokenPairs(whole.tokens[:], whole.starts, whole.stops, whole.labels)
    assert in_memory.fingerprint() == whole.fingerprint() == pickle.loads(pickle.dumps(whole)).fingerprint()
    swapped = TokenPairs(whole.tokens, whole.starts[:, ::-1], whole.stops[:, ::-1], whole.labels)
    others = (whole.subset([0, 2, 1]), swapped, TokenPairs(whole.tokens, whole.starts, whole.stops, 1 - whole.labels))
    assert len({whole.fingerprint(), *(other.fingerprint() for other in others)}) == 4


# ------------------------------------------------------------------------------------------ pairs of any collection


def collection(groups=40, size=6, seed=3):
    """Groups of papers that cite each other, and one paper that takes no part."""
    generator = np.random.default_rng(seed)
    names = [[f"G{group:02}-{paper}" for paper in range(size)] for group in range(groups)]
    cited = [(group[at], group[at - 1]) for group in names for at in range(1, size)]
    cited += [(group[0], group[size - 1]) for group in names if generator.random() < 0.5]
    return [name for group in names for name in group] + ["alone"], cited


def write_collection(folder, names=None, cited=None, *, id_name="acl_id", texts=None, header="citing\tcited\n"):
    given_names, given_cited = collection()
    names, cited = given_names if names is None else names, given_cited if cited is None else cited
    folder.mkdir(parents=True, exist_ok=True)
    values = [{id_name: name, "text": (texts or {}).get(name, f"Text of {name} é")} for name in names]
    (folder / "papers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in values), encoding="utf-8")
    (folder / "cited.tsv").write_text(header + "".join(f"{a}\t{b}\n" for a, b in cited), encoding="utf-8")
    return folder / "papers.jsonl", folder / "cited.tsv"


def named(part):
    return [
        (first.decode()[8:].split(" ")[0], second.decode()[8:].split(" ")[0], label)
        for first, second, label in pairs(part)
    ]


def every(parts):
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tries", [0, 1, 100])
def test_papers_are_in_one_part_and_citations_tell_the_class(tmp_path, monkeypatch, seed, tries):
    monkeypatch.setattr(retrieval, "_TRIES", tries)
    names, cited = collection()
    linked = {frozenset(pair) for pair in cited}
    parts = [named(part) for part in every(retrieval.make_pairs(*write_collection(tmp_path), seed=seed))]
    members = [{paper for first, second, _ in part for paper in (first, second)} for part in parts]
    assert len(parts) == 3
    assert not any(one & other for one, other in combinations(members, 2))
    assert "alone" not in set.union(*members)
    for part in parts:
        assert len({frozenset(pair[:2]) for pair in part}) == len(part)
        assert [label for *_, label in part] == [0, 1] * (len(part) // 2)
        assert all((frozenset((first, second)) in linked) == bool(label) for first, second, label in part)
        assert all((first, second) in cited for first, second, label in part if label)
        # Of both classes the first papers are the same.
        assert sorted(first for first, _, label in part if label) == sorted(
            first for first, _, label in part if not label
        )
        # And the second ones are cited.
        assert {second for _, second, _ in part} == {second for _, second, label in part if label}
    kept = sum(len(part) // 2 for part in parts)
    assert len(cited) - 12 <= kept <= len(cited)  # at most those of the two groups in which the cuts are
    sizes = np.array([len(part) for part in members]) / (len(names) - 1)
    assert np.abs(sizes - (0.8, 0.1, 0.1)).max() < 0.03


def test_the_same_arguments_give_the_same_pairs_and_others_others(tmp_path, monkeypatch):
    files = write_collection(tmp_path / "a")
    found = retrieval.make_pairs(*files)[0].fingerprint()
    # Made again, and from lines in another order.
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path / "another"))
    assert retrieval.make_pairs(*files)[0].fingerprint() == found
    names, cited = collection()
    assert retrieval.make_pairs(*write_collection(tmp_path / "b", names[::-1]))[0].fingerprint() == found
    assert retrieval.make_pairs(*files, seed=1)[0].fingerprint() != found
    assert retrieval.make_pairs(*files, fractions=(0.7, 0.2, 0.1))[0].fingerprint() != found
    more = write_collection(tmp_path / "c", cited=cited[:-1])[1]
    assert retrieval.make_pairs(files[0], more)[0].fingerprint() != found
    assert len([place for place in (tmp_path / "another/tokens").iterdir() if place.is_dir()]) == 5  # all are kept


def test_texts_are_bytes_of_utf8_and_cut(tmp_path):
    names, _ = collection()
    files = write_collection(tmp_path, texts=dict.fromkeys(names, "é" * 6_000), id_name="id", header="")
    train = retrieval.make_pairs(*files)[0]
    assert train.lengths.tolist() == [[10_000, 10_000]] * len(train)
    assert train[0][0][0][:2].tolist() == [0xC3 + 1, 0xA9 + 1]
    assert len(train.tokens) == 10_000  # the text that all have is there once


def test_parts_may_be_empty_where_none_is_wanted(tmp_path):
    files = write_collection(tmp_path)
    train, validation, test = retrieval.make_pairs(*files, fractions=(1, 0, 0))
    assert (len(train), validation, test) == (2 * len(collection()[1]), None, None)
    train, validation, test = retrieval.make_pairs(*files, fractions=(0.5, 0, 0.5))
    assert validation is None
    assert test is not None


def test_two_papers_that_cite_each_other_are_one_pair(tmp_path):
    names, cited = ["a", "b", "c", "d"], [("a", "b"), ("b", "a"), ("d", "c")]
    train = retrieval.make_pairs(*write_collection(tmp_path, names, cited), fractions=(1, 0, 0))[0]
    assert sorted(pair for pair in named(train) if pair[2]) == [("a", "b", 1), ("d", "c", 1)]


@pytest.mark.parametrize("seed", range(3))
def test_of_a_paper_that_cites_all_others_stand_in(tmp_path, seed):
    cited = [("a", "x"), ("a", "y"), ("a", "z"), ("b", "x"), ("c", "y"), ("d", "z")]
    files = write_collection(tmp_path, "abcdxyz", cited)
    train = named(retrieval.make_pairs(*files, fractions=(1, 0, 0), seed=seed)[0])
    found = {(first, second) for first, second, label in train if not label}
    assert found == {("b", "y"), ("b", "z"), ("c", "x"), ("c", "z"), ("d", "x"), ("d", "y")}


@pytest.mark.parametrize(
    ("names", "cited", "message"),
    [
        ("abcd", [("a", "b"), ("x", "y")], "cited.tsv, line 3: unknown paper 'x' and 'y'"),
        ("abcd", [("a", "b"), ("c", "")], "cited.tsv, line 3: unknown paper ''"),
        ("abcd", [("a", "b"), ("c", "d"), ("a", "b")], "cited.tsv, line 4: as line 2: a cites b"),
        ("abcd", [("a", "a")], "cited.tsv, line 2: a cites itself"),
        ("abcd", [("a", "b\tc")], "cited.tsv, line 2: expected two columns, citing and cited, got 3"),
        ("abcd", [], "cited.tsv: no citations"),
        ("abca", [("a", "b")], "papers.jsonl, line 4: paper 'a' is there twice"),
        ("", [], "papers.jsonl: no papers"),
        ("ab", [("a", "b")], "train part: 1 pairs that cite, but only 0 of a citing and a cited paper that do not"),
    ],
)
def test_wrong_collections(tmp_path, names, cited, message):
    with pytest.raises(DataError, match=message):
        retrieval.make_pairs(*write_collection(tmp_path, names, cited), fractions=(1, 0, 0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "a"}', "line 1: expected a text 'text', got fields id"),
        (b'{"acl_id": "a", "text": ""}', "line 1: expected a text 'text', got ''"),
        (b'{"text": "a"}', "line 1: expected a text 'id', got fields text"),
        (b'{"id": 3, "text": "a"}', "line 1: expected a text 'id', got 3"),
        (b"{id: 3}", "line 1: not JSON"),
        (b'{"id": "a", "text": "\xe9"}', r"papers\.jsonl is not UTF-8: byte 21"),
        (b'{"id": "a", "text": "\\udc00"}', "half of a surrogate pair"),
    ],
)
def test_wrong_papers(tmp_path, line, message):
    papers, cited = write_collection(tmp_path)
    papers.write_bytes(line + b"\n")
    with pytest.raises(DataError, match=message):
        retrieval.make_pairs(papers, cited)


def test_files_that_are_not_there_or_damaged(tmp_path):
    papers, cited = write_collection(tmp_path)
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        retrieval.make_pairs(tmp_path / "none.jsonl", cited)
    with pytest.raises(DataError, match="a folder, expected a file"):
        retrieval.make_pairs(papers, tmp_path)
    (tmp_path / "papers.jsonl.gz").write_bytes(gzip.compress(papers.read_bytes())[:-6])
    with pytest.raises(DataError, match=r"papers.jsonl.gz: cannot be read"):
        retrieval.make_pairs(tmp_path / "papers.jsonl.gz", cited)
    cited.write_bytes(b"\xef\xbb\xbfciting\tcited\r\nG00-1\tG00-0\r\n\r\nG01-1\tG01-0\r\n")
    assert len(retrieval.make_pairs(papers, cited, fractions=(1, 0, 0))[0]) == 4
    cited.write_bytes(b"G00-1\tG00-0\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"cited.tsv is not UTF-8: byte 12"):
        retrieval.make_pairs(papers, cited)


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5), (0, 0.5, 0.5)]
)
def test_wrong_fractions(tmp_path, fractions):
    with pytest.raises(ValueError, match="fractions must"):
        retrieval.make_pairs(*write_collection(tmp_path), fractions=fractions)


def test_a_part_without_citations_is_said(tmp_path):
    files = write_collection(tmp_path, "abcdef", [("a", "b"), ("c", "d"), ("e", "f")])
    with pytest.raises(DataError, match=r"no citation among the 0 papers of the validation part: enlarge its fraction"):
        retrieval.make_pairs(*files)


def test_two_at_once(tmp_path, cache):
    files = write_collection(tmp_path)
    found = []
    threads = [Thread(target=lambda: found.append(retrieval.make_pairs(*files)[0].fingerprint())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1
    assert len([place for place in (cache / "tokens").iterdir() if place.is_dir()]) == 1


def test_pairs_of_the_acl_anthology(shared):
    folder = shared / "data" / "aan"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: it is not part of the repository")
    parts = every(retrieval.make_pairs(folder / "acl_papers.jsonl.gz", folder / "citation_pairs.tsv"))
    assert [np.bincount(part.labels).tolist() for part in parts] == [[288, 288], [31, 31], [31, 31]]
    assert {int(length) for part in parts for length in part.lengths.flat} == {10_000}
