"""Where results go: folders and files that cannot be written, standard output of any encoding, closed or full."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path

import pytest

from flowformer import cli
from flowformer.cli.arguments.outputs import check_file, check_folder
from flowformer.cli.arguments.parser import UsageError
from flowformer.cli.output import escape, show, writable_output

NO_FOLDERS = ["file", "file/run", "a" * 300, "/proc/run", "null\0character"]
TRAIN = ["train", "text/bytes", "--steps", "1", "--num-layers", "1", "--dim", "16", "--num-heads", "2"]


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("out", NO_FOLDERS)
def test_a_folder_that_cannot_be_made_is_named(there, out):
    with pytest.raises(UsageError, match=r"cannot be written|file is a file") as error:
        check_folder(there / out)
    assert out.split("\0")[0][-20:] in str(error.value)
    assert "\n" not in str(error.value)
    assert left(there) == ["file"]


def test_a_file_that_cannot_be_written_is_named(there):
    for out, cause in ((".", "is a folder"), ("file/x.csv", "file is a file"), ("a" * 300, "cannot be written")):
        with pytest.raises(UsageError, match=cause):
            check_file(there / out)
    (there / "file").chmod(0o400)  # replaced, not written to
    check_file(there / "file")
    assert (there / "file").read_text() == "mine"


def test_a_check_leaves_nothing_behind(there):
    check_folder(there / "a" / "b" / "c")
    check_file(there / "d" / "e.csv")
    assert left(there) == ["file"]


@pytest.mark.parametrize("out", ["file", "file/run", "a" * 300, "/proc/run"])
def test_training_is_not_begun_for_nothing(there, out, capsys, monkeypatch):
    monkeypatch.setattr("flowformer.training.fit.train", lambda *_, **__: pytest.fail("the run was started"))
    assert cli.main([*TRAIN, "--out", str(there / out)]) == 2
    said = capsys.readouterr().err
    assert out[-20:] in said
    assert said.count("\n") == 1
    assert left(there) == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "run", "new.csv", "--out"],
        ["export", "run", "--to", "hf", "--out"],
        ["bench", "causal", "--out"],
        ["data", "wikitext", "--dir"],
    ],
)
def test_every_command_checks_where_it_writes_first(there, words, capsys, monkeypatch):
    monkeypatch.setattr("flowformer.tasks.downloads.fetch", lambda *_, **__: pytest.fail("data was fetched"))
    monkeypatch.setattr("flowformer.bench.command.main", lambda *_: pytest.fail("something was measured"))
    assert cli.main([*words, str(there / "file" / "below")]) == 2
    said = capsys.readouterr().err
    assert f"{there / 'file' / 'below'} cannot be written: " in said
    assert cli.main([*words, ""]) == 2
    assert "expects a path, got ''" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- standard output


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_text_is_written_in_any_encoding(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with writable_output():
        print("caf\xe9 \U0001f642 \udcff")
    text = raw.getvalue().decode(encoding)
    assert text.endswith("\\udcff\n")
    assert ("\U0001f642" in text) == (encoding == "utf-8")
    assert ("\\xe9" in text) == (encoding == "ascii")


@pytest.mark.parametrize("words", [["list"], ["info", "flow"], ["data"], ["--help"], ["--version"], ["doctor"]])
def test_a_full_disk_is_an_error(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "flowformer: standard output cannot be written: No space left on device\n"


def test_other_errors_of_the_system_stay_what_they_are(capsys):
    with pytest.raises(OSError, match="of a file"), writable_output():
        raise OSError(errno.ENOSPC, "of a file")


def test_closed_streams(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["list"]) == 2
    assert "standard output is closed" in capsys.readouterr().err
    sys.stdout.close()  # the null device that stands for it
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["nonsense"]) == 2
    sys.stderr.close()


def test_control_characters_do_not_reach_a_terminal(monkeypatch, capsys):
    assert escape("a\x1b[31mb\n") == "a\\x1b[31mb\\n"
    assert escape("caf\xe9") == "caf\xe9"
    show("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\x1b[2J\n\n"  # a file or pipe gets what there is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show("a\x1b[2J\tb\nc", end="")
    assert capsys.readouterr().out == "a\\x1b[2J\tb\nc"
