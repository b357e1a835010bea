"""CIFAR-10 in grey: the conversion and the split are those of the published pipeline."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.lra import image

# What tf.image.rgb_to_grayscale of TensorFlow 2.21 gives of images of 32 x 32 on a CPU. Before the last three, three of
# which the exact value is below, by less than rounding to float32 adds; the last ones differ if summed in another order
# or with fused multiplication, as TensorFlow does with a single pixel.
COLOURS = {
    (255, 255, 255): 255, (255, 0, 0): 76, (0, 255, 0): 149, (0, 0, 255): 29, (143, 96, 70): 107, (141, 96, 72): 106,
    (1, 1, 1): 1, (128, 128, 128): 128, (0, 0, 4): 0, (0, 0, 9): 1, (0, 122, 186): 93, (3, 121, 122): 86,
    (5, 171, 227): 128, (23, 195, 100): 132, (67, 239, 82): 170, (94, 116, 93): 106,
}  # fmt: skip


def write_batches(folder, *, test=True, count=4, labels=None):
    """CIFAR-10 in its binary form, of some images a batch; returns all training images and labels."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6 * count, 3, 32, 32), dtype=np.uint8)
    labels = generator.integers(0, 10, 6 * count).astype(np.uint8) if labels is None else labels
    records = np.concatenate([labels[:, None], images.reshape(6 * count, -1)], 1)
    for index, name in enumerate([f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"] * test):
        (folder / f"{name}.bin").write_bytes(records[index * count : (index + 1) * count].tobytes())
    return images.transpose(0, 2, 3, 1), labels


def test_grey_is_that_of_tensorflow():
    assert image.to_grey(np.array(list(COLOURS), np.uint8)).tolist() == list(COLOURS.values())
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    # SHA-256 of what TensorFlow gives of the same image.
    expected = "bd7d6685dd3fb17c480b6e292856fe387bdbe92cb77cebdefebd52f183608508"
    assert hashlib.sha256(image.to_grey(images).tobytes()).hexdigest() == expected


def test_grey_of_grey_is_the_same():
    levels = np.arange(256, dtype=np.uint8)
    assert image.to_grey(np.stack([levels] * 3, -1)).tolist() == levels.tolist()


def published_labels():
    labels = np.zeros(50_000, np.int64)
    labels[list(image._FIRST)] = image._FIRST_LABELS
    return labels


def test_the_split_is_that_of_tensorflow_datasets():
    split = image.split_as_published(published_labels())
    assert split is not None
    train, validation = split
    assert (len(train), len(validation)) == image.SIZES[:2]
    assert sorted([*train, *validation]) == list(range(50_000))
    # SHA-256 of the identifiers that tfds.load("cifar10", split="train[:5000]") gives, as recorded by others.
    names = b"\n".join(b"train_%05d" % number for number in train[:5_000])
    expected = "826f1dad26a11a20249e95c71c6f1532d857fb35e648694f9758d4c5c1747679"
    assert hashlib.sha256(names).hexdigest() == expected


@pytest.mark.parametrize("labels", [published_labels()[:-1], np.sort(published_labels()), np.zeros(50_000, np.int64)])
def test_another_number_or_order_of_images_is_not_split(labels):
    assert image.split_as_published(labels) is None


@pytest.mark.parametrize("test", [True, False])
def test_a_part_of_the_images_is_loaded_whole(tmp_path, test):
    images, labels = write_batches(tmp_path, test=test)
    train, validation, held = image.load(tmp_path)
    assert validation is None
    assert (held is not None) == test
    assert train.lengths.tolist() == [1_024] * 20
    assert train.labels.tolist() == labels[:20].tolist()
    assert train[3][0].dtype == np.uint8
    assert train[3][0].tolist() == image.to_grey(images[3]).reshape(-1).tolist()
    if held is not None:
        assert held[0][0].tolist() == image.to_grey(images[20]).reshape(-1).tolist()
        assert len(held) == 4


def test_all_images_are_split(tmp_path, monkeypatch):
    images, labels = write_batches(tmp_path)
    monkeypatch.setattr(image, "SIZES", (18, 2, 4))
    monkeypatch.setattr(image, "_FIRST", (3, 1))
    monkeypatch.setattr(image, "_FIRST_LABELS", tuple(labels[[3, 1]].tolist()))
    train, validation, _ = image.load(tmp_path)
    assert validation is not None
    order = sorted(range(20), key=lambda number: hashlib.md5(f"train{number}".encode()).digest())
    for part, numbers in ((train, order[:18]), (validation, order[18:])):
        assert part.labels.tolist() == labels[numbers].tolist()
        assert part[1][0].tolist() == image.to_grey(images[numbers[1]]).reshape(-1).tolist()


def test_many_images_are_as_one_by_one(tmp_path, monkeypatch):
    write_batches(tmp_path)
    expected = image.load(tmp_path)[0].fingerprint()
    monkeypatch.setattr(image, "_AT_A_TIME", 3)
    assert image.load(tmp_path)[0].fingerprint() == expected


def test_what_is_no_cifar10_is_said(tmp_path):
    with pytest.raises(DataError, match="does not contain CIFAR-10"):
        image.load(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        image.load(tmp_path / "mine.zip")
    (tmp_path / "data_batch_1.bin").write_bytes(b"")
    with pytest.raises(DataError, match="expected records of 3,073 bytes, got 0"):
        image.load(tmp_path)
