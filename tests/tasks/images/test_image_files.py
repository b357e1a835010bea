"""Labelled images: the forms they come in, what is refused, and what cannot be read."""

import json
import logging
import multiprocessing
import pickle
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from image_writers import encode, picture, png, write_folder, write_parquet, write_tar
from PIL import Image
from torch.utils.data import DataLoader

from flowformer.common.errors import DataError
from flowformer.tasks.images import decoding
from flowformer.tasks.images.decoding import UnreadableImage, decode
from flowformer.tasks.images.files import find_images, read_folder

CLASSES = ("cat", "dog")


def images(count=3, classes=CLASSES, below=""):
    return {
        f"{below}{name}/{number}.png": png(10 * row + number)
        for row, name in enumerate(classes)
        for number in range(count)
    }


def pixels(files):
    return [np.asarray(files.decode(index)) for index in range(len(files))]


def same(files, numbers):
    return all(
        np.array_equal(one, np.asarray(picture(number))) for one, number in zip(pixels(files), numbers, strict=True)
    )


# ----------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("below", ["", "data/", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/"])
@pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
def test_folders_by_split(tmp_path, below, validation):
    write_folder(tmp_path, images(below=f"{below}train/") | images(1, below=f"{below}{validation}/"))
    sets = find_images(tmp_path)
    assert list(sets) == ["train", "validation"]
    train, held = sets["train"], sets["validation"]
    assert (train.classes, train.numbered, train.form, len(train), len(held)) == (
        CLASSES,
        False,
        "folders by class",
        6,
        2,
    )
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [train.name(index) for index in (0, 5)] == ["cat/0.png", "dog/2.png"]
    assert same(train, [0, 1, 2, 10, 11, 12])
    assert str(train) == f"{tmp_path / below / 'train'}: 6 images of 2 classes in folders by class"
    assert (train[4].label, train[4].name, train[4].data) == (1, "dog/1.png", png(11))


def test_folders_of_classes_alone(tmp_path):
    write_folder(tmp_path, images() | {"cat/within/9.PNG": png(9)})
    (found,) = find_images(tmp_path).values()
    assert found.name(3) == "cat/within/9.PNG"
    assert read_folder(tmp_path).classes == CLASSES


def test_classes_are_sorted_and_numbers_by_value(tmp_path):
    assert read_folder(write_folder(tmp_path / "a", images(1, ("b", "B", "ä", "a b")))).classes == (
        "B",
        "a b",
        "b",
        "ä",
    )
    assert read_folder(write_folder(tmp_path / "b", images(1, ("10", "9", "0")))).classes == ("0", "9", "10")


def test_what_is_no_image_is_left_out_by_name(tmp_path, caplog):
    write_folder(
        tmp_path, images(1) | {"cat/notes.txt": b"?", "cat/.DS_Store": b"", "dog/Thumbs.db": b"", "top.jpg": b""}
    )
    files = read_folder(tmp_path)
    assert len(files) == 2
    assert files.left_out == {"top.jpg": "beside the class folders", "cat/notes.txt": "no image by its name"}
    assert "cat/notes.txt: no image by its name" in caplog.text
    assert ".DS_Store" not in caplog.text


def test_many_that_are_left_out_are_not_all_said(tmp_path, caplog):
    write_folder(tmp_path, images(1) | {f"cat/{number:02}.txt": b"" for number in range(30)})
    assert len(read_folder(tmp_path).left_out) == 30
    assert "cat/19.txt" in caplog.text
    assert "cat/20.txt" not in caplog.text
    assert "and 10 more" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no class folders; expected a folder for each class"),
        ({"a.png": png(0)}, "no class folders"),
        (images(1, ("cat",)), "only one class folder, 'cat'"),
        (images(1) | {"empty/.keep": b""}, "class folder 'empty' contains no images"),
    ],
)
def test_folders_that_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_folder(write_folder(tmp_path, content))


