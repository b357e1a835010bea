"""List operations: their rules, and the value of an expression in text.

Source: Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", 2018 (nyu-mll/spinn,
python/spinn/data/listops/make_data.py), and Tay et al., "Long Range Arena", 2021 (lra_benchmarks/data/listops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

# Of an even number of digits the median is the mean of the middle two, rounded down, as in both sources.
OPERATIONS: Mapping[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: _median(sorted(values)),
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
_DIGITS = {str(digit): digit for digit in range(10)}
_PARENTHESES = ("(", ")")
_SHOWN_CHARACTERS = 40


def evaluate(expression: str) -> int:
    """Compute the value of an expression, 0 to 9.

    Words are separated by whitespace. An expression is ``[MAX 4 3 [MIN 2 8 ] ]``, or the same as Long Range Arena's
    files have it, a binary tree with parentheses: ``( ( ( ( [MAX 4 ) 3 ) ( ( ( [MIN 2 ) 8 ) ] ) ) ] )``. Operations may
    be nested to any depth.

    Raises:
        ValueError: for an empty text, an unknown word, brackets or parentheses that do not match, an operation without
            arguments, or more than one expression; the message says which word it is.
    """
    words = expression.split()
    bare = [word for word in words if word not in _PARENTHESES]
    value = _compute(bare, words)
    if len(bare) < len(words):
        _check_parentheses(bare, words)
    return value


def _median(ordered: Sequence[int]) -> int:
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def _compute(bare: Sequence[str], words: Sequence[str]) -> int:
    """The value of an expression without parentheses; ``words`` is the same with them, for messages."""
    values: list[int] = []  # arguments so far of the innermost open operation
    around: list[tuple[str, int, list[int]]] = []  # open operations, their places, the arguments before them
    for place, word in enumerate(bare):
        if word in _DIGITS:
            values.append(_DIGITS[word])
        elif word == END:
            if not around:
                raise ValueError(f"{_locate(place, words)}: ] closes no operation")
            name, began, before = around.pop()
            if not values:
                raise ValueError(f"{_locate(began, words)}: {name} has no arguments")
            before.append(OPERATIONS[name](values))
            values = before
        elif word in OPERATIONS:
            around.append((word, place, values))
            values = []
        else:
            known = f"0 to 9, {', '.join(OPERATIONS)} or {END}"
            raise ValueError(f"{_locate(place, words)}: unknown token {_shorten(word)}, expected {known}")
    if around:
        raise ValueError(f"{_locate(around[-1][1], words)}: {around[-1][0]} is not closed")
    if len(values) != 1:
        raise ValueError(f"{len(values)} expressions, expected one" if values else "the expression is empty")
    return values[0]


def _locate(place: int, words: Sequence[str]) -> str:
    """Which word of all is the one at ``place`` among those that are no parentheses."""
    return f"word {[number for number, word in enumerate(words, 1) if word not in _PARENTHESES][place]}"


def add_parentheses(words: Sequence[str]) -> str:
    """Return an expression as Long Range Arena's files have it, a binary tree with parentheses.

    Args:
        words: The expression without parentheses, ``["[MAX", "4", "3", "]"]``, in which brackets match.

    Returns:
        ``( ( ( [MAX 4 ) 3 ) ] )``: each argument is joined to what precedes it, and so is the closing bracket.
    """
    written: list[str] = []
    place, count = -1, 0  # of the innermost open operation: where it is in `written`, its arguments so far
    around: list[tuple[int, int]] = []
    for word in words:
        if word in OPERATIONS:
            around.append((place, count))
            place, count = len(written), 0
            written.append(word)
            continue
        if word == END:
            written[place] = "( " * (count + 1) + written[place]
            place, count = around.pop()
            word = "] )"
        written.append(f"{word} )" if around else word)
        count += 1
    return " ".join(written)


def _check_parentheses(bare: Sequence[str], words: Sequence[str]) -> None:
    wanted = add_parentheses(bare)
    if wanted == " ".join(words):
        return
    pairs = zip([*words, "the end"], [*wanted.split(), "the end"], strict=False)
    place, found, right = next((place, *pair) for place, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    raise ValueError(f"word {place}: {found}, expected {right}; parentheses join each argument to what precedes it")


def _shorten(word: str) -> str:
    return repr(word if len(word) <= _SHOWN_CHARACTERS else f"{word[:_SHOWN_CHARACTERS]}...")
