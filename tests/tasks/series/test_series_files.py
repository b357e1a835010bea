"""Files of series: what is read, with labels and without, and every way a file can be wrong."""

import gzip
import time
from pathlib import Path

import numpy as np
import pytest
from series_writers import HEADER, ROWS, write_csv, write_ts

from flowformer.common.errors import DataError
from flowformer.tasks.series.files import read_csv, read_table, read_ts

DATA = Path(__file__).parents[4] / "shared" / "data" / "uea"


def refuse(call, *parts: str) -> None:
    """The call raises DataError, and its message holds every part."""
    with pytest.raises(DataError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


# --- .ts


def test_ts_reads_lengths_channels_and_labels(tmp_path):
    series, labels = read_ts(write_ts(tmp_path / "own.ts"))
    assert [one.shape for one in series] == [(3, 2), (2, 2), (2, 2), (2, 2)]
    np.testing.assert_array_equal(series[0], [[1, 4], [2, 5], [3, 6]])
    assert labels == ["a", "b", "a", "b"]


def test_ts_reads_missing_values_negative_numbers_and_exponents(tmp_path):
    series, _ = read_ts(write_ts(tmp_path / "own.ts", ["?,-2,NaN:1e-3,-4.5E2,0:a"]))
    np.testing.assert_array_equal(series[0], [[np.nan, 1e-3], [-2, -450], [np.nan, 0]])


def test_ts_keeps_labels_as_the_header_spells_them(tmp_path):
    header = [*HEADER[:-1], "@classLabel true Banana 1 walk Walk"]
    rows = ["1,2:banana", "1,2:1.0", "1,2:walk", "1,2:Walk", "1,2: Banana "]
    _, labels = read_ts(write_ts(tmp_path / "own.ts", rows, header))
    assert labels == ["Banana", "1", "walk", "Walk", "Banana"]


def test_ts_forgives_blank_lines_comments_byte_order_mark_and_crlf(tmp_path):
    path = tmp_path / "own.ts"
    text = "\r\n".join(["# caf\xe9", *HEADER, "@data", "", ROWS[0], "   ", "# half way", ROWS[1], "", ""])
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("latin-1"))
    series, labels = read_ts(path)
    assert len(series) == 2
    assert labels == ["a", "b"]


def test_ts_reads_gzip(tmp_path):
    plain = write_ts(tmp_path / "own.ts")
    packed = tmp_path / "own.ts.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for one, other in zip(read_ts(packed)[0], read_ts(plain)[0], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("1,2:a", "1 channels before the label, 2 expected"),
        ("1,2:3,4:5,6:a", "3 channels before the label, 2 expected"),
        ("a", "0 channels before the label, 2 expected"),
        ("1,2:3:a", "channels of different lengths [1, 2]"),
        ("1,2:3,4:c", "label 'c' is not in the header's @classLabel list"),
        ("1,2:3,4:", "label '' is not in the header"),
        ("1,2:3,x4:a", "channel 2, time step 2: 'x4' is not a number"),
        ("1,:3,4:a", "channel 1, time step 2: '' is not a number"),
        ("1,2:3,1.2.3:a", "'1.2.3' is not a number"),
    ],
)
def test_ts_names_the_line_of_a_bad_row(tmp_path, row, cause):
    path = write_ts(tmp_path / "own.ts", [ROWS[0], "", row, ROWS[1]])
    refuse(lambda: read_ts(path), f"{path}, line 9: ", cause)


def test_ts_holds_the_header_to_its_word(tmp_path):
    header = [*HEADER[:3], "@equalLength true", HEADER[4]]
    path = write_ts(tmp_path / "own.ts", ROWS, header)
    refuse(lambda: read_ts(path), f"{path}, line 8: 2 time steps, but 3 before it", "@equalLength true")
    path = write_ts(tmp_path / "own.ts", ROWS, [*HEADER, "@dimensions 3"])
    refuse(lambda: read_ts(path), f"{path}, line 8: 2 channels before the label, 3 expected")


