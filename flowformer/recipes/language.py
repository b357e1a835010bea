"""Recipes for language models: WikiText-103 (Flowformer), Enwik8 (AFT), and your own text.

What the papers and their code leave open is chosen here, and said in the docstring of each recipe. Of WikiText-103 and
Enwik8 the honest protocol is the paper's: the model is chosen on the validation set, and tested once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from flowformer.common.fields import option
from flowformer.models.language import LanguageModel
from flowformer.recipes.mechanism import check_attention, find_row, merge_fields
from flowformer.recipes.model import build_model, check_model
from flowformer.recipes.registry import RECIPES, register_recipe
from flowformer.tasks.text import enwik8, wikitext
from flowformer.tasks.text import files as text_files
from flowformer.tasks.text import task as text
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.format import TextFormat
from flowformer.tasks.text.task import TextTask
from flowformer.tasks.text.tokenizers import FITTED
from flowformer.training.recipe import DataState, StepRecipe

NO_COMPETITION: Mapping[str, Any] = {"competition": None}
NO_ALLOCATION: Mapping[str, Any] = {"allocation": False}
_OF_DEVELOPMENT = "the published value equals a perplexity of the development set in Peng et al., ICLR 2021"
_SIZES = ("num_layers", "num_heads", "dim", "ffn_dim")
# What tells a row of the tables from the others.
_PLAIN: Mapping[str, Any] = {**dict.fromkeys(_SIZES), "attention_options": {}, "query_key_gain": 1.0}
_WIKITEXT: Mapping[str, Mapping[str, Any]] = {
    "flow": {"attention": "flow"},
    "flow-no-competition": {"attention": "flow", "attention_options": NO_COMPETITION},
    "flow-no-allocation": {"attention": "flow", "attention_options": NO_ALLOCATION},
    "softmax": {"attention": "softmax"},
    "linear": {"attention": "linear"},
    "reformer": {"attention": "reformer"},
    "performer": {"attention": "performer"},
    # 64 features in the small model of Peng et al., ICLR 2021.
    "trf": {"attention": "rfa", "attention_options": {"num_features": 64}},
    "trf-gate": {"attention": "rfa", "attention_options": {"num_features": 64, "gate": True}},
    "cosformer": {"attention": "cosformer"},
}
_ENWIK8: Mapping[str, Mapping[str, Any]] = {
    "aft-local-12": {"attention": "aft_local"},
    "aft-local-24": {"model": "aft_enwik8_24", "attention": "aft_local"},
    "aft-simple": {"model": "aft_enwik8_24", "attention": "aft_simple"},
    "transformer": {"attention": "softmax", "num_heads": 8},
    "transformer-24": {"model": "aft_enwik8_24", "attention": "softmax", "num_heads": 4},
    "reformer": {"attention": "reformer", "num_heads": 8},
    "synthesizer": {
        "attention": "synthesizer", "attention_options": {"kind": "dense", "dot_product": False}, "num_heads": 8,
    },
    "linear": {"attention": "linear", "num_heads": 8},
    "performer": {"attention": "performer", "num_heads": 8},
}  # fmt: skip
_AFT_24 = _ENWIK8["aft-local-24"]
_ENWIK8_ROWS: Mapping[str, Mapping[str, Any]] = {
    **_ENWIK8,
    **{f"aft-local-24-window-{size}": {**_AFT_24, "attention_options": {"window": size}} for size in enwik8.WINDOWS},
    **{f"aft-local-24-length-{length}": {**_AFT_24, "length": length} for length in enwik8.LENGTHS},
}


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe(StepRecipe):
    """A language model."""

    attention: str = option("flow", "causal attention mechanism, see `flowformer list attentions`", group="attention")
    attention_options: dict[str, Any] = option({}, "options of the attention mechanism", group="attention")
    model: str = option(
        "flowformer_wikitext", "language model (sizes and initialization), see `flowformer list models`",
        group="model",
    )  # fmt: skip
    num_layers: int | None = option(
        None, "number of blocks; null for the model's default", group="model", at_least=1, largest=1_000
    )
    num_heads: int | None = option(
        None,
        "number of attention heads; null for the model's default",
        group="attention",
        at_least=1,
        largest=1_000_000,
    )
    dim: int | None = option(
        None, "model dimension; null for the model's default", group="model", at_least=1, largest=1_000_000
    )
    ffn_dim: int | None = option(
        None,
        "hidden dimension of the feed-forward networks; null for the model's default",
        group="model",
        at_least=1,
        largest=1_000_000,
    )
    query_key_gain: float = option(
        1.0, "factor of the initial query and key weights", group="attention", above=0, largest=1_000_000
    )
    positions: Literal["model", "learned", "sinusoidal"] | None = option(
        "model",
        "position embedding: the model's own choice, learned (limited to the training length), sinusoidal, or null for"
        " none",
        group="model",
    )
    dropout: float = option(
        0.1,
        "dropout on embeddings and on the outputs of attention and feed-forward networks",
        group="model",
        at_least=0,
        below=1,
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_model(self.model, LanguageModel)
        check_attention(self.attention, self.attention_options, causal=True)

    @property
    def label(self) -> str:
        """Default name of the run's folder."""
        return f"{self.attention}-seed{self.seed}"

    def read_format(self, values: dict[str, Any]) -> TextFormat:
        """Read the format saved by a run."""
        return TextFormat.from_json(values)

    def build_model(self, form: Any) -> nn.Module:
        """The model of the recipe, for the format's vocabulary."""
        positions = {} if self.positions == "model" else {"positions": self.positions}
        model = build_model(
            self.model,
            vocab_size=form.vocab_size,
            max_length=form.length,
            **positions,
            dropout=self.dropout,
            attention=self.attention,
            attention_options=self.attention_options,
            **{name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None},
        )
        with torch.no_grad():
            for block in cast("LanguageModel", model).decoder.layers:
                for name in block.attention.projections:
                    getattr(block.attention, f"{name}_proj").weight.mul_(self.query_key_gain)
        return model


