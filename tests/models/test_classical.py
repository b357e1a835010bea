"""Classifiers without attention: each equals the library that does its work, and no padding or damage passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import nn

import flowformer
from flowformer.models.classical.boosting import XGBoostClassifier
from flowformer.models.classical.dtw import DTWClassifier
from flowformer.models.classical.rocket import RocketClassifier
from flowformer.models.classical.svm import SupportVectors
from flowformer.models.classical.tcn import CausalEncoder, TCNClassifier
from flowformer.tasks.series import uea

DATA = Path(__file__).parents[3] / "shared" / "data" / "uea"
CHANNELS, LENGTH = 2, 12
MEAN, STD = np.array([3.0, -1.0]), np.array([2.0, 0.5])


def batch(classes: int, count: int = 18, seed: int = 0):
    """Noisy series whose slope is their class, of unequal lengths, standardised; NaN in their padding."""
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    lengths = torch.randint(4, LENGTH + 1, (count,), generator=random)
    lengths[0] = LENGTH
    mask = torch.arange(LENGTH) < lengths[:, None]
    x = torch.randn(count, LENGTH, CHANNELS, generator=random) + y[:, None, None] * torch.arange(LENGTH)[:, None] / 3
    return x.masked_fill(~mask[..., None], torch.nan), y, mask


def reload(model, fresh):
    """A fresh model with the state of another."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fresh.resize_buffers(state)
    fresh.load_state_dict(state)
    fresh.check_fitted()
    return fresh.eval()


def raw(x, mask):
    """Series as they were before standardisation, (channels, length) each."""
    return [(one[real].double().numpy() * STD + MEAN).T for one, real in zip(x, mask, strict=True)]


def classes_of(model, x, mask):
    """The classes that a model chooses, with certainty."""
    found = model(x, mask).exp()
    assert bool((found.sum(1) == 1).all())
    assert bool((found.max(1).values == 1).all())
    return found.argmax(1).numpy()


# ---------------------------------------------------------------------------------------------------------------- LSTM


def test_lstm_reads_the_last_real_step():
    model = flowformer.create_model("lstm_timeseries", in_chans=CHANNELS, num_classes=4, dim=8, num_layers=2).eval()
    x, _, mask = batch(4)
    alone = torch.cat([model.head(model.lstm(one[None, real])[0][:, -1]) for one, real in zip(x, mask, strict=True)])
    torch.testing.assert_close(model(x, mask), alone)


def test_lstm_refuses_other_series():
    model = flowformer.create_model("lstm_timeseries", in_chans=CHANNELS, num_classes=4, dim=8)
    with pytest.raises(ValueError, match=r"x must be \(batch, length, 2\)"):
        model(torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="dropout"):
        flowformer.create_model("lstm_timeseries", in_chans=2, num_classes=4, dropout=2.0)


# ----------------------------------------------------------------------------------------------------------------- TCN


def encoder(depth: int = 3) -> CausalEncoder:
    torch.manual_seed(0)
    return CausalEncoder(CHANNELS, channels=6, depth=depth, reduced_dim=7, dim=5).eval()


def test_padding_is_invisible_to_the_encoder():
    model = encoder()
    x, _, mask = batch(3)
    alone = torch.cat([model(one[None, real]) for one, real in zip(x, mask, strict=True)])
    torch.testing.assert_close(model(x, mask), alone)


def test_blocks_are_causal_convolutions_of_the_whole_kernel():
    model = encoder(depth=5)  # dilated by up to 32: most weights of the last blocks see nothing of 12 steps
    x, _, _ = batch(3)
    h = x[:1].transpose(1, 2)
    first = model.blocks(h)
    changed = h.clone()
    changed[..., 7:] += 1
    later = model.blocks(changed)
    torch.testing.assert_close(later[..., :7], first[..., :7], rtol=0, atol=0)
    assert (later[..., 7:] != first[..., 7:]).any()
    whole = h
    for number, block in enumerate(model.blocks):
        inner, dilation = whole, 2**number
        for one in (block.first, block.second):
            padded = nn.functional.pad(inner, (2 * dilation, 0))
            inner = nn.functional.leaky_relu(nn.functional.conv1d(padded, one.weight, one.bias, dilation=dilation))
        whole = inner + block.residual(whole)
    torch.testing.assert_close(first, whole)


def test_published_size_of_the_encoder():
    # 11 blocks of two convolutions with weight_norm (a norm per output channel, and a bias), residuals where the
    # number of channels changes, and the linear layer: networks/causal_cnn.py with default_hyperparameters.json.
    def block(a, b):
        return (a * b * 3 + 2 * b) + (b * b * 3 + 2 * b) + (a * b + b if a != b else 0)

    wanted = block(3, 40) + 9 * block(40, 40) + block(40, 160) + 160 * 320 + 320
    assert sum(p.numel() for p in CausalEncoder(3).parameters()) == wanted