@pytest.mark.parametrize(
    ("header", "line", "cause"),
    [
        (HEADER[:4], 5, "no class labels"),
        ([*HEADER[:4], "@classLabel false"], 6, "no class labels"),
        ([*HEADER[:4], "@classLabel true"], 6, "no class labels"),
        ([*HEADER[:4], "@targetLabel true"], 5, "a regression problem"),
        (["@timeStamps true", HEADER[4]], 1, "time stamps"),
    ],
)
def test_ts_refuses_headers(tmp_path, header, line, cause):
    path = write_ts(tmp_path / "own.ts", ROWS, header)
    refuse(lambda: read_ts(path), f"{path}, line {line}: ", cause)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "the file is empty"),
        (b"@problemName own\n1,2:a\n", "no @data line in 2 lines"),
        (bytes(range(256)) * 8, "no @data line"),
        ("\n".join([*HEADER, "@data", ""]).encode(), "no rows after @data"),
    ],
)
def test_ts_refuses_files_that_are_none(tmp_path, content, cause):
    path = tmp_path / "own.ts"
    path.write_bytes(content)
    refuse(lambda: read_ts(path), f"{path}: ", cause)


def test_unreadable_files_are_named(tmp_path):
    for name in ("gone.ts", "gone.ts.gz", "gone.csv", "gone.csv.gz"):
        refuse(lambda name=name: read_table(tmp_path / name), name, "no such file")
    (tmp_path / "folder.ts").mkdir()
    refuse(lambda: read_ts(tmp_path / "folder.ts"), "folder.ts: a folder, expected a file")
    body = gzip.compress(write_ts(tmp_path / "own.ts", ROWS * 400).read_bytes())
    for content in (b"no gzip at all", body[:-20], body[:30] + b"\xff" * 20 + body[50:]):
        for name in ("bad.ts.gz", "bad.csv.gz"):
            (tmp_path / name).write_bytes(content)
            refuse(lambda name=name: read_table(tmp_path / name), name)


# --- .csv


def test_csv_reads_any_order_of_rows_and_columns(tmp_path):
    rows = ["2,b,y1,5,10", "1,a,y0,1,20", "0,b,y1,6,30", "0,a,y0,2,", "10,b,y1,?,50"]
    path = write_csv(tmp_path / "own.csv", rows, "time,series,label,x, y ")
    series, labels = read_csv(path)
    np.testing.assert_array_equal(series[0], [[6, 30], [5, 10], [np.nan, 50]])
    np.testing.assert_array_equal(series[1], [[2, np.nan], [1, 20]])
    assert labels == ["y1", "y0"]
    assert series[0].dtype == np.float64


def test_csv_keeps_names_that_look_like_missing_values(tmp_path):
    _, labels = read_csv(write_csv(tmp_path / "own.csv", ["NA,1,None,1,2", "nan,1,null,1,2"]))
    assert labels == ["None", "null"]


def test_csv_sorts_dates(tmp_path):
    rows = ["s,2024-03-01T10:00:00+01:00,a,1,1", "s,2024-03-01T08:30:00Z,a,2,2", "s,2023-12-31,a,3,3"]
    series, _ = read_csv(write_csv(tmp_path / "own.csv", rows))
    np.testing.assert_array_equal(series[0][:, 0], [3, 2, 1])


