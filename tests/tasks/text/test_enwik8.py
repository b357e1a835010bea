"""Enwik8: the forms it comes in, its split, and what is not Enwik8."""

import hashlib
import zipfile

import numpy as np
import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.text import enwik8

pytestmark = pytest.mark.usefixtures("cache")

TEXT = bytes(range(256)) * 4
PARTS = (900, 60, 64)


@pytest.fixture
def small(monkeypatch):
    """Let a text of 1,024 bytes be Enwik8."""
    monkeypatch.setattr(enwik8, "SPLIT_SIZES", PARTS)
    monkeypatch.setattr(enwik8, "MD5", hashlib.md5(TEXT).hexdigest())


def split(text):
    return {"train": text[:900], "valid": text[900:960], "test": text[960:]}


def write(folder, form, text=TEXT):
    folder.mkdir(parents=True, exist_ok=True)
    if form == "file":
        (folder / "enwik8").write_bytes(text)
    elif form == "zip":
        with zipfile.ZipFile(folder / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("enwik8", text)
    else:
        for part, piece in split(text).items():
            (folder / f"{part}.txt.raw").write_bytes(piece)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", ["file", "zip", "split"])
@pytest.mark.parametrize("place", ["mine", "mine/enwik8", "cache/enwik8"])
def test_is_found_and_split(tmp_path, form, place):
    write(tmp_path / place, form)
    corpus = enwik8.load(tmp_path / "mine" if place.startswith("mine") else None)
    parts = [corpus.train, corpus.validation, corpus.test]
    assert [bytes(part) for part in parts] == list(split(TEXT).values())
    assert all(isinstance(part, StoredTokens) and part.dtype == np.uint8 for part in parts)
    assert (corpus.name, corpus.tokenizer.kind, corpus.tokenizer.vocab_size) == ("enwik8", "bytes", 256)
    assert str(tmp_path / place) in corpus.source
    assert "GNU Free Documentation License" in corpus.licence


def test_the_published_split():
    assert enwik8.SPLIT_SIZES == (90_000_000, 5_000_000, 5_000_000)


def test_missing_says_what_to_get_and_where_to_put_it(tmp_path, cache):
    with pytest.raises(DataError) as caught:
        enwik8.load(tmp_path / "mine")
    for part in (
        "https://mattmahoney.net/dc/enwik8.zip",
        "36,445,475 bytes",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        str(tmp_path / "mine"),
        f"put it into {cache / 'enwik8'}",
        "`flowformer data enwik8`",
        "--data-dir",
        "train.txt.raw",
    ):
        assert part in str(caught.value)


def test_a_prefix_is_not_enwik8(shared, tmp_path):
    (tmp_path / "enwik8").symlink_to(shared / "data" / "enwik8" / "enwik8_prefix")
    with pytest.raises(DataError, match=r"expected 100,000,000 bytes, got 3,500,000: incomplete"):
        enwik8.load(tmp_path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", ["file", "zip", "split"])
def test_other_text_is_refused(tmp_path, form):
    write(tmp_path, form, TEXT[1:])
    with pytest.raises(
        DataError, match=r"expected 1,024 bytes, got 1,023:|900 and 60 and 64 bytes, got 900 and 60 and 63"
    ):
        enwik8.load(tmp_path)
    write(tmp_path, form, TEXT[::-1])
    with pytest.raises(DataError, match=f"expected the MD5 {enwik8.MD5}, got"):
        enwik8.load(tmp_path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_damaged_zip_is_refused(tmp_path, cache, damage):
    write(tmp_path, "zip")
    archive = tmp_path / "enwik8.zip"
    content = bytearray(archive.read_bytes())
    if damage == "cut":
        archive.write_bytes(content[:100])
    elif damage == "changed":
        content[60] ^= 255
        archive.write_bytes(content)
    else:
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("readme", "none")
    with pytest.raises(DataError, match=r"enwik8.zip is not a zip file that contains enwik8"):
        enwik8.load(tmp_path)
    assert not [path for path in (cache / "tokens").iterdir() if path.is_dir()]


def test_published():
    assert enwik8.PUBLISHED["aft-local-24"] == 1.154
    assert enwik8.PUBLISHED["transformer"] == 1.137
    assert len(enwik8.PUBLISHED) == 9 + 9 + 2
    windows = {size: bits for size, bits in enwik8.WINDOWS.items() if size < 32}
    assert list(windows.values()) == sorted(windows.values(), reverse=True)  # up to 32, larger windows are better
    assert min(enwik8.WINDOWS.values()) > enwik8.PUBLISHED["aft-local-24"] > max(enwik8.LENGTHS.values())
