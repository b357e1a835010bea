"""WikiText-103: its forms, its words, its counts."""

import zipfile
from collections import Counter

import numpy as np
import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.text import wikitext

pytestmark = pytest.mark.usefixtures("cache")

TRAIN = [" \n", " = A river = \n", " \n", " The river , the <unk> , flows . \n", " It \u3000 flows\ton . \n"]
VALID = [" \n", " The sea , the river . \n"]
TEST = [" = Sea = \n", " \n"]
PARTS = {"train": TRAIN, "valid": VALID, "test": TEST}
FORMS = ("tokens", "zip", "parquet")


@pytest.fixture
def small(monkeypatch):
    """Let the text above be WikiText-103."""
    monkeypatch.setattr(wikitext, "COUNTS", {"train": 21, "valid": 8, "test": 5})
    monkeypatch.setattr(wikitext, "VOCABULARY", 12)


def write_parquet(folder, parts, *, shards=2):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for part, lines in parts.items():
        name, count = {"valid": "validation"}.get(part, part), shards if part == "train" else 1
        for index, rows in enumerate(np.array_split([line if line.strip() else "" for line in lines], count)):
            table = pyarrow.table({"text": rows.tolist()})
            parquet.write_table(table, folder / f"{name}-{index:05}-of-{count:05}.parquet")


def write(folder, form, parts=PARTS):
    folder.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        write_parquet(folder, parts)
    elif form == "zip":
        with zipfile.ZipFile(folder / "wikitext-103-v1.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
            for part, lines in parts.items():
                zipped.writestr(f"wikitext-103/wiki.{part}.tokens", "".join(lines))
    else:
        for part, lines in parts.items():
            (folder / f"wiki.{part}.tokens").write_text("".join(lines), encoding="utf-8")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["mine", "mine/wikitext-103", "mine/wikitext-103-v1", "cache/wikitext-103"])
def test_every_form_gives_the_same(tmp_path, form, place):
    write(tmp_path / place, form)
    corpus = wikitext.load(tmp_path / "mine" if place.startswith("mine") else None)
    decode = corpus.tokenizer.decode
    assert decode(corpus.train) == "\n= A river =\n\nThe river , the <unk> , flows .\nIt flows on .\n"
    assert decode(corpus.validation) == "\nThe <unk> , the river .\n"
    assert decode(corpus.test) == "= <unk> =\n\n"
    assert all(isinstance(part, StoredTokens) for part in (corpus.train, corpus.validation, corpus.test))
    assert (corpus.name, corpus.tokenizer.kind, corpus.tokenizer.vocab_size) == ("wikitext103", "words", 12)
    assert str(tmp_path / place) in corpus.source
    assert "ShareAlike" in corpus.licence


@pytest.mark.usefixtures("small")
def test_vocabulary_is_by_count_then_by_word(tmp_path):
    write(tmp_path, "tokens")
    words = wikitext.load(tmp_path).tokenizer.to_json()["words"]
    counts = Counter(word for line in TRAIN for word in [*line.split(), "<eos>"])
    assert set(words) == set(counts)
    assert words == sorted(words, key=lambda word: (-counts[word], word))
    assert words[0] == "<eos>"


def test_the_published_counts():
    assert dict(wikitext.COUNTS) == {"train": 103_227_021, "valid": 217_646, "test": 245_569}
    assert wikitext.VOCABULARY == 267_735


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_made_once(tmp_path, monkeypatch, form):
    write(tmp_path, form)
    first = wikitext.load(tmp_path)
    monkeypatch.setattr(wikitext, "write_tokens", None)
    again = wikitext.load(tmp_path)
    np.testing.assert_array_equal(again.train, first.train)
    assert again.tokenizer.to_json() == first.tokenizer.to_json()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [1, 5, 2**20])
@pytest.mark.parametrize("form", FORMS)
def test_pieces_do_not_show(tmp_path, monkeypatch, form, size):
    monkeypatch.setattr(wikitext, "PIECE_CHARACTERS", size)
    monkeypatch.setattr("flowformer.tasks.parquet.BATCH_ROWS", size)
    write(tmp_path, form)
    assert len(wikitext.load(tmp_path).train) == 21


@pytest.mark.parametrize("end", ["\n", ""])
def test_the_last_line_ends_with_or_without_a_line_feed(tmp_path, end):
    lines = [" a b \n", f" c {end}"]
    write(tmp_path, "tokens", dict.fromkeys(PARTS, lines))
    assert wikitext.load(tmp_path, check_counts=False).tokenizer.decode([0, 1]) == "\na"
    assert len(wikitext.load(tmp_path, check_counts=False).train) == 5


