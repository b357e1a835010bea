"""Image models' rows: timm's model with attention of ours in it, and a wrong one is refused."""

import dataclasses
import importlib.util

import pytest
import torch

import flowformer
from flowformer.bench import registry, runner, tables
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.registry import Contender, Shape
from flowformer.bench.rows import vision
from flowformer.bench.runner import Plan
from flowformer.core import backends as backend
from flowformer.core.backends import ENVIRONMENT_VARIABLE, list_backends
from flowformer.mechanisms import find_attention, list_attentions

timm = pytest.importorskip("timm")

registry.load()
BACKENDS = tuple(row.name for row in list_backends() if not row.by_request)
# With 8 channels for a head, noise of 6e-8 in what linear layers give moves the float64 scores around YOSO (7e-7) by up
# to 4 times as much as those around softmax: its weights are steep where a query is next to parallel to a key. With 16
# channels it moves both alike (2e-7).
SHAPE = Shape(48, batch=2, heads=2, channels=16, value_channels=16)
OPERATIONS = ("vision", "vision-training")
ROWS = [row for row in registry.contenders().values() if row.operation in OPERATIONS and not row.device]
EACH_ROW = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.operation}-{row.name}")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    monkeypatch.setattr(vision, "BLOCKS", 3)


def draw(shape=SHAPE):
    return vision.draw(shape, torch.float32, "length-first")


def check(row, shape=SHAPE):
    checker = Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout))
    return checker.check(registry.OPERATIONS[row.operation], row, shape)


def run(row, shape=SHAPE):
    return registry.OPERATIONS[row.operation].bind(row.function, draw(shape)).run()


def needs(row, shape=SHAPE):
    if reason := row.unavailable(draw(shape)):
        pytest.skip(reason)


def change_model(monkeypatch, change):
    """Have models built that are changed; the truth is built before that."""
    build = vision.build

    def changed(attention, shape):
        model = build(attention, shape)
        change(model)
        return model

    monkeypatch.setattr(vision, "build", changed)


def test_there_is_each_model():
    names = {operation: [row.name for row in ROWS if row.operation == operation] for operation in OPERATIONS}
    assert names["vision"] == names["vision-training"]
    ours = [row.function.attention for row in ROWS if row.operation == "vision" and row.ours]
    assert list(dict.fromkeys(ours)) == ["flow", *sorted(set(list_attentions()) - {"flow", "softmax"})]
    with_backends = ("flow", "linear", "mobile", "performer", "rfa", "cosformer", "aft-simple")
    for name in with_backends:
        assert [row for row in names["vision"] if row.startswith(name)] == [f"{name}-{one}" for one in BACKENDS]
    assert len(names["vision"]) == len(list_attentions()) + len(with_backends) * (len(BACKENDS) - 1)
    assert [row.name for row in ROWS if not row.ours] == ["softmax", "softmax"]


@EACH_ROW
def test_what_is_right_is_let_in_and_what_is_wrong_is_not(row, monkeypatch):
    needs(row)
    found = check(row)
    assert (found.note, found.length) == ("checked", 48)
    truth = row.reference(*draw())

    def change(model):
        attention = model.blocks[2].attn
        linear = attention.proj if hasattr(attention, "proj") else attention.attention.out_proj
        linear.weight.data.mul_(1.001)

    change_model(monkeypatch, change)
    wrong = Contender(**{**vars(row), "reference": lambda given: truth})
    with pytest.raises(WrongResultError, match=f"{row.name} is wrong in {row.operation}"):
        check(wrong)


@pytest.mark.parametrize("attention", [name for name in list_attentions() if name != "softmax"])
def test_the_truth_owes_nothing_to_the_operation(attention, monkeypatch):
    mechanism = find_attention(attention)
    start = attention.replace("_", "-")
    row = next(row for row in ROWS if f"{row.name}-".startswith(f"{start}-"))
    needs(row)

    def wrong(*given, **more):
        return 1.001 * mechanism.operation(*given, **more)

    monkeypatch.setattr(mechanism.module, "mechanism", dataclasses.replace(mechanism, operation=wrong))
    with pytest.raises(WrongResultError):
        check(row)