@pytest.mark.parametrize(("classes", "count"), [(2, 24), (4, 24), (4, 60)])  # without and with a search
def test_support_vectors_choose_as_scikit_learn_does(classes, count):
    random = np.random.default_rng(0)
    y = np.arange(count) % classes
    features = random.normal(size=(count, 5)) + y[:, None] * [0.6, -0.5, 0, 0, 1]
    model = SupportVectors(5, classes)
    model.fit(torch.from_numpy(features), torch.from_numpy(y))
    if count == 24:
        truth = SVC(C=np.inf).fit(features, y)
    else:
        from sklearn.model_selection import GridSearchCV

        truth = GridSearchCV(SVC(), {"C": [*10.0 ** np.arange(-4, 5), np.inf]}, cv=5).fit(features, y)
    new = random.normal(size=(500, 5)) + 1
    np.testing.assert_array_equal(model(torch.from_numpy(new)).numpy(), truth.predict(new))


def test_tcn_round_trip_and_what_is_refused():
    x, y, mask = batch(3)
    model = TCNClassifier(encoder(), 3)
    with pytest.raises(ValueError, match="not been fitted"):
        model.check_fitted()
    model.fit(x, y, mask, seed=0)
    again = reload(model, TCNClassifier(encoder(), 3))
    np.testing.assert_array_equal(classes_of(again, x, mask), classes_of(model, x, mask))
    vectors = model.classifier
    for name, value, message in (
        ("counts", vectors.counts + 1, "counts add up to"),
        ("vectors", vectors.vectors * torch.nan, "not finite"),
        ("coefficients", vectors.coefficients[:1], "coefficients has shape"),
        ("gamma", -vectors.gamma, "gamma must be above 0"),
    ):
        damaged = reload(model, TCNClassifier(encoder(), 3))
        setattr(damaged.classifier, name, value)
        with pytest.raises(ValueError, match=message):
            damaged.check_fitted()
    with torch.no_grad():
        again.encoder.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"encoder\.head\.bias has values that are not finite"):
        again.check_fitted()


# ------------------------------------------------------------------------------------------------------------- XGBoost


def boosted(classes: int) -> XGBoostClassifier:
    return XGBoostClassifier(CHANNELS, classes, LENGTH, num_trees=3, max_depth=2)


def fitted(classes: int) -> XGBoostClassifier:
    x, y, mask = batch(classes)
    model = boosted(classes)
    model.fit(x.nan_to_num(5.0), y, mask, seed=0)  # whatever padding holds
    return model


@pytest.mark.parametrize("classes", [2, 3])
def test_xgboost_sees_flat_series_with_missing_steps(classes):
    from xgboost import XGBClassifier

    x, y, mask = batch(classes)
    truth = XGBClassifier(n_estimators=3, max_depth=2).fit(x.flatten(1).numpy(), y.numpy())
    wanted = truth.predict_proba(x.flatten(1).numpy())
    model = fitted(classes)
    for one in (model, reload(model, boosted(classes))):
        np.testing.assert_allclose(one(x, mask).exp().numpy(), wanted, rtol=1e-6)
        short = mask.sum(1) <= 9
        np.testing.assert_allclose(one(x[short, :9], mask[short, :9]).exp().numpy(), wanted[short.numpy()], rtol=1e-6)


def check_votes(x, y, mask, new, new_mask, classes: int) -> None:
    """Votes are the margins of XGBoost, bit for bit."""
    from xgboost import XGBClassifier

    model = XGBoostClassifier(x.shape[2], classes, x.shape[1], num_trees=5, max_depth=4)
    model.fit(x, y, mask, seed=0)
    truth = XGBClassifier(n_estimators=5, max_depth=4, n_jobs=1)
    truth.fit(x.masked_fill(~mask[..., None], torch.nan).flatten(1).numpy(), y.numpy())
    missing = (0, 0, 0, x.shape[1] - new.shape[1])
    flat = nn.functional.pad(new.masked_fill(~new_mask[..., None], torch.nan), missing, value=torch.nan).flatten(1)
    wanted = truth.predict(flat.numpy(), output_margin=True).reshape(len(new), -1)
    np.testing.assert_array_equal(model.votes(new, new_mask).numpy(), wanted)
    np.testing.assert_array_equal(model(new, new_mask).argmax(1).numpy(), truth.predict(flat.numpy()))


