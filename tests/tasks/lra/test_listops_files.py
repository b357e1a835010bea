"""Files of ListOps in the published form: reading, checking and writing them, and what is wrong with others."""

import gzip
import io
import shutil

import numpy as np
import pytest
from rich.console import Console

from flowformer.common.errors import DataError
from flowformer.tasks.lra import listops
from flowformer.tasks.lra.listops import Grammar, generate, load
from flowformer.tasks.lra.listops.files import check, detokenize, print_check, read_sequences, tokenize, write

pytestmark = pytest.mark.usefixtures("cache")

SHORT = Grammar(max_depth=4, max_args=4, min_length=5, max_length=30)
HEADER = "Source\tTarget\r\n"
GOOD = "( ( ( [MAX 4 ) 3 ) ] )\t4\r\n"


@pytest.fixture
def splits():
    return generate(train=40, validation=20, test=20, grammar=SHORT, workers=1)


@pytest.fixture
def published(splits, tmp_path):
    return write(tmp_path / "published", splits)


def save(tmp_path, content):
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fingerprints(splits):
    return [part.fingerprint() for part in splits]


def test_tokens():
    assert tokenize("( ( ( [MAX 4 ) 3 ) ] )").tolist() == [12, 5, 4, 15]
    assert tokenize("[SM 0 [MED 9 ] [MIN 1 ] ]").tolist() == [14, 1, 13, 10, 15, 11, 2, 15, 15]
    assert tokenize("7").tolist() == [8]
    assert detokenize(np.array([12, 5, 4, 15], np.uint8)) == "( ( ( [MAX 4 ) 3 ) ] )"


def test_written_files_have_the_published_form(published, splits):
    assert sorted(path.name for path in published.iterdir()) == ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv"]
    header, *lines = (published / "basic_val.tsv").read_bytes().split(b"\r\n")
    assert header == b"Source\tTarget"
    assert lines.pop() == b""
    assert [line.split(b"\t")[1] for line in lines] == [b"%d" % label for label in splits.validation.labels]
    assert all(line.startswith(b"( ( ( [") for line in lines if line.count(b"]") == 1 and line.count(b"(") == 3)


def test_written_files_are_read_as_they_were_generated(published, splits, monkeypatch):
    assert fingerprints(load(published)) == fingerprints(splits)
    monkeypatch.setattr(listops, "read_sequences", None)
    again = load(published)
    assert fingerprints(again) == fingerprints(splits)
    assert again.train.labels.dtype == np.int64


