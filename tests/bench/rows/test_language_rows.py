"""Language models' rows: what is timed is the model of this library, and a wrong one is refused."""

import dataclasses
import os

import pytest
import torch

from flowformer.bench import registry, runner, tables
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.registry import Contender, Shape
from flowformer.bench.rows import language, models
from flowformer.bench.runner import Plan
from flowformer.core import backends as backend
from flowformer.core.backends import ENVIRONMENT_VARIABLE, list_backends
from flowformer.mechanisms import find_attention, list_attentions

registry.load()
BACKENDS = tuple(row.name for row in list_backends() if not row.by_request)
SHAPE = Shape(24, heads=2, channels=8, value_channels=8)
OPERATIONS = ("language-training", "language-step")
ROWS = [row for row in registry.contenders().values() if row.operation in OPERATIONS and not row.device]
MODELS = [name for name in list_attentions() if find_attention(name).can("state")]
STEPS = [row for row in ROWS if row.operation == "language-step"]


def text(shape=SHAPE):
    return language.text(shape, torch.float32, "length-first")


def check(row, shape=SHAPE):
    checker = Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout))
    return checker.check(registry.OPERATIONS[row.operation], row, shape)


def run(row, shape=SHAPE):
    return registry.OPERATIONS[row.operation].bind(row.function, text(shape)).run()


def change_attention(monkeypatch, change):
    """Have models built whose second attention is changed; the truth is built before that."""
    build = language.build

    def changed(attention, shape):
        model = build(attention, shape)
        change(model.decoder.layers[1].attention)
        return model

    monkeypatch.setattr(language, "build", changed)


def names_of(row, function):
    """Names of a mechanism's contenders: one for each backend, where there are several to choose from."""
    name, own = row.name.replace("_", "-"), [row.name for row in backend.backends_of(function.__name__)]
    own = [backend for backend in own if backend in BACKENDS]
    return [f"{name}-{backend}" for backend in own] if len(own) > 1 else [name]


def test_there_is_each_model_with_each_backend():
    names = {operation: [row.name for row in ROWS if row.operation == operation] for operation in OPERATIONS}
    found = [find_attention(name) for name in ["flow", *sorted(set(MODELS) - {"flow"})]]
    assert names["language-training"] == [name for row in found for name in names_of(row, row.operation)]
    assert names["language-step"] == [*(name for row in found for name in names_of(row, row.step)), "sdpa"]
    assert {"flow-native", "flow-torch", "aft-simple-native", "softmax"} <= set(names["language-training"])
    assert {"flow-native", "flow-torch", "aft-simple", "softmax"} <= set(names["language-step"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.operation}-{row.name}")
def test_what_is_right_is_let_in_and_what_is_wrong_is_not(row, monkeypatch):
    if row.unavailable(text()):
        pytest.skip(row.unavailable(text()))
    found = check(row)
    assert (found.note, found.length) == ("checked", 24)
    truth = row.reference(*text())
    change_attention(monkeypatch, lambda attention: attention.v_proj.weight.data.mul_(1.001))
    wrong = Contender(**{**vars(row), "reference": lambda given: truth})
    with pytest.raises(WrongResultError, match=f"{row.name} is wrong in {row.operation}"):
        check(wrong)


@pytest.mark.parametrize("attention", MODELS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_truth_owes_nothing_to_the_operation(operation, attention, monkeypatch):
    mechanism = find_attention(attention)
    row = next(row for row in ROWS if row.operation == operation and row.function.attention == attention)
    if row.unavailable(text()):
        pytest.skip(row.unavailable(text()))

    def wrong(*given, **more):
        return 1.001 * mechanism.operation(*given, **more)

    def wrong_step(*given, **more):
        out, state = mechanism.step(*given, **more)
        return 1.001 * out, state

    wrong.__name__ = mechanism.operation.__name__
    functions = {"operation": wrong} if operation == "language-training" else {"step": wrong_step}
    monkeypatch.setattr(mechanism.module, "mechanism", dataclasses.replace(mechanism, **functions))
    with pytest.raises(WrongResultError):
        check(row)


def test_wrong_gradient_is_refused(monkeypatch):
    row = registry.contenders()["language-training", "linear-torch"]
    truth = row.reference(*text())

    def change(attention):
        attend = attention.mechanism.operation
        # The same keys, with a gradient that is one percent larger.
        models.substitute(
            attention, operation=lambda q, k, v, **more: attend(q, k + 0.01 * (k - k.detach()), v, **more)
        )

    change_attention(monkeypatch, change)
    with pytest.raises(WrongResultError):
        check(Contender(**{**vars(row), "reference": lambda given: truth}))


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row.name)
def test_a_state_that_lacks_a_token_is_refused(row, monkeypatch):
    if row.unavailable(text()):
        pytest.skip(row.unavailable(text()))
    prefill = language.prefill
    monkeypatch.setattr(
        language, "prefill", lambda model, given: prefill(model, given._replace(tokens=given.tokens[:, 1:]))
    )
    with pytest.raises(WrongResultError):
        check(row)


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row.name)
def test_every_call_takes_the_same_step(row):
    if row.unavailable(text()):
        pytest.skip(row.unavailable(text()))
    call = registry.OPERATIONS[row.operation].bind(row.function, text())
    (one,), (other,) = call.run(), call.run()
    assert torch.equal(one, other)
    assert one.shape == (1, language.VOCABULARY)


