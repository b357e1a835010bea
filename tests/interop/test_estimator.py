"""FlowformerClassifier as scikit-learn and aeon use it."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import pickle
import random
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from aeon.datasets import load_basic_motions, load_japanese_vowels
from aeon.testing.estimator_checking import check_estimator
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score

from flowformer import FlowformerClassifier, list_attentions
from flowformer.recipes.series import timeseries_own
from flowformer.training.module import TaskModule

TINY = {"dim": 8, "num_heads": 2, "num_layers": 1, "ffn_dim": 8, "n_epochs": 2, "accelerator": "cpu"}
SMALL = {"dim": 32, "num_heads": 4, "num_layers": 1, "ffn_dim": 64, "learning_rate": 3e-3, "accelerator": "cpu"}


def tiny(**parameters) -> FlowformerClassifier:
    return FlowformerClassifier(**{**TINY, "random_state": 0, **parameters})


def waves(n: int = 12, channels: int = 2, length: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Slow and fast waves: (n, channels, length) and labels."""
    generator = np.random.default_rng(seed)
    labels = np.array(["slow", "fast"])[np.arange(n) % 2]
    phase = generator.uniform(0, 2 * np.pi, (n, channels, 1))
    speed = np.where(labels == "slow", 0.3, 1.2)[:, None, None]
    return np.sin(phase + speed * np.arange(length)) + 0.1 * generator.standard_normal((n, channels, length)), labels


@pytest.fixture(scope="module")
def fitted() -> FlowformerClassifier:
    return tiny().fit(*waves())


def test_passes_every_check_of_aeon():
    results = check_estimator(FlowformerClassifier)
    assert {name: result for name, result in results.items() if result != "PASSED"} == {}
    for kind in ("EqualLengthUnivariate", "EqualLengthMultivariate", "UnequalLengthMultivariate", "MissingValues"):
        assert any(f"datatype={kind}" in name for name in results), kind


def test_learns_series_of_equal_length():
    X, y = load_basic_motions(split="train")
    classifier = FlowformerClassifier(**SMALL, n_epochs=20, random_state=0).fit(X, y)
    assert classifier.score(*load_basic_motions(split="test")) > 0.85  # chance is 0.25
    assert (classifier.model_.in_chans, classifier.model_.max_length) == (6, 100)


