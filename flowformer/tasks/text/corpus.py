"""A tokenized text, split for language modelling."""

from __future__ import annotations

from dataclasses import dataclass

from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.text.tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized text: training, validation and test part.

    Attributes:
        name: What it is called.
        tokenizer: What made tokens of it, and makes text of tokens.
        train: Tokens of the training part, (n,) of the tokenizer's dtype, in a file as the others are.
        validation: Those of the validation part; None where there is none.
        test: Those of the test part; None where there is none.
        source: Where the text came from.
        licence: What is known of its terms.
    """

    name: str
    tokenizer: Tokenizer
    train: StoredTokens
    validation: StoredTokens | None
    test: StoredTokens | None
    source: str
    licence: str
