"""Series as a task: preprocessing against pandas, batching, splitting, classifying, and parts that do not fit."""

import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from series_writers import HEADER, ROWS, write_csv, write_ts

from flowformer.common.errors import DataError
from flowformer.models import create_model
from flowformer.tasks.protocols import Format, Task
from flowformer.tasks.series.dataset import SeriesSet
from flowformer.tasks.series.files import read_table
from flowformer.tasks.series.format import SeriesFormat, SeriesScaler, classify, fill_missing, match_format
from flowformer.tasks.series.table import SeriesTable
from flowformer.tasks.series.task import SeriesTask, build_task, load_pair


def draw_series(count: int, channels: int = 3, seed: int = 0, offset: float = 5.0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(offset, 2.0, (generator.integers(4, 12), channels)) for _ in range(count)]


def make_table(origin: str, series: list[np.ndarray], labels: list[str], **fields) -> SeriesTable:
    return SeriesTable(origin, series, labels, tuple(map(str, range(len(series)))), **fields)


def make_task(train: list[np.ndarray], test: list[np.ndarray], **fields) -> SeriesTask:
    parts = [
        make_table(o, s, ["abc"[i % 3] for i in range(len(s))], **fields) for o, s in (("tr", train), ("te", test))
    ]
    return build_task(*parts, name="made")


def standardise(form: SeriesFormat, part: SeriesSet) -> list[np.ndarray]:
    """The series as a model sees them, without padding."""
    batch = form.collate(list(part))
    return [x[mask].numpy() for x, mask in zip(batch["x"], batch["mask"], strict=True)]


def refuse(call, *parts: str) -> None:
    """The call raises DataError, and its message holds every part."""
    with pytest.raises(DataError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


# --- filling and scaling


def test_fill_missing_equals_pandas_interpolation():
    series = draw_series(1, channels=4)[0]
    series[[0, 2, 3, -1], 0] = np.nan
    series[1, 1] = np.inf
    series[2, 1] = -np.inf
    series[1:, 2] = np.nan
    filled = fill_missing(series)
    marked = pd.DataFrame(series).replace([np.inf, -np.inf], np.nan)
    np.testing.assert_allclose(filled, marked.interpolate(limit_direction="both").to_numpy(), rtol=1e-14)
    assert np.isnan(series[0, 0])  # the input is not touched


def test_fill_missing_leaves_a_wholly_missing_channel_to_the_scaler():
    series = np.array([[1.0, np.nan], [3.0, np.nan]])
    assert np.isnan(fill_missing(series)[:, 1]).all()
    scaler = SeriesScaler.fit([fill_missing(series), np.array([[2.0, 8.0], [2.0, 4.0]])])
    np.testing.assert_allclose(scaler.mean, [2.0, 6.0])
    assert (scaler(fill_missing(series))[:, 1] == 0).all()


def test_fill_missing_takes_integers_and_refuses_other_ranks():
    assert fill_missing(np.array([[1, 2]])).dtype == np.float64
    with pytest.raises(ValueError, match=r"\(length, channels\), got \(3,\)"):
        fill_missing(np.zeros(3))


def test_scaler_equals_pandas():
    series = draw_series(7, offset=1e6)
    series[2][1:4, 0] = np.nan
    stacked = pd.DataFrame(np.concatenate(series))
    scaler = SeriesScaler.fit(series)
    np.testing.assert_allclose(scaler.mean, stacked.mean(), rtol=1e-13)
    np.testing.assert_allclose(scaler.std, stacked.std(ddof=1), rtol=1e-9)
    scaled = scaler(series[0])
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, (series[0] - scaler.mean) / scaler.std, rtol=1e-6, atol=1e-6)


def test_scaler_never_divides_by_zero():
    series = [np.array([[0.1, np.nan, 7.0]] * 3), np.array([[0.1, np.inf, np.nan]] * 10)]
    scaler = SeriesScaler.fit(series)
    np.testing.assert_array_equal(scaler.std, [1, 1, 1])
    np.testing.assert_array_equal(scaler.mean, [0.1, 0, 7])
    assert all((scaler(one) == 0).all() for one in series)


def test_scaler_refuses_other_channels():
    scaler = SeriesScaler.fit(draw_series(3))
    with pytest.raises(ValueError, match=r"\(length, 3\), got \(4, 2\)"):
        scaler(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="the same number of channels"):
        SeriesScaler.fit([np.zeros((4, 2)), np.zeros((4, 3))])
    with pytest.raises(ValueError, match="the same number of channels"):
        SeriesScaler.fit([])


