"""Devices: a GPU's times, memory and inputs, with a stand-in for its runtime, since the tests run without one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import Card

from flowformer import cli
from flowformer.bench import compare, device, registry, runner, tables, timing
from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.device import Cuda, Device, move
from flowformer.bench.limits import make_limits
from flowformer.bench.registry import Shape
from flowformer.bench.rows import language, peers, vision
from flowformer.bench.rows.forms import Sequences
from flowformer.bench.rows.variants import find_variant
from flowformer.bench.runner import Plan
from flowformer.common.errors import RunError

registry.load()
SHAPE = Shape(24, batch=2, heads=2, channels=8, value_channels=8)
META = torch.device("meta")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """To ask for the commit and to collect garbage takes longer than a run."""
    said = dict.fromkeys(("cpu", "cpus", "threads", "flowformer", "commit", "torch", "python"), "?")
    monkeypatch.setattr(runner, "environment", lambda: said)
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture
def card(monkeypatch):
    found = Card()
    found.patch(monkeypatch)
    return found


@pytest.fixture
def gpu(card, monkeypatch):
    """The GPU's device, on tensors of the CPU."""
    made = Cuda(torch.device("cpu"))
    monkeypatch.setattr(runner, "find_device", lambda name: made)
    return made


def measured(**fields):
    records = []
    runner.run(Plan(device="cuda", **fields), records.append)
    return records


def points(records):
    return {record["contender"]: record for record in records if record["record"] == "point"}


# ---------------------------------------------------------------------------------------------------------------- times


def test_time_is_between_events_after_the_cache_is_flushed(card, gpu):
    gpu._cache.fill_(1)

    def call():
        assert not gpu._cache.any()
        card.log.append("call")
        card.now += 2.5

    assert gpu.seconds(call) == pytest.approx(2.75e-3)
    assert card.log == ["record", "call", "record", "wait"]


def test_the_cache_that_is_flushed_is_twice_that_of_the_card(card, gpu, monkeypatch):
    assert gpu._cache.numel() == 256
    monkeypatch.setattr(device, "LEAST_CACHE", 64)
    assert Cuda(torch.device("cpu"))._cache.numel() == 100


def test_timing_costs_what_the_host_sees(card, gpu):
    assert gpu.cost(lambda: time.sleep(0.002)) >= 0.002
    assert gpu.seconds(lambda: time.sleep(0.002)) == pytest.approx(2.5e-4)


def test_first_call_of_a_gpu_may_compile(gpu, rows, small):
    calls = []

    def compiled(q, k, v, *, causal):
        calls.append(1)
        if len(calls) == 2:  # the first call is the check
            time.sleep(0.02)
        return v

    registry.load((rows,))
    registry.add_contender(registry.Contender("compiled", "toy", compiled, None, ""))
    fields = {"operations": ("toy",), "imports": (rows,), "contenders": ("compiled",), **small, "seconds": 0.01}
    point = points(measured(**fields, limits=False))["compiled"]
    assert point["calls"] > timing.LEAST_ROUNDS  # 20 ms are no estimate


def test_calls_take_their_inputs_by_turns(gpu, small):
    seen = []
    what = registry.OPERATIONS["causal"]

    def bind(function, inputs):
        return dataclasses.replace(
            call := what.bind(function, inputs), run=lambda: (seen.append(id(inputs[0])), call.run())[1]
        )

    def inputs(shape, dtype, layout):
        return (Sequences(shape, dtype, layout),)

    registry.OPERATIONS["causal"] = dataclasses.replace(what, bind=bind, inputs=inputs)
    try:
        measured(operations=("causal",), lengths=(8,), contenders=("flow-torch",), limits=False, **small)
    finally:
        registry.OPERATIONS["causal"] = what
    check, *timed = seen
    assert len(set(timed)) == device.ROTATION
    assert check not in timed
    assert timed[:2] == timed[3:5]


def test_inputs_that_fill_the_memory_have_no_copies(card, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "put", lambda host: card.allocate(1000) or host)
    assert len(gpu.copies(())) == 3
    card.free = 4 * 2000 - 51
    assert len(gpu.copies(())) == 1


# --------------------------------------------------------------------------------------------------------------- memory


def test_peak_of_memory_is_that_of_one_call(card, gpu):
    card.peak = 10**6  # of a contender before

    def call():
        card.allocate(700)
        card.held -= 700

    assert gpu.peak_bytes(call) == 700
    assert card.log == ["wait", "reset", "wait"]


def test_memory_that_nobody_uses(card, gpu):
    assert gpu.available_bytes() == 10**9 + 50


