"""Reviews of films as bytes: every form gives the same, and damaged or hostile files are refused in words."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.lra import imdb
from flowformer.tasks.lra.texts import encode_bytes

pytestmark = pytest.mark.usefixtures("cache")

# By file; the order of the names is not that of their numbers.
REVIEWS = {
    "train/neg/2_1.txt": "Dull.<br /><br />Very dull.",
    "train/neg/10_4.txt": "No é \u2028 plot\x00\r\n",
    "train/pos/1_10.txt": "Great 🎬!",
    "train/pos/0_7.txt": "Good",
    "test/neg/0_2.txt": "Bad\ttabs",
    "test/neg/1_2.txt": " bad ",
    "test/pos/3_8.txt": "Fine",
    "test/pos/20_9.txt": "Fine, too",
}
TRAIN = [("train/neg/2_1.txt", 0), ("train/neg/10_4.txt", 0), ("train/pos/0_7.txt", 1), ("train/pos/1_10.txt", 1)]
TEST = [("test/neg/0_2.txt", 0), ("test/neg/1_2.txt", 0), ("test/pos/3_8.txt", 1), ("test/pos/20_9.txt", 1)]
FORMS = ("folder", "tar.gz", "jsonl", "jsonl.gz", "parquet")


def rows(reviews=REVIEWS):
    return [{"file": file, "label": int("/pos/" in file), "text": text} for file, text in reviews.items()]


def lines(values, end="\n"):
    return "".join(json.dumps(value, ensure_ascii=index % 2 == 0) + end for index, value in enumerate(values)).encode()


def regular(name, data=b"x"):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member, data


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def pack(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def published(reviews=REVIEWS):
    others = {
        "aclImdb/README": "about",
        "aclImdb/train/unsup/0_0.txt": "unlabelled",
        "aclImdb/train/labeledBow.feat": "1",
    }
    files = {**others, **{f"aclImdb/{file}": text for file, text in reviews.items()}}
    return [regular(name, text.encode()) for name, text in files.items()]


def write_parquet(folder, part, texts, labels, count=1):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for index, of_shard in enumerate(np.array_split(np.arange(len(texts)), count)):
        table = pyarrow.table({"text": [texts[at] for at in of_shard], "label": [labels[at] for at in of_shard]})
        parquet.write_table(table, folder / f"{part}-{index:05}-of-{count:05}.parquet")


def write(folder, form, reviews=REVIEWS):
    """Write reviews into a folder, in a form; returns a path that names exactly them."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "folder":
        for file, text in reviews.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(text.encode())
        return folder
    if form == "parquet":
        for part, expected, count in (("train", TRAIN, 2), ("test", TEST, 1)):
            write_parquet(
                folder, part, [reviews[file] for file, _ in expected], [label for _, label in expected], count
            )
        return folder
    path = folder / ("aclImdb_v1.tar.gz" if form == "tar.gz" else f"reviews.{form}")
    data = pack(published(reviews)) if form == "tar.gz" else lines(rows(reviews))
    path.write_bytes(gzip.compress(data) if form == "jsonl.gz" else data)
    return path


def texts(sequences):
    return [(bytes((tokens - 1).astype(np.uint8)).decode(), label) for tokens, label in sequences]


def items(sequences):
    return [sequences[index] for index in range(len(sequences))]


@pytest.fixture
def small(monkeypatch):
    """Let the reviews above be those of IMDB."""
    monkeypatch.setattr(imdb, "COUNT", 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["mine", "mine/imdb", "mine/aclImdb", "cache/imdb", "cache/imdb/aclImdb"])
def test_every_form_gives_the_same(tmp_path, form, place):
    write(tmp_path / place, form)
    given = tmp_path / "mine" if place.startswith("mine") else None
    assert imdb.is_here(given)
    train, test = imdb.load(given)
    assert test is not None
    for found, expected in ((train, TRAIN), (test, TEST)):
        assert texts(items(found)) == [(REVIEWS[file], label) for file, label in expected]
        assert found.tokens.dtype == np.uint16