# --- tasks


def test_task_keeps_raw_series_and_takes_train_statistics():
    train, test = draw_series(9), draw_series(6, seed=1, offset=50.0)
    task = make_task(train, test)
    for one, other in zip([*task.train.series, *task.test.series], [*train, *test], strict=True):
        np.testing.assert_array_equal(one, other)
    together = pd.DataFrame(np.concatenate(train))
    np.testing.assert_allclose(task.format.scaler.mean, together.mean(), rtol=1e-13)
    np.testing.assert_allclose(task.format.scaler.std, together.std(ddof=1), rtol=1e-12)
    assert (task.format.classes, task.format.channels, task.format.trim) == (("a", "b", "c"), 3, True)
    assert task.format.max_length == max(map(len, train))
    assert (task.metric.name, task.published, task.source) == ("accuracy", {}, "tr and te")
    assert task.train.labels.dtype == np.int64


def test_task_is_filled_before_statistics_are_taken():
    train = [np.array([[0.0], [np.nan], [np.nan], [9.0]]), np.array([[1.0]]), np.array([[2.0]])]
    task = make_task(train, train)
    np.testing.assert_array_equal(task.train.series[0][:, 0], [0, 3, 6, 9])
    filled = pd.Series([0.0, 3.0, 6.0, 9.0, 1.0, 2.0])
    scaler = task.format.scaler
    np.testing.assert_allclose([scaler.mean[0], scaler.std[0]], [filled.mean(), filled.std()])


def test_set_is_a_data_set():
    part = SeriesSet([np.zeros((2, 1), np.float32), np.ones((5, 1), np.float32)], np.array([1, 0]))
    assert len(part) == 2
    assert part[1][1] == 0
    assert isinstance(part[1][1], int)
    np.testing.assert_array_equal(part.lengths, [2, 5])
    assert part.subset([1])[0][0] is part.series[1]


