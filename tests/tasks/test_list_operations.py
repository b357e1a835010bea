"""List operations: values of expressions in text, and what is no expression."""

import random

import pytest
from plain_listops import draw_tree, value_of, write_tree

from flowformer.tasks.list_operations import add_parentheses, evaluate

DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MAX 4 3 ]", 4),
        ("[MIN 4 3 ]", 3),
        ("[SM 9 8 7 ]", 4),
        ("[MED 1 4 7 8 ]", 5),  # 5.5
        ("[MED 9 0 5 ]", 5),
        ("[MED 0 1 ]", 0),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),  # the example of the paper of Long Range Arena, and its others
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5),
        ("[MIN [SM 5 5 ] [MAX 3 [MED 2 2 2 ] ] ]", 0),
        ("  [SM\t1\n2 ]  ", 3),
        ("[MAX 4 ]", 4),
        ("( ( ( [MAX 4 ) 3 ) ] )", 4),
        ("( ( ( ( [MAX 4 ) 3 ) ( ( ( [MIN 2 ) 8 ) ] ) ) ] )", 4),
        ("( ( ( [SM ( ( ( [MIN 2 ) 8 ) ] ) ) 9 ) ] )", 1),
    ],
)
def test_values(text, value):
    assert evaluate(text) == value


def test_parentheses():
    assert add_parentheses(["[MAX", "4", "3", "]"]) == "( ( ( [MAX 4 ) 3 ) ] )"
    nested = add_parentheses(["[MAX", "4", "3", "[MIN", "2", "8", "]", "]"])
    assert nested == "( ( ( ( [MAX 4 ) 3 ) ( ( ( [MIN 2 ) 8 ) ] ) ) ] )"
    assert add_parentheses(["5"]) == "5"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the expression is empty"),
        ("( )", "the expression is empty"),
        ("[MAX 4 [AVG 3 ] ]", r"word 3: unknown token '\[AVG', expected 0 to 9, \[MIN, \[MAX, \[MED, \[SM or \]"),
        ("[MAX 10 3 ]", "word 2: unknown token '10'"),
        ("[MAX -1 3 ]", "word 2: unknown token '-1'"),
        ("[MAX ٣ 3 ]", "word 2: unknown token '٣'"),  # a digit, but not one of ours
        ("[MAX 4 3", r"word 1: \[MAX is not closed"),
        ("[MAX 4 [MIN 3 ]", r"word 1: \[MAX is not closed"),
        ("[MAX 4 [MIN 3 2", r"word 3: \[MIN is not closed"),
        ("[MAX 4 3 ] ]", r"word 5: \] closes no operation"),
        ("] [MAX 4 3", r"word 1: \] closes no operation"),
        ("[MAX ]", r"word 1: \[MAX has no arguments"),
        ("[MAX 1 [MIN ] ]", r"word 3: \[MIN has no arguments"),
        ("4 3", "2 expressions, expected one"),
        ("[MAX 4 3 ] [MIN 1 2 ]", "2 expressions, expected one"),
        ("( ( ( [MAX 4 ) 3 ) ]", r"word 10: the end, expected \)"),
        ("( ( [MAX 4 ) 3 ) ] )", r"word 3: \[MAX, expected \("),
        ("( ( ( [MAX 4 ) 3 ) ] ) )", r"word 11: \), expected the end"),
        ("( ( ( [MAX 4 3 ) ) ] )", r"word 6: 3, expected \)"),
        ("( ( ( [MAX ) 4 ) 3 ) ]", r"word 5: \), expected 4"),
        ("( ( ( [MAX 4 ) 3 ) x )", "word 9: unknown token 'x'"),
        ("( 4 )", r"word 1: \(, expected 4"),
        ("[MAX " + "9" * 1_000_000 + " ]", r"word 2: unknown token '9{40}\.\.\.'"),
    ],
)
def test_what_is_no_expression_is_said(text, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        evaluate(text)


def test_deep_nesting():
    words = ["[SM"] * DEEP + ["8"] + ["]"] * DEEP
    assert evaluate(" ".join(words)) == 8
    assert evaluate(add_parentheses(words)) == 8
    with pytest.raises(ValueError, match=r"word 1: .* is not closed"):
        evaluate(" ".join(words[:-1]))


def test_values_and_form_are_those_of_the_published_program():
    rng = random.Random(0)
    trees = [draw_tree(rng, 5) for _ in range(1_000)]
    assert max(length for _, length in trees) > 100
    for tree, _ in trees:
        text = write_tree(tree)
        words = text.replace("(", "").replace(")", "").split()
        assert evaluate(text) == evaluate(" ".join(words)) == value_of(tree)
        assert add_parentheses(words) == text
