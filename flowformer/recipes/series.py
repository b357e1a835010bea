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
from typing import Any

from torch import nn

from flowformer.common.fields import option
from flowformer.recipes.mechanism import check_attention, merge_fields
from flowformer.recipes.model import build_model
from flowformer.recipes.registry import RECIPES, register_recipe
from flowformer.recipes.series_data import OwnSeriesData, SeriesData, UEAData
from flowformer.tasks.series import uea
from flowformer.tasks.series.format import SeriesFormat
from flowformer.tasks.series.task import SeriesTask
from flowformer.training.recipe import EpochRecipe


@dataclass(frozen=True, kw_only=True)
class SeriesRecipe(SeriesData, EpochRecipe):
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

    def prepare(self, task: SeriesTask) -> SeriesTask:
        """Return the task with the padding of the recipe, and a validation part if it has one."""
        task = replace(task, format=replace(task.format, trim=self.trim_batches))
        return task.split_validation(self.validation_fraction, self.seed) if self.validation_fraction else task


@dataclass(frozen=True, kw_only=True)
class UEARecipe(UEAData, SeriesRecipe):
    """A classifier of one of the published UEA subsets."""


@dataclass(frozen=True, kw_only=True)
class OwnSeriesRecipe(OwnSeriesData, SeriesRecipe):
    """A classifier of your own series."""


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