def test_learns_series_of_unequal_length():
    X, y = load_japanese_vowels(split="train")
    classifier = FlowformerClassifier(**SMALL, n_epochs=8, random_state=0).fit(X, y)
    assert classifier.score(*load_japanese_vowels(split="test")) > 0.85  # chance is 0.11
    losses = [record["train/loss"] for record in classifier.history_]
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_known_after_fit(fitted):
    X, y = waves(seed=1)
    assert list(fitted.classes_) == ["fast", "slow"]
    assert fitted.n_classes_ == 2
    assert [record["epoch"] for record in fitted.history_] == [1, 2]
    assert {tuple(record) for record in fitted.history_} == {("epoch", "seconds", "train/loss", "train/accuracy")}
    assert fitted.format_.max_length == 16
    assert not fitted.model_.training
    assert {parameter.device.type for parameter in fitted.model_.parameters()} == {"cpu"}
    assert all(parameter.grad is None for parameter in fitted.model_.parameters())
    probabilities = fitted.predict_proba(X)
    assert probabilities.shape == (12, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(fitted.predict(X), fitted.classes_[probabilities.argmax(axis=1)])
    assert fitted.score(X, y) == np.mean(fitted.predict(X) == y)


def test_columns_of_probabilities_belong_to_the_sorted_labels():
    X, y = waves(24)
    numbers = np.where(y == "slow", 7, 3)
    classifier = tiny(n_epochs=40, learning_rate=3e-2, dropout=0.0).fit(X, numbers)
    assert list(classifier.classes_) == [3, 7]
    assert classifier.score(X, numbers) > 0.9
    assert np.mean((classifier.predict_proba(X)[:, 1] > 0.5) == (numbers == 7)) > 0.9


def test_one_channel_as_table_array_and_list():
    X, y = waves(channels=1)
    as_array = tiny().fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(tiny().fit(X[:, 0], y).predict_proba(X[:, 0]), as_array)
    np.testing.assert_array_equal(tiny().fit(list(X), y).predict_proba(list(X[:, 0])), as_array)
    integers = np.round(10 * X).astype(int)
    assert np.isfinite(tiny().fit(integers, y).predict_proba(integers)).all()


def test_input_is_left_as_it_was():
    X, y = waves()
    X[0, 0, 3] = np.nan
    before = X.copy(), y.copy()
    tiny().fit(X, y).predict(X)
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(y, before[1])


def test_missing_values_are_interpolated_in_time():
    generator = np.random.default_rng(0)
    X = generator.standard_normal((12, 2, 1)) * np.linspace(0, 1, 16) + generator.standard_normal((12, 2, 1))
    y = np.arange(12) % 2
    holes = X.copy()
    holes[:, 0, 5:9] = holes[3, 1, 2] = np.nan  # the series are straight lines: nothing is lost
    np.testing.assert_allclose(
        tiny().fit(holes, y).predict_proba(holes), tiny().fit(X, y).predict_proba(X), rtol=1e-4
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:(All-NaN slice|Degrees of freedom).*:RuntimeWarning")  # aeon's look at the variance
def test_a_channel_that_is_missing_altogether():
    X, y = waves()
    X[2, 1] = np.nan
    assert np.isfinite(tiny().fit(X, y).predict_proba(X)).all()


def test_longer_series_are_clipped_and_shorter_ones_padded_out_of_sight(fitted):
    X, _ = waves(length=40)
    np.testing.assert_array_equal(fitted.predict_proba(X), fitted.predict_proba(X[..., :16]))
    ragged = [series[:, : 5 + row] for row, series in enumerate(X)]
    together = fitted.predict_proba(ragged)
    alone = np.concatenate([fitted.predict_proba([series]) for series in ragged])
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_length_is_that_of_the_longest_training_series():
    X, y = waves()
    classifier = tiny().fit([series[:, : 4 + row] for row, series in enumerate(X)], y)
    assert classifier.model_.max_length == 15


def test_parameters_are_kept_and_cloned(fitted):
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not copy.is_fitted
    with pytest.raises(NotFittedError):
        copy.predict(waves()[0])
    assert copy.set_params(dim=16).fit(*waves()).model_.embed.out_features == 16


def test_defaults_are_those_of_the_recipe():
    recipe = timeseries_own()
    names = {"n_epochs": "epochs"}
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(FlowformerClassifier).parameters.items()
    }
    ours = {name: value for name, value in defaults.items() if name not in ("verbose", "random_state")}
    assert ours.pop("preset") == recipe.attention_options["preset"]
    assert ours == {name: getattr(recipe, names.get(name, name)) for name in ours}


CHANGES = [
    {"attention": "softmax"}, {"preset": "core"}, {"dim": 12}, {"num_heads": 4}, {"num_layers": 2}, {"ffn_dim": 9},
    {"dropout": 0.5}, {"n_epochs": 3}, {"batch_size": 5}, {"optimizer": "adam"}, {"learning_rate": 1e-2},
    {"weight_decay": 0.5}, {"clip_grad_norm": 0.1}, {"precision": "bf16-mixed"}, {"random_state": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_parameter_matters(fitted, change):
    X, y = waves()
    assert np.abs(tiny(**change).fit(X, y).predict_proba(X) - fitted.predict_proba(X)).max() > 1e-7


WRONG = [
    ({"attention": "flaw"}, ValueError, "did you mean 'flow'"),
    ({"preset": "corr"}, ValueError, "corr"),
    ({"optimizer": "sgdd"}, ValueError, "sgdd"),
    ({"precision": "bf16-true"}, ValueError, "precision"),
    ({"accelerator": "abacus"}, ValueError, "abacus"),
    ({"dim": 9}, ValueError, "9"),
    ({"dim": 8.0}, TypeError, "dim must be an integer"),
    ({"num_layers": 0}, ValueError, "num_layers must be at least 1"),
    ({"n_epochs": 0}, ValueError, "n_epochs must be at least 1"),
    ({"n_epochs": True}, TypeError, "n_epochs must be an integer"),
    ({"batch_size": -1}, ValueError, "batch_size must be at least 1"),
    ({"dropout": 1.0}, ValueError, "dropout"),
    ({"dropout": "0.1"}, TypeError, "dropout must be a number"),
    ({"learning_rate": 0.0}, ValueError, "learning_rate"),
    ({"learning_rate": float("nan")}, ValueError, "learning_rate"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay"),
    ({"clip_grad_norm": -4.0}, ValueError, "clip_grad_norm"),
    ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm"),
    ({"clip_grad_norm": "4.0"}, TypeError, "clip_grad_norm"),
    ({"random_state": "zero"}, ValueError, "zero"),
]


@pytest.mark.parametrize(("parameters", "error", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_parameters_are_refused_in_fit(parameters, error, message):
    classifier = tiny(**parameters)  # as scikit-learn has it, the constructor only stores
    with pytest.raises(error, match=message):
        classifier.fit(*waves())
    assert not classifier.is_fitted


def test_numbers_of_numpy_are_numbers():
    X, y = waves()
    classifier = tiny(n_epochs=np.int64(2), dim=np.int32(8), learning_rate=np.float32(1e-3), dropout=0)
    assert len(classifier.fit(X, y).history_) == 2


def test_wrong_series_and_labels_are_refused(fitted):
    X, y = waves()
    with pytest.raises(ValueError, match="number of channels"):
        fitted.predict(X[:, :1])
    with pytest.raises(ValueError, match="Mismatch in number of cases"):
        tiny().fit(X, y[:-1])


def changed(value, row=1, channel=0, time=3):
    X, _ = waves()
    X[row, channel, time] = value
    return X


HOSTILE = [
    (changed(np.inf), r"X\[1\] is inf at \[0, 3\], which is infinite; a missing value is NaN"),
    (changed(-np.inf, row=0, channel=1), r"X\[0\] is -inf at \[1, 3\]"),
    (changed(1e39), r"X\[1\] is 1e\+39 at \[0, 3\], which is beyond the range of float32"),
    (changed(-1e308), "beyond the range of float32"),
    (waves()[0] * np.where(np.arange(12) == 5, np.nan, 1)[:, None, None], r"X\[5\] has no values: all are missing"),
    (waves()[0][:0], r"at least one series, channel and time step, got an array of shape \(0, 2, 16\)"),
    (waves()[0][..., :0], r"got an array of shape \(12, 2, 0\)"),
    (waves()[0][:, :0], r"got an array of shape \(12, 0, 16\)"),
    ([], "got an empty list"),
    ([*waves()[0][:11], np.empty((2, 0))], r"X\[11\] must have"),
    ([series[: 1 + row % 2] for row, series in enumerate(waves()[0])], "number of channels is not consistent"),
    (waves()[0][None], "must be 2D or 3D"),
    (waves()[0].astype(str), "numeric"),
    (waves()[0].astype(complex), "numeric"),
    ([[1.0, 2.0], [1.0]] * 6, "list"),
    (None, "NoneType"),
]


@pytest.mark.filterwarnings("ignore:(All-NaN slice|Degrees of freedom).*:RuntimeWarning")  # aeon's look at the variance
@pytest.mark.parametrize(("X", "message"), HOSTILE, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_hostile_series_are_refused_in_words(fitted, X, message):
    for use in (lambda: tiny().fit(X, waves()[1]), lambda: fitted.predict(X)):
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_no_label_without_probabilities(fitted):
    X = changed(3e38)
    with pytest.raises(ValueError, match="3e\\+38 of channel 0, time step 3, is beyond float32"):
        fitted.predict(X)


def test_values_as_large_as_float32_are_scaled():
    X, y = waves()
    large = 1e38 * X
    expected = tiny().fit(X, y).predict_proba(X)
    np.testing.assert_allclose(tiny().fit(large, y).predict_proba(large), expected, rtol=1e-3)


LABELS = {
    "words": np.array(["two words", "one", " leading"] * 4),
    "unicode": np.array(["\u00e9", "\u65e5\u672c", ""] * 4),
    "integers": np.array([-1, 7, 10**15] * 4),
    "small": np.array([2, 0, 1] * 4, dtype=np.int8),
    "booleans": np.array([True, False] * 6),
    "dates": np.array(["2020-01-02", "2020-01-01"] * 6, dtype="datetime64[D]"),
    "objects": np.array(["b", "a"] * 6, dtype=object),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_given_back_as_they_came(kind):
    (X, _), y = waves(), LABELS[kind]
    classifier = tiny(n_epochs=30, learning_rate=3e-2, dropout=0.0, dim=16).fit(X, y)
    assert classifier.classes_.tolist() == sorted(set(y.tolist()))
    predicted = classifier.predict(X)
    assert (predicted.dtype, predicted.shape) == (y.dtype, (12,))
    assert np.mean(predicted == y) > 0.5
    assert [classifier.predict(X[row : row + 1])[0] for row in range(3)] == predicted[:3].tolist()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # scikit-learn's look at NaN
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array(["a"] * 12), "at least 2 unique labels"),
        (np.array([0.5, np.nan] * 6), "NaN|nan|continuous"),
        (np.array([None, "a"] * 6, dtype=object), "None|unknown|not supported"),
        (np.array([1, "a"] * 6, dtype=object), "unknown"),
        (np.linspace(0, 1, 12), "continuous"),
        (np.zeros((12, 2)), "1-dimensional"),
        (["a", "b"] * 6, "must be a np.array or a pd.Series"),
    ],
)
def test_labels_that_are_none_are_refused(y, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny().fit(waves()[0], y)


# ------------------------------------------------------------------------------------------------ threads, processes


def predictions(seed: int) -> np.ndarray:
    X, y = waves()
    return tiny(random_state=seed, dropout=0.3).fit(X, y).predict_proba(X)


def test_threads_give_what_each_gives_alone():
    """Neither random numbers nor warning filters nor log levels are shared."""
    alone = [predictions(seed) for seed in range(4)]
    before = surroundings()
    together = Parallel(n_jobs=4, backend="threading")(delayed(predictions)(seed) for seed in range(4))
    assert {name: value for name, value in surroundings().items() if value != before[name]} == {}
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(*alone[:2])


@pytest.mark.parametrize("attention", list_attentions())
def test_other_random_numbers_of_the_program_do_not_matter(attention, monkeypatch):
    """PyTorch's global generator is neither seeded nor read, nor does drawing from it change the model."""
    X, y = waves()
    expected = tiny(attention=attention, dropout=0.2).fit(X, y).predict_proba(X)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("the global generator is seeded"))
    state = torch.get_rng_state()
    np.testing.assert_array_equal(tiny(attention=attention, dropout=0.2).fit(X, y).predict_proba(X), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_processes_give_what_each_gives_alone():
    X, y = waves(24)
    alone = cross_val_score(tiny(), X, y, cv=2, error_score="raise")
    np.testing.assert_array_equal(cross_val_score(tiny(), X, y, cv=2, n_jobs=2, error_score="raise"), alone)
    search = GridSearchCV(tiny(), {"n_epochs": [1, 3]}, cv=2, n_jobs=2, error_score="raise").fit(X, y)
    assert search.predict(X).shape == (24,)


def test_same_state_same_predictions_to_the_bit(fitted):
    X, y = waves()
    expected = fitted.predict_proba(X)
    np.testing.assert_array_equal(fitted.predict_proba(X), expected)
    with torch.random.fork_rng():
        torch.manual_seed(7)  # whatever torch's own state
        np.testing.assert_array_equal(tiny().fit(X, y).predict_proba(X), expected)
    np.testing.assert_array_equal(tiny(random_state=np.random.RandomState(0)).fit(X, y).predict_proba(X), expected)
    generator = np.random.RandomState(0)
    first, second = (tiny(random_state=generator).fit(X, y).predict_proba(X) for _ in range(2))
    np.testing.assert_array_equal(first, expected)
    assert not np.array_equal(first, second)


def test_without_a_state_numpys_global_one_decides():
    X, y = waves()
    state = np.random.get_state()  # noqa: NPY002 # it is the old global one that scikit-learn draws from
    try:
        predictions = []
        for seed in (5, 5, 6):
            np.random.seed(seed)  # noqa: NPY002
            predictions.append(tiny(random_state=None).fit(X, y).predict_proba(X))
    finally:
        np.random.set_state(state)  # noqa: NPY002
    np.testing.assert_array_equal(predictions[0], predictions[1])
    assert not np.array_equal(predictions[0], predictions[2])


def surroundings() -> dict[str, object]:
    """All that a program shares with the estimator."""
    loggers = [logging.getLogger(name) for name in ("", "lightning", "lightning.pytorch", "lightning.fabric")]
    return {
        "torch": torch.get_rng_state().tolist(),
        "seed": torch.initial_seed(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
        "python": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "warnings": list(warnings.filters),
        "logging": [(logger.level, list(logger.handlers), logger.disabled) for logger in loggers],
        "environment": dict(os.environ),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "folder": sorted(Path.cwd().iterdir()),
    }


@pytest.mark.parametrize("fails", [False, True], ids=["fit", "failing fit"])
def test_nothing_global_is_touched(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    X, y = waves()
    tiny(random_state=1).fit(X, y)  # what an import does, is done
    with torch.no_grad():
        before = surroundings()
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(TaskModule, "training_step", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    tiny().fit(X, y)
        else:
            tiny().fit(X, y).predict_proba(X)
        after = surroundings()
    assert {name: value for name, value in after.items() if value != before[name]} == {}


def test_silent_unless_asked(capfd, caplog):
    X, y = waves()
    tiny().fit(X, y).predict(X)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    tiny(verbose=True).fit(X, y)
    assert "epoch 2/2  loss" in capfd.readouterr().out


def test_survives_pickling(fitted):
    X, _ = waves(seed=1)
    copy = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copy.predict_proba(X), fitted.predict_proba(X))
    assert copy.get_params() == fitted.get_params()


def test_cross_validation_and_grid_search():
    X, y = waves()
    assert cross_val_score(tiny(), X, y, cv=2, error_score="raise").shape == (2,)
    search = GridSearchCV(tiny(), {"n_epochs": [1, 3], "dim": [4, 8]}, cv=2, error_score="raise").fit(X, y)
    assert set(search.best_params_) == {"n_epochs", "dim"}
    assert search.predict(X).shape == (12,)


def test_without_aeon_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "flowformer.interop.estimator")
    monkeypatch.setitem(sys.modules, "aeon.classification.base", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flowformer\[timeseries\]'"):
        importlib.import_module("flowformer.interop.estimator")
