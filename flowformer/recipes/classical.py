"""Recipes of the methods without attention in the published UEA table, on its subsets and on your own files.

Which implementations, preprocessing and hyper-parameters the rows DTW, XGBoost, ROCKET, LSTM and TCN of the Flowformer
paper were made with is not stated there. Defaults here are those of the library that does the work, or of the
method's own code; what is our choice is said so. The rows of TCN and DTW are, to a rounding, those of
results_uea.csv of White-Link/UnsupervisedScalableRepresentationLearningTimeSeries: see :func:`tcn` and :func:`dtw`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from flowformer.common.fields import option
from flowformer.models.classical.boosting import XGBoostClassifier
from flowformer.models.classical.dtw import DTWClassifier, Scaling
from flowformer.models.classical.rocket import RocketClassifier
from flowformer.models.classical.tcn import CausalEncoder, TCNClassifier
from flowformer.recipes.model import build_model
from flowformer.recipes.registry import RECIPES
from flowformer.recipes.series_data import OwnSeriesData, SeriesData, UEAData
from flowformer.tasks.protocols import Task
from flowformer.tasks.series import uea
from flowformer.tasks.series.format import SeriesFormat
from flowformer.tasks.series.task import SeriesTask
from flowformer.tasks.series.triplets import TripletTask
from flowformer.training.recipe import EpochRecipe, FitRecipe, Recipe, StepRecipe


@dataclass(frozen=True, kw_only=True)
class _Method(SeriesData):
    """A method that the published table has a row of."""

    row_name: ClassVar[str]

    @property
    def label(self) -> str:
        """Default name of the run's folder."""
        return f"seed{self.seed}"

    @property
    def row(self) -> str:
        """The name of the method in the published table."""
        return self.row_name


@dataclass(frozen=True, kw_only=True)
class _LibraryRecipe(_Method, FitRecipe):
    """A method that a library fits at once."""

    threads: int | None = option(
        None,
        "threads of the library; null for those of PyTorch",
        group="machine",
        neutral=True,
        at_least=1,
        largest=1_000,
    )

    @property
    def used_threads(self) -> int:
        """Threads of the library."""
        return self.threads or torch.get_num_threads()