@dataclass(frozen=True, kw_only=True)
class TextRecipe(LanguageRecipe):
    """A language model of running text."""

    length: int = option(512, "sequence length in tokens", group="data", at_least=1, largest=1_000_000_000)


@dataclass(frozen=True, kw_only=True)
class WikiTextRecipe(TextRecipe):
    """A language model of WikiText-103, word by word."""

    data_dir: Path | None = option(
        None, "folder with wiki.train.tokens and the other files, or their archive; null for the cache", group="data",
        neutral=True,
    )  # fmt: skip
    context_window: int = option(
        400,
        "tokens at the start of each test sequence that serve as context and are not scored",
        group="data",
        at_least=0,
        largest=1_000_000_000,
    )
    check_counts: bool = option(True, "raise an error if token counts differ from the published ones", group="data")

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.context_window >= self.length:
            raise ValueError(f"context_window must be below length {self.length}, got {self.context_window}")

    def build_task(self, form: TextFormat | None = None) -> TextTask:
        """Read the corpus."""
        corpus = wikitext.load(self.data_dir, check_counts=self.check_counts)
        if form is not None and not _agree(corpus, form):
            corpus = wikitext.load(self.data_dir, check_counts=self.check_counts, tokenizer=form.tokenizer)
        # What was published is of the published text.
        published = wikitext.PUBLISHED if self.check_counts else None
        return text.build_task(corpus, self.length, context=self.context_window, published=published)

    @property
    def data_state(self) -> DataState:
        """Return whether the corpus is on this machine."""
        return "here" if wikitext.is_here(self.data_dir) else "absent"

    @property
    def row(self) -> str:
        """The name of this model in the published table; "" if it is not in it."""
        plain = {**_PLAIN, "model": "flowformer_wikitext", "positions": "sinusoidal", "length": 512, "attention": ""}
        return find_row(self, _WIKITEXT, plain)

    @property
    def published_note(self) -> str:
        """Of rows whose figure is that of a development set elsewhere."""
        return _OF_DEVELOPMENT if self.row in wikitext.OF_DEVELOPMENT else ""

    def published_table(self) -> tuple[str, Mapping[str, float]]:
        """The published perplexities."""
        return "test perplexity (Wu et al., ICML 2022)", wikitext.PUBLISHED


