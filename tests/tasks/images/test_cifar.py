"""CIFAR-10 in each of its forms gives the same pictures."""

import contextlib
import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowformer.common.errors import DataError
from flowformer.tasks.images.cifar import CLASSES, LabelledImages, read_cifar10

SHARED = Path(__file__).parents[4] / "shared" / "data" / "cifar10" / "cifar10_train_20000_jpeg.zip"
NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@pytest.fixture(scope="module")
def batches():
    """Six batches of three random pictures, classes in any order."""
    generator = np.random.default_rng(0)
    return {
        name: LabelledImages(generator.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), generator.integers(0, 10, 3))
        for name in NAMES
    }


def planes(images):
    """Red, green and blue, each row by row: (n, 3072)."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def binary(part):
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(part.labels, planes(part.images), strict=True))


def pickled(part):
    # The published ones were pickled by Python 2, whose strings are read as bytes.
    return pickle.dumps({b"data": planes(part.images), b"labels": part.labels.tolist()}, protocol=2)


def write_batches(folder, batches, form):
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in batches.items():
        suffix, data = (".bin", binary(part)) if form == "binary" else ("", pickled(part))
        (folder / f"{name}{suffix}").write_bytes(data)


def write_pictures(folder, batches, *, split=True):
    for name, part in batches.items():
        for row, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            within = "test" if name == "test_batch" else "train"
            path = folder / (within if split else ".") / CLASSES[label] / f"{name}_{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def as_sets(part):
    return {(int(label), image.tobytes()) for image, label in zip(part.images, part.labels, strict=True)}


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("packed", ["folder", "tar.gz", "zip"])
def test_batches(batches, tmp_path, form, packed):
    folder = tmp_path / "cifar-10-batches"
    write_batches(folder, batches, form)
    path = tmp_path
    if packed == "tar.gz":
        path = tmp_path / "cifar.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, folder.name)
    elif packed == "zip":
        path = tmp_path / "cifar.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for one in folder.iterdir():
                archive.write(one, f"{folder.name}/{one.name}")
    train, test = read_cifar10(path)
    assert train.images.shape == (15, 32, 32, 3)
    assert np.array_equal(train.images, np.concatenate([batches[name].images for name in NAMES[:5]]))
    assert np.array_equal(train.labels, np.concatenate([batches[name].labels for name in NAMES[:5]]))
    assert np.array_equal(test.images, batches["test_batch"].images)
    image, label = train[4]
    assert np.array_equal(image, batches["data_batch_2"].images[1])
    assert label == batches["data_batch_2"].labels[1]


def test_pictures_in_folders(batches, tmp_path):
    write_pictures(tmp_path, batches)
    train, test = read_cifar10(tmp_path)
    assert as_sets(train) == set().union(*(as_sets(batches[name]) for name in NAMES[:5]))
    assert as_sets(test) == as_sets(batches["test_batch"])


def test_pictures_without_a_test_part(batches, tmp_path):
    write_pictures(tmp_path, batches, split=False)
    train, test = read_cifar10(tmp_path)
    assert len(train) == 18
    assert test is None


def test_a_pickle_may_not_run_anything(batches, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(DataError, match=r"data_batch_1: not a batch of CIFAR-10 in its Python form"):
        read_cifar10(tmp_path)
    assert not (tmp_path / "touched").exists()


def damaged(tmp_path, name, data):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_cifar10(tmp_path)
    return str(caught.value)


def test_damaged_files_are_named(tmp_path):
    assert "data_batch_1.bin: expected records of 3,073 bytes, got 5 bytes" in damaged(
        tmp_path, "data_batch_1.bin", b"12345"
    )
    said = damaged(tmp_path, "data_batch_1.bin", bytes([10]) + bytes(3072))
    assert "expected labels from 0 to 9, got 10 to 10" in said


def test_a_damaged_pickle_is_named(tmp_path):
    good = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}, protocol=2)
    assert "data_batch_1: not a batch" in damaged(tmp_path, "data_batch_1", good[:100])
    short = pickle.dumps({b"data": np.zeros((1, 100), np.uint8), b"labels": [0]}, protocol=2)
    assert "expected 3,072 bytes per image, got uint8 (1, 100)" in damaged(tmp_path, "data_batch_1", short)


def test_damaged_pictures_are_named(tmp_path):
    assert "cat/1.png: not an image" in damaged(tmp_path, "cat/1.png", b"text")
    large = io.BytesIO()
    Image.new("RGB", (48, 32)).save(large, "png")
    assert "cat/1.png: expected 32 x 32 pixels, got 48 x 32" in damaged(tmp_path, "cat/1.png", large.getvalue())


def test_what_is_no_cifar10_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"does not contain CIFAR-10: expected data_batch_1\.bin"):
        read_cifar10(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        read_cifar10(tmp_path / "absent")
    with pytest.raises(DataError, match="expected a folder, or an archive"):
        read_cifar10(tmp_path / "notes.txt")


def test_the_folder_of_an_archive_will_do(batches, tmp_path):
    write_batches(tmp_path / "made", batches, "binary")
    (tmp_path / "data").mkdir()
    for name in ("one.zip", "two.zip"):
        with zipfile.ZipFile(tmp_path / "data" / name, "w") as archive:
            for one in (tmp_path / "made").iterdir():
                archive.write(one, one.name)
        if name == "one.zip":
            assert len(read_cifar10(tmp_path / "data")[0]) == 15
    with pytest.raises(DataError, match="does not contain CIFAR-10"):  # which of the two?
        read_cifar10(tmp_path / "data")


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
def test_twenty_thousand_real_pictures():
    train, test = read_cifar10(SHARED)
    assert np.bincount(train.labels).tolist() == [2000] * 10
    assert test is None
    assert train.images.mean() / 255 == pytest.approx(0.474, abs=0.005)


# -------------------------------------------------------------------------------------------- damaged and hostile files

HOSTILE = {
    "an array of terabytes": b"\x80\x02cnumpy\nndarray\n(\x8a\x06\x00\x00\x00\x00\x00\x01\x85tR.",
    "an unknown codec": b"\x80\x02c_codecs\nencode\nX\x04\x00\x00\x00testX\x06\x00\x00\x00zlib_c\x86R.",
    "code": b"cposix\nsystem\n(S'true'\ntR.",
    "nothing": b"",
    "a page": b"<!doctype html>",
    **{
        what: pickle.dumps(value)
        for what, value in {
            "a list": [1, 2],
            "a number": 7,
            "no labels": {b"data": planes(np.zeros((1, 32, 32, 3), np.uint8))},
            "data that is a list": {b"data": [[0] * 3072], b"labels": [1]},
            "data of other numbers": {b"data": np.zeros((1, 3072)), b"labels": [1]},
            "data of another size": {b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]},
            "data without rows": {b"data": np.zeros((), np.uint8), b"labels": [1]},
            "labels that are names": {b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]},
            "labels that are nested": {b"data": np.zeros((2, 3072), np.uint8), b"labels": [[1], [2, 3]]},
            "labels out of range": {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
            "gigantic labels": {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10**30]},
            "labels that are none": {b"data": np.zeros((1, 3072), np.uint8), b"labels": [None]},
            "too few labels": {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        }.items()
    },
}


@pytest.mark.parametrize("what", HOSTILE)
def test_pickles_that_are_no_batch_are_errors_that_name_them(tmp_path, what):
    (tmp_path / "data_batch_1").write_bytes(HOSTILE[what])
    with pytest.raises(DataError, match=rf"{tmp_path}: data_batch_1: ") as caught:
        read_cifar10(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_pickles_are_errors(tmp_path, batches):
    """Bytes changed anywhere, five hundred times."""
    generator = np.random.default_rng(0)
    whole = np.frombuffer(pickled(LabelledImages(batches["test_batch"].images[:1], np.array([3]))), np.uint8)
    opcodes = np.r_[:120, len(whole) - 60 : len(whole)]
    for _ in range(500):
        damaged = whole.copy()
        damaged[generator.choice(opcodes, 3)] = generator.integers(0, 256, 3)
        (tmp_path / "data_batch_1").write_bytes(damaged.tobytes())
        with contextlib.suppress(DataError):
            read_cifar10(tmp_path)


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_archives_that_unpack_to_too_much_are_refused(tmp_path, form, monkeypatch):
    monkeypatch.setattr("flowformer.tasks.images.cifar.MOST_BYTES", 2**20)
    path = tmp_path / f"cifar.{form}"
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("data_batch_1", bytes(2**21))
    else:
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo("data_batch_1")
            member.size = 2**21
            tar.addfile(member, io.BytesIO(bytes(2**21)))
    assert path.stat().st_size < 2**15
    with pytest.raises(
        DataError, match="files of 2,097,152 bytes and more, expected CIFAR-10, at most 1,048,576 bytes"
    ):
        read_cifar10(path)


def test_links_and_devices_of_archives_are_passed_over(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE), 1):
            member = tarfile.TarInfo(f"data_batch_{number}")
            member.type, member.linkname = kind, str(tmp_path / "secret")
            tar.addfile(member)
    with pytest.raises(DataError, match="does not contain CIFAR-10"):
        read_cifar10(tmp_path / "a.tar")


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_damaged_archives_are_errors_that_name_them(tmp_path, batches, form):
    path = tmp_path / f"cifar.{form}"
    data = binary(batches["data_batch_1"])
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("data_batch_1.bin", data)
    else:
        with tarfile.open(path, f"w:{form[4:]}") as tar:
            member = tarfile.TarInfo("data_batch_1.bin")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole[: generator.integers(1, 2 * len(whole))])
        for place in generator.integers(0, len(damaged), 8):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            read_cifar10(path)
    path.write_bytes(whole[:5000])
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_cifar10(path)


def test_picture_that_is_damaged_is_named(tmp_path, batches):
    write_pictures(tmp_path, batches)
    path = next(tmp_path.rglob("*.png"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=re.escape(path.relative_to(tmp_path).as_posix())):
        read_cifar10(tmp_path)
