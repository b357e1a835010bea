"""Hints at the nearest known name."""

from __future__ import annotations

import pytest

from flowformer.common.names import find_nearest, nearest

RECIPES = ["uea/JapaneseVowels", "text/bytes", "text/own", "timeseries/own"]


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("flwo", ["flow", "softmax"], "flow"),
        ("FLOW", ["flow", "softmax"], "flow"),
        ("pems-sf", ["PEMS-SF"], "PEMS-SF"),
        ("japanesevowels", RECIPES, "uea/JapaneseVowels"),
        ("uea/JapaneseVowel", RECIPES, "uea/JapaneseVowels"),
        ("own", RECIPES, "text/own"),  # the first of two
        ("zzz", RECIPES, None),
        ("flow", [], None),
    ],
)
def test_nearest_name_is_found_whatever_its_case(name, known, near):
    assert find_nearest(name, iter(known)) == near


def test_hint_is_empty_where_nothing_is_near():
    assert nearest("flwo", ["flow"]) == " (did you mean 'flow'?)"
    assert nearest("zzz", ["flow"]) == ""
