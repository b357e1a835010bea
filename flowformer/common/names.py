"""Suggestions for misspelled names: "did you mean ...?"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def find_nearest(name: object, known: Iterable[str]) -> str | None:
    """Return the known name nearest to another, or ``None`` if none is similar.

    Case is ignored, and ``"japanesevowels"`` is also near ``"uea/JapaneseVowels"``: the part after the last slash
    counts as a name of its own.
    """
    known = list(known)
    if not isinstance(name, str):
        return None
    spellings = {one.rsplit("/", 1)[-1].casefold(): one for one in reversed(known)}
    spellings.update({one.casefold(): one for one in reversed(known)})
    near = difflib.get_close_matches(name.casefold(), spellings, 1)
    return spellings[near[0]] if near else None


def nearest(name: object, known: Iterable[str]) -> str:
    """Return a hint for an error message, ``" (did you mean 'flow'?)"``; empty if no known name is similar."""
    near = find_nearest(name, known)
    return "" if near is None else f" (did you mean {near!r}?)"
