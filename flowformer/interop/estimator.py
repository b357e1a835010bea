"""The published time-series classifier as an estimator for scikit-learn and aeon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, cast

import numpy as np
import torch

from flowformer.recipes.series import SeriesRecipe
from flowformer.tasks.series.dataset import SeriesSet
from flowformer.tasks.series.format import SeriesFormat, classify, fill_missing
from flowformer.tasks.series.task import SeriesTask
from flowformer.training.recipe import Optimizer, Precision

try:
    from aeon.classification.base import BaseClassifier
    from sklearn.utils import check_random_state
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"FlowformerClassifier requires {error.name}: pip install 'flowformer[timeseries]'", name=error.name
    ) from error


class FlowformerClassifier(BaseClassifier):
    """Time-series classifier: the Flowformer of the published UEA experiments (Wu et al., ICML 2022).

    It takes what aeon's classifiers take: arrays of shape (n, channels, length) or, for one channel, (n, length), and
    lists of n arrays of shape (channels, length) whose lengths differ. Missing values (NaN) are interpolated in time
    (a series must have some value; a channel that has none is set to the mean), and each channel is standardised with
    the statistics of the training series. Series that are longer than the longest training series are clipped to its
    length; shorter ones are padded, and padding is hidden from attention.

    The defaults are those of the published experiments (thuml/Flowformer, Flowformer_TimeSeries, options.py),
    where nothing is held out and the weights of the last epoch are kept. They are meant for a GPU; on a CPU a smaller
    model (``dim=64, num_heads=4, ffn_dim=128``) is often as good and far quicker. The last layer has a weight for each
    channel of each time step and class, so that memory grows with the length of the longest series.

    Args:
        attention: Name of the mechanism: :func:`flowformer.list_attentions`.
        preset: Variant of Flow-Attention: :data:`flowformer.ops.PRESETS`. For ``attention="flow"`` only.
        dim: Channels of the encoder, a multiple of ``num_heads``.
        num_heads: Heads of each attention.
        num_layers: Encoder blocks.
        ffn_dim: Channels inside the feed-forward networks.
        dropout: Probability in [0, 1), throughout.
        n_epochs: Passes over the training series.
        batch_size: Series in a batch, in training and in prediction.
        optimizer: ``"radam"``, ``"adam"`` or ``"adamw"``.
        learning_rate: Constant learning rate.
        weight_decay: Weight decay of the optimizer.
        clip_grad_norm: Gradients are scaled down to this norm; ``None`` for no clipping.
        precision: Of training: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``. Weights are float32 in any case.
        accelerator: Where to train: ``"auto"``, ``"cpu"``, ``"gpu"`` or another that Lightning knows.
        verbose: Whether to show a progress bar on standard output; else nothing is printed.
        random_state: Decides initial weights, order of series and dropout. An int gives the same predictions each time
            (on a CPU to the last bit, on other devices as far as their kernels are deterministic). A ``RandomState``
            is drawn from once in each fit; ``None`` draws from NumPy's global one. No other global random state
            is touched: classifiers may be fitted in several threads at once, each with the result that it has alone.

    Attributes:
        classes_: (n_classes,) the labels, sorted.
        n_classes_: How many.
        model_: The trained :class:`flowformer.models.timeseries.SeriesClassifier`, in evaluation mode on the CPU.
            Prediction runs on the device that it is on: after ``model_.to("cuda")``, there.
        format_: How series are prepared for it: a :class:`flowformer.tasks.series.SeriesFormat`.
        history_: One dictionary an epoch: ``"epoch"`` (from 1), ``"seconds"``, ``"train/loss"``, ``"train/accuracy"``.

    Raises:
        ValueError: In ``fit``, for a parameter out of range or an unknown name; for series or labels that aeon rejects,
            infinite values and those beyond float32, and for series without values.
        TypeError: In ``fit``, for a parameter of the wrong type.
        RuntimeError: In ``fit``, if training diverges.

    Example:
        >>> from aeon.datasets import load_basic_motions
        >>> from flowformer import FlowformerClassifier
        >>> X, y = load_basic_motions(split="train")
        >>> classifier = FlowformerClassifier(dim=32, num_heads=4, ffn_dim=64, n_epochs=5, random_state=0)
        >>> classifier.fit(X, y).predict_proba(X).shape
        (40, 4)
    """

    _tags: ClassVar[dict[str, Any]] = {
        "capability:multivariate": True,
        "capability:unequal_length": True,
        "capability:missing_values": True,
        "X_inner_type": ["np-list", "numpy3D"],
        "algorithm_type": "deeplearning",
        "python_dependencies": ["torch", "lightning", "rich"],
    }

    def __init__(
        self,
        attention: str = "flow",
        preset: str = "timeseries",
        dim: int = 512,
        num_heads: int = 8,
        num_layers: int = 2,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        n_epochs: int = 100,
        batch_size: int = 16,
        optimizer: str = "radam",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = 4.0,
        precision: str = "32-true",
        accelerator: str = "auto",
        verbose: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.attention = attention
        self.preset = preset
        self.dim = dim
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.ffn_dim = ffn_dim
        self.dropout = dropout
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.clip_grad_norm = clip_grad_norm
        self.precision = precision
        self.accelerator = accelerator
        self.verbose = verbose
        self.random_state = random_state
        super().__init__()

    def _fit(self, X: Sequence[np.ndarray], y: np.ndarray) -> Any:  # self, though aeon's own method seems to be None
        # Not at the top of the file: without Lightning and rich, aeon says what to install when an estimator is made.
        from rich.console import Console

        from flowformer.training.draws import Draws
        from flowformer.training.fit import fit

        self._check_parameters()
        _check_values(X)  # of tables of pandas too, which are arrays by now
        part = SeriesSet([fill_missing(series.T) for series in X], np.searchsorted(self.classes_, y))
        recipe = self._recipe(part)
        task = recipe.build_task()
        draws = Draws(recipe.seed)
        with torch.enable_grad():  # Lightning switches gradients on for good
            with draws:
                model = recipe.build_model(task.format)
            self.history_ = fit(recipe, task, model, console=Console() if self.verbose else None, draws=draws)
        model.zero_grad()  # frees the gradients
        self.model_ = model.cpu().eval()
        self.format_ = task.format
        return self

    def _preprocess_collection(self, X: Any, store_metadata: bool = True) -> Any:
        _refuse_nothing(X)
        _check_values(X)  # before aeon looks at their variance
        return super()._preprocess_collection(X, store_metadata)

    def _predict_proba(self, X: Sequence[np.ndarray]) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            found = classify(self.model_, self.format_, [series.T for series in X], batch_size=int(self.batch_size))
        rows = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(rows):
            row = int(rows[0])
            largest = np.nanmax(np.abs(X[row]))
            raise ValueError(
                f"the probabilities of X[{row}] are not finite: its values, of magnitude up to {largest:g}, are far"
                " beyond those of the training series"
            )
        return found

    def _predict(self, X: Sequence[np.ndarray]) -> np.ndarray:
        return self.classes_[self._predict_proba(X).argmax(axis=1)]

    def _recipe(self, part: SeriesSet) -> _ArraysRecipe:
        generator = check_random_state(self.random_state)
        return _ArraysRecipe(
            name="arrays",
            part=part,
            classes=tuple(str(label) for label in self.classes_),
            seed=int(generator.randint(np.iinfo(np.int32).max)),
            attention=self.attention,
            attention_options={"preset": self.preset} if self.attention == "flow" else {},
            dim=int(self.dim),
            num_heads=int(self.num_heads),
            num_layers=int(self.num_layers),
            ffn_dim=int(self.ffn_dim),
            dropout=float(self.dropout),
            epochs=int(self.n_epochs),
            batch_size=int(self.batch_size),
            optimizer=cast("Optimizer", self.optimizer),  # checked by the recipe
            learning_rate=float(self.learning_rate),
            weight_decay=float(self.weight_decay),
            clip_grad_norm=None if self.clip_grad_norm is None else float(self.clip_grad_norm),
            precision=cast("Precision", self.precision),
            accelerator=self.accelerator,
        )

    def _check_parameters(self) -> None:
        """Refuse what neither recipe nor model would refuse by the parameter's name."""
        for name in ("dim", "num_heads", "num_layers", "ffn_dim", "n_epochs", "batch_size"):
            if self._number(name, Integral) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self._number("weight_decay", Real) < np.inf:
            raise ValueError(f"weight_decay must be finite and at least 0, got {self.weight_decay}")
        for name in ("learning_rate", "clip_grad_norm"):
            if name == "clip_grad_norm" and self.clip_grad_norm is None:
                continue
            if not 0 < self._number(name, Real) < np.inf:
                raise ValueError(f"{name} must be finite and positive, got {getattr(self, name)}")
        if not 0 <= self._number("dropout", Real) < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    def _number(self, name: str, kind: type) -> Any:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = "an integer" if kind is Integral else "a number"
            raise TypeError(f"{name} must be {wanted}, got {value!r}")
        return value

    @classmethod
    def _get_test_params(cls, parameter_set: str = "default") -> dict[str, Any]:
        """Settings that train in a fraction of a second, for aeon's checks of estimators."""
        return {"dim": 8, "num_heads": 2, "num_layers": 1, "ffn_dim": 8, "n_epochs": 2, "accelerator": "cpu"}


