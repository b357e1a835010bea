"""Every registered mechanism is timed, and checked before that; one that is added is too, without a line here."""

import dataclasses
from functools import partial

import pytest
import torch

from flowformer.bench import registry, runner
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.registry import Shape
from flowformer.bench.rows.attention import FAMILIES
from flowformer.bench.rows.forms import Form, has_heads
from flowformer.bench.rows.variants import Kind, linear_flops
from flowformer.bench.runner import Plan
from flowformer.core import backends
from flowformer.core.backends import Backend
from flowformer.mechanisms import Attention, find_attention, list_attentions
from flowformer.mechanisms.registry import register, unregister
from flowformer.mechanisms.weights import truth_of

registry.load()
SHAPE = Shape(24, heads=2, channels=8, value_channels=8)
OPERATIONS = [name for family in FAMILIES for name, _ in family.operations()]
CHECKED = [
    row for row in registry.contenders().values() if row.operation in (*OPERATIONS, "step") and row.reference
]  # fmt: skip


def inputs_of(row, shape=SHAPE):
    return registry.OPERATIONS[row.operation].inputs(shape, row.dtype, row.layout)


def check(row, shape=SHAPE):
    checker = Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout))
    return checker.check(registry.OPERATIONS[row.operation], row, shape)


def spoil(out):
    factor = torch.ones_like(out)
    factor[..., -1, :] = 1.001 if out.dtype == torch.float32 else 1.2  # one row of all, by little
    return out * factor


def changed(row):
    """The row's function with its outputs changed."""
    if row.operation == "step":

        def prepare(given):
            take, state_bytes = row.function(given)
            return lambda q, k, v: spoil(take(q, k, v)), state_bytes

        return prepare
    form = row.function if isinstance(row.function, Form) else None

    def run(*tensors, **options):
        return spoil((form.function if form else row.function)(*tensors, **options))

    return dataclasses.replace(form, function=run) if form else run


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: f"{row.operation}-{row.name}")
def test_right_results_pass_and_wrong_ones_do_not(row):
    if row.unavailable(inputs_of(row)):
        pytest.skip(row.unavailable(inputs_of(row)))
    assert check(row).error <= registry.OPERATIONS[row.operation].tolerances[row.dtype]
    with pytest.raises(WrongResultError, match=f"{row.name} is wrong in {row.operation}"):
        check(dataclasses.replace(row, function=changed(row)))


@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_is_timed_in_all_that_it_can_do(name):
    row, start = find_attention(name), name.replace("_", "-")
    found = {operation for operation, contender in registry.contenders() if f"{contender}-".startswith(f"{start}-")}
    prefix = "" if has_heads(row.layout) else "aft-"
    wanted = {f"{prefix}bidirectional", f"{prefix}bidirectional-training"}
    if row.can("causal"):
        wanted |= {f"{prefix}causal", f"{prefix}causal-training"}
    if row.can("state"):
        wanted |= {"step", "language-training", "language-step"}
    assert found == wanted | {"vision", "vision-training"}


def test_names_in_the_documentation():
    names = {operation: [] for operation in OPERATIONS}
    for operation, name in registry.contenders():
        names.setdefault(operation, []).append(name)
    flow, first = ["flow-native", "flow-native-bf16", "flow-torch"], "-native-heads-first"
    decay = [name.replace("flow", "flow-decay") for name in flow]
    peers = ["sdpa", "sdpa-bf16", "published", "performer"]
    linear, softmax = ["linear", "linear-decay"], ["softmax", "softmax-decay", "synthesizer", "yoso"]
    sorting = ["reformer", "sinkhorn"]
    others = [*linear, "mobile", *sorting, *softmax, *peers]
    both = [*linear, "linformer", "mobile", "nystromformer", *sorting, "soft", *softmax, *peers]
    assert names["bidirectional"] == names["bidirectional-training"] == [*flow, *decay, *both]
    assert names["causal-training"] == [*flow, *decay, *others]
    of_flow = [*flow[:2], f"flow{first}", flow[2], *decay[:2], f"flow-decay{first}", decay[2]]
    assert names["causal"] == [*of_flow, *others]
    ours = [
        "aft-full", "aft-full-factors", "aft-conv", "aft-conv-channels", "aft-local-64", "aft-local-64-free",
        "aft-simple-native", "aft-simple-torch",
    ]  # fmt: skip
    assert names["aft-causal"] == [*ours, "aft-simple-cumsum", "cumulative-sums", "direct"]
    assert names["aft-bidirectional"] == [
        *ours,
        *(f"aft-pytorch-{form}" for form in ("full", "local", "simple")),
        "direct",
    ]
    assert names["step"] == [
        "flow-native", "flow-torch", "flow-decay-native", "flow-decay-torch", "aft-conv", "aft-conv-channels",
        "aft-full-factors", "aft-local-64", "aft-simple", "linear", "linear-decay", "mobile", "reformer",
        "sinkhorn", "softmax", "softmax-decay", "synthesizer", "yoso", "sdpa",
    ]  # fmt: skip


