"""A text as tokens: what language tasks are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowformer.tasks.text.tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in its parts.

    Attributes:
        name: What it is called.
        tokenizer: What made tokens of it, and makes text of tokens.
        train: Tokens of the training part, (n,) of the tokenizer's dtype; a read-only memory map, as the others are.
        validation: Those of the validation part; None where there is none.
        test: Those of the test part; None where there is none.
        source: Where the text came from.
        licence: What is known of its terms.
    """

    name: str
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray | None
    test: np.ndarray | None
    source: str
    licence: str