def test_collate_standardises():
    task = make_task(draw_series(9), draw_series(6, seed=1, offset=50.0))
    together = np.concatenate(standardise(task.format, task.train))
    np.testing.assert_allclose(together.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(together.std(axis=0, ddof=1), 1, rtol=1e-6)
    raw, scaler = task.test.series[0][: task.format.max_length], task.format.scaler
    seen = standardise(task.format, task.test)[0]
    np.testing.assert_allclose(seen, (raw - scaler.mean) / scaler.std, rtol=1e-5)


def test_collate_sets_a_wholly_missing_channel_to_the_mean():
    test = draw_series(3, seed=1)
    test[0][:, 1] = np.nan
    task = make_task(draw_series(6), test)
    batch = task.format.collate([task.test[0]])
    assert (batch["x"][0, :, 1] == 0).all()
    assert (batch["x"][0, :, 0] != 0).all()


def test_collate_trims_pads_and_clips():
    # Zeros in the source would be -10 and -10 to the model: padding comes after standardising.
    scaler = SeriesScaler(np.array([10.0, 20.0]), np.array([1.0, 2.0]))
    form = SeriesFormat(("a", "b", "c"), 6, scaler)
    items = [(np.full((length, 2), 30.0), label) for length, label in ((2, 0), (9, 1), (3, 2))]
    batch = form.collate([items[0], items[2]])
    assert batch["x"].shape == (2, 3, 2)
    assert batch["x"].dtype == torch.float32
    assert batch["mask"].tolist() == [[True, True, False], [True] * 3]
    assert batch["y"].tolist() == [0, 2]
    assert batch["y"].dtype == torch.int64
    assert (batch["x"][0, 2] == 0).all()
    assert batch["x"][1].tolist() == [[20, 5]] * 3
    wide = replace(form, trim=False).collate([items[0], items[2]])
    assert wide["x"].shape == (2, 6, 2)
    assert wide["mask"].sum(1).tolist() == [2, 3]
    assert (wide["x"][~wide["mask"]] == 0).all()
    clipped = form.collate([(np.arange(18.0).reshape(9, 2), 1)])
    assert clipped["x"].shape == (1, 6, 2)
    assert clipped["mask"].all()
    np.testing.assert_array_equal(clipped["x"][0], scaler(np.arange(12.0).reshape(6, 2)))


def test_collate_refuses_what_would_broadcast():
    form = make_task(draw_series(6), draw_series(3)).format
    with pytest.raises(ValueError, match=r"\(length, 3\), got \(4, 1\)"):
        form.collate([(np.zeros((4, 1), np.float32), 0)])
    with pytest.raises(ValueError, match="at least one series"):
        form.collate([])


def test_task_feeds_a_data_loader_and_pickles():
    task = pickle.loads(pickle.dumps(make_task(draw_series(9), draw_series(3))))
    loader = torch.utils.data.DataLoader(task.train, batch_size=4, collate_fn=task.format.collate)
    batches = list(loader)
    assert [len(batch["y"]) for batch in batches] == [4, 4, 1]


def test_split_is_stratified_and_deterministic():
    task = make_task(draw_series(30), draw_series(6))
    reduced = task.split_validation(0.3, seed=4)
    assert np.bincount(reduced.train.labels).tolist() == [7, 7, 7]
    assert np.bincount(reduced.validation.labels).tolist() == [3, 3, 3]
    again = task.split_validation(0.3, seed=4)
    other = task.split_validation(0.3, seed=5)
    np.testing.assert_array_equal(again.format.scaler.mean, reduced.format.scaler.mean)
    assert (other.format.scaler.mean != reduced.format.scaler.mean).any()
    for fraction in (0.001, 0.999):
        few = make_task(draw_series(6), draw_series(3)).split_validation(fraction, seed=0)
        assert (len(few.train), len(few.validation)) == (3, 3)


def test_split_equals_a_task_built_from_the_kept_series():
    """What is set aside, its extremes and its lengths included, leaves no trace in the rest."""
    generator = np.random.default_rng(3)
    train = [generator.normal(5.0, 2.0, (4 + row, 3)) for row in range(12)]  # a length tells its row
    test = draw_series(6, seed=1)
    held = make_task(train, test).split_validation(0.25, seed=11).validation.lengths - 4  # depends on the labels only
    kept = np.setdiff1d(np.arange(12), held)
    train[kept[0]][:, 1] = np.nan
    train[kept[5]][1:3, 0] = np.nan
    test[2][:, 2] = np.nan
    train[held[0]] = np.full((90, 3), 60.0)
    train[held[1]][:, 0] = np.nan
    reduced = make_task(train, test).split_validation(0.25, seed=11)
    validation = reduced.validation
    tables = (
        make_table("tr", [train[row] for row in kept], ["abc"[row % 3] for row in kept]),
        make_table("te", [*test, *(train[row] for row in held)], ["abc"[row % 3] for row in [*range(6), *held]]),
    )
    truth = build_task(*tables, name="made")
    np.testing.assert_array_equal(reduced.format.scaler.mean, truth.format.scaler.mean)
    np.testing.assert_array_equal(reduced.format.scaler.std, truth.format.scaler.std)
    assert reduced.format.max_length == truth.format.max_length < 90
    np.testing.assert_array_equal(reduced.train.labels, truth.train.labels)
    np.testing.assert_array_equal([*reduced.test.labels, *validation.labels], truth.test.labels)
    parts = [*reduced.train.series, *reduced.test.series, *validation.series]
    for one, other in zip(parts, [*truth.train.series, *truth.test.series], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("trim", [True, False])
def test_split_keeps_the_rest_of_the_format(trim):
    task = make_task(draw_series(12), draw_series(3), channel_names=("x", "y", "z"))
    task = replace(task, format=replace(task.format, trim=trim))
    reduced = task.split_validation(0.25, seed=1)
    kept = SeriesScaler.fit(reduced.train.series)
    np.testing.assert_array_equal(reduced.format.scaler.mean, kept.mean)
    np.testing.assert_array_equal(reduced.format.scaler.std, kept.std)
    assert (reduced.format.trim, reduced.format.channel_names) == (trim, ("x", "y", "z"))
    assert reduced.format.classes == task.format.classes
    assert len(reduced.train) + len(reduced.validation) == len(task.train)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_fractions_out_of_range(fraction):
    with pytest.raises(ValueError, match=re.escape("must be above 0 and below 1, got")):
        make_task(draw_series(6), draw_series(3)).split_validation(fraction, seed=0)


def test_split_refuses_a_class_of_one():
    with pytest.raises(ValueError, match="class 'c' has 1 training examples"):
        make_task(draw_series(5), draw_series(3)).split_validation(0.5, seed=0)


@pytest.mark.parametrize("protocol", [Task, Format])
def test_task_offers_what_training_asks_for(protocol):
    task = make_task(draw_series(6), draw_series(3))
    wanted = {*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))}
    assert len(wanted) >= 2
    offered = task if protocol is Task else task.format
    assert not [name for name in wanted if not hasattr(offered, name)]


