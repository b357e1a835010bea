"""Recipes for time-series classification: the ten UEA subsets of the Flowformer paper, and your own files.

Source of every default: thuml/Flowformer, Flowformer_TimeSeries, options.py and scripts/flowformer.sh. Three things
depart from the published code, the first two with an option that restores it: padding is invisible to attention
(``mask_padding``), batches are padded to their longest series only (``trim_batches``), and the honest protocol is
reported beside the published one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from flowformer.common.fields import option
from flowformer.recipes.mechanism import check_attention, merge_fields
from flowformer.recipes.model import build_model
from flowformer.recipes.registry import RECIPES, register_recipe
from flowformer.tasks.series import uea
from flowformer.tasks.series.format import SeriesFormat
from flowformer.tasks.series.task import SeriesTask, load_pair
from flowformer.training.recipe import DataState, EpochRecipe


@dataclass(frozen=True, kw_only=True)
class SeriesRecipe(EpochRecipe):
    """A time-series classifier."""

    attention: str = option("flow", "attention mechanism, see `flowformer list attentions`", group="attention")
    attention_options: dict[str, Any] = option({}, "options of the attention mechanism", group="attention")
    dim: int = option(512, "model dimension", group="model", at_least=1, largest=1_000_000)
    num_heads: int = option(8, "number of attention heads", group="attention", at_least=1, largest=1_000_000)
    num_layers: int = option(2, "number of encoder blocks", group="model", at_least=1, largest=1_000)
    ffn_dim: int = option(
        2048, "hidden dimension of the feed-forward networks", group="model", at_least=1, largest=1_000_000
    )
    dropout: float = option(0.1, "dropout", group="model", at_least=0, below=1)
    mask_padding: bool = option(True, "mask padding in attention; the published code does not", group="attention")
    trim_batches: bool = option(
        True,
        "pad to the longest series of the batch; the published code pads to that of the training set",
        group="data",
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_attention(self.attention, self.attention_options)

    @property
    def label(self) -> str:
        """Default name of the run's folder."""
        return f"{self.attention}-seed{self.seed}"

    def read_format(self, values: dict[str, Any]) -> SeriesFormat:
        """Read the format saved by a run."""
        return SeriesFormat.from_json(values)

    def build_model(self, form: SeriesFormat) -> nn.Module:
        """Build the published classifier with the attention of the recipe."""
        return build_model(
            "flowformer_timeseries",
            in_chans=form.channels,
            num_classes=len(form.classes),
            max_length=form.max_length,
            dim=self.dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            ffn_dim=self.ffn_dim,
            dropout=self.dropout,
            attention=self.attention,
            attention_options=self.attention_options,
            mask_padding=self.mask_padding,
        )

    @property
    def row(self) -> str:
        """The name of this model in the published table, which is that of its attention; "" with options of its own."""
        published = _FLOW["attention_options"] if self.attention == "flow" else {}
        return self.attention if self.attention_options == published else ""

    def _prepare(self, task: SeriesTask, form: SeriesFormat | None) -> SeriesTask:
        task = replace(task, format=replace(task.format, trim=self.trim_batches))
        if self.validation_fraction:
            task = task.split_validation(self.validation_fraction, self.seed)
        return task if form is None else task.using(form)


@dataclass(frozen=True, kw_only=True)
class UEARecipe(SeriesRecipe):
    """A classifier of one of the published UEA subsets."""

    data_dir: Path | None = option(
        None,
        "folder with <Subset>/<Subset>_TRAIN.ts and _TEST.ts; null for aeon's files or the cache",
        group="data",
        neutral=True,
    )

    @property
    def subset(self) -> str:
        """Name of the subset in the archive."""
        return self.name.removeprefix("uea/")

    def build_task(self, form: SeriesFormat | None = None) -> SeriesTask:
        """Read the subset."""
        return self._prepare(uea.load(self.subset, self.data_dir), form)

    @property
    def data_state(self) -> DataState:
        """Return whether both files of the subset are on this machine."""
        return "here" if uea.find(self.subset, self.data_dir) else "absent"

    def published_table(self) -> tuple[str, dict[str, float]]:
        """The published accuracies on the subset."""
        return "accuracy, percent (Wu et al., ICML 2022)", uea.get_published(self.subset)


@dataclass(frozen=True, kw_only=True)
class OwnSeriesRecipe(SeriesRecipe):
    """A classifier of your own series."""

    train_file: Path | None = option(
        None, "training series: .ts, or .csv in long form (columns series, time, label, values)", group="data"
    )
    test_file: Path | None = option(None, "test series, in the same form", group="data")

    def build_task(self, form: SeriesFormat | None = None) -> SeriesTask:
        """Read the two files."""
        if self.train_file is None or self.test_file is None:
            flag = "--test-file" if self.train_file else "--train-file"
            raise ValueError(f"{self.name} requires {flag} FILE: series as .ts, or as .csv in long form")
        return self._prepare(load_pair(self.train_file, self.test_file), form)

    @property
    def data_state(self) -> DataState:
        """Unknown: the user specifies the files."""
        return "unknown"


_FLOW: Mapping[str, Any] = {"attention": "flow", "attention_options": {"preset": "timeseries"}}


def uea_subset(subset: str, **fields: Any) -> UEARecipe:
    """The published experiment on one UEA subset (Wu et al., ICML 2022): a classifier trained from scratch.

    100 epochs of RAdam at 1e-3 in batches of 16 (scripts/flowformer.sh), gradient norm clipped to 4 (running.py),
    2 layers of 512 channels, 8 heads, 2,048 inside, dropout 0.1 (options.py); PEMS-SF takes 400 epochs,
    SpokenArabicDigits Adam (scripts/flowformer.sh). An earlier revision of options.py (15b15d6) had 3 layers and 96
    channels inside: --num-layers 3 --ffn-dim 96. Of the mechanisms it is compared with (``--attention performer``, say)
    no option is published: they have the defaults of their modules.
    """
    published: dict[str, Any] = {"name": f"uea/{subset}", **_FLOW}
    if subset == "PEMS-SF":
        published["epochs"] = 400  # scripts/flowformer.sh
    if subset == "SpokenArabicDigits":
        published["optimizer"] = "adam"  # scripts/flowformer.sh
    return UEARecipe(**merge_fields(published, fields))


@register_recipe("timeseries/own")
def timeseries_own(**fields: Any) -> OwnSeriesRecipe:
    """The same classifier on your own series, with the hyper-parameters of the published experiments."""
    return OwnSeriesRecipe(**merge_fields({"name": "timeseries/own", **_FLOW}, fields))


for _subset in uea.SUBSETS:
    RECIPES.add(f"uea/{_subset}", partial(uea_subset, _subset))
