"""Recipes of Long Range Arena: its five tasks, for every mechanism (Tay et al., 2021; Wu et al., 2022).

The numbers are in :mod:`flowformer.recipes.lra_published`: Adam (0.9, 0.98) with epsilon 1e-9 and decoupled weight
decay, no clipping of gradients, and what the configuration of each task says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import nn

from flowformer.common.fields import option
from flowformer.common.processes import available_cpus
from flowformer.models.sequence import SequenceClassifier
from flowformer.recipes.lra_published import (
    ABLATIONS,
    IMAGE,
    MODEL_FIELDS,
    OPTIONS,
    PATHFINDER,
    PICTURES,
    RELEASED_PATHFINDER,
    TEXTS,
    inverse_root,
    merge_published,
    sizes,
)
from flowformer.recipes.mechanism import check_attention
from flowformer.recipes.model import build_model, check_model
from flowformer.recipes.registry import find_recipe, register_recipe
from flowformer.tasks.downloads import DATASETS
from flowformer.tasks.images import cifar
from flowformer.tasks.lra import image, imdb, listops, retrieval
from flowformer.tasks.lra.format import PairFormat, SequenceFormat
from flowformer.tasks.lra.pathfinder import files as pathfinder
from flowformer.tasks.lra.pathfinder.kinds import CLASSES as CONNECTED
from flowformer.tasks.lra.task import PUBLISHED, SequenceTask
from flowformer.tasks.splits import SPLIT_SEED, stratify
from flowformer.training.recipe import DataState, StepRecipe


@dataclass(frozen=True, kw_only=True)
class SequenceRecipe(StepRecipe):
    """A classifier of token sequences."""

    model: str = option("flowformer_sequence", "sequence model, see `flowformer list models`", group="model")
    attention: str = option("flow", "attention mechanism, see `flowformer list attentions`", group="attention")
    attention_options: dict[str, Any] = option({}, "options of the attention mechanism", group="attention")
    released: bool = option(
        False,
        "behave as the released code: padding takes part, and mechanisms have the faults of that code",
        group="attention",
    )
    num_layers: int = option(1, "number of blocks", group="model", at_least=1, largest=1_000)
    num_heads: int = option(4, "number of attention heads", group="attention", at_least=1, largest=1_000_000)
    dim: int = option(256, "model dimension", group="model", at_least=1, largest=1_000_000)
    head_dim: int | None = option(
        None, "channels of a head; null for dim / num_heads", group="attention", at_least=1, largest=1_000_000
    )
    ffn_dim: int = option(
        1_024, "hidden dimension of the feed-forward networks and of the classifier", group="model", at_least=1,
        largest=1_000_000,
    )  # fmt: skip
    dropout: float = option(
        0.1, "dropout on embeddings and on the outputs of attention and feed-forward networks", group="model",
        at_least=0, below=1,
    )  # fmt: skip
    positions: Literal["sinusoidal", "learned"] | None = option(
        "sinusoidal", "position embedding: sinusoidal, learned, or null for none", group="model"
    )
    pool: Literal["class", "mean"] = option(
        "class", "what is classified: a class token, or the mean over tokens", group="model"
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_model(self.model, SequenceClassifier)
        check_attention(self.attention, self.attention_options)
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide dim unless head_dim is given, got dim {self.dim} and num_heads {self.num_heads}"
            )

    @property
    def evaluated_rounds(self) -> list[int]:
        """All rounds, and not before training: on a CPU 25,000 reviews take longer than the first steps."""
        return super().evaluated_rounds[1:]

    @property
    def label(self) -> str:
        """Default name of the run's folder."""
        return f"{self.attention}-seed{self.seed}"

    def read_format(self, values: dict[str, Any]) -> SequenceFormat | PairFormat:
        """Read the format saved by a run."""
        return SequenceFormat.from_json(values)

    def build_model(self, form: Any) -> nn.Module:
        """The model of the recipe, for the format's vocabulary."""
        return build_model(
            self.model, vocab_size=form.vocab_size, num_classes=len(form.classes), max_length=form.max_length,
            attention=self.attention, attention_options=self.attention_options, mask_padding=not self.released,
            **{name: getattr(self, name) for name in MODEL_FIELDS}, **self.more_of_model,
        )  # fmt: skip

    @property
    def more_of_model(self) -> dict[str, Any]:
        """Further options of the model."""
        return {}

    def fit_format(self, form: SequenceFormat | PairFormat) -> Any:
        """Return a format whose batches are padded as this recipe's model is to see them."""
        return replace(form, trim=not self.released)

    @property
    def row(self) -> str:
        """The name of this model in the published table; "" if it is not in it."""
        known = find_recipe(self.name)(attention=self.attention)
        if any(getattr(self, name, None) != getattr(known, name, None) for name in (*MODEL_FIELDS, "model", "length")):
            return ""
        faults = RELEASED_PATHFINDER.get(self.attention, {})
        options = {name: value for name, value in self.attention_options.items() if name not in faults}
        base = dict(cast("SequenceRecipe", known).attention_options)
        rows = {self.attention: {}, **(ABLATIONS if self.attention == "flow" else {})}
        return next((row for row, more in rows.items() if options == {**base, **more}), "")

    def published_table(self) -> tuple[str, Mapping[str, float]] | None:
        """The published accuracies on the task."""
        return "accuracy, percent (Wu et al., ICML 2022)", PUBLISHED[self.task_name]

    @property
    def task_name(self) -> str:
        """Name of the task in the published table: the recipe's without ``lra/``."""
        return self.name.split("/")[1]


