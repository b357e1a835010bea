"""Labels of series as data spells them, encodings of their files, and values out of range."""

import gzip
import os

import numpy as np
import pytest
import torch
from series_writers import HEADER, ROWS, write_csv, write_ts

from flowformer.common.errors import DataError
from flowformer.tasks.series.files import read_csv, read_table, read_ts
from flowformer.tasks.series.format import SeriesFormat, SeriesScaler
from flowformer.tasks.series.task import load_pair


def refuse(call, *parts: str) -> None:
    """The call raises DataError, and its message holds every part."""
    with pytest.raises(DataError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def ts(path, declared, labels):
    return write_ts(path, [f"1,2:3,{number}:{label}" for number, label in enumerate(labels)], [*HEADER[:4], declared])


# ---------------------------------------------------------------------------------------------------------- .ts labels


NAMES = ("walking up", "a:b", "ends with :", "don't", "[red]", "tab\there", "1,2", "ä 川")


@pytest.mark.parametrize(("quote", "name"), [(quote, name) for quote in "'\"" for name in NAMES if quote not in name])
def test_quoted_labels_are_whole(tmp_path, quote, name):
    path = ts(tmp_path / "own.ts", f"@classLabel true {quote}{name}{quote} b", [f"{quote}{name}{quote}", "b"])
    assert read_ts(path)[1] == [name, "b"]


@pytest.mark.parametrize(
    ("declared", "labels", "wanted"),
    [
        ("'a' \"b\"", ["a", "b"], ["a", "b"]),
        ("a b", ["'a'", '"b"'], ["a", "b"]),
        ("don't can't", ["don't", "can't"], ["don't", "can't"]),
        ("'open b", ["'open", "b"], ["'open", "b"]),
        ("a\tb", ["a", "b\t"], ["a", "b"]),
        ("1 2.0 1_0 10", ["1.0", "2", "1_0", "10"], ["1", "2.0", "1_0", "10"]),
        (f"{2**60} {2**60 + 1}", [f"{2**60 + 1}", f"{2**60}.0"], [f"{2**60 + 1}", f"{2**60}"]),
    ],
)
def test_labels_are_found_in_the_header(tmp_path, declared, labels, wanted):
    assert read_ts(ts(tmp_path / "own.ts", f"@classLabel true {declared}", labels))[1] == wanted


def test_errors_about_labels_do_not_deny_what_is_in_the_file(tmp_path):
    path = tmp_path / "own.ts"
    two = "@classLabel true walking up walking down"
    refuse(
        lambda: read_ts(ts(path, two, ["walking up"])),
        "line 7: label 'walking up' is not in the header's @classLabel list, which spaces separate into 'walking', 'up'"
        ", 'down'; a label that contains spaces must be quoted, there and in the rows",
    )
    refuse(
        lambda: read_ts(ts(path, "@classLabel true a b", ["c"])),
        "line 7: label 'c' is not in the header's @classLabel list ('a', 'b')",
    )
    for declared in ("@classLabel true", "@classLabel false"):
        refuse(
            lambda declared=declared: read_ts(ts(path, declared, ["a"])),
            f"line 6: no class labels: the header has '{declared}', expected '@classLabel true' and the labels",
        )
    refuse(lambda: read_ts(write_ts(path, ROWS, HEADER[:4])), "no class labels: no @classLabel line, expected")
    refuse(
        lambda: read_ts(ts(path, "@classLabel a b", ["a"])),
        "line 5: '@classLabel a b': expected 'true' and the labels, or 'false', after @classLabel",
    )


def test_control_characters_in_labels_are_escaped_in_messages(tmp_path):
    with pytest.raises(DataError) as caught:
        read_ts(ts(tmp_path / "own.ts", "@classLabel true a b", ["\x1b[31mred", "b"]))
    assert r"'\x1b[31mred'" in str(caught.value)
    assert str(caught.value).isprintable()


def test_time_stamps_are_refused_in_words(tmp_path):
    rows = ["(0,1.5),(1,2.5):a"]
    refuse(
        lambda: read_ts(write_ts(tmp_path / "own.ts", rows)), "line 7: ", "values with time stamps are not supported"
    )
    header = ["@timeStamps true", *HEADER[1:]]
    refuse(lambda: read_ts(write_ts(tmp_path / "own.ts", rows, header)), "values with time stamps (@timeStamps true)")


# ---------------------------------------------------------------------------------------------------- order of classes


@pytest.mark.parametrize("kind", ["ts", "csv"])
@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["1", "-1"], ("-1", "1")),
        (["2.5", "0.5", "10"], ("0.5", "2.5", "10")),
        (["red panda", "red fox"], ("red fox", "red panda")),
        ([str(2**40), "20240131", str(10**19)], ("20240131", str(2**40), str(10**19))),
        (["[bold]", "a\x07b"], ("[bold]", "a\x07b")),
    ],
)
def test_classes_are_in_one_order(tmp_path, kind, labels, wanted):
    if kind == "ts":
        quoted = [f"'{label}'" for label in labels]
        path = ts(tmp_path / "own.ts", f"@classLabel true {' '.join(quoted)}", quoted * 2)
    else:
        rows = [f'{number},0,"{label}",1,{number}' for number, label in enumerate(labels * 2)]
        path = write_csv(tmp_path / "own.csv", rows)
    task = load_pair(path, path)
    assert task.format.classes == wanted
    assert [task.format.classes[row] for row in task.train.labels] == labels * 2
    assert SeriesFormat.from_json(task.format.to_json()).classes == wanted


