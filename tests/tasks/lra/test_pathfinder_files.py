"""Pathfinder as sequences: the cache of generated images, and the folders of Long Range Arena, whole and broken."""

import io
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from flowformer.common.errors import DataError
from flowformer.tasks.lra.pathfinder import files as pathfinder_files
from flowformer.tasks.lra.pathfinder.files import load, load_official, split
from flowformer.tasks.lra.pathfinder.kinds import find_kind
from flowformer.tasks.lra.sequences import TokenSequences
from flowformer.tasks.stored import StoredTokens

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 images; processes that are started have others."""
    monkeypatch.setattr("flowformer.tasks.lra.pathfinder.drawing.BLOCK_IMAGES", 16)
    monkeypatch.setattr("flowformer.tasks.lra.pathfinder.files.BLOCK_IMAGES", 16)


def whole(splits):
    return np.concatenate([part[index][0][None] for part in splits for index in range(len(part))])


def test_generated_images_in_three_parts(small_blocks, monkeypatch):
    splits = load("easy", num_images=50)
    assert [len(part) for part in splits] == [40, 5, 5]
    assert isinstance(splits.train.tokens, StoredTokens)
    assert all(tokens.shape == (1024,) and tokens.dtype == np.uint8 for tokens in whole(splits))
    assert len({tokens.tobytes() for tokens in whole(splits)}) == 50
    labels = np.concatenate([part.labels for part in splits])
    assert labels[:48].reshape(3, 16).sum(axis=1).tolist() == [8, 8, 8]
    assert (len(splits.train.tokens), splits.test.stops[-1]) == (50 * 1024, 50 * 1024)

    monkeypatch.setattr(pathfinder_files, "_draw", None)  # kept: nothing is drawn
    assert load("easy", num_images=50).test.fingerprint() == splits.test.fingerprint()


def test_fewer_images_are_the_first_and_a_seed_decides(small_blocks):
    many, few, other = load("easy", num_images=40), load("easy", num_images=20), load("easy", num_images=20, seed=1)
    assert np.array_equal(whole(many)[:20], whole(few))
    assert not np.array_equal(whole(other), whole(few))


def test_two_processes_give_the_same(tmp_path, monkeypatch):
    alone = load("easy", num_images=600)
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path / "other"))
    both = load("easy", num_images=600, workers=2)
    assert [part.fingerprint() for part in alone] == [part.fingerprint() for part in both]


def test_progress_is_shown(small_blocks):
    from rich.console import Console

    text = io.StringIO()
    load("easy", num_images=20, console=Console(file=text, width=100))
    assert "Pathfinder 32 x 32, easy" in text.getvalue()
    assert "20/20" in text.getvalue()


def test_what_is_interrupted_is_not_kept(small_blocks, monkeypatch, cache):
    calls = []

    def draw(kind, seed, block):
        calls.append(block)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.zeros((16, 1024), np.uint8), [0] * 16

    monkeypatch.setattr(pathfinder_files, "_draw", draw)
    with pytest.raises(KeyboardInterrupt):
        load("easy", num_images=40)
    assert not [path for path in (cache / "tokens").iterdir() if path.is_dir()]


@pytest.mark.parametrize("options", [{"num_images": 9}, {"workers": 0}, {"seed": -1}, {"side": 33}])
def test_options_that_are_refused(options):
    with pytest.raises(DataError):
        load("easy", **options)


def test_parts_are_disjoint_and_whole():
    images = TokenSequences.joined(np.arange(37), np.ones(37, np.int64), np.zeros(37))
    assert [len(part) for part in split(images)] == [31, 3, 3]
    assert [int(part[index][0][0]) for part in split(images) for index in range(len(part))] == list(range(37))


# --- the folders of Long Range Arena ----------------------------------------------------------------------------------


def png(value, side=32):
    data = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(data, "png")
    return data.getvalue()


@pytest.fixture
def release(tmp_path):
    """Folder of 24 images in two batches: image i has pixels i and label i % 2; metadata are text and an array."""
    folder = tmp_path / "pathfinder32" / FOLDER
    rows = []
    for index in range(24):
        batch, number = divmod(index, 12)
        place = folder / "imgs" / str(batch)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"sample_{number}.png").write_bytes(png(index))
        rows.append([f"imgs/{batch}", f"sample_{number}.png", number, index % 2, 1.0, 14, 4, 2, 0.5, 1, 1])
    (folder / "metadata").mkdir()
    (folder / "metadata" / "0.npy").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows[:12]))
    np.save(folder / "metadata" / "1.npy", np.array(rows[12:]))  # as the generator does: of strings
    np.save(folder / "metadata" / "combined.npy", np.array(rows))  # as its other script does
    return folder


FOLDER = "curv_contour_length_14"


def test_the_published_folders(release, tmp_path, monkeypatch):
    for place in (tmp_path, tmp_path / "pathfinder32", release):
        splits = load_official(place)
        assert [len(part) for part in splits] == [20, 2, 2]
        assert whole(splits)[:, 0].tolist() == list(range(24))
        assert np.concatenate([part.labels for part in splits]).tolist() == [0, 1] * 12
    monkeypatch.setattr(pathfinder_files, "_read_images", None)
    assert len(load_official(release).train) == 20  # from the cache


def test_empty_and_damaged_images_are_skipped_and_counted(release, caplog):
    (release / "imgs/0/sample_3.png").write_bytes(b"")
    (release / "imgs/1/sample_0.png").write_bytes(png(12)[:50])
    with caplog.at_level(logging.WARNING):
        splits = load_official(release)
    assert "2 of 24 images are empty or damaged" in caplog.text
    assert whole(splits)[:, 0].tolist() == [index for index in range(24) if index not in (3, 12)]
    assert [len(part) for part in splits] == [18, 2, 2]


def pickled(release):
    data = io.BytesIO()
    np.save(data, np.array([["imgs/0", "sample_0.png", 0, 1]], dtype=object), allow_pickle=True)
    (release / "metadata/0.npy").write_bytes(data.getvalue())


def change(file, old, new):
    def apply(release):
        path = release / file
        path.write_text(path.read_text().replace(old, new))

    return apply


BROKEN = {
    "absent metadata": (lambda folder: [path.unlink() for path in (folder / "metadata").iterdir()], "no metadata"),
    "absent metadata folder": (lambda folder: (folder / "metadata").rename(folder / "meta"), "metadata: No such file"),
    "objects": (pickled, r"0\.npy: .*could run any program"),
    "pickle": (
        lambda folder: (folder / "metadata/0.npy").write_bytes(pickle.dumps([["imgs/0"]], protocol=4)),
        r"0\.npy: neither an array of NumPy nor text.*could run any program",
    ),
    "numbers": (lambda folder: np.save(folder / "metadata/0.npy", np.zeros((2, 4))), "expected an array of strings"),
    "cut array": (
        lambda folder: (folder / "metadata/1.npy").write_bytes((folder / "metadata/1.npy").read_bytes()[:300]),
        r"1\.npy: ",
    ),
    "label 7": (change("metadata/0.npy", "sample_5.png 5 1 ", "sample_5.png 5 7 "), "row 6: the label is '7'"),
    "few columns": (change("metadata/0.npy", "imgs/0 sample_2.png 2 0 ", "imgs/0 sample_2.png\n"), "row 3: 2 columns"),
    "outside": (change("metadata/0.npy", "imgs/0 sample_1.png", "../.. sample_1.png"), "row 2: '../../sample_1.png'"),
    "absolute": (change("metadata/0.npy", "imgs/0 sample_1.png", "/etc passwd"), "row 2: '/etc/passwd'"),
    "twice": (change("metadata/0.npy", "sample_1.png", "sample_0.png"), "row 2: .*listed before.*row 1"),
    "absent image": (lambda folder: (folder / "imgs/0/sample_4.png").unlink(), r"sample_4\.png: No such.*row 5"),
    "size": (
        lambda folder: (folder / "imgs/1/sample_2.png").write_bytes(png(0, 31)),
        r"1/sample_2\.png: 31 x 31 pixels, expected 32 x 32",
    ),
    "all empty": (
        lambda folder: [path.write_bytes(b"") for path in folder.glob("imgs/*/*.png")],
        "0 readable images",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(release, cache, name):
    spoil, words = BROKEN[name]
    spoil(release)
    with pytest.raises(DataError, match=words):
        load_official(release)
    assert not list((cache / "tokens").glob("pathfinder*"))


def test_absent_folder(tmp_path):
    with pytest.raises(DataError, match="pathfinder128/curv_baseline"):
        load_official(tmp_path, "easy", 128)
    assert find_kind(128, "easy").side == 128