def test_csv_reads_gzip_quotes_and_byte_order_mark(tmp_path):
    path = tmp_path / "own.csv.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbfseries,time,label,x\r\n"one, two",0,a,1\r\n'))
    series, labels = read_csv(path)
    np.testing.assert_array_equal(series[0], [[1]])
    assert labels == ["a"]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("s,1,a,1,2", "time 1 occurs twice in the same series"),
        ("s,2,b,1,2", "label 'b', but the same series had 'a' before"),
        ("s,2,,1,2", "label is missing"),
        (",2,a,1,2", "series is missing"),
        ("s, ,a,1,2", "time is missing"),
        ("s,2,a,1,abc", "column 'y': 'abc' is not a number"),
        ("s,2,a,1_0,2", "column 'x': '1_0' is not a number"),
        ("s,soon,a,1,2", "time 'soon' is neither a number nor an ISO 8601 date"),
        ("s,2,a,1", "4 cells, but the header has 5"),
        ("s,2,a,1,2,3", "6 cells, but the header has 5"),
        ("s,2", "2 cells, but the header has 5"),
    ],
)
def test_csv_names_the_line_of_a_bad_row(tmp_path, row, cause):
    rows = ["s,1,a,1,2", "", "   ", '"t\nu",1,b,1,', row, "t,5,b,1,2"]
    path = write_csv(tmp_path / "own.csv", rows)
    refuse(lambda: read_csv(path), f"{path}, line 7: ", cause)


def test_csv_refuses_rows_that_are_all_too_long(tmp_path):
    path = write_csv(tmp_path / "own.csv", ["s,1,a,1,2,3", "s,2,a,1,2,3"])
    refuse(lambda: read_csv(path), f"{path}, line 2: 6 cells")


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        ("series,time,x,y", "line 1: missing column label"),
        ("id,when,x", "line 1: missing column series, time, label"),
        ("series,time,label", "line 1: no channel columns"),
        ("series,time,label,x,", "line 1: a column without a name"),
        ("series,time,label,x,x", "two of one name"),
        (" , ", "line 1: no header"),
    ],
)
def test_csv_refuses_headers(tmp_path, header, cause):
    path = write_csv(tmp_path / "own.csv", ["s,1,a,1,2"], header)
    refuse(lambda: read_csv(path), str(path), cause)


@pytest.mark.parametrize(
    ("content", "cause"),
    [("", "the file is empty"), ("series,time,label,x\n\n", "no rows"), ('series,time,label,x\ns,1,"a,1\n', "cells")],
)
def test_csv_refuses_files_without_data(tmp_path, content, cause):
    path = tmp_path / "own.csv"
    path.write_text(content)
    refuse(lambda: read_csv(path), str(path), cause)


# --- without labels


def test_unlabelled_ts_is_read(tmp_path):
    rows = [row.rpartition(":")[0] for row in ROWS]
    truth = read_table(write_ts(tmp_path / "own.ts"))
    for header in ([*HEADER[:-1], "@classLabel false"], HEADER[:-1], [*HEADER[:-1], "@targetLabel false"]):
        table = read_table(write_ts(tmp_path / "bare.ts", rows, header), labelled=False)
        for one, other in zip(table.series, truth.series, strict=True):
            np.testing.assert_array_equal(one, other)
        assert table.labels == [""] * 4
        assert table.names == ("0", "1", "2", "3")
        assert table.channel_names is None
        assert table.where(1) == f"{tmp_path / 'bare.ts'}, line {len(header) + 3}"


def test_labels_that_are_not_needed_are_read_where_they_are(tmp_path):
    path = write_ts(tmp_path / "own.ts", [*ROWS[:2], "1,2:3,4: ? "])
    assert read_table(path, labelled=False).labels == ["a", "b", ""]
    refuse(lambda: read_table(path), "line 9: label '?' is not in the header")
    path = write_csv(tmp_path / "own.csv", ["s,1,a,1,", "t,1,,3,4", "s,2,a,1,2"])
    table = read_table(path, labelled=False)
    assert (table.names, table.labels, table.channel_names) == (("s", "t"), ["a", ""], ("x", "y"))
    refuse(lambda: read_table(path), "line 3: label is missing")