@dataclass(frozen=True, kw_only=True)
class Enwik8Recipe(TextRecipe):
    """A language model of Enwik8, byte by byte."""

    data_dir: Path | None = option(
        None, "folder with enwik8 or enwik8.zip; null for the cache", group="data", neutral=True
    )

    def build_task(self, form: TextFormat | None = None) -> TextTask:
        """Read the corpus."""
        corpus = enwik8.load(self.data_dir)
        return text.build_task(corpus, self.length, published=enwik8.PUBLISHED)

    @property
    def data_state(self) -> DataState:
        """Return whether the corpus is on this machine."""
        return "here" if enwik8.is_here(self.data_dir) else "absent"

    @property
    def row(self) -> str:
        """The name of this model in the published table; "" if it is not in it."""
        plain = {**_PLAIN, "model": "aft_enwik8_12", "positions": "learned", "length": 1_024, "attention": ""}
        return find_row(self, _ENWIK8_ROWS, plain)

    def published_table(self) -> tuple[str, Mapping[str, float]]:
        """The published figures."""
        return "test bits per character (Zhai et al., 2021)", enwik8.PUBLISHED


@dataclass(frozen=True, kw_only=True)
class OwnTextRecipe(TextRecipe):
    """A language model of your own text."""

    needs_file: ClassVar[bool] = True

    file: Path | None = option(None, "file or folder of text", group="data")
    tokenizer: str = option(
        "bytes", "bytes, characters, words, or a Hugging Face tokenizer: folder, tokenizer.json or name", group="data"
    )
    held_out: float = option(
        0.02,
        "end of the text used as test set: a fraction below 1, or a number of bytes",
        group="data",
        above=0,
        largest=1e15,
    )

    def build_task(self, form: TextFormat | None = None) -> TextTask:
        """Read the text."""
        if self.needs_file and self.file is None:
            raise ValueError(f"{self.name} requires --file FILE: a file or folder of text")
        # A fitted vocabulary is most likely that of the run, whose tokens are in the cache.
        tokenizer = self.tokenizer if form is None or self.tokenizer in FITTED else form.tokenizer
        corpus = text_files.load(self.file, tokenizer=tokenizer, held_out=self.held_out)
        if form is not None and not _agree(corpus, form):
            corpus = text_files.load(self.file, tokenizer=form.tokenizer, held_out=self.held_out)
        return text.build_task(corpus, self.length)

    @property
    def data_state(self) -> DataState:
        """Unknown: the text is the user's, or that of the gensim package."""
        if self.needs_file:
            return "unknown"
        return "here" if importlib.util.find_spec("gensim") else "absent"


@dataclass(frozen=True, kw_only=True)
class DemoTextRecipe(OwnTextRecipe):
    """A language model of your own text, by default of a slice of the English Wikipedia."""

    needs_file: ClassVar[bool] = False


def _agree(corpus: Corpus, form: TextFormat) -> bool:
    """Whether the tokens of a corpus are those of a run."""
    return corpus.tokenizer.to_json() == form.tokenizer.to_json()