@pytest.mark.parametrize("name", ["softmax", "aft-conv"])
def test_a_wrong_gradient_is_refused(name, monkeypatch):
    row = registry.contenders()["vision-training", name]
    truth = row.reference(*draw())

    def change(model):
        # The same output, with a gradient that is one percent larger.
        model.blocks[1].attn.register_forward_hook(lambda _, given, out: out + 0.01 * (out - out.detach()))

    change_model(monkeypatch, change)
    with pytest.raises(WrongResultError):
        check(Contender(**{**vars(row), "reference": lambda given: truth}))


def test_the_filters_of_aft_conv_are_checked():
    model = vision.build("aft_conv", SHAPE)
    attention = model.blocks[0].attn.attention
    assert isinstance(attention, flowformer.AFTConv)
    assert (attention.num_heads, attention.kernel_size) == (32, (11, 11))
    assert attention.filters.std() > 0.03
    _, *gradients = run(registry.contenders()["vision-training", "aft-conv"])
    assert [tuple(one.shape) for one in gradients] == [
        (32, 768), (1000, 32), (128, 32), (32, 121), *[(32, 32)] * 4,
    ]  # fmt: skip


def test_six_heads_are_deit_small(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        model = vision.build(None, Shape(224, heads=6))
    small = timm.create_model("deit_small_patch16_224")
    shapes = [{name: tuple(one.shape) for name, one in each.named_parameters()} for each in (model, small)]
    assert shapes[0] == shapes[1]


def test_models_are_alike_but_for_their_attention():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    models = {
        attention: vision.build(attention, SHAPE) for attention in (None, "softmax", "flow", "mobile", "aft_conv")
    }
    assert torch.equal(torch.get_rng_state(), before)
    own = dict(models[None].named_parameters())
    for attention, model in models.items():
        shared = [name for name, _ in model.named_parameters() if name in own]
        assert len(shared) == len(own) - (0 if attention is None else 3 * 4) - 2 * (attention == "aft_conv")
        assert all(torch.equal(model.get_parameter(name), own[name]) for name in shared)
    for attention in ("softmax", "flow", "mobile"):
        block = models[attention].blocks[1].attn.attention
        joined = torch.cat([block.q_proj.weight, block.k_proj.weight, block.v_proj.weight])
        assert torch.equal(joined, own["blocks.1.attn.qkv.weight"])
        assert joined.std() > 0.15  # attention is no mean
    assert models["flow"].blocks[0].attn.attention.preset == "vision"


@EACH_ROW
def test_every_call_is_the_same(row):
    needs(row)
    call = registry.OPERATIONS[row.operation].bind(row.function, draw())
    for one, other in zip(call.run(), call.run(), strict=True):
        assert torch.equal(one, other)
    first = call.run()[0]
    assert first.shape == ((2, 1000) if row.operation == "vision" else (1,))


@pytest.mark.parametrize("row", [row for row in ROWS if row.name.endswith(BACKENDS)], ids=lambda row: row.name)
def test_the_backend_of_the_name_runs(row, monkeypatch):
    needs(row)
    call = registry.OPERATIONS[row.operation].bind(row.function, draw())
    choices, decide = [], backend._decide
    monkeypatch.setattr(backend, "_decide", lambda *given: (choices.append(decide(*given)), choices[-1])[1])
    call.run()
    assert len(choices) >= 3
    assert {name for name, _ in choices} == {row.name.rpartition("-")[2]}


def test_what_cannot_run_says_why(monkeypatch):
    flow = registry.contenders()["vision", "flow-torch"]
    for row in ROWS:
        assert "must be equal" in row.unavailable(draw(Shape(48, heads=2, channels=8, value_channels=4)))
        assert "no whole number of patches of 16" in row.unavailable(draw(Shape(50, heads=2)))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nothing")
    assert flow.unavailable(draw()) is None  # the name says which
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find_spec(name))
    assert "pip install 'flowformer[vision]'" in flow.unavailable(draw())


def test_the_table_compares_with_softmax(small):
    records = []
    plan = Plan(
        operations=("vision",), lengths=(32, 64), contenders=("softmax", "mobile-torch"), limits=False, repeats=1,
        batch=2, **small,
    )  # fmt: skip
    runner.run(plan, records.append)
    points = [record for record in records if record["record"] == "point"]
    assert [point["ratio_to"] for point in points] == ["softmax"] * 4
    assert points[0]["tokens_per_s"] == pytest.approx(2e3 / points[0]["min_ms"])  # two images
    assert {"ratio", "doubling", "images/s"} <= {column.header for column in tables.point_tables(records)[0].columns}