@pytest.mark.parametrize(
    ("header", "row", "cause"),
    [
        ("@classLabel false", "1,2:3,4:a", "3 channels, 2 expected; the header declares no labels (@classLabel)"),
        ("@classLabel false", "1,2:a", "channels of different lengths [1, 2] in one series; the header declares no"),
        ("@classLabel true a b", "1,2:3,4", "1 channels before the label, 2 expected"),
        (
            "@classLabel true a b",
            "1,2:3,4:c",
            "label 'c' is not in the header's @classLabel list ('a', 'b'); if the rows have no",
        ),
        ("@classLabel false", "1,2:3,x", "channel 2, time step 2: 'x' is not a number"),
    ],
)
def test_unlabelled_ts_names_the_line_of_a_bad_row(tmp_path, header, row, cause):
    good = "1,2:3,4:a" if "true" in header else "1,2:3,4"
    path = write_ts(tmp_path / "own.ts", [good, row], [*HEADER[:-1], header])
    refuse(lambda: read_table(path, labelled=False), f"{path}, line 8: ", cause)


def test_unlabelled_ts_refuses_what_it_cannot_tell_apart(tmp_path):
    path = write_ts(tmp_path / "own.ts", ROWS, [*HEADER[:-1], "@classLabel true"])
    refuse(lambda: read_table(path, labelled=False), f"{path}, line 6: no class labels")
    path = write_ts(tmp_path / "own.ts", ["1,2", "3,4"])
    refuse(lambda: read_table(path, labelled=False), f"{path}, line 7: 0 channels before the label")


def test_unlabelled_csv_is_read(tmp_path):
    rows = ["NA,2,5,10", "a,1,1,20", "NA,1,6,", " a ,2,2,40"]
    table = read_table(write_csv(tmp_path / "own.csv", rows, "series,time,x,y"), labelled=False)
    assert (table.names, table.labels, table.channel_names) == (("NA", "a"), ["", ""], ("x", "y"))
    np.testing.assert_array_equal(table.series[0], [[6, np.nan], [5, 10]])
    np.testing.assert_array_equal(table.series[1], [[1, 20], [2, 40]])
    assert table.where(1) == f"{tmp_path / 'own.csv'}, line 3"


@pytest.mark.parametrize(
    ("header", "row", "cause"),
    [
        ("series,time,x,y", "s,2,1", "3 cells, but the header has 4"),
        ("series,time,x,label", "s,2,1", "3 cells, but the header has 4"),
        ("series,time,x,y", ",2,1,1", "series is missing"),
        ("series,time,x,y", "s,,1,1", "time is missing"),
        ("series,time,x,y", "s,1,1,1", "time 1 occurs twice"),
        ("series,time,x,y", "s,2,1,a", "column 'y': 'a' is not a number"),
        ("series,time,x,label", "s,2,1,b", "label 'b', but the same series had '5' before"),
    ],
)
def test_unlabelled_csv_names_the_line_of_a_bad_row(tmp_path, header, row, cause):
    path = write_csv(tmp_path / "own.csv", ["s,1,4,5", "", row], header)
    refuse(lambda: read_table(path, labelled=False), f"{path}, line 4: ", cause)


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        ("x,label", "missing column series, time; the header has x, label"),
        ("series,time", "no channel columns besides series, time"),
        ("series,time,label", "no channel columns besides series, time, label"),
    ],
)
def test_unlabelled_csv_refuses_headers(tmp_path, header, cause):
    path = write_csv(tmp_path / "own.csv", ["s,1,2"], header)
    refuse(lambda: read_table(path, labelled=False), f"{path}, line 1: {cause}")


def test_an_error_is_one_line():
    assert str(DataError("a: broken:\nby something\r\nelse")) == "a: broken: by something else"


# --- real data


def test_real_files_read_as_aeon_reads_them(tmp_path):
    packed = DATA / "SelfRegulationSCP1_TRAIN.ts.gz"
    if not packed.is_file():
        pytest.skip(f"{packed} is not there")
    from aeon.datasets import load_from_ts_file

    start = time.perf_counter()
    series, labels = read_ts(packed)
    seconds = time.perf_counter() - start
    plain = tmp_path / "plain.ts"
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    truth, names = load_from_ts_file(str(plain))
    np.testing.assert_array_equal(np.stack(series), truth.transpose(0, 2, 1))
    assert labels == list(names)
    assert seconds < 30  # about 1 s alone on two cores; the limit catches only a quadratic mistake