def test_a_label_with_a_line_feed_is_one_label(tmp_path):
    path = write_csv(tmp_path / "own.csv", ['s,0,"a\nb",1,2', "t,0,c,2,1", "u,0,d,2,?"])
    assert load_pair(path, path).format.classes == ("a\nb", "c", "d")
    bad = write_csv(tmp_path / "bad.csv", ['s,0,"x\ny",1,2'])
    with pytest.raises(DataError) as caught:
        load_pair(path, bad)
    assert r"'x\ny'" in str(caught.value)


def test_whole_numbers_are_found_where_a_program_wrote_decimals(tmp_path):
    train = write_csv(tmp_path / "train.csv", ["s,0,1,1,2", "t,0,2,2,1"])
    test = write_csv(tmp_path / "test.csv", ["s,0,2.0,1,2", "t,0,1.0,2,1"])
    assert load_pair(train, test).test.labels.tolist() == [1, 0]
    other = write_csv(tmp_path / "other.csv", ["s,0,3.0,1,2"])
    refuse(lambda: load_pair(train, other), "label '3.0' does not occur in the training data", "which has '1', '2'")


# ----------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["own.ts", "own.csv", "own.csv.gz", "own.ts.gz"])
def test_files_of_editors_are_read(tmp_path, form, newline, name):
    plain = tmp_path / f"plain{name.removesuffix('.gz')[-4:]}"
    if ".ts" in name:
        ts(plain, "@classLabel true ä b", ["ä", "b"])
    else:
        write_csv(plain, ["s,0,ä,1,2", "t,0,b,2,"])
    data = plain.read_text(encoding="utf-8").replace("\n", newline).encode(form)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    table, truth = read_table(tmp_path / name), read_table(plain)
    assert (table.labels, table.names, table.channel_names) == (truth.labels, truth.names, truth.channel_names)
    for one, other in zip(table.series, truth.series, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_no_utf8_is_named_with_its_byte(tmp_path):
    path = write_csv(tmp_path / "own.csv", ["s,0,Fuß,1,2", "t,0,b,2,1"])
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    refuse(lambda: read_csv(path), f"{path} is not UTF-8: byte 28: ")
    path = ts(tmp_path / "own.ts", "@classLabel true Fuß b", ["Fuß", "b"])
    content = path.read_text(encoding="utf-8").encode("latin-1")
    path.write_bytes(content)
    refuse(lambda: read_ts(path), f"{path} is not UTF-8: byte {content.index(0xDF)}: ")
    # What is no data may be in any encoding, as in the published archive.
    path.write_bytes(b"# caf\xe9\n@problemName caf\xe9\n" + content.replace(b"\xdf", b"s"))
    assert read_ts(path)[1] == ["Fus", "b"]


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes on POSIX only")
def test_a_name_of_a_file_that_is_no_utf8(tmp_path):
    path = write_csv(tmp_path / "caf\udce9.csv", ["s,0,a,1,2", "t,0,b,2,1"])
    assert read_csv(path)[1] == ["a", "b"]


# -------------------------------------------------------------------------------------------------- values out of range


@pytest.mark.parametrize("value", ["1e308", "-1e308", "inf", "-Infinity", "1e400", "3.5e38"])
def test_values_beyond_float32_are_named_with_their_place(tmp_path, value):
    path = write_csv(tmp_path / "own.csv", ["s,0,a,1,2", "t,1,b,2,", "", f"t,0,b,2, {value}"])
    refuse(lambda: read_csv(path), f"{path}, line 5: column 'y': {value!r} is beyond the range of float32")
    path = write_ts(tmp_path / "own.ts", [ROWS[0], f"1,2:?,{value}:b"])
    refuse(lambda: read_ts(path), f"{path}, line 8: channel 2, time step 2: {value!r} is beyond the range of float32")


def test_the_range_of_float32_is_read(tmp_path):
    series, _ = read_csv(write_csv(tmp_path / "own.csv", ["s,0,a,3.4e38,-3.4e38", "t,1,b,1e-300,nan"]))
    np.testing.assert_array_equal(np.concatenate(series), [[3.4e38, -3.4e38], [1e-300, np.nan]])


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        ('"1,5"', "'1,5' is not a number; the decimal sign must be a point"),
        ('"1,234,567"', "'1,234,567' is not a number; digits must not be grouped"),
        ("1'000", '"1\'000" is not a number; digits must not be grouped'),
        ("1 000", "'1 000' is not a number; digits must not be grouped"),
        ("1_000", "'1_000' is not a number"),
        ("0x10", "'0x10' is not a number"),
        ("TRUE", "'TRUE' is not a number"),
    ],
)
def test_numbers_of_other_countries_are_explained(tmp_path, cell, cause):
    path = write_csv(tmp_path / "own.csv", ["s,0,a,1,2", f"t,1,b,2,{cell}"])
    refuse(lambda: read_csv(path), f"{path}, line 3: column 'y': {cause}")


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        ("series;time;label;x", "expected commas between columns, not semicolons"),
        ("series\ttime\tlabel\tx", "expected commas between columns, not tabs"),
        ("Series,Time,label,x", "'Series', 'Time' must be written in small letters"),
    ],
)
def test_headers_of_other_programs_are_explained(tmp_path, header, cause):
    refuse(lambda: read_csv(write_csv(tmp_path / "own.csv", ["s,0,a,1"], header)), "line 1: missing column", cause)