def test_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        read_folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "contains no labelled images; expected folders of images by class"),
        ({"train/cat/a.txt": b"", "train/dog/b.txt": b""}, "contains no labelled images"),
        (images(below="train/") | images(below="val/") | images(below="validation/"), "two folders for validation"),
        (images(below="train/") | {"val/a.png": png(0)}, "contains images but no class folders; add a labels.tsv"),
        (images(below="train/") | {"x.tar": b""}, "contains tar files and folders by class"),
        ({"ILSVRC2012_img_train.tar": b""}, "is a published archive of ImageNet: unpack it"),
        ({"train-0.tar": b"nothing"}, "train-0.tar: cannot read the tar file"),
        ({"train-0.parquet": b"nothing"}, "train-0.parquet: cannot read the parquet file"),
    ],
)
def test_what_holds_no_images_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        find_images(write_folder(tmp_path, content))


def test_path_that_is_wrong(tmp_path):
    with pytest.raises(DataError, match="nothing not found; expected"):
        find_images(tmp_path / "nothing")
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"images.zip is a file; .* must be unpacked"):
        find_images(tmp_path / "images.zip")


# --------------------------------------------------------------------------------------- a folder and a list


@pytest.mark.parametrize(
    ("name", "text", "classes", "numbered"),
    [
        ("val/labels.tsv", "name\tclass\na.png\tdog\nb.png\tcat\n", CLASSES, False),
        ("val/labels.csv", "index,file\n1,a.png\n0,b.png\n", ("0", "1"), True),
        ("val_labels.csv", "a.png,dog\nb,cat\n", CLASSES, False),
        ("val.tsv", "\ufeffa\tdog\n\nb\tcat\n", CLASSES, False),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\na,dog 1 2 3 4\nb,cat 1 2 3 4 cat 5 6 7 8 \n",
            CLASSES,
            False,
        ),
    ],
)
def test_flat_folder_with_a_list(tmp_path, name, text, classes, numbered):
    write_folder(tmp_path, images(below="train/") | {"val/a.png": png(1), "val/b.png": png(2), name: text.encode()})
    held = find_images(tmp_path)["validation"]
    assert (held.classes, held.numbered, held.labels.tolist()) == (classes, numbered, [1, 0])
    assert same(held, [1, 2])


def test_list_that_lacks_an_image(tmp_path, caplog):
    listed = {"val/a.png": png(1), "val/b.png": png(2), "val/labels.csv": b"a,cat\nc,dog\n"}
    held = find_images(write_folder(tmp_path, images(below="train/") | listed))["validation"]
    assert (len(held), held.left_out) == (1, {"b.png": "not in labels.csv"})
    assert "b.png: not in labels.csv" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"c,dog\n", "lists none of the images"),
        (b"a\n", r"expected a name and a class in each line, got \['a'\]"),
        (b"a, \n", "expected a name and a class"),
        (b"\xff\xfe\x00", "labels.csv is not UTF-16, which its byte order mark states: byte 2: truncated data"),
        (b"a,1\nb,cat\n", "labels are partly numbers and partly names"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, message):
    write_folder(tmp_path, images(below="train/") | {"val/a.png": b"", "val/b.png": b"", "val/labels.csv": text})
    with pytest.raises(DataError, match=message):
        find_images(tmp_path)


def test_test_set_without_labels_is_not_used(tmp_path):
    """As ImageNet's is."""
    write_folder(tmp_path, images(below="train/") | images(below="val/") | {"test/a.png": png(1)})
    assert list(find_images(tmp_path)) == ["train", "validation"]


# ----------------------------------------------------------------------------------------------------- parquet


def rows(count, labels=None):
    return [(png(number), number % 2 if labels is None else labels[number]) for number in range(count)]


@pytest.mark.parametrize("below", ["", "data/"])
def test_parquet(tmp_path, below):
    write_parquet(tmp_path / below / "train-00000-of-00002.parquet", rows(7))
    write_parquet(tmp_path / below / "train-00001-of-00002.parquet", [(png(number), 2) for number in range(7, 12)])
    write_parquet(tmp_path / below / "validation-00000-of-00001.parquet", rows(2))
    write_parquet(tmp_path / below / "test-00000-of-00001.parquet", rows(2, [-1, -1]))
    sets = find_images(tmp_path)
    assert list(sets) == ["train", "validation"]
    train = sets["train"]
    assert (len(train), train.classes, train.numbered) == (12, ("0", "1", "2"), True)
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 2, 2, 2, 2, 2]
    assert same(train, range(12))
    assert [np.asarray(train.decode(index)).sum() for index in (11, 0, 6, 7)] == [
        np.asarray(picture(index)).sum() for index in (11, 0, 6, 7)
    ]
    names = [train.name(index) for index in (0, 6, 7, 11)]
    assert names == [f"train-0000{file}-of-00002.parquet:{row}" for file, row in ((0, 0), (0, 6), (1, 0), (1, 4))]


