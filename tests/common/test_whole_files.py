"""Files are written whole or not at all."""

from __future__ import annotations

import pytest

from flowformer.common.files import read_json, remove_staged, replacing, staged_folder, write_json, write_whole


@pytest.mark.parametrize("content", ["text: é", b"bytes: \x00\xff"])
def test_content_is_what_was_written_and_folders_are_made(tmp_path, content):
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(path.parent.iterdir()) == [path]


def test_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "before")
    with pytest.raises(TypeError):
        write_whole(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_file_has_the_suffix_and_is_removed_when_interrupted(tmp_path):
    path = tmp_path / "picture.png"

    def write(then=None):
        with replacing(path) as temporary:
            assert temporary.suffix == ".png"
            assert temporary.parent == tmp_path
            temporary.write_text("half")
            if then:
                raise then

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    write()
    assert path.read_text() == "half"


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None], "b": "é"}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "a" / "b"
    with staged_folder(folder) as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "file").write_text("x")
        assert not folder.exists()
    assert (folder / "inner" / "file").read_text() == "x"
    with pytest.raises(FileExistsError, match="not an empty folder"), staged_folder(folder):
        pass
    (tmp_path / "c").mkdir()

    def stop():
        with staged_folder(tmp_path / "c") as staged:
            (staged / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert list((tmp_path / "c").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


def test_folders_of_killed_writers_are_removed(tmp_path):
    (tmp_path / ".staged-1-a").mkdir()
    (tmp_path / ".staged-1-a" / "file").touch()
    (tmp_path / "kept").mkdir()
    remove_staged(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
