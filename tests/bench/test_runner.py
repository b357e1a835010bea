"""What is wrong is not timed; what is timed takes turns; what is finished is kept."""

import time
from itertools import pairwise

import pytest
import torch

from flowformer.bench import registry, runner, timing
from flowformer.bench.check import Checker, WrongResultError, error_of
from flowformer.bench.registry import Shape
from flowformer.bench.rows import language
from flowformer.bench.rows.published import flow_attention as published
from flowformer.bench.runner import Plan
from flowformer.mechanisms import find_attention


def measured(rows, small, **fields):
    records = []
    runner.run(Plan(operations=("toy",), imports=(rows,), **{**small, **fields}), records.append)
    return records


def points(records):
    return {record["contender"]: record for record in records if record["record"] == "point"}


@pytest.fixture
def checker(rows):
    registry.load((rows,))
    return Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout))


def test_wrong_contender_is_refused_and_not_timed(rows, small, monkeypatch):
    timed = []
    monkeypatch.setattr(runner, "estimate", lambda call, seconds, clock: timed.append(call) or 1e-4)
    found = points(measured(rows, small, contenders=("right", "wrong")))
    assert found["right"]["status"] == "timed"
    assert found["right"]["min_ms"] > 0
    assert found["right"]["check"]["error"] < found["right"]["check"]["tolerance"] == 2e-5
    wrong = found["wrong"]
    assert wrong["status"] == "wrong"
    assert "min_ms" not in wrong
    assert len(timed) == 1 + 3  # the right one, and the limits
    assert wrong["reason"].startswith("wrong is wrong in toy at length 8: its error of ")
    assert "tolerance of 2e-05; it is not timed" in wrong["reason"]


def test_error_is_of_the_worst_row():
    want = torch.full((1, 50, 2, 4), 1.0, dtype=torch.float64)
    want[:, 0] = 1000  # the first tokens of causal attention are the largest
    got = want.clone()
    got[0, -1, 1] *= 1.01
    assert error_of(got, want) == pytest.approx(0.01)
    got[0, 3, 0, 2] = torch.nan
    assert error_of(got, want) == float("inf")
    assert error_of(want[:, :-1], want) == float("inf")


def test_long_points_are_checked_at_a_length_that_truth_can_afford(checker):
    what, row = registry.OPERATIONS["toy"], registry.contenders()["toy", "right"]
    sizes = {"heads": 1, "channels": 4, "value_channels": 4}
    assert checker.check(what, row, Shape(1500, **sizes)).length == what.check_length == 1024
    assert checker.check(what, row, Shape(7, **sizes)).length == 7


def test_approximation_is_unchecked_but_finite(checker, monkeypatch):
    what, row = registry.OPERATIONS["toy"], registry.contenders()["toy", "allocate"]
    assert checker.check(what, row, Shape(8)).note == "unchecked: approximation"
    spoilt = registry.Contender("spoilt", "toy", lambda q, k, v, causal: q * torch.nan, None, "")
    with pytest.raises(WrongResultError, match="spoilt gives values that are not finite"):
        checker.check(what, spoilt, Shape(8))


@pytest.mark.parametrize("causal", [False, True])
def test_published_formulas_are_the_reference(causal):
    q, k, v = (torch.randn(2, 37, 3, width, dtype=torch.float64) for width in (5, 5, 7))
    torch.testing.assert_close(
        published(q, k, v, causal=causal), find_attention("flow").truth(q, k, v, causal=causal), rtol=0, atol=1e-10
    )


def test_every_contender_is_right_or_says_why_not(small, monkeypatch):
    monkeypatch.setattr(language, "LAYERS", 1)  # tests/bench/rows has whole models
    records = []
    runner.run(Plan(lengths=(40,), limits=False, repeats=2, **small), records.append)
    found = [record for record in records if record["record"] == "point"]
    assert {record["operation"] for record in found} == set(registry.OPERATIONS) - {"toy"}
    for record in found:
        assert record["status"] in ("timed", "unavailable"), record
        if record["status"] == "timed":
            assert record["check"]["length"] == 40
            if record["contender"] == "cumulative-sums":
                assert record["check"]["note"].startswith("unchecked: ")
            else:
                assert record["check"]["error"] <= record["check"]["tolerance"], record
    steps = {record["contender"]: record for record in found if record["operation"] == "step"}
    assert steps["softmax"]["state_bytes"] >= 40 * 2 * 16 * 4
    assert not any(record.get("state_bytes") for record in found if not record["operation"].endswith("step"))


def test_ratios_are_to_the_first_and_shares_to_sgemm(rows, small):
    records = []
    plan = Plan(operations=("causal",), lengths=(64,), contenders=("sdpa", "flow-torch"), **small)
    runner.run(plan, records.append)
    found = points(records)
    first, second = found["sdpa"], found["flow-torch"]
    assert first["ratio"] == 1
    assert second["ratio"] == second["min_ms"] / first["min_ms"]
    assert second["ratio_to"] == "sdpa"
    flops = 64 * 2 * 2 * (2 * 8 * 8 + 16 * (8 + 8))  # tokens, heads, and the formula of variants.py
    assert second["gflops"] == pytest.approx(flops / second["min_ms"] / 1e6)
    sgemm = next(record for record in records if record.get("name") == "sgemm")
    assert second["share_of_sgemm"] == pytest.approx(second["gflops"] / sgemm["value"])


