"""Values of JSON that may be damaged."""

import pytest

from flowformer.common.values import read_flag, read_texts


@pytest.mark.parametrize("value", ["yes", 1, None, []])
def test_flags_are_true_or_false(value):
    with pytest.raises(ValueError, match="trim must be true or false, got"):
        read_flag({"trim": value}, "trim")


def test_texts_that_must_differ():
    with pytest.raises(ValueError, match="classes must differ from each other, 1 of 3 do not"):
        read_texts({"classes": ["1", "2", "1"]}, "classes", distinct=True)
    assert read_texts({"names": ["a", "a"]}, "names") == ("a", "a")