@pytest.mark.usefixtures("small")
def test_files_may_be_named_themselves(tmp_path):
    expected = imdb.load(write(tmp_path / "a", "folder"))[0].fingerprint()
    archive = write(tmp_path / "b", "tar.gz").read_bytes()
    (tmp_path / "b" / "mine.tgz").write_bytes(archive)
    (tmp_path / "b" / "mine.tar").write_bytes(gzip.decompress(archive))
    for path in (tmp_path / "b" / "mine.tgz", tmp_path / "b" / "mine.tar", write(tmp_path / "c", "jsonl")):
        assert imdb.load(path)[0].fingerprint() == expected


def test_a_token_is_a_byte_plus_one():
    assert encode_bytes(bytes(range(256))).tolist() == list(range(1, 257))
    assert encode_bytes(b"").shape == (0,)


def test_without_a_test_part_there_is_none(tmp_path):
    path = write(tmp_path, "jsonl", {file: REVIEWS[file] for file, _ in TRAIN})
    train, test = imdb.load(path, check_counts=False)
    assert (len(train), test) == (4, None)


def test_counts_are_checked(tmp_path, monkeypatch):
    path = write(tmp_path, "jsonl")
    with pytest.raises(DataError, match=r"train 2 negative and 2 positive; test 2 .* instead of 12,500 each"):
        imdb.load(path)
    monkeypatch.setattr(imdb, "COUNT", 2)
    imdb.load(path)
    path = write(tmp_path / "other", "jsonl", {**REVIEWS, "train/pos/5_9.txt": "More"})
    with pytest.raises(DataError, match="reviews of IMDB: train 2 negative and 3 positive, instead of 2 each"):
        imdb.load(path)
    path = write(tmp_path / "one", "jsonl", {"train/pos/5_9.txt": "Good", "test/neg/1_1.txt": "Bad"})
    with pytest.raises(DataError, match="no negative review to train on"):
        imdb.load(path, check_counts=False)


def test_a_review_that_changes_is_read_again(tmp_path):
    folder = write(tmp_path / "mine", "folder")
    assert texts(items(imdb.load(folder, check_counts=False)[0]))[2] == ("Good", 1)
    (folder / "train/pos/0_7.txt").write_text("Better", encoding="utf-8")
    assert texts(items(imdb.load(folder, check_counts=False)[0]))[2] == ("Better", 1)


def test_what_is_not_there_is_said_with_the_way_to_get_it(tmp_path, cache):
    with pytest.raises(DataError) as caught:
        imdb.load()
    for part in (
        str(cache / "imdb"),
        "flowformer data lra-text",
        "84,125,825 bytes",
        "ai.stanford.edu",
        "SHA-256 c40f",
    ):
        assert part in str(caught.value)
    assert not imdb.is_here()
    with pytest.raises(DataError, match=r"mine: no such file or folder"):
        imdb.load(tmp_path / "mine")
    (tmp_path / "mine.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"mine.csv: expected a folder, or a file that ends in .tar, .tar.gz"):
        imdb.load(tmp_path / "mine.csv")


# ------------------------------------------------------------------------------------------------- hostile archives


def read_archive(tmp_path, data):
    path = tmp_path / "mine.tar.gz"
    path.write_bytes(data)
    return imdb.load(path, check_counts=False)


@pytest.mark.parametrize(
    "name", ["/train/pos/5_9.txt", "../train/pos/5_9.txt", "a/../train/pos/5_9.txt", "a/b/train/pos/5_9.txt",
             "train/pos/../5_9.txt", "train/pos/.5_9.txt", "train/pos/._5_9.txt", "train/pos/x/5_9.txt"],
)  # fmt: skip
def test_members_elsewhere_stay_unread_and_nothing_is_unpacked(tmp_path, cache, name):
    train, _ = read_archive(tmp_path, pack([*published(), regular(name)]))
    assert len(train) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"mine.tar.gz", cache.name}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_review_that_is_a_link_or_device_is_refused(tmp_path, kind):
    with pytest.raises(DataError, match=r"mine.tar.gz: aclImdb/train/pos/5_9.txt: a link or device"):
        read_archive(tmp_path, pack([*published(), special("aclImdb/train/pos/5_9.txt", kind, "/etc/passwd")]))
    # Elsewhere they are of no interest.
    assert len(read_archive(tmp_path, pack([special("aclImdb/link", kind, "/etc/passwd"), *published()]))[0]) == 4


