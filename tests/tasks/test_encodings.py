"""Text in the encodings that editors write, and bytes that are none."""

import bz2
import errno
import gzip
import lzma

import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.encodings import decode, find_undecodable, open_text

TEXT = "Füße, 川\nzweite Zeile\n"
# As Notepad calls them: UTF-8, UTF-8 with BOM, UTF-16 LE, UTF-16 BE; and UTF-32.
FORMS = {
    "utf-8": TEXT.encode(),
    "utf-8-sig": TEXT.encode("utf-8-sig"),
    "utf-16-le": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "utf-16-be": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "utf-32-le": b"\xff\xfe\0\0" + TEXT.encode("utf-32-le"),
    "utf-32-be": b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".GZ", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_text_is_read_without_its_mark(tmp_path, form, suffix, pack):
    file = tmp_path / f"text{suffix}"
    file.write_bytes(pack(FORMS[form]))
    with open_text(file) as text:
        assert text.read() == TEXT
    assert decode(FORMS[form], "text") == TEXT
    assert find_undecodable(file) is None


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_lines_end_as_in_other_systems(tmp_path, newline):
    (tmp_path / "text").write_bytes(TEXT.replace("\n", newline).encode("utf-16"))
    with open_text(tmp_path / "text") as text:
        assert text.readlines() == ["Füße, 川\n", "zweite Zeile\n"]


@pytest.mark.parametrize("before", [0, 5, 2**20 - 1, 2**20, 3 * 2**20 + 7])
@pytest.mark.parametrize(
    ("name", "mark", "wrong", "said"),
    [
        ("utf-8", b"", b"\xff", "is not UTF-8: byte {}: invalid start byte; save it as UTF-8"),
        ("utf-8", b"\xef\xbb\xbf", b"\xe4b", "is not UTF-8, which its byte order mark states: byte {}: invalid cont"),
        (
            "utf-16-le",
            b"\xff\xfe",
            b"\x00\xdc",
            "is not UTF-16, which its byte order mark states: byte {}: illegal enc",
        ),
        ("utf-16-be", b"\xfe\xff", b"\x00", "is not UTF-16, which its byte order mark states: byte {}: truncated data"),
    ],
)
def test_the_first_wrong_byte_is_named(tmp_path, before, name, mark, wrong, said):
    good = mark + ("a" * before).encode(name)
    file = tmp_path / "text"
    file.write_bytes(good + wrong)
    wanted = f"{file} {said.format(f'{len(good):,}')}"
    with pytest.raises(DataError) as caught, open_text(file) as text:
        text.read()
    assert str(caught.value).startswith(wanted)
    with pytest.raises(DataError) as caught:
        decode(good + wrong, file)
    assert str(caught.value).startswith(wanted)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"text")[:-5])
    for name, message in {
        "gone": "no such file",
        "folder": "a folder, expected a file",
        "bad.gz": "cannot be read",
    }.items():
        with pytest.raises(DataError, match=f"{name}: {message}"), open_text(tmp_path / name) as text:
            text.read()


def test_what_the_block_writes_is_not_blamed_on_the_file(tmp_path):
    (tmp_path / "text").write_text("a")
    with pytest.raises(OSError, match="full"), open_text(tmp_path / "text"):
        raise OSError(errno.ENOSPC, "full")
