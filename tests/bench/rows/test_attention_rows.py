"""Every registered mechanism is timed, and checked before that; one that is added is too, without a line here."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from flowformer.bench import registry, runner
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.registry import Shape
from flowformer.bench.rows.attention import FAMILIES, bind
from flowformer.bench.rows.forms import Form, Sequences, has_heads
from flowformer.bench.rows.variants import Kind, Variant, linear_flops, variants_of
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


def test_all_that_operations_take_is_moved_to_a_device():
    for row in map(find_attention, list_attentions()):
        for variant in variants_of(row):
            given = Sequences(SHAPE, torch.float32)
            here, there = (tree_leaves(one.learned(variant)) for one in (given, given.to("meta")))
            assert [leaf is None for leaf in here] == [leaf is None for leaf in there]
            assert all(
                leaf.is_meta and leaf.dtype == own.dtype
                for own, leaf in zip(here, there, strict=True)
                if own is not None
            )


def test_integers_are_given_as_they_are_and_have_no_gradients():
    def attend(q, k, v, filters, draws, absent, *, causal):
        assert draws.dtype == torch.int32
        assert absent is None
        return v * filters.sum() + draws.sum()

    variant = Variant(learned=lambda draw, length, heads: (draw(heads), draw(heads).int(), None))
    call = bind(
        Form(attend, variant=variant), (Sequences(SHAPE, torch.float32),), causal=False, training=True, double=True
    )
    out, *gradients = call.run()
    assert out.dtype == torch.float64
    assert [one.shape for one in gradients] == [out.shape, (SHAPE.heads,)]  # of v and the filters


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
    assert found == wanted | {"sequence-training", "vision", "vision-training"}


def test_every_contender_is_in_the_documentation():
    page = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9-]+)`", page))
    assert {name.removesuffix("-ours") for _, name in registry.contenders()} - named == set()


def test_what_is_for_a_gpu_is_not_on_the_cpu_unless_it_is_named():
    named = {(operation, name): row.device for (operation, name), row in registry.contenders().items() if row.device}
    assert set(named.values()) == {"cuda"}
    found = {operation: {name for at, name in named if at == operation} for operation in registry.OPERATIONS}
    triton = {"flow-triton", "flow-decay-triton", "linear-triton", "linear-decay-triton", "mobile-triton"}
    of_features = {"performer-triton", "rfa-triton", "cosformer-triton"}
    for form in ("causal", "causal-training"):
        assert found[form] == {*triton, *of_features, "sdpa-flash", "fla-linear"}
        assert found[f"aft-{form}"] == {"aft-simple-triton"}
    for form in ("bidirectional", "bidirectional-training"):
        assert found[form] == {*triton, *of_features, "sdpa-flash"}
        assert found[f"aft-{form}"] == {"aft-simple-triton"}
    assert found["step"] == {*triton, "aft-simple-triton"}
    for form in ("language-training", "vision", "vision-training"):
        assert found[form] == {"flow-triton", "linear-triton", "mobile-triton", "aft-simple-triton", *of_features}
    assert found["language-step"] == {"flow-triton", "linear-triton", "mobile-triton", "aft-simple-triton"}
    for device, there in (("cpu", False), ("cuda", True)):
        ((_, rows),) = Plan(operations=("causal",), device=device).rows()
        assert ("flow-triton" in [row.name for row in rows]) == there
    ((_, rows),) = Plan(operations=("causal",), contenders=("flow-triton",)).rows()
    assert [row.name for row in rows] == ["flow-triton"]


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
        "bidirectional", "bidirectional-training", "sequence-training", "vision", "vision-training",
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
    ours = [name for (at, name), row in found.items() if at == "causal-training" and not row.device]
    linear = [name for name in ours if name.startswith("linear")]
    quick = ["quick", "quick-bf16", "native", "torch"]
    assert linear == [*(f"linear-{name}" for name in quick), *(f"linear-decay-{name}" for name in quick)]
    assert ("step", "flow-quick") in found
    assert "not today" in found["causal", "linear-quick"].unavailable(inputs_of(found["causal", "linear-quick"]))


def test_two_contenders_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "ADDED", dict(registry.ADDED))
    registry.add_contender(registry.Contender("softmax", "causal", partial(print), None, "another"))
    with pytest.raises(ValueError, match="two contenders of 'causal' are called 'softmax'"):
        registry.contenders()


def test_matrices_of_scores_are_left_out_where_they_do_not_fit():
    rows = [row for row in registry.contenders().values() if row.operation == "bidirectional"]
    needs = {row.name: row.needs_bytes(Shape(16_384)) for row in rows if row.ours}
    assert {name for name, many in needs.items() if many} == {"synthesizer"}
    assert needs["synthesizer"] > 2e10
