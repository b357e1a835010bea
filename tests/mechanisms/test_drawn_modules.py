"""Modules that own random tensors: whose they are, and when they change."""

from __future__ import annotations

import copy

import pytest
import torch

from flowformer import create_model
from flowformer.mechanisms.draws import DrawnAttention
from flowformer.mechanisms.linear.operation import linear_attention, linear_weights
from flowformer.mechanisms.registry import register, unregister
from flowformer.mechanisms.weights import truth_of


@pytest.fixture(scope="module")
def drawn():
    """A mechanism with a random matrix and random integers, which it does not use."""

    @register("drawn", operation=linear_attention, truth=truth_of(linear_weights), source="this test", cost="L K V")
    class Drawn(DrawnAttention):
        def __init__(self, dim, num_heads, *, features=6, **options):
            super().__init__(dim, num_heads, **options)
            self.features = features
            self.register_drawn()

        def draw(self, generator):
            rows = torch.randn(self.features, self.head_dim, generator=generator)
            return {"projection": rows, "order": torch.randperm(self.features, generator=generator)}

    yield Drawn
    unregister("drawn")


def same(one, other):
    return torch.equal(one.projection, other.projection) and torch.equal(one.order, other.order)


def test_same_seed_gives_the_same_numbers(drawn):
    one = drawn(8, 2, seed=3)
    torch.rand(1)
    assert same(one, drawn(8, 2, seed=3))
    assert not same(one, drawn(8, 2, seed=4))


def test_same_numbers_on_every_device_and_in_every_dtype(drawn):
    one = drawn(8, 2, seed=3)
    other = drawn(8, 2, seed=3, dtype=torch.float64)
    assert other.projection.dtype == torch.float64
    assert torch.equal(other.projection.float(), one.projection)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(drawn(8, 2, seed=3).projection, one.projection.bfloat16())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        empty = drawn(8, 2, seed=3)
    assert empty.projection.is_meta
    assert empty.order.is_meta
    filled = empty.to_empty(device="cpu")
    filled.reset_parameters()
    assert same(filled, one)


def test_absent_seed_comes_from_the_global_generator(drawn):
    def build(seed):
        torch.manual_seed(seed)
        return drawn(8, 2), drawn(8, 2)

    (one, two), (again, _), (other, _) = build(0), build(0), build(1)
    assert same(one, again)
    assert not same(one, two)
    assert not same(one, other)
    state = torch.get_rng_state()
    with torch.device("meta"):
        empty = drawn(8, 2)
    assert torch.equal(torch.get_rng_state(), state)  # there is nothing to draw yet
    torch.manual_seed(0)
    empty.to_empty(device="cpu").reset_parameters()
    assert same(empty, one)


def test_state_dict_has_the_numbers(drawn):
    one, other = drawn(8, 2, seed=3), drawn(8, 2, seed=4)
    assert {"projection", "order"} <= set(one.state_dict())
    other.load_state_dict(one.state_dict())
    assert same(one, other)


def test_numbers_are_not_parameters(drawn):
    assert not {"projection", "order"} & {name for name, _ in drawn(8, 2).named_parameters()}


def test_redraw_is_in_place(drawn):
    module, other = drawn(8, 2, seed=3), drawn(8, 2, seed=4)
    before, storage = module.projection.clone(), module.projection.data_ptr()
    module.redraw(4)
    assert same(module, other)
    assert module.seed == 4
    assert module.projection.data_ptr() == storage
    module.redraw()
    assert not same(module, other)
    module.redraw(3)
    assert torch.equal(module.projection, before)


def test_nothing_else_redraws(drawn):
    module = drawn(8, 2, seed=3)
    x = torch.randn(2, 5, 8)
    for training in (True, False):
        module.train(training)(x)
        assert same(module, drawn(8, 2, seed=3))
    module.reset_parameters()
    assert same(module, drawn(8, 2, seed=3))


def test_reset_draws_as_the_constructor_does(drawn):
    torch.manual_seed(0)
    fresh = drawn(8, 2)
    module, given = drawn(8, 2), drawn(8, 2, seed=3)
    torch.manual_seed(0)
    module.reset_parameters()
    assert same(module, fresh)
    given.redraw(4)
    given.reset_parameters()
    assert same(given, drawn(8, 2, seed=3))


def test_other_dtype_and_device(drawn):
    module = drawn(8, 2, seed=3)
    rounded = copy.deepcopy(module).to(torch.bfloat16)
    assert rounded.projection.dtype == torch.bfloat16
    assert rounded.order.dtype == torch.int64
    assert torch.equal(rounded.projection, module.projection.bfloat16())
    rounded.redraw(4)
    assert torch.equal(rounded.projection, drawn(8, 2, seed=4).projection.bfloat16())
    empty = copy.deepcopy(module).to("meta")
    assert empty.projection.is_meta
    empty.redraw(4)
    assert empty.projection.is_meta


def test_copy_has_its_own_numbers(drawn):
    module = drawn(8, 2, seed=3)
    other = copy.deepcopy(module)
    other.redraw(4)
    assert not same(module, other)
    assert same(module, drawn(8, 2, seed=3))


def test_layers_of_a_model_differ(drawn):
    def layers():
        torch.manual_seed(0)
        sizes = {"dim": 8, "num_heads": 2, "num_layers": 3, "ffn_dim": 8}
        model = create_model(
            "flowformer_timeseries", in_chans=3, num_classes=2, max_length=5, attention="drawn", **sizes
        )
        return [module for module in model.modules() if isinstance(module, drawn)]

    first, second, third = layers()
    assert not same(first, second)
    assert not same(second, third)
    assert all(same(one, again) for one, again in zip((first, second, third), layers(), strict=True))


@pytest.mark.parametrize(
    ("seed", "error", "says"),
    [
        (-1, ValueError, "seed must be from 0 to 9223372036854775807, got -1"),
        (2**63, ValueError, "seed must be from 0"),
        (1.5, TypeError, "seed must be a whole number, got 1.5"),
        (True, TypeError, "seed must be a whole number, got True"),
    ],
)
def test_bad_seed_is_refused(seed, error, says, drawn):
    with pytest.raises(error, match=says):
        drawn(8, 2, seed=seed)
    with pytest.raises(error, match=says):
        drawn(8, 2).redraw(seed)