def test_parquet_reads_no_more_than_a_group(tmp_path, monkeypatch):
    from pyarrow import parquet

    files = find_images(write_parquet(tmp_path / "a.parquet", rows(9)))["all"]
    read, original = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group",
        lambda self, group, *words, **options: read.append(group) or original(self, group, *words, **options),
    )  # fmt: skip
    for index in (0, 1, 2, 8, 7, 3):
        files.decode(index)
    assert read == [0, 2, 1]


def test_parquet_has_names_of_classes(tmp_path):
    files = find_images(write_parquet(tmp_path / "a.parquet", rows(4), names=["tench, fish", "goldfish"]))["all"]
    assert (files.classes, files.numbered) == (("tench, fish", "goldfish"), True)


def test_parquet_columns_of_other_names_and_kinds(tmp_path):
    files = find_images(write_parquet(tmp_path / "a.parquet", rows(2, ["dog", "cat"]), image="img", label="labels"))[
        "all"
    ]
    assert (files.classes, files.numbered, files.labels.tolist()) == (CLASSES, False, [1, 0])


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({"image": "photo"}, [0, 1], "no column image or img or jpg or png; available: photo, label"),
        ({"label": "kind"}, [0, 1], "no column label or"),
        ({}, [0, None], "row 1 has no label"),
        ({}, [0, -1], "labels from -1 to 0"),
        ({"names": ["one"]}, [0, 1], "labels from 0 to 1 for 1 classes"),
        ({}, [-1, -1], "no image has a label"),
    ],
)
def test_parquet_that_is_refused(tmp_path, options, labels, message):
    write_parquet(tmp_path / "train-0.parquet", rows(2, labels), **options)
    with pytest.raises(DataError, match=message):
        find_images(tmp_path)


def test_parquet_row_without_bytes(tmp_path):
    files = find_images(write_parquet(tmp_path / "a.parquet", [(png(0), 0), (None, 1)]))["all"]
    with pytest.raises(UnreadableImage, match="the row contains no bytes"):
        files.decode(1)


# --------------------------------------------------------------------------------------------------------- tar


def members(count, label, suffix="cls"):
    pairs = [(f"{number:03}", png(number), label(number)) for number in range(count)]
    return {
        name: data for key, image, said in pairs for name, data in ((f"{key}.png", image), (f"{key}.{suffix}", said))
    }


@pytest.mark.parametrize(
    ("suffix", "label", "classes", "numbered"),
    [
        ("cls", lambda number: b"%d\n" % (number % 2), ("0", "1"), True),
        ("cls", lambda number: CLASSES[number % 2].encode(), CLASSES, False),
        ("json", lambda number: json.dumps({"label": number % 2, "width": 3}).encode(), ("0", "1"), True),
        ("json", lambda number: json.dumps({"wnid": CLASSES[number % 2]}).encode(), CLASSES, False),
    ],
)
def test_tar_files(tmp_path, suffix, label, classes, numbered):
    whole = members(6, label, suffix)
    write_tar(tmp_path / "imagenet-train-000000.tar", dict(list(whole.items())[:8]))
    write_tar(tmp_path / "imagenet-train-000001.tar", dict(list(whole.items())[8:]))
    write_tar(tmp_path / "imagenet-val-000000.tar", members(2, label, suffix))
    sets = find_images(tmp_path)
    assert list(sets) == ["train", "validation"]
    train = sets["train"]
    assert (train.classes, train.numbered, train.labels.tolist()) == (classes, numbered, [0, 1, 0, 1, 0, 1])
    assert same(train, range(6))
    assert [train.name(index) for index in (0, 5)] == [
        "imagenet-train-000000.tar:000.png",
        "imagenet-train-000001.tar:005.png",
    ]