@dataclass(frozen=True, kw_only=True)
class DTWRecipe(_LibraryRecipe):
    """Nearest neighbour under dynamic time warping."""

    row_name: ClassVar[str] = "dtw"

    scaling: Scaling = option(
        "none",
        "what is compared: values as they are (none), standardised by the training set, or each series by itself",
        group="model",
    )
    window: float | None = option(
        None, "Sakoe-Chiba band as a fraction of the length; null for none", group="model", at_least=0, at_most=1
    )

    def build_model(self, form: SeriesFormat) -> nn.Module:
        """Build the model."""
        return DTWClassifier(
            form.scaler.mean, form.scaler.std, len(form.classes), scaling=self.scaling, window=self.window,
            threads=self.used_threads,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class XGBoostRecipe(_LibraryRecipe):
    """Boosted trees on flattened series."""

    row_name: ClassVar[str] = "xgboost"

    num_trees: int = option(100, "rounds of boosting", group="model", at_least=1, largest=100_000)
    max_depth: int = option(6, "depth of a tree", group="model", at_least=1, largest=50)
    learning_rate: float = option(0.3, "shrinkage of each round", group="optimisation", above=0, at_most=1)

    def build_model(self, form: SeriesFormat) -> nn.Module:
        """Build the model."""
        return XGBoostClassifier(
            form.channels, len(form.classes), form.max_length, num_trees=self.num_trees, max_depth=self.max_depth,
            learning_rate=self.learning_rate, threads=self.used_threads,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RocketRecipe(_LibraryRecipe):
    """Random convolutional kernels and a ridge classifier."""

    row_name: ClassVar[str] = "rocket"

    num_kernels: int = option(10_000, "number of kernels", group="model", at_least=1, largest=1_000_000)

    def build_model(self, form: SeriesFormat) -> nn.Module:
        """Build the model."""
        return RocketClassifier(
            form.scaler.mean, form.scaler.std, len(form.classes), form.max_length, num_kernels=self.num_kernels,
            threads=self.used_threads,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LSTMRecipe(_Method, EpochRecipe):
    """A recurrent classifier."""

    row_name: ClassVar[str] = "lstm"

    dim: int = option(128, "channels of the state", group="model", at_least=1, largest=1_000_000)
    num_layers: int = option(1, "number of layers", group="model", at_least=1, largest=1_000)
    dropout: float = option(0.1, "dropout between layers and before the classifier", group="model", at_least=0, below=1)

    def prepare(self, task: SeriesTask) -> SeriesTask:
        """Return the task, with a validation part if the recipe has one."""
        return task.split_validation(self.validation_fraction, self.seed) if self.validation_fraction else task

    def build_model(self, form: SeriesFormat) -> nn.Module:
        """Build the model."""
        return build_model(
            "lstm_timeseries", in_chans=form.channels, num_classes=len(form.classes), dim=self.dim,
            num_layers=self.num_layers, dropout=self.dropout,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TCNRecipe(_Method, StepRecipe):
    """An encoder trained without labels, and a support vector classifier."""

    row_name: ClassVar[str] = "tcn"

    negatives: int = option(
        10, "negative windows for each series of a batch", group="optimisation", at_least=1, largest=10_000
    )
    channels: int = option(40, "channels of the causal blocks", group="model", at_least=1, largest=100_000)
    depth: int = option(10, "causal blocks before the last one", group="model", at_least=1, largest=30)
    reduced_dim: int = option(160, "channels of the last block", group="model", at_least=1, largest=100_000)
    dim: int = option(320, "channels of a series' vector", group="model", at_least=1, largest=100_000)
    kernel_size: int = option(3, "steps that a convolution sees", group="model", at_least=1, largest=1_000)

    def build_model(self, form: SeriesFormat) -> nn.Module:
        """Build the model."""
        encoder = CausalEncoder(
            form.channels, channels=self.channels, depth=self.depth, reduced_dim=self.reduced_dim, dim=self.dim,
            kernel_size=self.kernel_size,
        )  # fmt: skip
        return TCNClassifier(encoder, len(form.classes))

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        return {**super().misfits(), "compile": "compile has no effect on the encoder of a TCN"}

    def training_task(self, task: Task) -> Task:
        """Return the task without labels that the encoder is trained on."""
        assert isinstance(task, SeriesTask)
        return TripletTask.of(task, self.negatives)


# -------------------------------------------------------------------------------------------- on files and UEA subsets


@dataclass(frozen=True, kw_only=True)
class _UEADTW(UEAData, DTWRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _OwnDTW(OwnSeriesData, DTWRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _UEAXGBoost(UEAData, XGBoostRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _OwnXGBoost(OwnSeriesData, XGBoostRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _UEARocket(UEAData, RocketRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _OwnRocket(OwnSeriesData, RocketRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _UEALSTM(UEAData, LSTMRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _OwnLSTM(OwnSeriesData, LSTMRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _UEATCN(UEAData, TCNRecipe): ...


@dataclass(frozen=True, kw_only=True)
class _OwnTCN(OwnSeriesData, TCNRecipe): ...


def dtw(kind: type[Recipe], name: str, **fields: Any) -> Recipe:
    """DTW: the class of the nearest training series under dynamic time warping of all channels together (aeon).

    No band, and values as they are, as aeon's KNeighborsTimeSeriesClassifier does by default. The published row is
    that of results_uea.csv of White-Link (there from Bagnall et al., arXiv:1811.00075: one neighbour, dependent
    warping), but for SelfRegulationSCP1 (77.5 there). Nothing is random: the seed has no effect.
    """
    return kind(**{"name": name, **fields})


def xgboost(kind: type[Recipe], name: str, **fields: Any) -> Recipe:
    """XGBoost: boosted trees on flattened series.

    100 trees per class of depth 6, learning rate 0.3: the defaults of XGBoost; the published settings are not known.
    Steps that a shorter series does not have are missing values. Nothing is random: the seed has no effect.
    """
    return kind(**{"name": name, **fields})


def rocket(kind: type[Recipe], name: str, **fields: Any) -> Recipe:
    """ROCKET: 10,000 random convolutional kernels (aeon) and a ridge classifier (scikit-learn).

    Kernels and ridge are those of aeon's RocketClassifier and of Dempster et al. (2020), at their defaults. Shorter
    series are padded with zeros at the end, to the longest training series, which comes near the published values; how
    they were made is not stated.
    """
    return kind(**{"name": name, **fields})


def lstm(kind: type[Recipe], name: str, **fields: Any) -> Recipe:
    """LSTM: a recurrent network whose last state is classified, trained as the transformers of the table are.

    Optimizer, batches, epochs and standardisation are those of the published transformers (uea_subset). One layer of
    128 channels is our choice: size and training of the published row are not known.
    """
    return kind(**{"name": name, **fields})


def tcn(kind: type[Recipe], name: str, **fields: Any) -> Recipe:
    """TCN: causal convolutions trained without labels on a triplet loss, and a support vector classifier.

    Franceschi, Dieuleveut and Jaggi (NeurIPS 2019), with default_hyperparameters.json of their code: 1,500 steps of
    Adam at 1e-3, batches of 10, 10 negatives, 11 blocks of kernels of 3 with 40 channels, vectors of 320. The
    published row is, subset by subset, the best on the test set of the four columns of their results_uea.csv: 5, 10
    and 20 negatives, and the three together. They standardise with the statistics of training and test set.
    """
    published = {"optimizer": "adam", "steps": 1500, "eval_every": 100, "batch_size": 10, "clip_grad_norm": None}
    return kind(**{"name": name, **published, **fields})


_METHODS: dict[Callable[..., Recipe], tuple[type[Recipe], type[Recipe]]] = {
    dtw: (_UEADTW, _OwnDTW),
    xgboost: (_UEAXGBoost, _OwnXGBoost),
    rocket: (_UEARocket, _OwnRocket),
    lstm: (_UEALSTM, _OwnLSTM),
    tcn: (_UEATCN, _OwnTCN),
}
for _method, (_on_uea, _on_own) in _METHODS.items():
    for _prefix, _kind in [*((f"uea/{subset}", _on_uea) for subset in uea.SUBSETS), ("timeseries/own", _on_own)]:
        _name = f"{_prefix}/{_method.__name__}"
        RECIPES.add(_name, partial(_method, _kind, _name))
