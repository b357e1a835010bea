"""AFT's rows: each is checked, gradients of learned inputs too, and what cannot run says why."""

import importlib.util

import pytest
import torch

from flowformer.bench import aft, aft_peers, registry
from flowformer.bench.aft import Form, Given
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.operations import Token
from flowformer.bench.registry import Shape

registry.load()
SHAPE = Shape(24, heads=2, channels=8, value_channels=8)
ROWS = [
    row
    for (operation, name), row in registry.CONTENDERS.items()
    if (operation in aft.OPERATIONS or "aft" in name or name == "mobile")
    and row.reference
    and not operation.startswith("language")
]


def inputs_of(row, shape=SHAPE):
    return registry.OPERATIONS[row.operation].inputs(shape, row.dtype, row.layout)


def check(row, shape=SHAPE):
    checker = Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout))
    return checker.check(registry.OPERATIONS[row.operation], row, shape)


def changed(function, change):
    """A row's function with outputs, or a tensor it starts from, changed."""

    def run(given, *others, **options):
        if isinstance(given, Given):
            compute, tensors = function(given)
            return lambda *taken, causal: change(compute(*taken, causal=causal)), tensors
        if isinstance(given, Token):
            take, state_bytes = function(given)
            return lambda q, k, v: change(take(q, k, v)), state_bytes
        return change(function(given, *others, **options))

    return run


def spoil(out):
    factor = torch.ones_like(out)
    factor[..., -1, :] = 1.001  # one row of all, by little
    return out * factor


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.operation}-{row.name}")
def test_what_is_right_is_let_in_and_what_is_wrong_is_not(row):
    if row.unavailable(inputs_of(row)):
        pytest.skip(row.unavailable(inputs_of(row)))
    assert check(row).error <= registry.OPERATIONS[row.operation].tolerances[torch.float32]
    fields = {**vars(row), "function": changed(row.function, spoil)}
    with pytest.raises(WrongResultError, match=f"{row.name} is wrong in {row.operation}"):
        check(registry.Contender(**fields))


@pytest.mark.parametrize("name", ["aft-full", "aft-full-factors", "aft-local-64", "aft-local-64-free", "aft-conv"])
def test_wrong_gradient_of_what_is_learned_is_refused(name):
    row = registry.CONTENDERS["aft-causal-training", name]

    def run(*tensors, causal):
        *others, last = tensors
        last = last + 0.01 * (last - last.detach())  # the same number, with a gradient that is one percent larger
        return row.function.function(*others, last, causal=causal)

    fields = {**vars(row), "function": Form(run, row.function.take)}
    with pytest.raises(WrongResultError):
        check(registry.Contender(**fields))


def test_learned_inputs_are_made_once_and_deterministic():
    one, other = Given(SHAPE, torch.float32), Given(SHAPE, torch.float32)
    assert one.bias is one.bias
    for first, second in zip((one.bias, *one.factors), (other.bias, *other.factors), strict=True):
        assert torch.equal(first, second)
    assert one.bias.shape == (24, 24)
    assert [tuple(part.shape) for part in one.factors] == [(24, aft.FACTOR_CHANNELS)] * 2
    assert one.bias.std() == pytest.approx(aft.STD, rel=0.1)


def test_training_takes_the_gradient_of_every_tensor():
    what, row = registry.OPERATIONS["aft-causal-training"], registry.CONTENDERS["aft-causal-training", "aft-conv"]
    outputs = what.bind(row.function, inputs_of(row)).run()
    sizes = [tuple(tensor.shape) for tensor in outputs]
    assert sizes == [(1, 24, 16), (1, 24, 16), (1, 24, 2), (1, 24, 16), (2, aft.TAPS)]


@pytest.mark.parametrize(
    ("operation", "name"), [("aft-causal", "aft-full"), ("aft-causal", "direct"), ("step", "aft-conv")]
)
def test_values_of_another_width_than_keys_are_none_of_aft(operation, name):
    row = registry.CONTENDERS[operation, name]
    reason = row.unavailable(inputs_of(row, Shape(24, heads=2, channels=8, value_channels=4)))
    assert "--channels and --value-channels must be equal" in reason


def test_aft_pytorch_says_why_it_is_absent(monkeypatch):
    row = registry.CONTENDERS["aft-bidirectional", "aft-pytorch-full"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert row.unavailable(inputs_of(row)) == "aft-pytorch is not installed"


def test_aft_pytorch_learns_no_local_bias(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    row = registry.CONTENDERS["aft-bidirectional-training", "aft-pytorch-local"]
    assert "no gradient reaches it" in row.unavailable(inputs_of(row))


def test_direct_formula_wants_memory_quadratic_in_length():
    direct = registry.CONTENDERS["aft-causal", "direct"]
    assert direct.needs_bytes(Shape(4096)) == 16 * direct.needs_bytes(Shape(1024)) > 2 * 4096**2 * 512 * 4
    assert aft_peers._direct_bytes(SHAPE, training=True) > direct.needs_bytes(SHAPE)


def test_operations_are_counted_by_pairs():
    whole, past = aft.Kind(causal=False, training=False), aft.Kind(causal=True, training=True)
    shape = Shape(1024)
    assert aft.full_flops(shape, whole) == 4 * 1024**2 * 512
    assert aft.full_flops(shape, past) == 3 * 2 * 1024**2 * 512
    assert aft.factor_flops(shape, whole) == (4 * 512 + 2 * 128) * 1024**2
    assert aft.local_flops(shape, whole) == 1024 * 127 * 4 * 512
    assert aft.local_flops(shape, past) == 3 * 1024 * 64 * 4 * 512
    assert aft.conv_flops(shape, whole, of_channels=False) == 1024 * 31 * 2 * (512 + 8)