def test_tar_files_in_folders_by_split(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / split / "000.tar", members(2, lambda number: b"%d" % number))
    assert list(find_images(tmp_path)) == ["train", "validation"]


def test_label_of_cls_goes_before_that_of_json(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.json": b'{"label": 5}', "a.cls": b"1", "a.png": png(0), "b/x.cls": b"0",
                                          "b/x.json": b'{"label": 5}', "b/x.png": png(1)})  # fmt: skip
    assert find_images(path)["all"].labels.tolist() == [1, 0]


def test_members_that_lack_something_are_left_out(tmp_path, caplog):
    content = members(2, lambda number: b"%d" % number) | {"a.png": png(5), "b.cls": b"1", "c.txt": b""}
    files = find_images(write_tar(tmp_path / "a.tar", content))["all"]
    assert len(files) == 2
    assert files.left_out == {
        "a.tar:a": "no label of this name", "a.tar:b": "no image of this name",
        "a.tar:c": "no image and no label of this name",
    }  # fmt: skip
    assert "a.tar:b" in caplog.text


def test_tar_file_that_is_cut_off(tmp_path):
    path = write_tar(tmp_path / "a.tar", members(4, lambda number: b"%d" % (number % 2)))
    with tarfile.open(path) as archive:
        last = archive.getmember("002.png")
    path.write_bytes(path.read_bytes()[: last.offset_data + 100])
    files = find_images(path)["all"]
    assert same(files, [0, 1])
    assert any("a.tar" in name for name in files.left_out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.png": b"", "a.cls": b""}, "a.cls contains no label: b''"),
        ({"a.png": b"", "a.json": b"{"}, "a.json contains no label"),
        ({"a.png": b"", "a.json": b"[]"}, "a.json contains no label"),
        ({"a.png": b"", "a.json": b'{"label": [1]}'}, "a.json contains no label: .*; expected a number or a name"),
        ({"a.png": b"", "a.json": b"[" * 100_000}, "a.json contains no label"),
        ({"a.png": b"", "a.cls": b"a\xff"}, r"a\.tar: a\.cls is not UTF-8: byte 1: invalid start byte"),
        ({"a.png": b"", "a.cls": b"1", "b.png": b"", "b.cls": b"cat"}, "labels are partly numbers and partly names"),
    ],
)
def test_tar_labels_that_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        find_images(write_tar(tmp_path / "a.tar", content))


def test_files_that_do_not_say_their_split(tmp_path):
    for name in ("train-0.tar", "0.tar"):
        write_tar(tmp_path / name, members(2, lambda number: b"%d" % number))
    with pytest.raises(DataError, match=r"0.tar: the name does not contain"):
        find_images(tmp_path)


# ------------------------------------------------------------------------------- processes, parts and classes


