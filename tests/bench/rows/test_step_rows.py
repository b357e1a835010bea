"""One step of decoding: contexts repeat in pieces, long ones of quadratic mechanisms are random."""

import pytest
import torch

from flowformer.bench import registry
from flowformer.bench.registry import Shape
from flowformer.bench.rows import step
from flowformer.mechanisms import list_attentions

registry.load()
SHAPE = Shape(30, heads=2, channels=4, value_channels=4)


def token(shape=SHAPE):
    return step.token(shape, torch.float32, "length-first")


def test_long_contexts_repeat_in_pieces(monkeypatch):
    monkeypatch.setattr(step, "PERIOD", 8)
    (given,) = step.token(Shape(30, heads=1, channels=4, value_channels=3), torch.float32, "length-first")
    pieces = given.pieces(16)
    assert [piece[0].shape[1] for piece in pieces] == [16, 14]
    for tensor, *parts in zip(given.context, *pieces, strict=True):
        assert torch.equal(torch.cat(parts, 1), tensor[:, [place % 8 for place in range(30)]])
    assert given.q.shape == (1, 1, 4)
    assert not torch.equal(given.q, given.context[0][:, 0])


@pytest.mark.parametrize("name", ["softmax", "aft-full-factors"])
def test_long_contexts_of_mechanisms_that_keep_them_are_random(name, monkeypatch):
    row = registry.contenders()["step", name]
    read = step.step(row.function, token())
    monkeypatch.setattr(step, "CHECK_LENGTH", 29)
    monkeypatch.setattr(step, "prefill", None)  # nothing is read
    drawn = step.step(row.function, token())
    assert drawn.state_bytes == read.state_bytes == 30 * 2 * 2 * 4 * 4 + 30
    assert drawn.run()[0].shape == read.run()[0].shape == (1, 2, 4)
    assert drawn.run()[0].isfinite().all()


def test_random_context_is_not_read_by_mechanisms_with_a_fixed_state(monkeypatch):
    monkeypatch.setattr(step, "CHECK_LENGTH", 3)
    monkeypatch.setattr(step, "random_cache", None)
    for row in registry.contenders().values():
        if row.operation == "step" and row.name in ("flow-torch", "linear-torch", "mobile", "aft-simple", "aft-local-64"):
            assert step.step(row.function, token()).state_bytes


def test_a_context_is_read_once_for_all_backends(monkeypatch):
    calls, prefill = [], step.prefill
    monkeypatch.setattr(step, "prefill", lambda *given, **more: (calls.append(1), prefill(*given, **more))[1])
    inputs = token()
    for name in ("flow-native", "flow-torch"):
        step.step(registry.contenders()["step", name].function, inputs)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["flow-native", "flow-torch", "softmax", "sdpa", "aft-conv"])
def test_every_call_takes_the_same_step(name):
    row = registry.contenders()["step", name]
    if row.unavailable(token()):
        pytest.skip(row.unavailable(token()))
    call = step.step(row.function, token())
    assert torch.equal(call.run()[0], call.run()[0])


def test_mechanisms_that_keep_their_context_need_memory_for_it():
    rows = {name: row for (operation, name), row in registry.contenders().items() if operation == "step"}
    cache = 30 * 2 * (4 + 4) * 4
    assert rows["softmax"].needs_bytes(SHAPE) == pytest.approx(2.1 * cache)
    assert rows["aft-full-factors"].needs_bytes(SHAPE) == pytest.approx(2.1 * cache + 2 * 30 * 128 * 4)
    assert rows["aft-local-64"].needs_bytes(SHAPE) == 2 * 30 * 128 * 4
    assert rows["linear-torch"].needs_bytes(SHAPE) == 0
    assert set(list_attentions()) >= {"softmax", "linear"}