def test_rows_of_parquet_may_lack_their_line_feeds(tmp_path):
    write_parquet(tmp_path, {part: ["a b", "", "c"] for part in PARTS})
    corpus = wikitext.load(tmp_path, check_counts=False)
    assert corpus.tokenizer.decode(corpus.test) == "a b\n\nc\n"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("train", "train 16 instead of 21, vocabulary 10 instead of 12"),
        ("valid", "valid 1 instead of 8"),
        ("test", "test 4 instead of 5"),
    ],
)
def test_what_is_cut_short_is_refused(tmp_path, form, part, message):
    write(tmp_path, form, {**PARTS, part: PARTS[part][:-1]})
    with pytest.raises(DataError, match=rf"not the tokens of WikiText-103: {message}: incomplete"):
        wikitext.load(tmp_path)
    assert len(wikitext.load(tmp_path, check_counts=False).train) > 0
    with pytest.raises(DataError, match=message):  # what was made for others does not pass either
        wikitext.load(tmp_path)
    write(tmp_path, form)
    assert len(wikitext.load(tmp_path).test) == 5


def test_missing_says_what_to_get_and_where_to_put_it(tmp_path, cache):
    write(tmp_path / "mine", "tokens", {"train": TRAIN, "valid": VALID})
    with pytest.raises(DataError) as caught:
        wikitext.load(tmp_path / "mine")
    for part in (
        "no wiki.{train,valid,test}.tokens, wikitext-103-v1.zip or train-*.parquet",
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        "190,229,076 bytes",
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        str(tmp_path / "mine"),
        f"put it into {cache / 'wikitext-103'}",
        "`flowformer data wikitext`",
        "--data-dir",
    ):
        assert part in str(caught.value)


def test_missing_parquet_files_are_named(tmp_path):
    write(tmp_path, "parquet")
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"expected train-00000-of-00002.parquet, train-00001.*unexpected: train-00000"):
        wikitext.load(tmp_path)
    write(tmp_path, "parquet")
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"unexpected: test-00000-of-00001.parquet"):
        wikitext.load(tmp_path)


def test_damaged_files_are_named(tmp_path, cache):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write(tmp_path / "a", "zip")
    archive = tmp_path / "a" / "wikitext-103-v1.zip"
    archive.write_bytes(archive.read_bytes()[:50])
    write(tmp_path / "b", "parquet")
    (tmp_path / "b" / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    write(tmp_path / "c", "parquet")
    parquet.write_table(pyarrow.table({"line": [""]}), tmp_path / "c" / "test-00000-of-00001.parquet")
    write(tmp_path / "d", "tokens")
    (tmp_path / "d" / "wiki.valid.tokens").write_bytes(b"\xff\n")
    for folder, message in {
        "a": r"wikitext-103-v1.zip cannot be read: BadZipFile",
        "b": r"train-00001-of-00002.parquet cannot be read",
        "c": r"test-00000-of-00001.parquet has no column text; available: line",
        "d": r"wiki.valid.tokens is not UTF-8: byte 0: invalid start byte",
    }.items():
        with pytest.raises(DataError, match=message):
            wikitext.load(tmp_path / folder, check_counts=False)
    assert not [path for path in (cache / "tokens").iterdir() if path.is_dir()]


def test_tokens_of_the_real_validation_part(shared, tmp_path):
    for part in PARTS:
        (tmp_path / f"wiki.{part}.tokens").symlink_to(shared / "data" / "wikitext" / "wiki103.valid.tokens")
    corpus = wikitext.load(tmp_path, check_counts=False)
    assert len(corpus.validation) == wikitext.COUNTS["valid"] == 217_646
    text = corpus.tokenizer.decode(corpus.validation[:40])
    assert text.startswith("\n= Homarus gammarus =\n\nHomarus gammarus , known as the European lobster")
    assert int((corpus.validation == 0).sum()) > 3760  # one <eos> for each line; the most frequent are "the" and ","


def test_published():
    assert wikitext.PUBLISHED["flow"] == min(wikitext.PUBLISHED.values()) == 30.8
    assert (wikitext.PUBLISHED["softmax"], wikitext.PUBLISHED["linear"]) == (33.0, 38.4)
    assert len(wikitext.PUBLISHED) == 10