def test_values_too_far_from_the_training_data_are_named(tmp_path):
    train = write_csv(tmp_path / "train.csv", ["s,0,a,1,2", "t,0,b,2,2"])
    far = write_csv(tmp_path / "far.csv", ["s,0,a,1,2", "t,0,b,?,3", "t,1,b,1e30,3"])
    wanted = (
        f"{far}, line 3: channel 'x', time step 2: 1e+30 is 1.4e+30 standard deviations from the mean of the training"
    )
    refuse(lambda: load_pair(train, far), wanted)
    form = load_pair(train, train).format

    def model(x, mask):
        raise AssertionError("not reached")

    refuse(lambda: form.classify_files(model, [far]), wanted)


def test_no_label_without_probabilities(tmp_path):
    train = write_csv(tmp_path / "train.csv", ["s,0,a,1,2", "t,0,b,2,2"])
    form = load_pair(train, train).format

    class Model(torch.nn.Linear):
        def forward(self, x, mask):
            return torch.where(x[:, 0, :1] > 0, torch.nan, 0.0).expand(-1, 2)

    refuse(
        lambda: form.classify_files(Model(1, 1), [train]), f"{train}, line 3: the model gives no finite probabilities"
    )


def test_a_channel_without_values_is_said(tmp_path, caplog):
    train = write_csv(tmp_path / "train.csv", ["s,0,a,1,", "t,0,b,2,?"])
    task = load_pair(train, train)
    assert f"{train}: channel 'y' without any value, set to 0" in caplog.text
    assert (task.format.collate(list(task.train))["x"][..., 1] == 0).all()


def test_scales_beyond_float64_are_refused():
    with pytest.raises(ValueError, match=r"channel 1 has values from -1e\+200 to 1e\+200, whose standard deviation"):
        SeriesScaler.fit([np.array([[0.0, 1e200], [1.0, -1e200]])])
    with pytest.raises(ValueError, match="channel 0 has values from 1e"):
        SeriesScaler.fit([np.array([[1.7e308], [1.6e308], [1e308]])])
    scaler = SeriesScaler.fit([np.array([[0.0], [1e-10]])])
    with pytest.raises(ValueError, match=r"the value 1e\+300 of channel 0, time step 1, is beyond float32"):
        scaler(np.array([[0.0], [1e300]]))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("s9,inf,a,1,2", "time 'inf' is neither a number"),
        ("s9,-inf,a,1,2", "time '-inf' is neither a number"),
        ("s9,0\0,a,1,2", "null character"),
        ("s9,0,a\0b,1,2", "null character"),
        ("s9,0,a,\u0661\u0662,2", "'\u0661\u0662' is not a number"),
        (f"s9,0,a,{'x' * 5000},2", "is not a number"),
    ],
)
def test_odd_cells_are_refused(tmp_path, row, says):
    path = tmp_path / "odd.csv"
    path.write_text(f"series,time,label,x,y\ns1,0,a,1,2\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_csv(path)
    assert says in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200
