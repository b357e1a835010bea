"""Text format: preprocessing for language models, and generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flowformer.common.fields import option
from flowformer.common.values import read_integer
from flowformer.models.language import LanguageModel
from flowformer.tasks.encodings import decode
from flowformer.tasks.protocols import Track
from flowformer.tasks.sampling import SamplingOptions
from flowformer.tasks.scenes import Scene, View, find_mechanisms, line_strips, read_example
from flowformer.tasks.text.tokenizers import Tokenizer, read_tokenizer
from flowformer.tasks.text.writing import write

IGNORED = -100  # a target that does not count


@dataclass(frozen=True, kw_only=True)
class WritingOptions(SamplingOptions):
    """Options of ``flowformer generate`` for text."""

    prompt: tuple[str, ...] = option((), "text to continue (default: a new line)")
    tokens: int = option(200, "maximum number of new tokens per prompt", at_least=1, largest=1_000_000_000)
    stop: tuple[str, ...] = option((), "stop before this text")
    temperature: float = option(0.8, "sampling temperature; 0 always selects the most likely token", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TextChoice:
    """Selection of a text."""

    text: str | None = option(None, "text to visualize, instead of a file")


@dataclass(frozen=True, eq=False)
class TextFormat:
    """Text format: tokenizer and length.

    Attributes:
        tokenizer: Text to tokens and back.
        length: Tokens of a training sequence.
    """

    kind: ClassVar[str] = "text"
    generate_options: ClassVar[type] = WritingOptions
    show_options: ClassVar[type] = TextChoice

    tokenizer: Tokenizer
    length: int

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self.tokenizer.vocab_size

    def collate(self, items: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        """Make a batch: ``tokens`` and ``targets``, (batch, length) int64; a ``mask`` too where lengths differ."""
        longest = max(len(seen) for seen, _ in items)
        tokens = torch.zeros(len(items), longest, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORED)
        for row, (seen, wanted) in enumerate(items):
            tokens[row, : len(seen)] = torch.from_numpy(seen)
            targets[row, : len(seen)] = torch.from_numpy(wanted)
        batch = {"tokens": tokens, "targets": targets}
        lengths = torch.tensor([len(seen) for seen, _ in items])
        if int(lengths.min()) < longest:
            batch["mask"] = torch.arange(longest) < lengths.unsqueeze(1)
        return batch

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        return {"tokenizer": self.tokenizer.to_json(), "length": self.length}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TextFormat:
        """Read a format that :meth:`to_json` wrote."""
        return cls(read_tokenizer(values["tokenizer"]), read_integer(values, "length"))

    def generate(self, model: LanguageModel, options: WritingOptions, *, track: Track) -> Iterator[str]:
        """Continue prompts. The text of a single prompt is streamed; several are shown when all are complete.

        Raises:
            ValueError, TypeError: as :func:`flowformer.tasks.text.writing.write`.
        """
        texts = list(options.prompt or ["\n"])
        if not all(texts):
            raise ValueError("a prompt must have at least one character, got ''")
        pieces = write(
            model, self.tokenizer, texts, stop=options.stop, max_new_tokens=options.tokens, **options.as_arguments()
        )
        if len(texts) == 1:
            yield texts[0]
            yield from (text for _, text in pieces)
            yield "\n"
            return
        for row, text in pieces:
            texts[row] += text
        yield "\n---\n".join(texts) + "\n"

    def show(self, model: LanguageModel, file: Path | None, options: TextChoice, view: View) -> Scene:
        """Return the attention maps of a language model for the text of a file or of ``--text``.

        Raises:
            ValueError: for both or neither, and as :meth:`scene`.
            DataError: for a file that cannot be read, or is not UTF-8.
        """
        if options.text is None:
            return self.scene(model, _read_text(file), view)
        if file is not None:
            raise ValueError(f"pass either a file or --text, got both {file} and --text {options.text!r}")
        return self.scene(model, options.text, view)

    def scene(self, model: LanguageModel, text: str, view: View) -> Scene:
        """Return the attention maps of a language model for a text.

        Args:
            model: The model, in evaluation mode.
            text: The text, one token or more.
            view: What to show.

        Raises:
            ValueError: for a text without tokens, or too long for the model, and for a query, layer or head that is not
                there.
        """
        tokens = torch.from_numpy(self.tokenizer.encode(text).astype(np.int64))
        if not len(tokens):
            raise ValueError("the text must have at least one token, got an empty one")
        shown = tuple(_label(self.tokenizer, token) for token in tokens.tolist())
        strips = line_strips(
            model, (tokens.unsqueeze(0),), len(tokens), view, default=-1,
            name=lambda position: f"token {position}, {shown[position]!r}",
        )  # fmt: skip
        return Scene(", ".join(find_mechanisms(model)), strips, tokens=shown)


def _label(tokenizer: Tokenizer, token: int) -> str:
    """Return the label of a token on an axis; its number in hexadecimal if it is not a character."""
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        return f"{token:02x}"
    return "".join({" ": "␣", "\n": "↵", "\t": "→"}.get(c, c if c.isprintable() else "·") for c in text)


def _read_text(file: Path | None) -> str:
    data = read_example(file, "a text in UTF-8; or give --text TEXT")
    return decode(data, file).rstrip("\n")
