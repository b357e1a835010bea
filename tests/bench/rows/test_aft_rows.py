"""AFT's peers say what they are and why they cannot run; gradients of learned tensors are checked."""

import dataclasses
import importlib.util

import pytest
import torch

from flowformer.bench import registry
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.registry import Shape
from flowformer.bench.rows import aft, variants
from flowformer.bench.rows.variants import Kind, find_variant

registry.load()
SHAPE = Shape(24, heads=2, channels=8, value_channels=8)
ROWS = registry.contenders()


def inputs_of(row, shape=SHAPE):
    return registry.OPERATIONS[row.operation].inputs(shape, row.dtype, row.layout)


def check(row, shape=SHAPE):
    checker = Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout))
    return checker.check(registry.OPERATIONS[row.operation], row, shape)


@pytest.mark.parametrize("name", ["aft-full", "aft-full-factors", "aft-local-64", "aft-local-64-free", "aft-conv"])
def test_wrong_gradient_of_a_learned_tensor_is_refused(name):
    row = ROWS["aft-causal-training", name]

    def run(q, k, v, learned, **options):
        *others, last = learned if isinstance(learned, tuple) else (learned,)
        last = last + 0.01 * (last - last.detach())  # the same number, with a gradient that is one percent larger
        return row.function.function(q, k, v, (*others, last) if others else last, **options)

    with pytest.raises(WrongResultError):
        check(dataclasses.replace(row, function=dataclasses.replace(row.function, function=run)))


def test_training_takes_the_gradient_of_every_tensor():
    what, row = registry.OPERATIONS["aft-causal-training"], ROWS["aft-causal-training", "aft-conv"]
    outputs = what.bind(row.function, inputs_of(row)).run()
    sizes = [tuple(tensor.shape) for tensor in outputs]
    assert sizes == [(1, 24, 16), (1, 24, 16), (1, 24, 2), (1, 24, 16), (2, variants.TAPS)]


def test_missing_gradient_is_refused():
    row = ROWS["aft-causal-training", "aft-simple-cumsum"]

    def detached(q, k, v, *, causal):
        return row.function.function(q.detach(), k, v, causal=causal)

    with pytest.raises(WrongResultError, match="its error of inf"):
        check(dataclasses.replace(row, function=dataclasses.replace(row.function, function=detached)))


@pytest.mark.parametrize(
    ("operation", "name"), [("aft-causal", "aft-full"), ("aft-causal", "direct"), ("step", "aft-conv")]
)
def test_values_of_another_width_than_keys_are_none_of_aft(operation, name):
    row = ROWS[operation, name]
    reason = row.unavailable(inputs_of(row, Shape(24, heads=2, channels=8, value_channels=4)))
    assert "--channels and --value-channels must be equal" in reason


def test_aft_pytorch_says_why_it_is_absent(monkeypatch):
    row = ROWS["aft-bidirectional", "aft-pytorch-full"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert row.unavailable(inputs_of(row)) == "aft-pytorch is not installed"


def test_aft_pytorch_learns_no_local_bias(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    row = ROWS["aft-bidirectional-training", "aft-pytorch-local"]
    assert "no gradient reaches it" in row.unavailable(inputs_of(row))


def test_peers_are_given_the_learned_tensors_of_the_mechanism_without_its_options():
    ours, peer = (ROWS["aft-bidirectional", name] for name in ("aft-local-64-free", "aft-pytorch-local"))
    assert ours.reference == peer.reference
    (given,) = inputs_of(ours)
    assert given.learned(ours.function.variant) is given.learned(peer.function.variant)
    assert ours.function.variant.options == {"window": 64}
    assert peer.function.variant.options == {}


def test_direct_formula_wants_memory_quadratic_in_length():
    direct = ROWS["aft-causal", "direct"]
    assert direct.needs_bytes(Shape(4096)) == 16 * direct.needs_bytes(Shape(1024)) > 2 * 4096**2 * 512 * 4
    assert aft.direct_bytes(SHAPE, training=True) > direct.needs_bytes(SHAPE)


def test_operations_are_counted_by_pairs():
    whole, past = Kind(causal=False, training=False), Kind(causal=True, training=True)
    shape = Shape(1024)
    assert variants.full_flops(shape, whole) == 4 * 1024**2 * 512
    assert variants.full_flops(shape, past) == 3 * 2 * 1024**2 * 512
    assert variants.factor_flops(shape, whole) == (4 * 512 + 2 * 128) * 1024**2
    assert variants.local_flops(shape, whole) == 1024 * 127 * 4 * 512
    assert variants.local_flops(shape, past) == 3 * 1024 * 64 * 4 * 512
    assert variants.conv_flops(shape, whole, per_channel=False) == 1024 * 31 * 2 * (512 + 8)


def test_learned_tensors_are_made_once_and_deterministic():
    row = ROWS["aft-causal", "aft-full"]
    (one,), (other,) = inputs_of(row), inputs_of(row)
    free, two = find_variant("aft_full"), find_variant("aft_full", "factors")
    assert one.learned(free)[0] is one.learned(free)[0]
    (bias,), (factors,) = one.learned(free), one.learned(two)
    again = (*other.learned(free), *other.learned(two)[0])
    for first, second in zip((bias, *factors), again, strict=True):
        assert torch.equal(first, second)
    assert bias.shape == (24, 24)
    assert [tuple(part.shape) for part in factors] == [(24, variants.FACTOR_CHANNELS)] * 2
    assert not torch.equal(*factors)
    assert bias.std() == pytest.approx(0.1, rel=0.1)
