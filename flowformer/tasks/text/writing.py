"""Text that a language model writes, as it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flowformer.models.generation import DONE, stream_tokens
from flowformer.models.language import LanguageModel
from flowformer.tasks.text.tokenizers import Tokenizer


def write(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], *, stop: Sequence[str] = (), **options: Any
) -> Iterator[tuple[int, str]]:
    """Continue texts, and hand out each piece as soon as it is complete.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Texts to go on from; lengths may differ.
        stop: Texts at which a row ends; they are not handed out themselves.
        **options: ``max_new_tokens`` and how to choose tokens: see :func:`flowformer.models.generation.stream_tokens`.

    Returns:
        An iterator of (row, text). What may be the beginning of a ``stop`` is held back until it is known not to be.

    Raises:
        ValueError, TypeError: in the call, for an empty ``stop``, a prompt that the vocabulary cannot express, and as
            :func:`flowformer.models.generation.stream_tokens`.
    """
    if any(not text for text in stop):
        raise ValueError("a text to stop at must have a character or more, got ''")
    read = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    tokens = stream_tokens(model, read, **options)
    return _write(tokens, [_Row(tokenizer, prompt, stop) for prompt in read])


def _write(tokens: Iterator[Any], rows: list[_Row]) -> Iterator[tuple[int, str]]:
    for step in tokens:
        for number, (row, token) in enumerate(zip(rows, step.tolist(), strict=True)):
            text = row.add(token) if token != DONE else ""
            if text:
                yield number, text
        if all(row.ended for row in rows):
            break
    for number, row in enumerate(rows):
        if row.held and not row.ended:
            yield number, row.held


class _Row:
    """One text: what of it can be handed out."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decode, self._stop = tokenizer.stream(), stop
        for token in prompt:  # what comes next may depend on it: a space between words
            self._decode(token)
        self.held, self.ended = "", False

    def add(self, token: int) -> str:
        if self.ended:
            return ""
        text = self.held + self._decode(token)
        places = [place for place in map(text.find, self._stop) if place >= 0]
        if places:
            self.ended = True
            return text[: min(places)]
        keep = max((self._beginning(text, stop) for stop in self._stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """How many characters at the end of a text are the beginning of a stop."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
