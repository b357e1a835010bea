"""Text of one's own: files and folders, compressed or not, what is held out, and every tokenizer."""

import bz2
import gzip
import lzma
import os
from importlib import util

import numpy as np
import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.text import files as text_files

pytestmark = pytest.mark.usefixtures("cache")

LINES = [f"Zeile {number % 10}: über den Fluss {number % 7}\n" for number in range(200)]
TEXT = "".join(LINES)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT.encode())
    return path


def whole(corpus):
    return corpus.tokenizer.decode(corpus.train) + corpus.tokenizer.decode(corpus.test)


def test_bytes_of_a_file_are_not_copied(file, cache):
    corpus = text_files.load(file)
    content = TEXT.encode()
    assert bytes(corpus.train) + bytes(corpus.test) == content
    assert len(corpus.test) == round(0.1 * len(content))
    assert corpus.validation is None
    assert isinstance(corpus.train, StoredTokens)
    assert corpus.train.dtype == np.uint8
    assert (corpus.name, corpus.source, corpus.tokenizer.kind) == ("mine", str(file), "bytes")
    assert not cache.exists()


@pytest.mark.parametrize("tokenizer", ["characters", "words"])
def test_other_tokens_are_made_once(file, cache, monkeypatch, tokenizer):
    corpus = text_files.load(file, tokenizer=tokenizer)
    assert corpus.tokenizer.kind == tokenizer
    assert isinstance(corpus.test, StoredTokens)
    assert not corpus.test[:].flags.writeable
    assert corpus.test.dtype == corpus.tokenizer.dtype
    monkeypatch.setattr(text_files, "_pieces", None)  # nothing is read again
    again = text_files.load(file, tokenizer=tokenizer)
    np.testing.assert_array_equal(again.train, corpus.train)
    np.testing.assert_array_equal(again.test, corpus.test)
    assert again.tokenizer.to_json() == corpus.tokenizer.to_json()
    assert len([path for path in (cache / "tokens").iterdir() if path.is_dir()]) == 1


def test_hugging_face_tokens(file, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for name, size in (("one", 300), ("two", 280)):
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator(LINES, vocab_size=size, show_progress=False)
        made.save(str(tmp_path / f"{name}.json"))
    one = text_files.load(file, tokenizer=str(tmp_path / "one.json"))
    two = text_files.load(file, tokenizer=str(tmp_path / "two.json"))
    assert len(one.train) < len(two.train) < len(TEXT)
    assert whole(one) == whole(two) == TEXT
    # Another tokenizer under the same name makes other tokens.
    (tmp_path / "two.json").replace(tmp_path / "one.json")
    again = text_files.load(file, tokenizer=str(tmp_path / "one.json"))
    np.testing.assert_array_equal(again.train, two.train)


def test_vocabulary_is_that_of_the_training_part(tmp_path):
    file = tmp_path / "text"
    file.write_text("ab a\n" * 9 + "axa c\n")
    characters = text_files.load(file, tokenizer="characters", held_out=6)
    assert characters.tokenizer.decode(characters.test) == "a\ufffda \ufffd\n"
    assert characters.tokenizer.vocab_size == len("ab \n\ufffd")
    words = text_files.load(file, tokenizer="words", held_out=6)
    assert words.tokenizer.decode(words.test) == "<unk> <unk>\n"
    assert words.tokenizer.vocab_size == len(["ab", "a", "<eos>", "<unk>"])


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 2**20])
@pytest.mark.parametrize("tokenizer", ["characters", "words"])
def test_pieces_do_not_show(file, monkeypatch, piece_bytes, tokenizer):
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    corpus = text_files.load(file, tokenizer=tokenizer)
    assert whole(corpus) == TEXT


@pytest.mark.parametrize("held_out", [0.1, 0.25, 1, 100, 5000])
def test_held_out_bytes_are_exact(file, held_out):
    size = len(TEXT.encode())
    wanted = round(held_out * size) if held_out < 1 else held_out
    assert len(text_files.load(file, held_out=held_out).test) == wanted


@pytest.mark.parametrize("held_out", [0.1, 0.25, 30, 100, 5000])
def test_held_out_text_begins_with_a_line(file, held_out):
    size = len(TEXT.encode())
    most = round(held_out * size) if held_out < 1 else held_out
    corpus = text_files.load(file, tokenizer="characters", held_out=held_out)
    test = corpus.tokenizer.decode(corpus.test)
    assert TEXT.endswith(f"\n{test}")
    assert most - max(map(len, LINES)) < len(test.encode()) <= most


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_other_shares_are_kept_beside(file, tokenizer):
    half, quarter, again = (text_files.load(file, tokenizer=tokenizer, held_out=share) for share in (0.5, 0.25, 0.5))
    assert len(half.test) > len(quarter.test)
    np.testing.assert_array_equal(again.test, half.test)