def test_step_gives_mean_loss_and_accuracy():
    class Fixed(torch.nn.Module):
        def forward(self, x, mask):
            assert x.shape[:2] == mask.shape
            return torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 3.0], [4.0, 0.0, 0.0]])

    task = make_task(draw_series(6), draw_series(4))
    batch = task.format.collate(list(task.test))  # labels 0, 1, 2, 0: all but the second are right
    result = task.step(Fixed(), batch)
    assert task.size(batch) == 4
    assert set(result) == {"loss", task.metric.key}
    assert result["accuracy"].item() == 3
    own = [np.exp(2), 1.0, np.exp(3), np.exp(4)]
    sums = [np.exp(peak) + 2 for peak in (2, 1, 3, 4)]
    np.testing.assert_allclose(result["loss"].item(), np.mean(np.log(sums) - np.log(own)), rtol=1e-6)


def test_step_trains_a_model():
    task = make_task(draw_series(6), draw_series(3))
    model = make_model(task.format)
    loss = task.step(model, task.format.collate(list(task.train)))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- the format and what a trained model does with it


def make_model(form: SeriesFormat) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"in_chans": form.channels, "num_classes": len(form.classes), "max_length": form.max_length}
    return create_model("flowformer_timeseries", **sizes, dim=8, num_heads=2, num_layers=1, ffn_dim=8).eval()


@pytest.mark.parametrize(("trim", "names"), [(True, None), (False, ("x", "ÿ, z", "1"))])
def test_format_survives_json_exactly(trim, names):
    scaler = SeriesScaler(np.array([0.1 + 0.2, 1e-300, -7.0]), np.array([1 / 3, np.nextafter(1.0, 2.0), 5e-324]))
    form = SeriesFormat(("b", "a", "1.0"), 17, scaler, trim, names)
    values = json.loads(json.dumps(form.to_json()))
    back = SeriesFormat.from_json(values)
    assert back.to_json() == form.to_json() == values
    for name in ("mean", "std"):
        one, other = getattr(back.scaler, name), getattr(form.scaler, name)
        assert one.dtype == np.float64
        assert one.tobytes() == other.tobytes()
    assert (back.classes, back.max_length, back.trim, back.channel_names) == (("b", "a", "1.0"), 17, trim, names)


def test_format_of_whole_numbers_stays_float():
    back = SeriesFormat.from_json(
        {"classes": ["a"], "max_length": 1, "mean": [0], "std": [1], "trim": True, "channel_names": None}
    )
    assert back.scaler.mean.dtype == back.scaler.std.dtype == np.float64


def test_classify_equals_the_model_on_each_series_alone():
    form = make_task(draw_series(9), draw_series(3)).format
    model = make_model(form)
    series = draw_series(7, seed=2)
    series[0][1:3, 0] = np.nan
    series[1][:, 2] = np.nan
    series[2] = np.concatenate([series[2]] * 4)  # longer than any the model was trained on
    probabilities = classify(model, form, series, batch_size=3)
    assert probabilities.shape == (7, 3)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert np.ptp(probabilities[:, 0]) > 1e-4  # not the same for all
    for row, one in zip(probabilities, series, strict=True):
        seen = torch.from_numpy(form.scaler(fill_missing(one))[None, : form.max_length])
        with torch.no_grad():
            np.testing.assert_allclose(row, model(seen)[0].softmax(-1), rtol=1e-5)
    assert np.isnan(series[0][1:3, 0]).all()  # the input is not touched


def test_classify_refuses_other_channels():
    form = make_task(draw_series(9), draw_series(3)).format
    with pytest.raises(ValueError, match=r"\(length, 3\), got \(5, 2\)"):
        classify(make_model(form), form, [np.zeros((5, 2))])


def test_new_series_get_the_channels_of_the_training_data():
    form = make_task(draw_series(9), draw_series(3), channel_names=("x", "y", "z")).format
    series = draw_series(2, seed=2)
    for names, order in ((("x", "y", "z"), [0, 1, 2]), (("z", "x", "y"), [1, 2, 0]), (None, [0, 1, 2])):
        matched = match_format(make_table("new", series, ["", ""], channel_names=names), form)
        for one, other in zip(matched, series, strict=True):
            np.testing.assert_array_equal(one, other[:, order])
    unnamed = replace(form, channel_names=None)
    for one, other in zip(
        match_format(make_table("new", series, ["", ""], channel_names=("p", "q", "r")), unnamed), series, strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (None, "new: 2 channels, but the training data has 3"),
        (("x", "y"), "new, line 1: channels ['z'] of the training data are missing"),
        (("x", "w"), "['w'] do not occur in the training data; channels ['y', 'z'] of the training data are missing"),
        (("x", "y", "z", "w"), "new, line 1: channels ['w'] do not occur in the training data"),
    ],
)
def test_new_series_with_other_channels_are_refused(names, cause):
    form = make_task(draw_series(9), draw_series(3), channel_names=("x", "y", "z")).format
    table = make_table("new", draw_series(2, channels=len(names or "ab")), ["", ""], channel_names=names)
    refuse(lambda: match_format(table, form), cause)