@pytest.mark.parametrize("classes", [2, 5])
def test_votes_are_those_of_xgboost_at_and_beside_thresholds(classes):
    """Values of few kinds, of which each threshold is one or a neighbour; classes of unequal size."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (400, 6, CHANNELS), generator=random) / 7
    x[:200] = torch.nextafter(x[:200], torch.tensor(1.0))
    y = (torch.arange(400) % (2 * classes - 1)).clamp(max=classes - 1)
    x += y[:, None, None] / 7 * (torch.rand(400, 6, 1, generator=random) < 0.5)
    mask = torch.rand(400, 6, generator=random) < 0.8
    check_votes(x[::2], y[::2], mask[::2], x, mask, classes)


@pytest.mark.parametrize("subset", ["JapaneseVowels", "UWaveGestureLibrary"])
def test_votes_are_those_of_xgboost_on_real_series(subset):
    folder = DATA if DATA.is_dir() else None
    if uea.find(subset, folder) is None:
        pytest.skip(f"{subset} is not there")
    task = uea.load(subset, folder)
    train, test = (task.format.collate(list(part)) for part in (task.train, task.test))
    check_votes(train["x"], train["y"], train["mask"], test["x"], test["mask"], len(task.format.classes))


def test_trees_need_no_xgboost_once_they_are_grown(monkeypatch):
    x, _, mask = batch(3)
    model = fitted(3)
    monkeypatch.setitem(sys.modules, "xgboost", None)
    torch.testing.assert_close(reload(model, boosted(3))(x, mask), model(x, mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("left", 0, 10**6, "one root, or one child of one node"),
        ("right", 0, -1, "one root, or one child of one node"),
        ("left", 0, 0, "one root, or one child of one node"),
        ("left", 2, 0, "one root, or one child of one node"),
        ("roots", 1, 0, "one root, or one child of one node"),
        ("missing", 0, 0, "missing must lead to the left or to the right"),
        ("missing", 2, 10**6, "missing must lead to the left or to the right"),
        ("features", 0, CHANNELS * LENGTH, "features must be from 0 to 23"),
        ("features", 0, -1, "features must be from 0 to 23"),
        ("values", 0, torch.nan, "values has values that are not finite"),
        ("values", -1, 3e38, "sums of leaves has values that are not finite"),
        ("base", 1, torch.inf, "base has values that are not finite"),
    ],
)
def test_xgboost_follows_no_link_that_leads_nowhere(name, place, value, message):
    model = fitted(3)
    getattr(model, name)[place] = value
    with pytest.raises(ValueError, match=message):
        model.check_fitted()


@pytest.mark.parametrize("name", ["base", "roots", "features", "values", "left", "right", "missing"])
def test_xgboost_of_another_number_of_trees_or_nodes_is_refused(name):
    model = fitted(3)
    setattr(model, name, getattr(model, name)[:-1])
    with pytest.raises(ValueError, match="has shape"):
        model.check_fitted()


def chain(model: XGBoostClassifier, left: list[int], right: list[int]) -> XGBoostClassifier:
    """A model of one tree, of these links."""
    model.base, model.roots, model.values = torch.zeros(1), torch.tensor([0]), torch.zeros(len(left))
    model.left, model.missing, model.right = torch.tensor(left), torch.tensor(left), torch.tensor(right)
    model.features = torch.zeros(len(left), dtype=torch.int64)
    return model


def test_each_walk_ends_in_a_leaf():
    model = XGBoostClassifier(CHANNELS, 2, LENGTH, num_trees=1, max_depth=2)
    chain(model, [1, 1, 3, 3, 4], [2, 1, 4, 3, 4]).check_fitted()
    with pytest.raises(ValueError, match="a tree is deeper than 2"):
        chain(model, [1, 1, 3, 3, 5, 5, 6], [2, 1, 4, 3, 6, 5, 6]).check_fitted()
    with pytest.raises(ValueError, match="a child must come after its node"):
        chain(model, [0, 1, 2], [0, 2, 2]).check_fitted()
    with pytest.raises(ValueError, match="a child must come after its node"):
        chain(model, [0, 2, 1, 3, 4], [0, 3, 4, 3, 4]).check_fitted()


def test_xgboost_of_other_data_is_refused():
    model = fitted(3)
    with pytest.raises(ValueError, match="features must be from 0 to 2"):
        reload(model, XGBoostClassifier(1, 3, 3, num_trees=3, max_depth=2))
    with pytest.raises(ValueError, match="roots has shape"):
        reload(model, XGBoostClassifier(CHANNELS, 3, LENGTH))
    with pytest.raises(ValueError, match="not been fitted"):
        boosted(3).check_fitted()


# ----------------------------------------------------------------------------------------------------- ROCKET and DTW


def rocket(classes: int) -> RocketClassifier:
    return RocketClassifier(MEAN, STD, classes, LENGTH, num_kernels=20)


def test_rocket_that_aeon_would_read_out_of_bounds_with_is_refused():
    """Without aeon: kernels of the right shapes are all that the check sees."""
    model = rocket(3)
    with pytest.raises(ValueError, match="not been fitted"):
        model.check_fitted()
    integers = {"kernel_lengths": 7, "dilations": 1, "paddings": 3, "channel_counts": 1}
    for name, value in integers.items():
        setattr(model, name, torch.full((20,), value, dtype=torch.int32))
    model.biases, model.weights = torch.zeros(20), torch.zeros(140)
    model.channel_indices = torch.zeros(20, dtype=torch.int32)
    model.scale, model.coefficients = torch.ones(40).double(), torch.zeros(3, 40).double()
    model.intercepts = torch.zeros(3).double()
    model.check_fitted()
    for name, value, message in (
        ("channel_indices", 2, "channel_indices must be from 0 to 1"),
        ("channel_counts", 2, "weights has shape"),
        ("kernel_lengths", -7, "kernel_lengths must be"),
        ("kernel_lengths", 9, "weights has shape"),
        ("dilations", 6, "does not fit into 12 steps"),
        ("paddings", -1, "paddings must be"),
    ):
        kept = getattr(model, name)
        changed = kept.clone()
        changed[-1] = value
        setattr(model, name, changed)
        with pytest.raises(ValueError, match=message):
            model.check_fitted()
        setattr(model, name, kept)
    model.coefficients[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        model.check_fitted()


@pytest.mark.slow  # aeon compiles with numba
@pytest.mark.parametrize("classes", [2, 3])
def test_rocket_is_that_of_aeon_on_padded_series(classes):
    from aeon.classification.convolution_based import RocketClassifier as Truth

    x, y, mask = batch(classes, 30)
    padded = np.zeros((30, CHANNELS, LENGTH))
    for row, one in zip(padded, raw(x, mask), strict=True):
        row[:, : one.shape[1]] = one
    model = rocket(classes)
    model.fit(x[:20], y[:20], mask[:20], seed=7)
    truth = Truth(20, random_state=7).fit(padded[:20], y[:20].numpy())
    again = reload(model, rocket(classes))
    for one in (model, again):
        np.testing.assert_array_equal(classes_of(one, x, mask), truth.predict(padded))
    other = rocket(classes)
    other.fit(x[:20], y[:20], mask[:20], seed=8)
    assert not torch.equal(other.biases, model.biases)


@pytest.mark.slow  # aeon compiles with numba
@pytest.mark.parametrize("scaling", ["none", "training", "series"])
@pytest.mark.filterwarnings("ignore:.*unsafe cast from uint64:Warning")  # of aeon itself
def test_dtw_is_that_of_aeon_on_unequal_series(scaling):
    from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier

    x, y, mask = batch(3, 40)
    values = raw(x, mask)
    if scaling == "training":
        values = [(one - MEAN[:, None]) / STD[:, None] for one in values]
    if scaling == "series":
        values = [(one - one.mean(1, keepdims=True)) / one.std(1, keepdims=True) for one in values]
    model = DTWClassifier(MEAN, STD, 3, scaling=scaling, window=0.4)
    model.fit(x[:20], y[:20], mask[:20], seed=0)
    truth = KNeighborsTimeSeriesClassifier("dtw", {"window": 0.4}).fit(values[:20], y[:20].numpy())
    again = reload(model, DTWClassifier(MEAN, STD, 3, scaling=scaling, window=0.4))
    np.testing.assert_array_equal(classes_of(again, x[20:], mask[20:]), truth.predict(values[20:]))


FIRST_DTW = """
import numpy as np, torch
from flowformer.models.classical.dtw import DTWClassifier
torch.set_num_threads(3)
model, x, mask = DTWClassifier(np.zeros(2), np.ones(2), 2), torch.randn(4, 9, 2), torch.ones(4, 9, dtype=torch.bool)
model.fit(x, torch.arange(4) % 2, mask, seed=0)
model(x, mask)
assert torch.get_num_threads() == 3, torch.get_num_threads()
"""


@pytest.mark.slow  # aeon compiles with numba, in a process of its own
def test_numba_sets_no_threads_of_pytorch():
    subprocess.run([sys.executable, "-c", FIRST_DTW], check=True, timeout=300)


def test_dtw_of_no_training_set_is_refused():
    model = DTWClassifier(MEAN, STD, 3)
    with pytest.raises(ValueError, match="not been fitted"):
        model.check_fitted()
    x, y, mask = batch(3)
    model.fit(x.nan_to_num(0.0), y, mask, seed=0)
    model.check_fitted()
    for name, value in (("y", y + 1), ("lengths", mask.sum(1) * 2), ("x", x), ("x", x[:, :, :1])):
        kept = getattr(model, name)
        setattr(model, name, value)
        with pytest.raises(ValueError, match=name):
            model.check_fitted()
        setattr(model, name, kept)
    with pytest.raises(ValueError, match="scaling must be one of"):
        DTWClassifier(MEAN, STD, 3, scaling="all")  # pyright: ignore[reportArgumentType]