@dataclass(frozen=True, kw_only=True)
class ListOpsRecipe(SequenceRecipe):
    """A classifier of nested list operations."""

    length: int = option(2_000, "tokens that expressions are cut to", group="data", at_least=1, largest=1_000_000)
    data_dir: Path | None = option(
        None, "folder with basic_train.tsv, basic_val.tsv and basic_test.tsv; null to generate expressions",
        group="data", neutral=True,
    )  # fmt: skip
    train_examples: int = option(
        listops.SIZES["train"], "number of generated training expressions", group="data", at_least=1,
        largest=1_000_000_000,
    )  # fmt: skip
    test_examples: int = option(
        listops.SIZES["test"], "number of generated expressions to test with, and to validate with", group="data",
        at_least=1, largest=1_000_000_000,
    )  # fmt: skip

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        return super().misfits() | _without_effect(self.data_dir, "data_dir", "train_examples", "test_examples")

    def build_task(self, form: SequenceFormat | None = None) -> SequenceTask:
        """Generate the expressions, or read them."""
        if self.data_dir is None:
            from rich.console import Console

            parts = listops.generate(
                train=self.train_examples, validation=self.test_examples, test=self.test_examples,
                console=Console(stderr=True),
            )  # fmt: skip
            source = f"generated here: {self.train_examples:,} expressions to train on, {self.test_examples:,} to test"
        else:
            parts, source = listops.load(self.data_dir), str(self.data_dir)
        sizes_differ = tuple(map(len, parts)) != tuple(listops.SIZES.values())
        found = SequenceFormat("listops", listops.CLASSES, self.length)
        return SequenceTask(
            "listops", parts.train, parts.test, form or self.fit_format(found),
            {} if sizes_differ else PUBLISHED["listops"], source,
            listops.LICENCE, validation=parts.validation, tested_in_training=True,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HeldOutRecipe(SequenceRecipe):
    """A classifier of sequences whose data may come without a part to validate or test with."""

    validation_fraction: float | None = option(
        None, "fraction of the training set held out to select the best step if the data has no such part; null for "
        "none", group="data", above=0, below=1,
    )  # fmt: skip
    test_fraction: float = option(0.1, "fraction used as test set if the data has none", group="data", above=0, below=1)

    def hold_out(self, task: SequenceTask) -> SequenceTask:
        """Hold out what the data does not have; the test set is always the same."""
        if task.test is None:
            kept, held = stratify(task.train.labels, task.format.classes, self.test_fraction, SPLIT_SEED)
            task = replace(
                task, train=task.train.subset(kept), test=task.train.subset(held),
                name=f"{task.name} (a part held out)", published={},
                source=f"{task.source}, without a test set: {self.test_fraction:g} of it held out",
            )  # fmt: skip
        if task.validation is None and self.validation_fraction:
            task = task.split_validation(self.validation_fraction, self.seed)
        return task


@dataclass(frozen=True, kw_only=True)
class BytesRecipe(HeldOutRecipe):
    """A classifier of film reviews, byte by byte."""

    length: int = option(1_000, "bytes that reviews are cut to", group="data", at_least=1, largest=1_000_000)
    data: Path | None = option(
        None, "IMDB: the folder aclImdb, its archive, .jsonl, .jsonl.gz, or a folder of parquet files; null for the "
        "cache", group="data", neutral=True,
    )  # fmt: skip

    def build_task(self, form: SequenceFormat | None = None) -> SequenceTask:
        """Read the reviews."""
        train, test = imdb.load(self.data)
        found = SequenceFormat("bytes", imdb.CLASSES, self.length)
        return self.hold_out(SequenceTask(
            "text", train, test, form or self.fit_format(found), PUBLISHED["text"], str(self.data or "the cache"),
            DATASETS["lra-text"].licence, tested_in_training=True,
        ))  # fmt: skip

    @property
    def task_name(self) -> str:
        """Name of the task in the published table."""
        return "text"

    @property
    def data_state(self) -> DataState:
        """Return whether the reviews are on this machine."""
        return "here" if imdb.is_here(self.data) else "absent"


@dataclass(frozen=True, kw_only=True)
class RetrievalRecipe(SequenceRecipe):
    """A classifier of pairs of papers: does one cite the other?"""

    length: int = option(4_000, "bytes that papers are cut to", group="data", at_least=1, largest=1_000_000)
    interaction: bool = option(False, "classify products and differences of the encoded papers too", group="model")
    data_dir: Path | None = option(
        None, "folder with new_aan_pairs.train.tsv, .eval.tsv and .test.tsv; null for the cache", group="data",
        neutral=True,
    )  # fmt: skip
    papers: Path | None = option(
        None, "papers to make pairs of, instead: .jsonl or .jsonl.gz with an identifier and a text each", group="data"
    )
    citations: Path | None = option(None, "their citations: .tsv of citing and cited identifiers", group="data")

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if (self.papers is None) != (self.citations is None):
            missing = "papers" if self.papers is None else "citations"
            raise ValueError(f"papers and citations are needed together, got no {missing}")

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        return super().misfits() | _without_effect(self.papers, "papers", "data_dir")

    @property
    def more_of_model(self) -> dict[str, Any]:
        """Pairs, with or without interaction."""
        return {"pairs": "interaction" if self.interaction else "joined"}

    def read_format(self, values: dict[str, Any]) -> PairFormat:
        """Read the format saved by a run."""
        return PairFormat.from_json(values)

    def build_task(self, form: PairFormat | None = None) -> SequenceTask:
        """Read the pairs, or make them."""
        if self.papers is not None and self.citations is not None:
            train, validation, test = retrieval.make_pairs(self.papers, self.citations)
            name, source = "retrieval (own pairs)", f"pairs made of {self.papers} and {self.citations}"
            published = {}
        else:
            train, validation, test = retrieval.load(self.data_dir)
            name, source, published = "retrieval", str(self.data_dir or "the cache"), PUBLISHED["retrieval"]
        found = PairFormat(retrieval.CLASSES, self.length)
        return SequenceTask(
            name, train, test, form or self.fit_format(found), published, source, retrieval.LICENCE,
            validation=validation,
        )  # fmt: skip

    @property
    def data_state(self) -> DataState:
        """Return whether the published pairs are on this machine; there is no download."""
        return "here" if self.papers is None and retrieval.is_here(self.data_dir) else "unknown"


@dataclass(frozen=True, kw_only=True)
class GreyRecipe(HeldOutRecipe):
    """A classifier of CIFAR-10 as 1,024 grey levels."""

    data: Path | None = option(None, "folder or archive of CIFAR-10; null for the cache", group="data", neutral=True)

    def build_task(self, form: SequenceFormat | None = None) -> SequenceTask:
        """Read the pictures."""
        path = cifar.locate(self.data)
        train, validation, test = image.load(path)
        found = SequenceFormat("grey", image.CLASSES, image.LENGTH)
        return self.hold_out(SequenceTask(
            "image", train, test, form or self.fit_format(found), PUBLISHED["image"], str(path), cifar.LICENCE,
            validation=validation,
        ))  # fmt: skip

    @property
    def data_state(self) -> DataState:
        """Return whether CIFAR-10 is on this machine."""
        return "here" if cifar.is_located(self.data) else "absent"


@dataclass(frozen=True, kw_only=True)
class PathfinderRecipe(SequenceRecipe):
    """A classifier of pictures by whether two markers lie on one dashed contour."""

    side: ClassVar[int] = 32

    difficulty: Literal["easy", "intermediate", "hard"] = option(
        "hard", "length of the contours: 6, 9 or 14 dashes", group="data"
    )
    data_dir: Path | None = option(
        None, "folder with the published pictures (pathfinder32, ...); null to generate pictures", group="data",
        neutral=True,
    )  # fmt: skip
    num_images: int = option(
        pathfinder.NUM_IMAGES, "number of generated pictures, 80 % of them to train on", group="data",
        at_least=20, largest=1_000_000_000,
    )  # fmt: skip

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        return super().misfits() | _without_effect(self.data_dir, "data_dir", "num_images")

    def build_task(self, form: SequenceFormat | None = None) -> SequenceTask:
        """Generate the pictures, or read them."""
        from rich.console import Console

        console = Console(stderr=True)
        if self.data_dir is None:
            parts = pathfinder.load(
                self.difficulty, self.side, num_images=self.num_images, workers=available_cpus(), console=console
            )
            source = f"generated here: {self.num_images:,} pictures, {self.difficulty}"
        else:
            parts = pathfinder.load_official(self.data_dir, self.difficulty, self.side, console=console)
            source = f"{self.data_dir}, {self.difficulty}"
        found = SequenceFormat("grey", CONNECTED, self.side**2)
        # The published figures are of 200,000 hard pictures of 32 x 32 pixels.
        as_published = (self.side, self.difficulty) == (32, "hard") and self.num_images == pathfinder.NUM_IMAGES
        published = PUBLISHED["pathfinder"] if as_published else {}
        return SequenceTask(
            "pathfinder", parts.train, parts.test, form or self.fit_format(found), published, source,
            validation=parts.validation,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PathXRecipe(PathfinderRecipe):
    """The same of 128 x 128 pixels, 16,384 tokens."""

    side: ClassVar[int] = 128

    def published_table(self) -> None:
        """No row of the table solved it."""


def _without_effect(given: Any, name: str, *others: str) -> dict[str, str]:
    return {} if given is None else {other: f"{other} has no effect with {name}" for other in others}


@register_recipe("lra/listops")
def lra_listops(**fields: Any) -> ListOpsRecipe:
    """Long Range Arena, ListOps: nested list operations of 500 to 2,000 tokens, generated here or read.

    1 layer of 512 channels, 2 heads; 5,000 steps of 32, evaluated every 50, on the test set too. Long Range Arena's
    own configuration has 4 layers and 8 heads.
    """
    published = {
        **TEXTS, **inverse_root(0.005, 1_000), **sizes(1, 2, 512, 512, 1_024), "steps": 5_000, "eval_every": 50,
    }  # fmt: skip
    return ListOpsRecipe(**merge_published("lra/listops", published, {}, fields))


@register_recipe("lra/text")
def lra_text(**fields: Any) -> BytesRecipe:
    """Long Range Arena, Text: film reviews (IMDB) as 1,000 bytes, two classes.

    1 layer of 256 channels, 4 heads; 20,000 steps of 32, evaluated every 100 on the test set, for which the training
    part has no other. --validation-fraction holds out a part to choose the step by. The released configuration has
    1,000 bytes; the paper says 4,000: lra/text-4000.
    """
    return _text("lra/text", 1_000, fields)


@register_recipe("lra/text-4000")
def lra_text_4000(**fields: Any) -> BytesRecipe:
    """Long Range Arena, Text, with the 4,000 bytes of the paper."""
    return _text("lra/text-4000", 4_000, fields)


def _text(name: str, length: int, fields: Mapping[str, Any]) -> BytesRecipe:
    published = {
        **TEXTS, **inverse_root(0.005, 8_000), **sizes(1, 4, 256, 256, 1_024), "steps": 20_000, "eval_every": 100,
        "length": length,
    }  # fmt: skip
    return BytesRecipe(**merge_published(name, published, {}, fields))


@register_recipe("lra/retrieval")
def lra_retrieval(**fields: Any) -> RetrievalRecipe:
    """Long Range Arena, Retrieval: does one of two papers (AAN, 4,000 bytes each) cite the other?

    4 layers of 128 channels, 4 heads, both papers by the same weights; 5,000 steps of 32 pairs, which end during
    warm-up; evaluated every 100 on the validation set, tested once. The published pairs: --data-dir; pairs of papers of
    your own: --papers and --citations.
    """
    published = {
        **TEXTS, **inverse_root(0.05, 8_000), **sizes(4, 4, 128, 128, 512), "steps": 5_000, "eval_every": 100,
    }  # fmt: skip
    return RetrievalRecipe(**merge_published("lra/retrieval", published, {}, fields))


@register_recipe("lra/image")
def lra_image(**fields: Any) -> GreyRecipe:
    """Long Range Arena, Image: CIFAR-10 as 1,024 grey levels, pixel by pixel.

    1 layer of 128 channels, 4 heads of 16, learned positions; 200 epochs of 175 steps of 256, evaluated after each on
    the validation set, tested once. Baselines have the sizes of their own configurations.
    """
    published = {
        **sizes(1, 4, 128, 64, 128), "positions": "learned", "dropout": 0.3, "batch_size": 256, "schedule": "cosine",
        "learning_rate": 5e-4, "warmup_steps": 175, "steps": 35_000, "eval_every": 175,
    }  # fmt: skip
    return GreyRecipe(**merge_published("lra/image", published, IMAGE, fields, {**OPTIONS, **PICTURES}))


@register_recipe("lra/pathfinder")
def lra_pathfinder(**fields: Any) -> PathfinderRecipe:
    """Long Range Arena, Pathfinder: are two markers on one dashed contour? 32 x 32 pixels, generated here or read.

    1 layer of 256 channels, 8 heads of 16, the mean over pixels; 200 epochs of 312 steps of 512 at 1e-4, evaluated
    after each on the validation set, tested once. Baselines have the sizes and the learning rate, 1e-3, of their own
    configurations.
    """
    published = {
        **sizes(1, 8, 256, 128, 256), "pool": "mean", "dropout": 0.2, "batch_size": 512, "schedule": "cosine",
        "learning_rate": 1e-4, "warmup_steps": 312, "steps": 62_400, "eval_every": 312,
    }  # fmt: skip
    return PathfinderRecipe(
        **merge_published(
            "lra/pathfinder", published, PATHFINDER, fields, {**OPTIONS, **PICTURES}, RELEASED_PATHFINDER
        )
    )  # fmt: skip


@register_recipe("lra/pathfinder-128")
def lra_pathfinder_128(**fields: Any) -> PathXRecipe:
    """Long Range Arena, Path-X: Pathfinder of 128 x 128 pixels, which no mechanism of the table solves.

    The configuration of Long Range Arena, for all mechanisms: 1 layer of 32 channels, 2 heads of 8, learned positions,
    200 epochs of 2,500 steps of 64, gradient norm 1.
    """
    published = {
        **sizes(1, 2, 32, 16, 32), "pool": "mean", "positions": "learned", "dropout": 0.1, "batch_size": 64,
        "schedule": "cosine", "learning_rate": 1e-3, "warmup_steps": 2_500, "steps": 500_000, "eval_every": 2_500,
        "clip_grad_norm": 1.0,
    }  # fmt: skip
    return PathXRecipe(**merge_published("lra/pathfinder-128", published, {}, fields, {**OPTIONS, **PICTURES}))