def test_training_gives_the_loss_and_checked_gradients():
    loss, *gradients = run(registry.contenders()["language-training", "linear-torch"])
    assert loss.shape == (1,)
    assert 4 < loss.item() < 8  # log 256 is 5.5
    assert [tuple(gradient.shape) for gradient in gradients] == [(256, 16), (256, 16), *[(16, 16)] * 3, (64, 16)]


def test_models_are_alike_but_for_their_attention():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    built = {attention: language.build(attention, SHAPE) for attention in MODELS}
    assert torch.equal(torch.get_rng_state(), before)
    own = dict(built["softmax"].named_parameters())
    for attention, model in built.items():
        assert len(model.decoder.layers) == 6
        assert (model.dim, model.vocab_size, model.scale) == (16, 256, 4)
        mine = dict(model.named_parameters())
        shared = {name for name in mine if name in own and own[name].shape == mine[name].shape}
        assert all(torch.equal(own[name], mine[name]) for name in shared), attention
        # Position biases, filters, narrow keys, gates and such; and where queries are the keys, no projection of them.
        assert all(".attention." in name for name in {*own, *mine} - shared), attention
        assert all(f"decoder.blocks.{layer}.attention.v_proj.weight" in shared for layer in range(6)), attention
    assert all(
        block.attention.filters.std() > 0.03 for block in built["aft_conv"].decoder.layers
    )  # as images have them
    assert len({type(model.decoder.layers[0].attention) for model in built.values()}) == len(built)


@pytest.mark.parametrize("before", [None, "torch"])
def test_backends_are_chosen_for_a_call_only(before, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    if before:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, before)
    with models.chosen("native"):
        assert os.environ[ENVIRONMENT_VARIABLE] == "native"
    assert os.environ.get(ENVIRONMENT_VARIABLE) == before
    with models.chosen(None):
        assert os.environ.get(ENVIRONMENT_VARIABLE) == before
    with pytest.raises(KeyError), models.chosen("native"):
        raise KeyError
    assert os.environ.get(ENVIRONMENT_VARIABLE) == before