def test_files_are_found_in_the_folder_of_the_release_and_compressed(published, splits, tmp_path):
    shutil.copytree(published, tmp_path / "release" / "listops-1000")
    assert fingerprints(load(tmp_path / "release")) == fingerprints(splits)
    (tmp_path / "small").mkdir()
    for path in published.iterdir():
        (tmp_path / "small" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert fingerprints(load(tmp_path / "small")) == fingerprints(splits)
    files = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
    named = {part: tmp_path / "small" / f"{name}.gz" for part, name in files.items()}
    assert fingerprints(listops.read(named)) == fingerprints(splits)


def test_a_file_that_changes_is_read_again(published, splits):
    load(published)
    content = (published / "basic_test.tsv").read_bytes()
    (published / "basic_test.tsv").write_bytes(content + GOOD.encode())
    assert len(load(published).test) == 21


def test_missing_files(published, tmp_path):
    with pytest.raises(
        DataError, match=r"no basic_train.tsv, basic_val.tsv, basic_test.tsv .*elsewhere or .*listops-1000"
    ):
        load(tmp_path / "elsewhere")
    (published / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"no basic_val.tsv \(or .* expressions are generated"):
        load(published)
    with pytest.raises(DataError, match=r"basic_train.tsv: a file, expected the folder with"):
        load(published / "basic_train.tsv")
    with pytest.raises(DataError, match=r"absent: no such file"):
        listops.read(dict.fromkeys(("train", "validation", "test"), tmp_path / "absent"))
    with pytest.raises(DataError, match=r"published: not a file"):
        listops.read(dict.fromkeys(("train", "validation", "test"), published))
    with pytest.raises(ValueError, match=r"expected files for train, validation, test, got train"):
        listops.read({"train": published / "basic_train.tsv"})


@pytest.mark.parametrize(
    "content",
    [
        HEADER + GOOD,
        (HEADER + GOOD).replace("\r", ""),  # line feeds alone
        (HEADER + GOOD)[:-2],  # no line end at the end
        "\ufeff" + HEADER + GOOD,
        (HEADER + GOOD).encode("utf-16"),
        HEADER + "\r\n" + GOOD + "\r\n",  # empty lines
        "Target\tSource\r\n4\t( ( ( [MAX 4 ) 3 ) ] )\r\n",
        "id\tSource\tnote\tTarget\r\n7\t[MAX 4 3 ]\t\t 4 \r\n",
        HEADER + "((( [MAX 4 ) 3) ] )\t4\n",  # parentheses without spaces: the published pipeline drops them too
    ],
)
def test_forms_that_are_understood(tmp_path, content):
    ((tokens, label),) = read_sequences(save(tmp_path, content))
    assert tokens.tolist() == [12, 5, 4, 15]
    assert label == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": the file is empty"),
        ("\ufeff", ": the file is empty"),
        (HEADER, ": there is a header, but no expression"),
        (GOOD, r", line 1: no column Source and no column Target; .* got '\( \( \( \[MAX"),
        ("Source\tLabel\n" + GOOD, ", line 1: no column Target"),
        ("Source,Target\n[MAX 4 3 ],4\n", ", line 1: no column Source and no column Target"),
        (HEADER + GOOD + "[MAX 4 3 ] 4\n", ", line 3: 1 columns, the header has 2"),
        (HEADER + GOOD + "[MAX 4 3\t4\n", r", line 3: word 1: \[MAX is not closed"),
        (HEADER + GOOD + "[MAX 4 3 ] ]\t4\n", r", line 3: word 5: \] closes no operation"),
        (HEADER + "] [MAX 4\t4\n", r", line 2: word 1: \] closes no operation"),
        (HEADER + "( ( ( [MAX 4 ) 33 ) ] )\t4\n", ", line 2: word 7: unknown token '33'"),
        (HEADER + "[MAX [MIN ] ]\t4\n", r", line 2: word 2: \[MIN has no arguments"),
        (HEADER + "[MAX 1 ] [MIN 2 ]\t4\n", ", line 2: 2 expressions"),
        (HEADER + "\t4\n", ", line 2: the expression is empty"),
        (HEADER + GOOD + "\r\n" + "[MAX 4 3 ]\t10\n", ", line 4: Target is '10', expected a digit from 0 to 9"),
        (HEADER + "[MAX 4 3 ]\t-1\n", ", line 2: Target is '-1'"),
        (HEADER + "[MAX 4 3 ]\t4.0\n", ", line 2: Target is '4.0'"),
        (HEADER + "[MAX 4 3 ]\t\n", ", line 2: Target is ''"),
        (HEADER + "[MAX 4 3 ]\t\u0664\n", ", line 2: Target is '\u0664'"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff", " is not UTF-8: byte 0"),
        (b"\x00" * 1_000, ", line 1: no column Source"),
        (HEADER.encode() + b"[MAX \xff 3 ]\t4\n", " is not UTF-8: byte 20"),
        (b"Source\tTarget\n" + b"[MAX 4 3 ]" * 2_000_000, ", line 2: longer than 16,777,216 characters"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, content, said):
    path = save(tmp_path, content)
    with pytest.raises(DataError, match=f"^{path}{said}"):
        list(read_sequences(path))


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "basic_train.tsv.gz"
    path.write_bytes(gzip.compress((HEADER + GOOD * 100).encode())[:-20])
    with pytest.raises(DataError, match=f"^{path}: cannot be read"):
        list(read_sequences(path))


def test_what_cannot_be_read_leaves_nothing(published, cache):
    for name in ("basic_test.tsv", "basic_train.tsv"):
        path = published / name
        path.write_bytes(path.read_bytes() + b"[MAX\t4\r\n")
        with pytest.raises(DataError, match=rf"{name}, line \d\d: word 1: \[MAX is not closed"):
            load(published)
        assert len([path for path in (cache / "tokens").iterdir() if path.is_dir()]) == 1  # the generated ones


def test_deep_nesting(tmp_path):
    tokens = np.array([12] * 100_000 + [5] + [15] * 100_000, np.uint8)
    path = save(tmp_path, f"{HEADER}{detokenize(tokens)}\t4\r\n")
    ((found, label),) = read_sequences(path)
    np.testing.assert_array_equal(found, tokens)
    assert label == 4
    assert check(path).wrong == 0


def test_check_agrees_with_what_was_generated(published):
    for path in published.iterdir():
        checked = check(path)
        assert checked.count in (20, 40)
        assert (checked.wrong, checked.first) == (0, ())


def test_check_finds_what_is_wrong(published):
    path = published / "basic_train.tsv"
    lines = path.read_text().splitlines()
    source, label = lines[6].split("\t")
    lines[6] = f"{source}\t{(int(label) + 1) % 10}"
    lines[11] = lines[11].replace("(", "", 1)
    lines[20] = lines[20].split("\t")[0] + "\tten"
    path.write_text("\n".join(lines))
    checked = check(path)
    assert (checked.count, checked.wrong) == (40, 3)
    assert [line.split(":")[0] for line in checked.first] == ["line 7", "line 12", "line 21"]
    assert f"Target is {(int(label) + 1) % 10}, the expression gives {label}: '( " in checked.first[0]
    assert "parentheses join each argument" in checked.first[1]
    assert "expected a digit" in checked.first[2]
    assert check(path, most=1).first == checked.first[:1]


def test_check_is_printed(published):
    screen = io.StringIO()
    console = Console(file=screen, width=40)
    assert print_check(published / "basic_val.tsv", console)
    path = published / "basic_train.tsv"
    path.write_text(HEADER + "[MAX 4 3 ]\t3\n" * 12)
    assert not print_check(path, console)
    path.write_text(HEADER)
    assert not print_check(path, console)
    lines = screen.getvalue().splitlines()
    assert lines[0] == f"{published / 'basic_val.tsv'}: 20 expressions, 0 wrong"
    assert lines[1] == f"{path}: 12 expressions, 12 wrong"
    assert lines[2] == "line 2: Target is 3, the expression gives 4: '[MAX 4 3 ]'"
    assert lines[12:] == ["and 2 more", f"{path}: 0 expressions, 0 wrong: there is a header, but no expression"]
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        print_check(path, console)


def test_writing_takes_a_new_folder_or_an_empty_one(splits, published, tmp_path):
    with pytest.raises(DataError, match="published contains files, expected a new folder or an empty one"):
        write(published, splits)
    with pytest.raises(DataError, match=r"basic_val.tsv is a file, expected a new folder"):
        write(published / "basic_val.tsv", splits)
    (tmp_path / "empty").mkdir()
    screen = io.StringIO()
    write(tmp_path / "empty", splits, console=Console(file=screen, force_terminal=True, width=80))
    assert "80/80" in screen.getvalue()
    write(tmp_path / "new" / "folder", splits)
    for name in ("empty", "new/folder"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(listops.FILES.values())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_writing_that_is_interrupted_leaves_nothing(splits, tmp_path, monkeypatch, error):
    calls = iter(range(50))

    def fail(tokens):
        if next(calls) == 45:
            raise error
        return detokenize(tokens)

    monkeypatch.setattr("flowformer.tasks.lra.listops.files.detokenize", fail)
    with pytest.raises((KeyboardInterrupt, DataError)):
        write(tmp_path / "folder" / "here", splits)
    assert list((tmp_path / "folder").iterdir()) == []