def test_a_place_where_a_line_begins_is_taken(tmp_path):
    (tmp_path / "text").write_bytes(b"there\none\nthree\n")
    corpus = text_files.load(tmp_path / "text", tokenizer="characters", held_out=6)
    assert corpus.tokenizer.decode(corpus.test) == "three\n"


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("held_out", range(4, 9))
def test_no_character_is_cut_where_no_line_begins(tmp_path, end, held_out):
    (tmp_path / "text").write_text("\n" + "川🌊" * 9 + end, encoding="utf-8")
    corpus = text_files.load(tmp_path / "text", tokenizer="characters", held_out=held_out)
    assert whole(corpus) == "\n" + "川🌊" * 9 + end
    assert 0 < len(corpus.tokenizer.decode(corpus.test).encode()) <= held_out


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_nothing_is_held_out(file, tokenizer):
    corpus = text_files.load(file, tokenizer=tokenizer, held_out=0)
    assert corpus.test is None
    assert corpus.tokenizer.decode(corpus.train) == TEXT


@pytest.mark.parametrize("held_out", [-0.1, 1.5, float("nan"), 0.99999, len(TEXT.encode()), 10**9])
def test_shares_that_mean_nothing(file, held_out):
    with pytest.raises(ValueError, match=r"held_out must .* got"):
        text_files.load(file, held_out=held_out)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_compressed_files(tmp_path, suffix, pack, tokenizer):
    file = tmp_path / f"mine.txt{suffix}"
    file.write_bytes(pack(TEXT.encode()))
    assert whole(text_files.load(file, tokenizer=tokenizer)) == TEXT
    file.write_bytes(pack(TEXT.encode())[:-20])
    with pytest.raises(DataError, match=rf"mine.txt{suffix} cannot be read: EOFError"):
        text_files.load(file, tokenizer=tokenizer)
    file.write_bytes(b"no such thing")
    with pytest.raises(DataError, match=rf"mine.txt{suffix} cannot be read"):
        text_files.load(file, tokenizer=tokenizer)


def write_folder(folder):
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "z.md").write_text("rest")
    (folder / "a.txt").write_text("first")  # no line feed at its end
    (folder / "b" / "in.txt.gz").write_bytes(gzip.compress(b"second\n"))
    (folder / "b" / "empty.txt").write_text("")
    (folder / "c.png").write_bytes(b"\x89PNG")
    (folder / ".git" / "note.txt").write_text("hidden")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


def test_a_folder_is_its_text_files_in_order(tmp_path):
    folder = write_folder(tmp_path / "own")
    for tokenizer in ("bytes", "characters"):
        corpus = text_files.load(folder, tokenizer=tokenizer, held_out=4)
        assert whole(corpus) == "first\nsecond\nrest"
        assert corpus.tokenizer.decode(corpus.test) == "rest"
    assert corpus.name == "own"


def test_a_hidden_folder_that_is_named_itself_is_read(tmp_path):
    assert whole(text_files.load(write_folder(tmp_path / ".own"))) == "first\nsecond\nrest"


def test_a_folder_that_changes_is_read_again(tmp_path, cache):
    folder = write_folder(tmp_path / "own")
    text_files.load(folder)
    (folder / "more.txt").write_text("more\n")
    assert whole(text_files.load(folder)) == "first\nsecond\nmore\nrest"
    (folder / "a.txt").unlink()
    assert whole(text_files.load(folder)) == "second\nmore\nrest"
    assert len(list((cache / "tokens").glob("own-text-*"))) == 1


def test_a_file_that_changes_is_read_again(file, cache):
    text_files.load(file, tokenizer="characters")
    file.write_text("123\n" * 10)
    os.utime(file, ns=(1, 1))
    assert text_files.load(file, tokenizer="characters").tokenizer.vocab_size == len("123\n\ufffd")
    assert len(list((cache / "tokens").glob("mine-characters-*"))) == 1


def test_a_word_on_every_file_that_does_not_do(tmp_path):
    for name in ("text.zst", "text.parquet", "text.zip"):
        (tmp_path / name).write_bytes(b"1")
        with pytest.raises(DataError, match=rf"{name}: expected plain text or .gz, .bz2, .xz"):
            text_files.load(tmp_path / name)
    with pytest.raises(DataError, match=r"contains no text: expected files that end in .txt"):
        text_files.load(tmp_path)
    with pytest.raises(DataError, match=r"file or folder .*nowhere not found"):
        text_files.load(tmp_path / "nowhere")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty.txt: the text is empty"):
        text_files.load(tmp_path / "empty.txt")


