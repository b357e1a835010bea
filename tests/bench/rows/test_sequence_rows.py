"""Sequence classifiers' rows: what is timed is the model of this library, and a wrong one is refused."""

from __future__ import annotations

import pytest
import torch

from flowformer.bench import registry
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.registry import Contender, Shape
from flowformer.bench.rows import sequence
from flowformer.mechanisms import list_attentions

registry.load()
SHAPE = Shape(24, heads=2, channels=8, value_channels=8)
ROWS = {row.name: row for row in registry.contenders().values() if row.operation == "sequence-training"}


def given():
    return sequence.draw(SHAPE, torch.float32, "length-first")


def check(row):
    checker = Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout))
    return checker.check(registry.OPERATIONS["sequence-training"], row, SHAPE)


def test_every_mechanism_is_there():
    named = {name.rpartition("-")[0] if name.endswith(("-native", "-torch", "-triton")) else name for name in ROWS}
    assert named == {name.replace("_", "-") for name in list_attentions()}
    assert next(iter(ROWS)).startswith("flow")


@pytest.mark.parametrize("name", ["flow-torch", "linear-torch", "local", "synthesizer", "aft-full"])
def test_what_is_right_is_let_in_and_what_is_wrong_is_not(name, monkeypatch):
    assert check(ROWS[name]).error < 2e-6
    truth = ROWS[name].reference(*given())
    build = sequence.build

    def changed(attention, shape):
        model = build(attention, shape)
        model.encoder.blocks[0].attention.v_proj.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(sequence, "build", changed)
    wrong = Contender(**{**vars(ROWS[name]), "reference": lambda given: truth})
    with pytest.raises(WrongResultError, match=f"{name} is wrong in sequence-training"):
        check(wrong)


def test_memory_that_grows_with_the_square_of_the_length_is_known():
    for name in ROWS:
        squares = ROWS[name].needs_bytes(Shape(2_000, heads=2)) / max(ROWS[name].needs_bytes(Shape(1_000, heads=2)), 1)
        assert squares == (4 if name == "synthesizer" else 0), name