def test_new_series_must_be_there():
    form = make_task(draw_series(9), draw_series(3)).format
    refuse(lambda: match_format(make_table("bare", [], []), form), "bare: contains no series")
    hollow = make_table("hollow", [np.zeros((2, 3)), np.zeros((0, 3))], ["", ""])
    refuse(lambda: match_format(hollow, form), "hollow, series 1: a series without time steps")


# --- a user's own pair


def test_pair_of_both_kinds(tmp_path):
    rows = ["s,1,b,1,2", "s,0,b,3,4", "t,0,a,1,"]
    task = load_pair(write_ts(tmp_path / "own_TRAIN.ts"), write_csv(tmp_path / "own_TEST.csv", rows), name="mine")
    assert (task.name, len(task.train), len(task.test), task.format.max_length) == ("mine", 4, 2, 3)
    assert task.test.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(task.test.series[0], [[3, 4], [1, 2]])
    np.testing.assert_array_equal(task.test.series[1], [[1, np.nan]])
    assert task.format.channel_names is None
    assert "own_TRAIN.ts" in task.source
    assert "own_TEST.csv" in task.source


def test_pair_matches_channels_by_name(tmp_path):
    train = write_csv(tmp_path / "train.csv", ["s,1,a,1,10", "t,1,b,2,20"])
    test = write_csv(tmp_path / "test.csv", ["s,1,a,10,1"], "series,time,label,y,x")
    task = load_pair(train, test)
    np.testing.assert_array_equal(task.test.series[0], load_pair(train, train).test.series[0])
    assert task.format.channel_names == ("x", "y")
    more = write_csv(tmp_path / "more.csv", ["s,1,10,1"], "series,time,y,x")
    np.testing.assert_array_equal(match_format(read_table(more, labelled=False), task.format)[0], task.test.series[0])
    other = write_csv(tmp_path / "other.csv", ["s,1,a,10,1"], "series,time,label,y,z")
    refuse(lambda: load_pair(train, other), f"{other}, line 1: channels ['z']", str(train))


def test_pair_refuses_parts_that_do_not_fit(tmp_path):
    train = write_ts(tmp_path / "train.ts")
    strange = write_ts(tmp_path / "test.ts", ["1:2:a", "1:2:c"], [*HEADER[:-1], "@classLabel true a c"])
    refuse(lambda: load_pair(train, strange), f"{strange}, line 8: label 'c'", str(train))
    strange = write_csv(tmp_path / "test.csv", ["s,1,a,1,2", "", "t,1,c,1,2"])
    refuse(lambda: load_pair(train, strange), f"{strange}, line 4: label 'c'", str(train))
    narrow = write_ts(tmp_path / "narrow.ts", ["1,2:a"])
    refuse(lambda: load_pair(train, narrow), f"{narrow}: 1 channels", f"{train} has 2")
    single = write_ts(tmp_path / "single.ts", [ROWS[0]])
    refuse(lambda: load_pair(single, train), f"{single}: ", "at least two classes", "'a'")


def test_pair_names_the_kinds_it_takes(tmp_path):
    refuse(lambda: load_pair(tmp_path / "own.arff", tmp_path / "own.ts"), "own.arff", ".ts, .ts.gz, .csv, .csv.gz")


def test_tables_without_series_or_steps_are_refused():
    good = make_table("good", draw_series(2), ["a", "b"])
    refuse(lambda: build_task(good, make_table("bare", [], []), name="x"), "bare: contains no series")
    hollow = make_table("hollow", [np.zeros((2, 3)), np.zeros((0, 3))], ["a", "b"])
    refuse(lambda: build_task(hollow, good, name="x"), "hollow, series 1: a series without time steps")
    ragged = make_table("ragged", [np.zeros((2, 3)), np.zeros((2, 4))], ["a", "b"])
    refuse(lambda: build_task(ragged, good, name="x"), "ragged, series 1: 4 channels, but the first series has 3")