def wikitext103(row: str, mechanism: Mapping[str, Any], /, **fields: Any) -> WikiTextRecipe:
    """The published experiment on WikiText-103 (Wu et al., ICML 2022): fairseq's transformer_lm, its attention swapped.

    6 layers of 512 channels, 8 heads, 2,048 inside, tied embedding, sinusoidal positions; 150,000 steps of Adam (0.9,
    0.98) with decoupled weight decay 0.01; learning rate 1e-3 after 6,000 steps, then falling with their root; blocks
    of 512; test with 400 tokens of context, batches of 2 (README of Flowformer_NLP). A step is 16 times 2,048
    tokens for each GPU; how many GPUs there were is not said. fairseq's README assumes two, so a step is 65,536 tokens
    here, in batches of 4 blocks. Evaluated every 1,500 steps, about an epoch; the best on the validation set is tested.

    The rows trf and trf-gate are Random Feature Attention (Peng et al., ICLR 2021) with sines and cosines of 64
    projections, without and with its gate; whether all heads share a gate is not said, and here each has its own. Of
    reformer, performer and cosformer no option is published: they have the defaults of their modules.
    Performer and Reformer see no later tokens here; their published causal code does. The figures of softmax, linear,
    trf and trf-gate are those that Peng et al. print for the development set; a run reports the test set.
    """
    published: dict[str, Any] = {
        "model": "flowformer_wikitext", **mechanism, "positions": "sinusoidal", "length": 512, "dropout": 0.1,
        "optimizer": "adamw", "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.01, "learning_rate": 1e-3,
        "schedule": "inverse-sqrt", "warmup_steps": 6_000, "clip_grad_norm": None,
        "batch_size": 4, "accumulate": 32, "steps": 150_000, "eval_every": 1_500,
    }  # fmt: skip
    return WikiTextRecipe(**merge_fields({"name": f"wikitext103/{row}", **published}, fields))


def enwik8_aft(row: str, model: Mapping[str, Any], /, **fields: Any) -> Enwik8Recipe:
    """The published experiment on Enwik8 (Zhai et al., 2021, table 4), T = 1,024.

    AdamW at 3e-3 with the schedule of Vaswani et al. (2017), weight decay 0.5 on the weights of linear layers, dropout
    0.1, batches of 128, 100 epochs of 90 million bytes, which are 686 steps each. Not given, and chosen here: 4,000
    steps of warm-up (those of Vaswani et al.), learned positions (the paper's of CIFAR-10), no clipping.

    Of Reformer, Synthesizer and Performer, in 12 layers of 512 channels and 8 heads, the table gives that the
    Synthesizer is the dense one. Other options are not published: they have the defaults of their modules. Performer
    and Reformer see no later tokens here; their published causal code does.
    """
    published: dict[str, Any] = {
        "model": "aft_enwik8_12", **model, "positions": "learned", "length": 1_024, "dropout": 0.1,
        "optimizer": "adamw", "weight_decay": 0.5, "decayed": "linear", "learning_rate": 3e-3,
        "schedule": "inverse-sqrt", "warmup_steps": 4_000,
        "clip_grad_norm": None, "batch_size": 128, "steps": 68_600, "eval_every": 686,
    }  # fmt: skip
    return Enwik8Recipe(**merge_fields({"name": f"enwik8/{row}", **published}, fields))


# Ours, for a few minutes on a laptop.
_OWN_TEXT: Mapping[str, Any] = {
    "model": "flowformer_text", "length": 128, "dropout": 0.0, "optimizer": "adamw",
    "beta2": 0.99, "weight_decay": 0.1, "decayed": "linear", "learning_rate": 4e-3, "schedule": "cosine",
    "warmup_steps": 100, "clip_grad_norm": 1.0, "batch_size": 8, "steps": 2_000, "eval_every": 500,
}  # fmt: skip


@register_recipe("text/bytes")
def text_bytes(**fields: Any) -> DemoTextRecipe:
    """A byte-level language model, in minutes on a laptop, of any text in any language.

    Without a file: a slice of the English Wikipedia that the gensim package ships. Flow-Attention that knows distance,
    without positions, so that the length of generated text is not limited.
    """
    return DemoTextRecipe(**merge_fields({"name": "text/bytes", **_OWN_TEXT}, fields))


@register_recipe("text/own")
def text_own(**fields: Any) -> OwnTextRecipe:
    """A language model of your own text, a file or folder, by bytes, characters, words or a tokenizer of your own.

    As text/bytes otherwise. A tokenizer of Hugging Face is a folder, a tokenizer.json or a name on the hub.
    """
    return OwnTextRecipe(**merge_fields({"name": "text/own", **_OWN_TEXT}, fields))


for _row, _fields in _WIKITEXT.items():
    RECIPES.add(f"wikitext103/{_row}", partial(wikitext103, _row, _fields))
for _row, _fields in _ENWIK8.items():
    RECIPES.add(f"enwik8/{_row}", partial(enwik8_aft, _row, _fields))