def test_memory_of_a_point_is_that_of_the_allocator(card, gpu, rows, small, monkeypatch):
    def allocate(q, k, v, *, causal):
        card.allocate(4096)
        card.held -= 4096
        return v

    monkeypatch.setattr(runner, "ask", None)  # no process
    registry.load((rows,))
    registry.add_contender(registry.Contender("allocating", "toy", allocate, None, ""))
    fields = {"operations": ("toy",), "imports": (rows,), "contenders": ("allocating",), "limits": False}
    memory = points(measured(**fields, **{**small, "memory": True}))["allocating"]["memory"]
    assert memory == {"peak_bytes": 4096, "bytes_per_token": 4096 / 8, "method": "allocator"}


def test_what_does_not_fit_is_left_out(card, gpu, rows, small):
    def huge(q, k, v, *, causal):
        raise torch.OutOfMemoryError("CUDA out of memory")

    registry.load((rows,))
    registry.add_contender(registry.Contender("huge", "toy", huge, None, ""))
    fields = {"operations": ("toy",), "imports": (rows,), "contenders": ("huge", "right"), "limits": False}
    found = points(measured(**fields, **small))
    assert (found["huge"]["status"], found["huge"]["reason"]) == ("left out", "the GPU's memory is too small")
    assert found["right"]["status"] == "timed"


# --------------------------------------------------------------------------------------------------------------- inputs