@pytest.mark.parametrize("damage", ["short", "shorter", "checksum", "middle", "not gzip", "empty", "not tar"])
def test_damaged_archives(tmp_path, damage):
    data = pack(
        [
            regular(f"aclImdb/train/{name}/{index}_1.txt", os.urandom(3_000))
            for index in range(9)
            for name in ("neg", "pos")
        ]
    )
    data = {
        "short": data[:-6], "shorter": data[: len(data) // 2], "checksum": data[:-8] + b"0000" + data[-4:],
        "middle": data[:20_000] + bytes(200) + data[20_200:], "not gzip": b"PK\x03\x04" + data, "empty": b"",
        "not tar": gzip.compress(b"no tar file" * 100),
    }[damage]  # fmt: skip
    with pytest.raises(DataError, match=r"mine.tar.gz: damaged archive"):
        read_archive(tmp_path, data)


def test_too_large_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "MOST_BYTES", 40)
    with pytest.raises(DataError, match="reviews of more than 40 bytes together"):
        read_archive(tmp_path, pack(published()))
    with pytest.raises(DataError, match=r"aclImdb/train/pos/5_9.txt: 41 bytes, expected a review"):
        read_archive(tmp_path, pack([regular("aclImdb/train/pos/5_9.txt", bytes(41))]))


@pytest.mark.parametrize("form", ["tar.gz", "jsonl"])
def test_a_review_twice_and_an_empty_one(tmp_path, form):
    path = write(tmp_path, form)
    again = (
        pack([*published(), regular("aclImdb/train/pos/0_7.txt")]) if form == "tar.gz" else lines([*rows(), rows()[3]])
    )
    path.write_bytes(again)
    with pytest.raises(DataError, match=r"train/pos/0_7.txt is there twice"):
        imdb.load(path, check_counts=False)
    path.write_bytes(
        pack([*published(), regular("train/pos/9_7.txt", b"")])
        if form == "tar.gz"
        else lines([{"file": "train/pos/9_7.txt", "text": ""}])
    )
    with pytest.raises(DataError, match=r"train/pos/9_7.txt: an empty review|line 1: expected a text 'text', got ''"):
        imdb.load(path, check_counts=False)


# ------------------------------------------------------------------------------------------------------- JSON lines


def read_lines(tmp_path, data, name="mine.jsonl"):
    path = tmp_path / name
    path.write_bytes(data)
    return imdb.load(path, check_counts=False)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + lines(rows()), lines(rows(), "\r\n"), lines(rows(), "\n\n"), lines(rows()).rstrip(b"\n"),
        lines(rows()).decode().encode("utf-16"),
    ],
    ids=["byte order mark", "CRLF", "empty lines", "no last line feed", "UTF-16"],
)  # fmt: skip
def test_spellings_of_json_lines(tmp_path, data):
    assert texts(items(read_lines(tmp_path, data)[0])) == [(REVIEWS[file], label) for file, label in TRAIN]