def test_first_contender_is_the_one_that_ratios_are_to():
    first = {}
    for operation, name in registry.contenders():
        first.setdefault(operation, name)
    assert {first[name] for name in ("causal", "bidirectional-training", "step")} == {"flow-native"}
    assert first["aft-causal"] == first["aft-bidirectional-training"] == "aft-full"


def test_mean_forms_count_matrix_products():
    shape = Shape(64, heads=2, channels=8, value_channels=8)
    assert linear_flops(shape, Kind(causal=True, training=False)) == 64 * 2 * 2 * (2 * 8 * 8 + 16 * (8 + 8))
    assert linear_flops(shape, Kind(causal=False, training=True)) == 3 * 64 * 2 * 4 * 8 * 8


# ------------------------------------------------------------------------------------------------------- what is added


def mean_attention(q, k, v, *, causal=False, backend="torch", **masks):
    if causal:
        raise ValueError("no causal form")
    return v.mean(1, keepdim=True).expand_as(v).contiguous()


def mean_weights(q, k, *, causal=False):
    return lambda places: q.new_full((q.shape[1], len(places), len(k)), 1 / len(k))


@pytest.fixture
def mean():
    class MeanAttention(Attention):
        pass

    register(
        "test_mean", operation=mean_attention, truth=truth_of(mean_weights), source="here", cost="L V",
        cannot={"causal": "a mean knows no order"},
    )(MeanAttention)  # fmt: skip
    yield
    unregister("test_mean")


def test_mechanism_that_is_added_is_timed(mean, small):
    records = []
    plan = Plan(operations=("bidirectional",), lengths=(16,), contenders=("test-mean",), limits=False, **small)
    runner.run(plan, records.append)
    (point,) = (record for record in records if record["record"] == "point")
    assert point["status"] == "timed", point
    assert point["ours"]
    assert {operation for operation, name in registry.contenders() if name == "test-mean"} == {
        "bidirectional", "bidirectional-training", "vision", "vision-training",
    }  # fmt: skip


def test_removed_mechanism_is_not_timed():
    assert not [name for _, name in registry.contenders() if name == "test-mean"]


def test_backend_that_is_added_is_timed(monkeypatch):
    row = Backend("quick", "for tests", (torch.float32,), lambda device, dtype: "not today", lambda: "here", rank=1)
    rows = (row, *backends.list_backends())
    monkeypatch.setattr(backends, "list_backends", lambda: rows)
    for op in ("linear_attention", "flow_attention_step"):
        monkeypatch.setitem(backends._IMPLEMENTATIONS, op, {**backends._IMPLEMENTATIONS.get(op, {}), "quick": None})
    found = registry.contenders()
    linear = [name for operation, name in found if operation == "causal-training" and name.startswith("linear")]
    quick = ["quick", "quick-bf16", "torch"]
    assert linear == [*(f"linear-{name}" for name in quick), *(f"linear-decay-{name}" for name in quick)]
    assert ("step", "flow-quick") in found
    assert "not today" in found["causal", "linear-quick"].unavailable(inputs_of(found["causal", "linear-quick"]))


def test_two_contenders_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "ADDED", dict(registry.ADDED))
    registry.add_contender(registry.Contender("linear", "causal", partial(print), None, "another"))
    with pytest.raises(ValueError, match="two contenders of 'causal' are called 'linear'"):
        registry.contenders()
