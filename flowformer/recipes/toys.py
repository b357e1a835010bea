"""Recipes of toys: addition, sorting and characters (projects of the GPT-style module); recall, and brackets.

Source of every default of the projects: thuml/Flowformer, Flowformer_TorchModule, trainer.py and projects, which are
minGPT's: AdamW (0.9, 0.95) at 5e-4, weight decay 0.1 on the weights of linear layers, gradient norm 1, batches of 64,
dropout 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowformer.common.fields import option
from flowformer.recipes.language import DemoTextRecipe, LanguageRecipe
from flowformer.recipes.registry import register_recipe
from flowformer.tasks.text import brackets as bracket_task
from flowformer.tasks.text import recall as recall_task
from flowformer.tasks.text import toys

_SHARED: dict[str, Any] = {
    "optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "learning_rate": 5e-4, "weight_decay": 0.1, "decayed": "linear",
    "clip_grad_norm": 1.0, "batch_size": 64, "dropout": 0.1, "positions": "learned",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdderRecipe(LanguageRecipe):
    """A model that adds two numbers."""

    digits: int = option(2, "number of digits", group="data", at_least=1, at_most=3)

    def build_task(self, form: Any = None) -> toys.ToyTask:
        """Create the problems."""
        return toys.adder(self.digits)


@dataclass(frozen=True, kw_only=True)
class SortRecipe(LanguageRecipe):
    """A model that sorts digits."""

    size: int = option(6, "length of the list to sort", group="data", at_least=1, at_most=8)
    kinds: int = option(3, "number of different digits", group="data", at_least=2, at_most=10)

    def build_task(self, form: Any = None) -> toys.ToyTask:
        """Create the problems."""
        return toys.sorter(self.size, self.kinds)


@dataclass(frozen=True, kw_only=True)
class RecallRecipe(LanguageRecipe):
    """A model that recalls values by their keys."""

    pairs: int = option(8, "key-value pairs of a sequence, and queries", group="data", at_least=1, largest=1_000_000)
    length: int = option(
        64, "sequence length in tokens, at least 4 for each pair", group="data", at_least=4, largest=1_000_000
    )
    vocab_size: int = option(
        128, "number of tokens; half of them are values", group="data", at_least=4, largest=1_000_000
    )
    train_examples: int = option(
        100_000, "number of training sequences", group="data", at_least=1, largest=1_000_000_000
    )
    test_examples: int = option(1_000, "number of test sequences", group="data", at_least=1, largest=1_000_000_000)

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        recall_task.Sizes(self.pairs, self.length, self.vocab_size)

    def build_task(self, form: Any = None) -> toys.ToyTask:
        """Draw the sequences."""
        return recall_task.recall(
            self.pairs, self.length, self.vocab_size, train_examples=self.train_examples,
            test_examples=self.test_examples,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BracketsRecipe(LanguageRecipe):
    """A model that evaluates nested list operations."""

    depth: int = option(4, "largest number of operations within each other", group="data", at_least=1, at_most=20)
    length: int = option(128, "largest number of tokens of an expression", group="data", at_least=5, largest=1_000_000)
    train_examples: int = option(
        50_000, "number of training expressions", group="data", at_least=1, largest=1_000_000_000
    )
    test_examples: int = option(2_000, "number of test expressions", group="data", at_least=1, largest=1_000_000_000)

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        bracket_task.check_sizes(self.depth, self.length)

    def build_task(self, form: Any = None) -> toys.ToyTask:
        """Draw the expressions."""
        return bracket_task.brackets(
            self.depth, self.length, train_examples=self.train_examples, test_examples=self.test_examples
        )


@register_recipe("toys/adder")
def adder(**fields: Any) -> AdderRecipe:
    """Toy project: add two numbers of two digits; the sum is written from its last digit on.

    The smallest GPT-style module (projects/adder.py), which trains there until it is stopped. With the source's
    settings Flow-Attention finds all digits of the sum but the last one, which depends on two of four tokens at once:
    queries and keys with initial weights of 0.02 have features near 1/2, so that all tokens look alike. Here those
    weights are 30 times as large, the learning rate is 2e-3, and nothing is dropped.
    """
    ours = {"query_key_gain": 30.0, "learning_rate": 2e-3, "dropout": 0.0, "schedule": "cosine", "warmup_steps": 100}
    return AdderRecipe(
        **{"name": "toys/adder", **_SHARED, "model": "flowformer_gpt_nano", "steps": 4_000, "eval_every": 500,
           **ours, **fields}
    )  # fmt: skip


@register_recipe("toys/sort")
def sort(**fields: Any) -> SortRecipe:
    """Toy project: sort six digits of three kinds with the smallest GPT-style module, 2,000 steps (the demo)."""
    return SortRecipe(
        **{"name": "toys/sort", **_SHARED, "model": "flowformer_gpt_nano", "steps": 2_000,
           "eval_every": 500, **fields}
    )  # fmt: skip


@register_recipe("toys/chars")
def chars(**fields: Any) -> DemoTextRecipe:
    """Toy project: character-level text, 6 layers of 192 channels, sequences of 128 (projects/chargpt.py).

    There the text is tiny-shakespeare: --file input.txt. Without a file it is a slice of the English Wikipedia. The
    source trains until it is stopped and tests nothing.
    """
    return DemoTextRecipe(
        **{"name": "toys/chars", **_SHARED, "model": "flowformer_gpt_mini", "tokenizer": "characters", "length": 128,
           "steps": 5_000, "eval_every": 500, **fields}
    )  # fmt: skip


# Ours, for a few minutes of one core. With GPT's initial weights of 0.02, softmax attention chose among the values of
# the sequence for 500 steps and more; with those of flowformer_text, of Xavier's size, it recalls after 400.
_OURS: dict[str, Any] = {
    **_SHARED, "model": "flowformer_text", "num_layers": 2, "dim": 64, "num_heads": 2, "positions": "model",
    "dropout": 0.0, "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 200, "batch_size": 32,
}  # fmt: skip


@register_recipe("toys/recall")
def recall(**fields: Any) -> RecallRecipe:
    """Toy project: multi-query associative recall (MQAR), 8 key-value pairs and a query of each in 64 tokens.

    The data of Arora et al., "Zoology", 2023, with 128 tokens in place of 8,192. 100,000 training sequences and the
    length of 64 are the source's; model, optimizer and steps are ours, for a few minutes of one core: 2 layers of 64
    channels. Accuracy is the percentage of queries answered right: 1.6 % by chance (64 values), 12.5 % by choosing one
    of the 8 values of the sequence.
    """
    return RecallRecipe(**{"name": "toys/recall", **_OURS, "steps": 2_000, "eval_every": 500, **fields})


@register_recipe("toys/brackets")
def brackets(**fields: Any) -> BracketsRecipe:
    """Toy project: nested list operations, such as [MAX 4 3 [MIN 2 3 ] 1 0 ], up to 4 deep and 128 tokens long.

    Operations and drawing as in ListOps (Nangia and Bowman, 2018) and Long Range Arena (Tay et al., 2020), whose
    expressions are longer; model, optimizer and steps are ours, for a few minutes of one core: 2 layers of 64
    channels. Each digit is the answer of a tenth of the examples: 10 % are right by chance, and 22 % with the digit
    that is most frequent after the outermost operation.
    """
    return BracketsRecipe(**{"name": "toys/brackets", **_OURS, "steps": 2_500, "eval_every": 500, **fields})