GOOD = {"file": "train/pos/1_9.txt", "label": 1, "rating": 9, "text": "Good"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lines([GOOD]) + b"{'file': 1}\n", "mine.jsonl, line 2: not JSON: "),
        (lines([GOOD]) + b'{"file": "train', "line 2: not JSON: "),
        (b"[" * 100_000, "line 1: not JSON: "),
        (b"\n[1]\n", r"line 2: expected a JSON object, got \[1\]"),
        (lines([{"text": "a", "label": 1}]), "line 1: expected a text 'file', got fields text, label"),
        (lines([{"file": "train/pos/1_9.txt"}]), "line 1: expected a text 'text', got fields file"),
        (lines([{**GOOD, "text": 3}]), "line 1: expected a text 'text', got 3"),
        (lines([{**GOOD, "text": ""}]), "line 1: expected a text 'text', got ''"),
        (lines([{**GOOD, "label": 0}]), "line 1: expected label 1, that of train/pos/1_9.txt, got 0"),
        (lines([{**GOOD, "label": None}]), "expected label 1, .* got None"),
        (lines([{**GOOD, "file": "valid/pos/1_9.txt"}]), "a file such as train/neg/0_3.txt, got 'valid/pos/1_9.txt'"),
        (lines([{**GOOD, "file": "../train/pos/1_9.txt"}]), "a file such as train/neg/0_3.txt, got '../train"),
        (b'{"file": "train/pos/1_9.txt", "text": "\\ud83c"}', "line 1: character 0 is half of a surrogate pair"),
        (lines([GOOD]) + b'{"file": "train/pos/2_9.txt", "text": "\xe9"}', "mine.jsonl is not UTF-8: byte"),
        (b"", "no negative review to train on"),
        (b"\n\n", "no negative review to train on"),
    ],
)
def test_wrong_json_lines(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        read_lines(tmp_path, data)


def test_damaged_compressed_lines(tmp_path):
    whole = gzip.compress(lines(rows()))
    for data in (whole[:-6], whole[:-8] + b"0000" + whole[-4:], lines(rows())):
        with pytest.raises(DataError, match=r"mine.jsonl.gz: cannot be read"):
            read_lines(tmp_path, data, "mine.jsonl.gz")


def test_an_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr("flowformer.tasks.lra.texts.MOST_CHARACTERS", 1_000)
    with pytest.raises(DataError, match="line 1: more than 1,000 characters"):
        read_lines(tmp_path, gzip.compress(b" " * 10_000), "mine.jsonl.gz")


# ---------------------------------------------------------------------------------------------------------- parquet


def test_wrong_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path / "a", "parquet")
    (tmp_path / "a" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"unexpected: train-00000-of-00002.parquet"):
        imdb.load(tmp_path / "a")
    for labels, message in (
        ([0, -1], "row 2: expected a text and a label 0 or 1, got 'b' and -1"),
        ([1, None], "row 2"),
    ):
        write_parquet(tmp_path, "train", ["a", "b"], labels)
        with pytest.raises(DataError, match=rf"train-00000-of-00001.parquet, {message}"):
            imdb.load(tmp_path, check_counts=False)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet cannot be read"):
        imdb.load(tmp_path, check_counts=False)
    write_parquet(tmp_path, "train", ["a", "b"], [0, 1])
    train, test = imdb.load(tmp_path / "train-00000-of-00001.parquet", check_counts=False)
    assert (texts(items(train)), test) == ([("a", 0), ("b", 1)], None)


# ------------------------------------------------------------------------------------------------ files of a folder


def test_bytes_that_are_no_utf8_stay_as_they_are(tmp_path):
    folder = write(tmp_path, "folder")
    (folder / "train/neg/2_1.txt").write_bytes(b"\xff\xfe\x00")
    assert imdb.load(folder, check_counts=False)[0][0][0].tolist() == [256, 255, 1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    folder = write(tmp_path / "mine", "folder")
    os.mkfifo(folder / "train/neg/3_1.txt")
    with pytest.raises(DataError, match=r"3_1.txt: a pipe or device"):
        imdb.load(folder, check_counts=False)
    os.mkfifo(tmp_path / "mine.jsonl")
    with pytest.raises(DataError, match=r"mine.jsonl: a pipe or device"):
        imdb.load(tmp_path / "mine.jsonl")


# Another process that loads a file when it is told to.
OTHER = """
import sys
from flowformer.tasks.lra import imdb
print("ready", flush=True)
sys.stdin.readline()
print(imdb.load(sys.argv[1], check_counts=False)[0].fingerprint())
"""


def test_two_processes_at_once(tmp_path, cache):
    path = write(tmp_path, "jsonl.gz")
    words = [sys.executable, "-c", OTHER, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        found = imdb.load(path, check_counts=False)[0].fingerprint()
        assert other.communicate()[0].strip() == found
    assert len([place for place in (cache / "tokens").iterdir() if place.is_dir()]) == 1


def test_the_published_training_set(shared):
    folder = shared / "data" / "imdb"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: it is not part of the repository")
    train, test = imdb.load(folder)
    assert test is None
    assert np.bincount(train.labels).tolist() == [12_500, 12_500]
    assert (int(train.lengths.min()), int(train.lengths.sum()), int(train.lengths.max())) == (52, 33_132_823, 13_704)
    assert bytes((train[0][0][:23] - 1).astype(np.uint8)) == b"Story of a man who has "
    assert b"<br /><br />" in bytes((train.tokens[:] - 1).astype(np.uint8))