def forms(tmp_path):
    write_folder(tmp_path / "folder", images())
    write_parquet(tmp_path / "a.parquet", [(png(number), number // 10) for number in (0, 1, 2, 10, 11, 12)])
    content = {f"{number:02}.{suffix}": data for number in (0, 1, 2, 10, 11, 12)
               for suffix, data in (("png", png(number)), ("cls", b"%d" % (number // 10)))}  # fmt: skip
    write_tar(tmp_path / "a.tar", content)
    return [find_images(path)["all"] for path in (tmp_path / "folder", tmp_path / "a.parquet", tmp_path / "a.tar")]


def _first(items):
    return items[0]


def test_all_forms_are_alike_in_any_process(tmp_path):
    """Also after the file was read here: workers that are forked must not share its position."""
    for files in forms(tmp_path):
        here = [files[index] for index in range(len(files))]
        loader = DataLoader(files, 1, num_workers=2, collate_fn=_first)
        for there in (list(loader), list(pickle.loads(pickle.dumps(files)))):
            assert [(one.data, one.label, one.name) for one in there] == [
                (one.data, one.label, one.name) for one in here
            ]
        assert [one.data for one in here] == [png(number) for number in (0, 1, 2, 10, 11, 12)]


def test_subset_has_one_record_with_the_whole(tmp_path):
    files = read_folder(write_folder(tmp_path, images()))
    part = files.subset([4, 0])
    assert [part.name(index) for index in (0, 1)] == ["dog/1.png", "cat/0.png"]
    assert part.labels.tolist() == [1, 0]
    part.leave_out("dog/1.png", "a reason")
    assert files.left_out == {"dog/1.png": "a reason"}


def test_classes_of_another_set(tmp_path):
    files = read_folder(write_folder(tmp_path, images(1)))
    other = files.with_classes(("bird", "dog", "cat"))
    assert (other.labels.tolist(), other.classes) == ([2, 1], ("bird", "dog", "cat"))
    with pytest.raises(DataError, match="unknown classes 'cat', 'dog'"):
        files.with_classes(("bird",))
    assert files.subset([1]).with_classes(("dog",)).labels.tolist() == [0]


# ---------------------------------------------------------------------------------------------------- decoding


def test_other_colours():
    grey = picture(0).convert("L")
    assert np.array_equal(decode(encode(grey)), np.asarray(grey.convert("RGB")))
    assert np.array_equal(decode(encode(grey.convert("1"))), np.asarray(grey.convert("1").convert("RGB")))
    cmyk = picture(0).convert("CMYK")
    assert np.abs(np.asarray(decode(encode(cmyk, "TIFF"))).astype(int) - np.asarray(cmyk.convert("RGB"))).max() == 0
    palette = picture(0).quantize(16)
    assert np.array_equal(decode(encode(palette)), np.asarray(palette.convert("RGB")))
    assert decode(encode(picture(0).convert("YCbCr"), "JPEG")).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode):
    image = picture(0).convert(mode)
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0], [255]]), 20, 1).repeat(8, 0)))
    found = np.asarray(decode(encode(image)))
    assert (found[:8] == 255).all()
    assert np.array_equal(found[8:], np.asarray(image.convert("RGB"))[8:])


def test_transparent_colour_of_a_palette():
    image = Image.fromarray(np.uint8([[0, 1]]), "L").convert("P")
    image.putpalette([9, 9, 9, 7, 7, 7])
    assert np.asarray(decode(encode(image, transparency=0))).tolist() == [[[255] * 3, [7] * 3]]


def test_sixteen_bits():
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        assert np.asarray(decode(encode(Image.fromarray(values), form)))[0, :, 0].tolist() == [0, 0, 1, 255]
    low = Image.fromarray(np.array([[0, 255]], dtype=np.int32))
    assert np.asarray(decode(encode(low, "TIFF")))[0, :, 0].tolist() == [0, 255]


