"""Classes of images as folders, lists and shards spell them."""

import csv
import io
import json
import os
import tracemalloc

import pytest
from image_writers import png, write_folder, write_parquet, write_tar

from flowformer.common.errors import DataError
from flowformer.tasks.images import imagenet
from flowformer.tasks.images.files import find_images, read_folder

PNG = png(0)


def flat(names, labels="", **more):
    return {**dict.fromkeys(names, PNG), **({"labels.csv": labels.encode()} if labels else {}), **more}


def found(root, files):
    return find_images(write_folder(root, files))["all"]


def labels_of(files):
    return [files.classes[label] for label in files.labels]


# --------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    "labels",
    [
        ("red fox", "red panda"),
        ("fox, red", 'fox "red"'),
        ("tab\there", "'quoted'"),
        ("[bold]", "\x1b[31mred"),
        ("two\nlines", "\u200b"),
        ("10", "9"),
        ("-1", "1"),
        ("1.5", "1"),
        ("007", "7"),
        (str(2**40), str(10**19)),
        ("9" * 5000, "1"),
    ],
)
@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_a_class_of_a_list_is_the_whole_cell(tmp_path, labels, suffix, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(zip(("a.png", "b.png"), labels, strict=True))
    files = found(tmp_path, flat(["a.png", "b.png"], **{f"labels.{suffix}": text.getvalue().encode()}))
    assert labels_of(files) == list(labels)


def test_spaces_around_cells_are_no_part_of_them(tmp_path):
    files = found(tmp_path, flat(["a.png", "b.png"], 'name, class\na.png , "red fox" \n b, red panda \n'))
    assert labels_of(files) == ["red fox", "red panda"]


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lists_of_editors_are_read(tmp_path, form, newline):
    text = newline.join(["file,label", "a.png,Füchse", "b.png,川", ""])
    files = found(tmp_path, flat(["a.png", "b.png"], **{"labels.csv": text.encode(form)}))
    assert labels_of(files) == ["Füchse", "川"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,label\na.png,x\n\nb.png,\n",
            r"labels.csv, line 4: expected a name and a class in each line, got \['b.png', ''\]",
        ),
        ("file,label\na.png,x\nb.png,  \n", "labels.csv, line 3: expected a name and a class"),
        ("file,label\na.png,x\n,y\n", "labels.csv, line 3: expected a name and a class"),
        ("a.png;x\nb.png;y\n", "line 1: .*; columns must be separated by commas, not ';'"),
        ("a.png\tx\nb.png\ty\n", r"line 1: .*; columns must be separated by commas, not '\\t'"),
        ("a.png,x\nb.png,y\na.png,y\n", "line 3: 'a.png' is of class 'y', but was of 'x' before"),
        ("a.png,1\nb.png,cat\n", "labels are partly numbers and partly names: 1 and 'cat'"),
        ("a.png,\x1b[31m\nb.png,2\n", r"partly numbers and partly names: 2 and '\\x1b\[31m'"),
        ("", "lists none of the images"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        found(tmp_path, flat(["a.png", "b.png"], **{"labels.csv": text.encode()}))


def test_a_list_that_is_no_text_is_named_with_its_byte(tmp_path):
    with pytest.raises(DataError, match=r"labels.csv is not UTF-8: byte 8: "):
        found(tmp_path, flat(["a.png"], **{"labels.csv": b"a.png,Fu\xdf\n"}))


# ------------------------------------------------------------------------------------------------- folders like splits


@pytest.mark.parametrize("name", ["train", "test", "validation", "val", "Training"])
@pytest.mark.parametrize("others", [("bus", "car"), ("bus",)])
def test_a_class_may_be_called_like_a_split(tmp_path, name, others):
    files = found(tmp_path, {f"{folder}/{copy}.png": PNG for folder in (name, *others) for copy in range(2)})
    assert set(files.classes) == {name, *others}
    assert set(labels_of(files)) == {name, *others}


def test_several_classes_may_be_called_like_splits(tmp_path):
    names = ("train", "val", "test", "plane", "data")
    assert set(found(tmp_path, {f"{name}/0.png": PNG for name in names}).classes) == set(names)


def test_a_class_called_train_within_sets(tmp_path):
    write_folder(
        tmp_path, {f"{split}/{name}/0.png": PNG for split in ("train", "val") for name in ("train", "test", "bus")}
    )
    sets = find_images(tmp_path)
    assert list(sets) == ["train", "validation"]
    assert sets["train"].classes == sets["validation"].classes == ("bus", "test", "train")


def test_sets_beside_other_folders_say_what_is_not_used(tmp_path, caplog):
    write_folder(
        tmp_path, {f"{split}/{name}/0.png": PNG for split in ("train", "val") for name in "ab"} | {"more/0.png": PNG}
    )
    assert list(find_images(tmp_path)) == ["train", "validation"]
    assert f"{tmp_path}: beside train, val, the images in 'more' are not used" in caplog.text


def test_what_may_be_a_set_or_a_class_is_refused(tmp_path):
    write_folder(tmp_path, {f"train/{name}/0.png": PNG for name in ("steam", "electric")} | {"bus/0.png": PNG})
    with pytest.raises(
        DataError, match=r"'train' is either a set, .* or a class beside 'bus': move the class folders out"
    ):
        find_images(tmp_path)


# ------------------------------------------------------------------------------------------------------------- folders


def test_names_of_folders_are_names_of_classes(tmp_path):
    names = ("red fox", "[bold]", "a\nb", "\x1b[31m", "10", "9", "1.5", "-1", "ä", "caf\udce9")
    if os.name == "nt":
        names = names[:2]
    files = read_folder(write_folder(tmp_path, {f"{name}/0.png": PNG for name in names}))
    assert files.classes == (("-1", "1.5", "9", "10", "\x1b[31m", "[bold]", "a\nb", "caf\udce9", "red fox", "ä"))
    assert json.loads(json.dumps(files.classes)) == list(files.classes)
    assert files.decode(files.classes.index("caf\udce9")).size == (20, 16)


# -------------------------------------------------------------------------------------------------------------- shards


def tar(path, labels, suffix="cls"):
    files = {}
    for number, label in enumerate(labels):
        files |= {f"{number}.png": PNG, f"{number}.{suffix}": str(label).encode()}
    return write_tar(path, files)


@pytest.mark.parametrize("large", [2**40, 20_240_131, 10**19, 10**30, -1, 1000])
@pytest.mark.parametrize("form", ["tar", "json", "list"])
def test_as_many_classes_as_there_are_numbers(tmp_path, large, form):
    labels = [0, large] * 3
    tracemalloc.start()
    if form == "list":
        text = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
        files = found(tmp_path, flat([f"{number}.png" for number in range(6)], text))
    elif form == "json":
        files = find_images(tar(tmp_path / "a.tar", [json.dumps({"label": label}) for label in labels], "json"))["all"]
    else:
        files = find_images(tar(tmp_path / "a.tar", labels))["all"]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert files.classes == tuple(map(str, sorted({0, large})))
    assert labels_of(files) == list(map(str, labels))
    assert files.numbered
    assert most < 2**24


def test_parquet_of_large_numbers(tmp_path):
    files = find_images(write_parquet(tmp_path / "a.parquet", [(PNG, label) for label in (2**40, 7, 2**40)]))["all"]
    assert (files.classes, files.labels.tolist()) == (("7", str(2**40)), [1, 0, 1])


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["1.5", "1", "10"], ("1", "1.5", "10")),
        (["01", "1"], ("01", "1")),
        (["red fox", "red panda"], ("red fox", "red panda")),
        (["\ufeff3", "1"], ("1", "3")),
    ],
)
def test_labels_of_shards_are_in_the_order_of_all(tmp_path, labels, wanted):
    assert find_images(tar(tmp_path / "a.tar", labels))["all"].classes == wanted


def test_labels_of_json_that_are_no_whole_numbers(tmp_path):
    labels = ['{"label": 1.5}', '{"label": 2}', '{"label": 10}']
    assert find_images(tar(tmp_path / "a.tar", labels, "json"))["all"].classes == ("1.5", "2", "10")
    labels = ['{"label": true}', '{"label": false}']
    assert find_images(tar(tmp_path / "b.tar", labels, "json"))["all"].classes == ("false", "true")


def test_own_numbers_are_classes_of_their_own(tmp_path):
    for split in ("train", "val"):
        tar(tmp_path / f"{split}-0.tar", [3, 5, 5])
    assert imagenet.load(tmp_path).format.classes == imagenet.classes()
    task = imagenet.load(tmp_path, own_numbers=True)
    assert task.format.classes == ("3", "5")
    assert task.test.files.labels.tolist() == [0, 1, 1]


def test_numbers_that_the_training_set_lacks(tmp_path):
    tar(tmp_path / "train-0.tar", [3, 5, 10**6])
    tar(tmp_path / "val-0.tar", [4, 3])
    with pytest.raises(DataError, match="unknown classes '4'"):
        imagenet.load(tmp_path)