@pytest.mark.parametrize("row", [row for row in ROWS if row.name.endswith(BACKENDS)], ids=lambda row: row.name)
def test_the_backend_of_the_name_runs(row, monkeypatch):
    if row.unavailable(text()):
        pytest.skip(row.unavailable(text()))
    call = registry.OPERATIONS[row.operation].bind(row.function, text())
    choices, decide = [], backend._decide
    monkeypatch.setattr(backend, "_decide", lambda *given: (choices.append(decide(*given)), choices[-1])[1])
    call.run()
    assert len(choices) >= language.LAYERS
    assert {name for name, _ in choices} == {row.name.rpartition("-")[2]}


def test_what_cannot_run_says_why(monkeypatch):
    for row in ROWS:
        reason = row.unavailable(text(Shape(24, heads=2, channels=8, value_channels=4)))
        assert "--channels and --value-channels must be equal" in reason
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    reason = registry.contenders()["language-step", "softmax"].unavailable(text())
    assert "softmax_attention has no native kernels" in reason


def test_long_contexts_of_softmax_are_random_numbers(monkeypatch):
    monkeypatch.setattr(language, "CHECK_LENGTH", 8)
    monkeypatch.setattr(language, "prefill", None)  # nothing is read
    (given,) = text()
    assert language.state_after(language.build("softmax", SHAPE), "softmax", given).length.item() == 24
    calls = [take("softmax", given) for take in (language.step, language.in_place_step)]
    (copied,), (kept,) = (call.run() for call in calls)
    torch.testing.assert_close(copied, kept, rtol=1e-5, atol=1e-5)
    numbers = 4 * language.LAYERS * 2 * 2 * 8
    assert calls[1].state_bytes == 25 * numbers + 8
    assert calls[0].state_bytes == 24 * numbers + 8 + 24 * language.LAYERS
    row = registry.contenders()["language-step", "softmax"]
    assert row.needs_bytes(SHAPE) == pytest.approx(2.1 * 24 * numbers)


def test_keys_and_values_are_kept_in_place():
    past = torch.randn(2, 5, 3, 4)
    room = language._make_room(past)
    assert room.is_contiguous()
    assert torch.equal(room[:, :, :5], past.transpose(1, 2))
    new = torch.randn(2, 3, 4)
    out, rooms = language._attend_in_place(new, new, 2 * new, (room, language._make_room(past)))
    assert rooms[0] is room
    assert torch.equal(room[:, :, -1], new)
    assert torch.equal(rooms[1][:, :, -1], 2 * new)
    assert out.shape == (2, 3, 4)


def test_a_context_is_read_once_for_all_backends(monkeypatch):
    calls, prefill = [], language.prefill
    monkeypatch.setattr(language, "prefill", lambda *given: (calls.append(1), prefill(*given))[1])
    (given,) = text()
    for name in BACKENDS:
        models.OfModel(language.step, "flow", name)(given)
    assert len(calls) == 1


def test_contexts_are_read_in_pieces(monkeypatch):
    model = language.build("flow", SHAPE)
    (whole,) = text()
    one = language.prefill(model, whole)
    monkeypatch.setattr(language, "PIECE", 7)
    other = language.prefill(model, whole)
    assert one.length.item() == other.length.item() == 24
    for left, right in zip(one.layers, other.layers, strict=True):
        for part, same in zip(left, right, strict=True):
            torch.testing.assert_close(part, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("operation", "tokens"), [("language-training", 24), ("language-step", 1)])
def test_the_table_has_tokens_per_second(operation, tokens, small):
    records = []
    plan = Plan(operations=(operation,), lengths=(24,), contenders=("linear-torch",), limits=False, **small)
    runner.run(plan, records.append)
    (point,) = (record for record in records if record["record"] == "point")
    assert point["tokens_per_s"] == pytest.approx(1e3 * tokens / point["min_ms"])
    assert "tokens/s" in [column.header for column in tables.point_tables(records)[0].columns]


def test_other_tables_have_none(small):
    records = []
    runner.run(Plan(operations=("causal",), lengths=(8,), contenders=("linear-torch",), **small), records.append)
    assert "tokens/s" not in [column.header for column in tables.point_tables(records)[0].columns]