def test_what_cannot_run_says_why(rows, small):
    found = points(measured(rows, small))
    assert found["absent"]["status"] == "unavailable"
    assert found["absent"]["reason"] == "the moon is not up"
    assert found["hungry"]["status"] == "left out"
    assert "needs about 1000000000.0 GB" in found["hungry"]["reason"]
    assert found["failing"]["status"] == "failed"
    assert found["failing"]["reason"] == "RuntimeError: no such kernel"
    assert found["right"]["status"] == "timed"


def test_what_takes_too_long_is_left_out_at_greater_lengths_too(rows, small, monkeypatch):
    monkeypatch.setattr(runner, "estimate", lambda call, seconds, clock: 99.0)
    monkeypatch.setattr(runner, "make_limits", lambda size, seconds, device: [])
    records = measured(rows, small, contenders=("right",), lengths=(8, 16))
    reasons = [record["reason"] for record in records if record["record"] == "point"]
    assert reasons == ["a call at length 8 takes 99 s, more than the 60 s allowed"] * 2


def test_contenders_take_turns():
    calls = []

    def call(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return run

    runs = {"quick": call("quick", 0), "middle": call("middle", 0), "slow": call("slow", 0.001)}
    plan = timing.schedule({"quick": 0.001, "middle": 0.002, "slow": 5.0}, seconds=0.1)
    samples = timing.interleave(runs, plan)
    assert {name: len(found) for name, found in samples.items()} == {"quick": 100, "middle": 50, "slow": 3}
    assert [name for name, found in samples.items() if min(found) >= 0.001] == ["slow"]
    assert all({"quick", "middle"} <= {name for name, _ in entries} for entries in plan)
    assert len({tuple(name for name, _ in entries) for entries in plan}) > 3  # nobody always follows the same
    last = {name: len(calls) - 1 - calls[::-1].index(name) for name in runs}
    slow = [place for place, name in enumerate(calls) if name == "slow"]
    assert calls.index("quick") < slow[1] < last["quick"]
    assert all(40 < b - a < 70 for a, b in pairwise(slow))  # evenly spread over 153 calls


def test_repeats_bound_the_calls():
    plan = timing.schedule({"a": 1e-6, "b": 1.0}, seconds=1.0, repeats=2)
    for name in "ab":
        assert sum(count for entries in plan for other, count in entries if other == name) == 2


def test_yardstick_says_that_it_is_one(checker):
    what, row = registry.OPERATIONS["aft-causal"], registry.contenders()["aft-causal", "cumulative-sums"]
    assert checker.check(what, row, Shape(8)).note == "unchecked: no AFT, a yardstick"


def test_interruption_keeps_what_is_finished(rows, small, monkeypatch):
    interleave, groups = runner.interleave, []

    def interrupted(*arguments):
        groups.append(1)
        if len(groups) == 2:
            raise KeyboardInterrupt
        return interleave(*arguments)

    monkeypatch.setattr(runner, "interleave", interrupted)
    records = []
    plan = Plan(operations=("toy",), imports=(rows,), contenders=("right",), lengths=(8, 16, 32), **small)
    with pytest.raises(KeyboardInterrupt):
        runner.run(plan, records.append)
    assert [record["length"] for record in records if record["record"] == "point"] == [8]
    assert records[-1]["record"] == "end"
    assert records[-1]["finished"] is False


def test_interruption_while_memory_is_measured_keeps_the_times(rows, small, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "ask", interrupted)
    records = []
    plan = Plan(operations=("toy",), imports=(rows,), contenders=("right",), **{**small, "memory": True})
    with pytest.raises(KeyboardInterrupt):
        runner.run(plan, records.append)
    assert points(records)["right"]["min_ms"] > 0


def test_threads_are_given_back(rows, small):
    before = torch.get_num_threads()
    records = measured(rows, small, contenders=("right",), threads=before + 1)
    assert records[0]["environment"]["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operations": ("casual",)}, "no operation 'casual' .did you mean 'causal'"),
        ({"contenders": ("flow-tortch",)}, "no contender 'flow-tortch' .did you mean 'flow-torch'"),
        ({"operations": ("step",), "contenders": ("sdpa-bf16",)}, "no contender 'sdpa-bf16'"),
        ({"lengths": (0,)}, "length must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"imports": ("no_such_rows",)}, "no module 'no_such_rows'"),
    ],
)
def test_mistakes_are_explained(fields, message):
    with pytest.raises(ValueError, match=message):
        Plan(**fields).rows()


def test_memory_of_a_fresh_process_sees_what_is_allocated(rows, small):
    records = measured(rows, {**small, "memory": True}, contenders=("allocate",))
    memory = points(records)["allocate"]["memory"]
    assert memory["peak_bytes"] == pytest.approx(64 * 2**20, rel=0.2)
    assert memory["bytes_per_token"] == memory["peak_bytes"] / 8


def test_process_that_dies_is_a_remark(rows, small, monkeypatch):
    from flowformer.bench import process

    monkeypatch.setattr(process.sys, "executable", "false")
    memory = points(measured(rows, {**small, "memory": True}, contenders=("right",)))["right"]["memory"]
    assert "the process that was to do 'memory'" in memory["reason"]
