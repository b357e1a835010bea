"""Published packages beside ours: each computes the same, and is shown with the ratio of times."""

import dataclasses

import pytest

from flowformer.bench import registry, runner
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.registry import Shape
from flowformer.bench.rows import packages
from flowformer.bench.runner import Plan
from flowformer.bench.tables import point_tables

registry.load()
SHAPE = Shape(512, heads=2, channels=8, value_channels=8)  # the shortest at which options of both sides are alike
ROWS = [row for row in registry.contenders().values() if row.operation == "packages-bidirectional-training"]


def check(row):
    checker = Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout))
    return checker.check(registry.OPERATIONS[row.operation], row, SHAPE)


@pytest.mark.filterwarnings("ignore:distutils Version:DeprecationWarning")  # performer-pytorch compares versions by it
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_package_equals_the_truth_of_ours(row):
    assert check(row).error < 1e-4


def test_other_options_are_noticed():
    row = next(row for row in ROWS if row.name == "hf-longformer-ours")
    other = dataclasses.replace(row.function.variant, options={"window": 510})
    with pytest.raises(WrongResultError, match="hf-longformer-ours is wrong"):
        check(dataclasses.replace(row, function=dataclasses.replace(row.function, variant=other)))


def test_every_package_has_ours_beside_it():
    rows = [row for row in registry.contenders().values() if row.operation.startswith("packages-")]
    names = {(row.operation, row.name) for row in rows}
    theirs = [row for row in rows if not row.ours]
    assert {row.name for row in theirs} == {package.name for package in packages.installed()}
    assert all((row.operation, row.twin) in names for row in theirs)
    assert not any(row.name == "hf-yoso" and "causal" in row.operation for row in theirs)


def test_other_lengths_are_refused_in_words():
    row = next(row for row in ROWS if row.name == "hf-reformer")
    inputs = registry.OPERATIONS[row.operation].inputs(Shape(40, heads=2), row.dtype, row.layout)
    assert row.unavailable(inputs) == "hf-reformer takes multiples of 128 tokens, got 40"


def test_only_what_is_installed_takes_part():
    absent = dataclasses.replace(packages.PACKAGES[0], module="no_such_package")
    assert packages.installed((absent,)) == []


def test_table_shows_the_ratio_to_ours():
    names = ("hf-nystromformer-ours", "hf-nystromformer")
    plan = Plan(
        ("packages-bidirectional",), (64,), heads=2, channels=8, value_channels=8, contenders=names, repeats=1,
        seconds=0.001, memory=False, limits=False,
    )  # fmt: skip
    records = []
    runner.run(plan, records.append)
    ours, theirs = (record for record in records if record["record"] == "point")
    assert "ratio_to_ours" not in ours
    assert theirs["ratio_to_ours"] == theirs["min_ms"] / ours["min_ms"]
    (table,) = point_tables(records)
    column = next(column for column in table.columns if column.header == "to ours")
    assert list(column.cells) == ["-", f"{theirs['ratio_to_ours']:.2f}"]
