"""Tables of lengths and classes."""

import numpy as np
import pytest

from flowformer.tasks.lra.describing import describe
from flowformer.tasks.lra.sequences import TokenSequences


def made(lengths, labels):
    return TokenSequences.joined(np.zeros(sum(lengths), np.uint8), np.array(lengths), np.array(labels))


def test_tables():
    parts = {"train": made([10, 20, 30, 33], [0, 0, 1, 2]), "test": made([1_200], [1])}
    assert describe(parts, ["a", "b", "c"]).splitlines() == [
        "part   sequences     mean    0 %    5 %   25 %   50 %   75 %   95 %  100 %",
        "train          4     23.2     10     12     18     25     31     33     33",
        "test           1  1,200.0  1,200  1,200  1,200  1,200  1,200  1,200  1,200",
        "",
        "tokens (train)  sequences",
        "10 to 11                1  ########################################",
        "12 to 13                0",
        "14 to 15                0",
        "16 to 17                0",
        "18 to 19                0",
        "20 to 21                1  ########################################",
        "22 to 23                0",
        "24 to 25                0",
        "26 to 27                0",
        "28 to 29                0",
        "30 to 31                1  ########################################",
        "32 to 33                1  ########################################",
        "",
        "part   class a  class b  class c",
        "train   50.0 %   25.0 %   25.0 %",
        "test     0.0 %  100.0 %    0.0 %",
    ]


def test_one_length():
    assert "7 to 7                  2  ###" in describe({"train": made([7, 7], [0, 1])}, ["a", "b"])


@pytest.mark.parametrize("parts", [{}, {"train": made([], [])}, {"train": made([3], [0]), "test": made([], [])}])
def test_parts_without_sequences(parts):
    with pytest.raises(ValueError, match="expected parts with sequences"):
        describe(parts, ["a"])