def deep_png(values, kind):
    """A PNG file of 16 bits; Pillow writes none of colours. Kinds: 0 grey, 2 RGB, 6 RGBA."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    ends = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + ends


def deep_tiff(values):
    """A TIFF file of 16-bit colours, not compressed."""
    height, width, _ = values.shape
    data = values.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128),
            (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + struct.pack("<HHH", 16, 16, 16) + data


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(decoding, "_reported", [])
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("most", [1023, 4095, 3000, 16383, 255])
@pytest.mark.parametrize("form", ["grey PNG", "grey TIFF", "PNG", "PNG with alpha", "TIFF"])
def test_fewer_bits_in_sixteen_are_scaled_by_their_maximum(most, form, said):
    values = np.random.default_rng(0).integers(0, most + 1, (6, 8, 3))
    values[0, 0] = most
    wanted = np.rint(values * (255 / most)).astype(np.uint8)
    if form.startswith("grey"):
        data = encode(Image.fromarray(values[..., 0].astype(np.uint16)), form[5:])
        wanted = wanted[..., :1].repeat(3, 2)
    elif form == "TIFF":
        data = deep_tiff(values)
    else:
        alpha = np.full((6, 8, 1), 65535)
        data = deep_png(np.concatenate([values, alpha], 2), 6) if "alpha" in form else deep_png(values, 2)
    assert np.array_equal(np.asarray(decode(data)), wanted)
    decode(data)
    assert said() == [
        f"images of 16 bits that use fewer (the first has values up to {most}) are scaled by their maximum"
    ]


@pytest.mark.parametrize("kind", [2, 6])
def test_sixteen_bits_of_colours(kind, said):
    values = np.random.default_rng(0).integers(0, 65536, (6, 8, 3 if kind == 2 else 4))
    values[..., 3:] = 65535
    assert np.array_equal(np.asarray(decode(deep_png(values, kind))), (values >> 8)[..., :3])
    assert not said()


def test_black_of_sixteen_bits(said):
    assert not np.asarray(decode(encode(Image.new("I;16", (3, 3))))).any()
    assert not np.asarray(decode(deep_png(np.zeros((3, 3, 3), int), 2))).any()
    assert not said()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.ones((2, 2), dtype=np.float32)), "floating-point numbers of unknown range"),
        (Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "pixels from 0 to 70000, expected at most 16 bits"),
    ],
)
def test_values_of_unknown_range_are_refused(image, message):
    with pytest.raises(UnreadableImage, match=message):
        decode(encode(image, "TIFF"))


@pytest.mark.parametrize(
    ("orientation", "turned"), [(1, lambda x: x), (3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1))]
)
def test_upright(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encode(picture(0), exif=exif)), turned(np.asarray(picture(0))))


def test_damaged_exif_costs_nothing():
    data = encode(picture(0), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(decode(data), decode(encode(picture(0), "JPEG")))


def test_first_image_of_an_animation():
    frames = [picture(number).quantize(256).convert("RGB") for number in (0, 1)]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(decode(data), np.asarray(frames[0]))


def test_image_too_large_to_be_one(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(UnreadableImage, match="DecompressionBomb"):
        decode(png(0))


# -------------------------------------------------------------------------------------------------- corruption


def corrupt_ten(root):
    """Ten things that are no images, among those of class cat and dog; their names."""
    jpeg, whole = encode(picture(0, (200, 200)), "JPEG"), encode(picture(0, (200, 200)))
    broken = {
        "cat/cut.jpg": jpeg[: len(jpeg) // 2],
        "cat/head.jpg": jpeg[:20],
        "cat/text.jpg": b"not an image\n",
        "cat/empty.jpg": b"",
        "cat/page.png": b"<html>404</html>",
        "dog/broken.png": whole[:60] + b"\x00" * 40 + whole[100:],
        "dog/cut.png": whole[: len(whole) // 2],
        "dog/zeros.jpeg": bytes(1000),
        "dog/picture.doc": jpeg,
    }
    write_folder(root, broken)
    (root / "dog" / "folder.jpg").mkdir()
    return {*broken, "dog/folder.jpg"}


def test_ten_corrupt_files_cost_nothing_else(tmp_path, caplog):
    write_folder(tmp_path, images(5) | {"cat/jpeg called.png": encode(picture(3), "JPEG")})
    names = corrupt_ten(tmp_path)
    files = read_folder(tmp_path)
    good = []
    for index in range(len(files)):
        try:
            files.decode(index)
            good.append(files.name(index))
        except UnreadableImage as error:  # noqa: PERF203
            files.leave_out(files.name(index), str(error))
            files.leave_out(files.name(index), "twice")
    assert sorted(good) == sorted([*images(5), "cat/jpeg called.png"])
    assert set(files.left_out) == names
    assert all(reason and reason != "twice" for reason in files.left_out.values())
    for name in names:
        assert sum(name in record.message for record in caplog.records) == 1, name
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_file_that_is_gone(tmp_path):
    files = read_folder(write_folder(tmp_path, images(1)))
    (tmp_path / "cat/0.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        files.decode(0)
    assert files.check() is files


def test_only_corrupt_files_are_an_error(tmp_path):
    files = read_folder(
        write_folder(tmp_path, {f"{name}/{number}.jpg": b"?" for name in CLASSES for number in range(3)})
    )
    with pytest.raises(DataError, match=r"none of 6 images can be read; dog/2.jpg: not an image of a known format"):
        files.check()


# -------------------------------------------------------------------------------------------- damaged and hostile files


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM"])
@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.8])
def test_truncated_pictures_are_unreadable(form, part):
    data = encode(picture(0, (64, 64)), form)
    with pytest.raises(UnreadableImage) as caught:
        decode(data[: int(len(data) * part)])
    assert "\n" not in str(caught.value)


def test_picture_of_no_pixels():
    with pytest.raises(UnreadableImage):
        decode(b"P6 0 0 255\n")
    with pytest.raises(UnreadableImage):
        decode(deep_png(np.zeros((1, 1, 3), int), 2).replace(struct.pack(">II", 1, 1), bytes(8), 1))


def test_decompression_bomb_costs_no_memory():
    bomb = b"P6 60000 60000 255\n"
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="DecompressionBomb"):
        decode(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_folder_called_like_a_picture_is_left_out(tmp_path):
    files = read_folder(write_folder(tmp_path, images(1) | {"cat/folder.png/x": b""}))
    with pytest.raises(UnreadableImage, match=r"Is a directory|Permission denied"):
        files.decode([files.name(index) for index in range(len(files))].index("cat/folder.png"))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_that_become_shorter_are_errors_that_name_them(tmp_path, kind):
    """Not the end of the process: a file that is mapped into memory would be."""
    big = {number: encode(Image.effect_noise((200, 200), 90)) for number in range(6)}
    if kind == "tar":
        path = write_tar(
            tmp_path / "a.tar", {f"{n}.png": data for n, data in big.items()} | {f"{n}.cls": b"1" for n in big}
        )
    else:
        path = write_parquet(tmp_path / "a.parquet", [(data, 1) for data in big.values()], group=1)
    files = find_images(path)["all"]
    files.decode(0)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)
    files.decode(0)
    with pytest.raises(UnreadableImage, match="shorter" if kind == "tar" else "cannot read rows"):
        files.decode(5)
    path.unlink()
    with pytest.raises(UnreadableImage):
        pickle.loads(pickle.dumps(files)).decode(5)


def _decode_all(files):
    return [np.asarray(files.decode(index)).sum() for index in range(len(files))]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_parquet_that_is_open_is_read_by_forked_processes(tmp_path):
    files = find_images(write_parquet(tmp_path / "a.parquet", rows(40), group=1))["all"]
    wanted = _decode_all(files)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        running = pool.map_async(_decode_all, [files] * 12)
        assert all(_decode_all(files) == wanted for _ in range(5))
        assert running.get() == [wanted] * 12


def special(name, kind, **fields):
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def test_hostile_members_of_tar_files_are_passed_over(tmp_path):
    """Links, devices, names that lead elsewhere: nothing is unpacked, and only what is in the file is read."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(0))
    write_tar(
        tmp_path / "good.tar", {"/abs/1.png": png(1), "/abs/1.cls": b"a", "../up/2.png": png(2), "../up/2.cls": b"b"}
    )
    good = (tmp_path / "good.tar").read_bytes().rstrip(b"\0")
    good += bytes(-len(good) % 512)
    bad = b"".join(
        special(f"{number}.png", kind, linkname=str(secret))
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        )
    )
    (tmp_path / "a.tar").write_bytes(good + bad + bytes(1024))
    files = find_images(tmp_path / "a.tar")["all"]
    assert [files.name(index) for index in range(len(files))] == ["a.tar:/abs/1.png", "a.tar:../up/2.png"]
    assert same(files, [1, 2])


@pytest.mark.parametrize("size", [2**40, 2**62, 2**33])
@pytest.mark.parametrize("name", ["0.png", "0.cls", "0.json"])
def test_members_that_claim_to_be_gigantic_take_no_memory(tmp_path, size, name):
    path = write_tar(tmp_path / "a.tar", members(2, lambda number: b"%d" % number))
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    path.write_bytes(whole + special(name, tarfile.REGTYPE, size=size) + b"abc")
    tracemalloc.start()
    files = find_images(path)["all"]
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert len(files) == 2
    assert any("damaged" in reason for reason in files.left_out.values())


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_damaged_shards_are_errors_or_left_out(tmp_path, kind):
    """Bytes changed anywhere, two hundred times."""
    generator = np.random.default_rng(0)
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        write_tar(path, members(3, lambda number: b"%d" % number))
    else:
        write_parquet(path, rows(3))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(200):
        damaged = whole.copy()
        places = generator.integers(0, len(whole), 8)
        damaged[places] = generator.integers(0, 256, 8)
        path.write_bytes(damaged[: generator.integers(1, 2 * len(whole))].tobytes())
        try:
            files = find_images(path)["all"]
        except DataError:
            continue
        for index in range(len(files)):
            files._reason(index)
