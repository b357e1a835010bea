"""Names of classes: their order, and what a label stands for."""

import pytest

from flowformer.tasks.classes import as_number, find_class, order_classes


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["10", "9", "2", "2"], ("2", "9", "10")),
        (["1", "-1", "-10", "0"], ("-10", "-1", "0", "1")),
        (["2.5", "10", "1e1", "1.0", "1"], ("1", "1.0", "2.5", "10", "1e1")),
        (["07", "7", "11", "007"], ("007", "07", "7", "11")),
        (["b", "10", "a b", "9", "B", "ä"], ("9", "10", "B", "a b", "b", "ä")),
        (["nan", "inf", "1_0", "3", "٣"], ("3", "1_0", "inf", "nan", "٣")),
        ([str(2**63 + 1), str(2**63), "1e400"], (str(2**63), str(2**63 + 1), "1e400")),
        (["", "a\nb", "[red]", "\x1b[31m"], ("", "\x1b[31m", "[red]", "a\nb")),
    ],
)
def test_order_is_by_value_then_by_characters(names, wanted):
    assert order_classes(names) == order_classes(reversed(names)) == wanted


def test_a_name_that_is_no_number():
    assert [as_number(text) for text in ("NaN", "-inf", "1_0", "1,5", "a", "", "1 2", "sNaN")] == [None] * 8


@pytest.mark.parametrize(
    ("label", "wanted"), [("1", 0), ("1.0", 0), ("01", 0), ("a", 2), ("A", None), ("2", 1), ("2.00", None), ("3", None)]
)
def test_a_label_stands_for_the_only_class_of_its_value(label, wanted):
    assert find_class(label, {"1": 0, "2": 1, "a": 2, "2.0": 3}) == wanted