def _refuse_nothing(X: Any) -> None:
    """Refuse no series, and series without channels or time steps, of which aeon's own checks fail."""
    if not isinstance(X, (np.ndarray, list)):
        return  # left to aeon
    if not len(X) or (isinstance(X, np.ndarray) and not X.size):
        shape = f"an array of shape {X.shape}" if isinstance(X, np.ndarray) else "an empty list"
        raise ValueError(f"X must have at least one series, channel and time step, got {shape}")
    for row, series in enumerate(X):
        if isinstance(series, np.ndarray) and not series.size:
            raise ValueError(f"X[{row}] must have at least one channel and time step, got shape {series.shape}")


def _check_values(X: Any) -> None:
    """Refuse infinite values, those beyond float32, and series of which all values are missing.

    What is no array of numbers is left to aeon.
    """
    for row, series in enumerate(X if isinstance(X, (np.ndarray, list)) else ()):
        if not isinstance(series, np.ndarray) or series.dtype.kind not in "fiu":
            continue
        if np.isnan(series).all():
            raise ValueError(f"X[{row}] has no values: all are missing")
        beyond = np.abs(series) > np.finfo(np.float32).max
        if beyond.any():
            place = tuple(int(index) for index in np.argwhere(beyond)[0])
            value = series[place]
            what = "beyond the range of float32" if np.isfinite(value) else "infinite; a missing value is NaN"
            raise ValueError(f"X[{row}] is {value:g} at {list(place)}, which is {what}")


@dataclass(frozen=True, kw_only=True)
class _ArraysRecipe(SeriesRecipe):
    """A classifier of series that are in memory, with nothing to test it on."""

    part: SeriesSet
    classes: tuple[str, ...]

    def read_series(self) -> SeriesTask:
        form = SeriesFormat.fit(self.part, self.classes)
        return SeriesTask(name=self.name, train=self.part, test=self.part.subset([]), format=form)