def test_inputs_are_the_same_numbers_on_every_device():
    host = Sequences(SHAPE, torch.bfloat16, "heads-first")
    there = move((host,), torch.device("cpu"))[0]
    assert there is not host
    variant = find_variant("aft_local", "64")
    for one, other in zip(
        (host.q, host.k, host.v, host.upstream, *host.learned(variant)[0]),
        (there.q, there.k, there.v, there.upstream, *there.learned(variant)[0]),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def rows_for_a_gpu():
    """Contenders, but for AFT's: those look at values, but for AFT-simple's bidirectional form."""
    quick = {
        ("causal", "flow-torch"), ("causal", "sdpa-flash"), ("causal-training", "linear-decay-torch"), ("step", "softmax"),
        ("aft-bidirectional-training", "aft-simple-torch"), ("step", "sdpa"), ("step", "flow-decay-torch"),
        ("language-step", "sdpa"), ("language-training", "softmax"), ("vision", "aft-simple-torch"),
    }  # fmt: skip
    for place, row in registry.contenders().items():
        looks = row.name.startswith("aft-") and not (
            row.name.endswith(("cumsum",)) or (row.name == "aft-simple-torch" and place[0].startswith(("aft-b", "vis")))
        )
        if not looks:
            yield pytest.param(row, id="-".join(place), marks=() if place in quick else pytest.mark.slow)


@pytest.mark.parametrize("row", list(rows_for_a_gpu()))
def test_a_call_stays_on_the_device_of_its_inputs(row, monkeypatch):
    """A tensor that was made on the CPU meets those of the meta device with an error."""
    monkeypatch.setattr(vision, "BLOCKS", 1)
    monkeypatch.setattr(language, "LAYERS", 1)
    what = registry.OPERATIONS[row.operation]
    shape = dataclasses.replace(SHAPE, length=48) if row.operation.startswith("vision") else SHAPE
    given = move(what.inputs(shape, row.dtype, row.layout), META)
    if reason := row.unavailable(given):
        pytest.skip(reason)
    outs = what.bind(row.function, given).run()
    assert {out.device for out in outs} == {META}


def test_kernels_for_the_cpu_say_that_they_are():
    what, every = registry.OPERATIONS["causal"], registry.contenders()
    given = move(what.inputs(SHAPE, torch.float32, "length-first"), META)
    assert "the native kernels run on the CPU, not on meta" in every["causal", "flow-native"].unavailable(given)
    given = move(language.text(SHAPE, torch.float32, ""), META)
    assert "run on the CPU" in every["language-training", "flow-native"].unavailable(given)
    assert "run on the CPU" in every["vision", "flow-native"].unavailable(
        move(vision.draw(dataclasses.replace(SHAPE, length=48), torch.float32, ""), META)
    )


def test_flash_wants_values_as_wide_as_keys():
    row = registry.contenders()["causal", "sdpa-flash"]
    given = registry.OPERATIONS["causal"].inputs(dataclasses.replace(SHAPE, value_channels=4), row.dtype, row.layout)
    assert "must be equal" in row.unavailable(given)


def test_a_long_context_that_is_drawn_is_drawn_for_the_device(monkeypatch):
    from flowformer.bench.rows import step

    monkeypatch.setattr(step, "CHECK_LENGTH", 3)
    what, row = registry.OPERATIONS["step"], registry.contenders()["step", "softmax"]
    call = what.bind(row.function, move(what.inputs(SHAPE, torch.float16, row.layout), META))
    assert [(out.device, out.dtype) for out in call.run()] == [(META, torch.float16)]


# ---------------------------------------------------------------------------------------------------------------- check


class Elsewhere(Cuda):
    """A device that spoils what is put on it."""

    def put(self, host):
        (given,) = host
        moved = given.to("cpu")
        moved.v = 1.01 * moved.v
        return (moved,)


def test_the_truth_is_that_of_the_numbers_on_the_cpu():
    what, row = registry.OPERATIONS["causal"], registry.contenders()["causal", "flow-torch"]
    checker = Checker(lambda what, *given: what.inputs(*given), Elsewhere())
    with pytest.raises(WrongResultError, match=r"its error of 1\.0e-02"):
        checker.check(what, row, SHAPE)


def test_two_sequences_are_checked_on_a_gpu(gpu):
    what, row = registry.OPERATIONS["causal"], registry.contenders()["causal", "flow-torch"]
    checkers = [Checker(lambda what, *given: what.inputs(*given), one) for one in (gpu, Device())]
    large = dataclasses.replace(SHAPE, batch=3)
    assert [checker.check(what, row, large).note for checker in checkers] == [
        "checked with 2 of 3 sequences", "checked",
    ]  # fmt: skip
    assert checkers[0].check(what, row, SHAPE).note == "checked"


# -------------------------------------------------------------------------------------------------------------- records


def test_a_run_names_card_and_limits(card, gpu, small, capsys):
    fields = {**small, "limit_size": 8}
    records = measured(operations=("causal",), lengths=(8,), contenders=("flow-torch", "sdpa-flash"), batch=3, **fields)
    found = records[0]["environment"]["device"]
    assert found["name"] == "Test Card"
    assert (found["type"], found["capability"], found["driver"]) == ("cuda", "9.0", "580.159")
    assert {"triton", "torch", "cuda"} <= set(found)
    limits = {record["name"]: record for record in records if record["record"] == "limit"}
    assert set(limits) == {"sgemm", "bf16 gemm", "fp16 gemm", "copy"}
    assert limits["copy"]["size"] == 4 * 8 * 32**2
    assert points(records)["sdpa-flash"]["dtype"] == "bfloat16"
    for timed in (*points(records).values(), limits["copy"]):
        assert timed["min_ms"] == timed["median_ms"] == pytest.approx(0.25)  # between two events
    heading = tables.describe_run(records)
    assert heading.startswith("Test Card, capability 9.0, driver 580.159, Triton ")
    (table, _) = tables.point_tables(records)
    assert "checked with 2 of 3 sequences (8)" in table.caption


def test_shares_are_of_the_product_of_the_same_dtype(gpu):
    what, rows = registry.OPERATIONS["causal"], [registry.contenders()["causal", "sdpa-flash"]]
    point = {"status": "timed", "contender": "sdpa-flash", "min_ms": 1.0}
    runner._compare([point], what, rows, SHAPE, {"sgemm": 1.0, "bf16 gemm": 10.0}, gpu)
    assert point["share_of_gemm"] == point["gflops"] / 10
    assert "share_of_sgemm" not in point


def test_products_of_float32_are_not_rounded_to_tf32(card, gpu):
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = True
    try:
        with gpu.session():
            assert [part.allow_tf32 for part in parts] == [False, False]
        assert [part.allow_tf32 for part in parts] == [True, True]
    finally:
        for part, value in zip(parts, before, strict=True):
            part.allow_tf32 = value


def test_limits_are_measured_on_the_device():
    class OnMeta(Device):
        name = "cuda"

        def put(self, host):
            return move(host, META)

    for limit in make_limits(16, 0.001, OnMeta(META)):
        assert limit.run().device == META


def test_driver_is_what_nvidia_smi_says(monkeypatch):
    said = subprocess.CompletedProcess([], 0, stdout="580.159.03\n580.159.03\n")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: said)
    assert device.driver_version() == "580.159.03"

    def missing(*words, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert device.driver_version() is None


def test_the_cpu_says_nothing_more(small):
    records = []
    runner.run(Plan(operations=("causal",), lengths=(8,), contenders=("linear-torch",), **small), records.append)
    assert "device" not in records[0]["environment"]
    assert {record["name"] for record in records if record["record"] == "limit"} == {"sgemm", "bf16 gemm", "copy"}
    assert "share_of_sgemm" in points(records)["linear-torch"]


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(capsys, tmp_path):
    assert cli.main(["bench", "causal", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert f"there is no CUDA device here: torch {torch.__version__}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "cud"}, r"no device 'cud' \(did you mean 'cuda'\?\); there is cpu, cuda"),
        ({"dtype": "fp61"}, r"no dtype 'fp61' .*; there is fp32, bf16, fp16"),
    ],
)
def test_mistakes_are_explained(fields, message):
    with pytest.raises(ValueError, match=message):
        Plan(**fields)


def test_what_is_for_a_gpu_says_so_where_it_is_named(small):
    records = []
    plan = Plan(operations=("causal",), lengths=(8,), contenders=("sdpa-flash",), limits=False, **small)
    runner.run(plan, records.append)
    point = points(records)["sdpa-flash"]
    assert (point["status"], point["reason"]) == ("unavailable", "it is for cuda, and this is cpu")


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_all_contenders_run_in_the_dtype_that_is_asked_for(dtype, small, monkeypatch):
    monkeypatch.setattr(language, "LAYERS", 1)
    names = ("flow-torch", "aft-full", "published", "sdpa-bf16", "softmax")
    operations = ("causal", "aft-causal", "language-step", "language-training")
    records = []
    sizes = {"operations": operations, "lengths": (16,), "contenders": names, "limits": False, "repeats": 1}
    runner.run(Plan(dtype=dtype, **sizes, **small), records.append)
    found = {(record["operation"], record["contender"]): record for record in records if record["record"] == "point"}
    name = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    words = f"it is timed in float32, not in {name}"
    assert found["causal", "published"]["reason"] == words
    for (operation, contender), point in found.items():
        if contender == "published" or (contender == "sdpa-bf16" and dtype == "fp16"):
            assert point["status"] == "unavailable"
            continue
        assert (point["status"], point["dtype"]) == ("timed", name)
        limit = registry.OPERATIONS[operation].tolerances[runner.DTYPES[dtype]]
        # What computes in float32 is a hundred times better than this.
        assert limit / 1000 < point["check"]["error"] <= point["check"]["tolerance"] == limit
    assert f"in {dtype}" in tables.describe_run(records).splitlines()


def test_a_wrong_contender_is_refused_in_half_precision_too(rows, small):
    def wrong(q, k, v, *, causal):
        return 1.05 * peers.sdpa(q, k, v, causal=causal)

    registry.load((rows,))
    truth = registry.contenders()["causal", "sdpa"].reference
    registry.add_contender(registry.Contender("spoilt", "toy", wrong, truth, ""))
    records = []
    fields = {"operations": ("toy",), "imports": (rows,), "contenders": ("spoilt",), "dtype": "bf16", "limits": False}
    runner.run(Plan(**fields, **small), records.append)
    assert points(records)["spoilt"]["status"] == "wrong"
    assert "tolerance of 3e-02" in points(records)["spoilt"]["reason"]


def test_fla_says_why_it_is_absent(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.fla_missing() == "flash-linear-attention is not installed"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)

    def broken(name):
        raise RuntimeError("another Triton, please")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    assert "RuntimeError: another Triton, please" in peers.fla_missing()


def test_fla_is_called_on_our_features(monkeypatch):
    """By a stand-in with its signature: it is right where that is."""

    def chunk_linear_attn(q, k, v, normalize):
        assert normalize
        scores = torch.einsum("blhk,bshk->bhls", q, k).tril()
        return torch.einsum("bhls,bshv->blhv", scores / scores.sum(-1, keepdim=True), v), None

    module = SimpleNamespace(chunk_linear_attn=chunk_linear_attn)
    monkeypatch.setitem(sys.modules, "fla", module)
    monkeypatch.setitem(sys.modules, "fla.ops", module)
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", module)
    what, row = registry.OPERATIONS["causal"], registry.contenders()["causal", "fla-linear"]
    exact = dataclasses.replace(row, dtype=torch.float32)
    assert Checker(lambda what, *given: what.inputs(*given)).check(what, exact, SHAPE).error < 1e-5


# ----------------------------------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({}, "this tree was measured on Test Card, bf16, and HEAD on the CPU, dtypes by default"),
        ({"environment": {"device": {"name": "Another"}}, "plan": {"dtype": "bf16"}}, "HEAD on Another, bf16"),
        ({"environment": {"device": {"name": "Test Card"}}, "plan": {"dtype": "fp16"}}, "HEAD on Test Card, fp16"),
    ],
)
def test_times_of_two_devices_are_not_compared(there, words, monkeypatch, tmp_path, small):
    here = {"record": "run", "environment": {"device": {"name": "Test Card"}}, "plan": {"dtype": "bf16"}}
    sides = [[here], [{"record": "run", "environment": {}, **there}]]

    class Tree:
        def __enter__(self):
            return tmp_path

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(compare, "find_commit", lambda root, revision: "0" * 40)
    monkeypatch.setattr(compare, "worktree", lambda root, commit: Tree())
    monkeypatch.setattr(compare, "ask", lambda *given, **more: sides.pop(0))
    plan = Plan(operations=("causal",), device="cuda", dtype="bf16", **small)
    with pytest.raises(RunError, match=f"{words}.*different devices or dtypes are not compared"):
        compare.compare("HEAD", plan, lambda record: None)
    assert not sides  # after the first pair