@pytest.mark.parametrize("tokenizer", ["characters", "words"])
def test_what_is_not_utf8_is_named(tmp_path, cache, tokenizer):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"richtig\n")
    (folder / "b.txt").write_bytes(b"alt\n" + "f\xfcnf\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"b.txt is not UTF-8: byte 5: .*; with --tokenizer bytes any file is read"):
        text_files.load(folder, tokenizer=tokenizer)
    assert not list((cache / "tokens").glob(f"own-{tokenizer}-*"))
    assert bytes(text_files.load(folder).test)


MARKED = {"utf-8-sig": 3, "utf-16": 2, "utf-32": 4}


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("tokenizer", ["bytes", "words", "characters"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_text(tmp_path, form, tokenizer, pack, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 101)  # cuts characters of all encodings
    file = tmp_path / ("mine.txt" if pack is bytes else "mine.txt.gz")
    file.write_bytes(pack(TEXT.encode(form)))
    assert whole(text_files.load(file, tokenizer=tokenizer)) == TEXT


@pytest.mark.parametrize("tokenizer", ["bytes", "words", "characters"])
def test_no_byte_order_mark_within_a_text_of_several_files(tmp_path, tokenizer):
    folder = tmp_path / "own"
    folder.mkdir()
    for number, form in enumerate(("utf-8", *MARKED, "utf-8-sig")):
        (folder / f"{number}.txt").write_bytes("Füße\nFluss\nein".encode(form))
    assert whole(text_files.load(folder, tokenizer=tokenizer)) == "\n".join(["Füße\nFluss\nein"] * 5)


def test_utf_16_that_is_damaged_is_named_with_its_byte(tmp_path, cache):
    (tmp_path / "own.txt").write_bytes("abc".encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"own.txt is not UTF-16, which its byte order mark states: byte 6: truncated"):
        text_files.load(tmp_path / "own.txt")
    assert not list((cache / "tokens").glob("own-*"))


def test_lines_that_end_as_on_windows_stay(tmp_path):
    (tmp_path / "own.txt").write_bytes(b"one\r\ntwo\rthree\r\n" * 9)
    for tokenizer in ("bytes", "characters"):
        assert whole(text_files.load(tmp_path / "own.txt", tokenizer=tokenizer)) == "one\r\ntwo\rthree\r\n" * 9


def test_a_text_that_becomes_shorter_while_it_is_read_is_named(file, monkeypatch):
    pieces = text_files._pieces

    def cut_first(text, start, stop):
        file.write_bytes(TEXT.encode()[:100])
        return pieces(text, start, stop)

    monkeypatch.setattr(text_files, "_pieces", cut_first)
    with pytest.raises(DataError, match=r"mine.txt has become shorter while it was read: 100 of "):
        text_files.load(file, tokenizer="words")


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes on POSIX only")
def test_names_of_files_that_are_no_utf8(tmp_path):
    for name in ("caf\udce9.txt", "caf\udce9"):
        (tmp_path / name).write_bytes(TEXT.encode())
        assert whole(text_files.load(tmp_path / name, tokenizer="words")) == TEXT


def test_what_is_neither_a_file_nor_a_folder():
    with pytest.raises(DataError, match=f"{os.devnull} is neither a file nor a folder"):
        text_files.load(os.devnull)


def test_the_slice_of_wikipedia():
    if util.find_spec("gensim") is None:
        pytest.skip("gensim is not installed")
    corpus = text_files.load()
    assert corpus.name == "wikipedia-slice"
    assert len(corpus.train) + len(corpus.test) == 6_089_746
    assert bytes(corpus.train[:10]) == b"<mediawiki"
    assert "in gensim" in corpus.source
    assert "ShareAlike" in corpus.licence


def test_without_gensim(monkeypatch, tmp_path):
    monkeypatch.setattr(text_files.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"gensim is not installed: pip install 'flowformer\[text\]', or pass a file"):
        text_files.load()
    fake = type("Spec", (), {"origin": str(tmp_path / "gensim" / "__init__.py")})
    monkeypatch.setattr(text_files.util, "find_spec", lambda name: fake)
    with pytest.raises(DataError, match=r"this gensim has no "):
        text_files.load()


def test_enwik8_prefix_as_own_text(shared):
    corpus = text_files.load(shared / "data" / "enwik8" / "enwik8_prefix", held_out=500_000)
    assert (len(corpus.train), len(corpus.test)) == (3_000_000, 500_000)
    assert bytes(corpus.train[:10]) == b"<mediawiki"
