"""One run: check, time by turns and measure memory, one operation and length after the other."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from typing import Any

import torch

from flowformer.bench.check import Checker, WrongResultError
from flowformer.bench.device import DEVICES, Device, find_device
from flowformer.bench.limits import PRODUCTS, SGEMM, Limit, make_limits
from flowformer.bench.process import ask
from flowformer.bench.registry import Call, Contender, Inputs, Operation, Shape, find_contenders, find_operations, load
from flowformer.bench.timing import estimate, interleave, schedule
from flowformer.common.errors import RunError
from flowformer.common.machine import environment
from flowformer.common.names import nearest

Record = dict[str, Any]
Tell = Callable[[str], None]
LARGEST = 1_000_000_000  # of any number of a plan
BUSY = 0.5  # processes that want to run besides ours
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        operations: Names; none for all.
        lengths: None for those of each operation.
        batch: Sequences.
        heads: Heads.
        channels: Channels of a query or key of one head.
        value_channels: Channels of a value of one head.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: One of :data:`DTYPES`, for all contenders; empty for that of each contender.
        contenders: Names; none for all.
        ours_only: Only this library's own contenders, where none are named.
        threads: Of torch and OpenMP; 0 for what torch has now.
        seconds: Time of each contender at each length.
        repeats: The most calls of each contender at each length; 0 for no bound.
        memory: Measure peak memory too.
        limits: Measure the machine's limits too.
        limit_size: Rows of the square matrices of the limits; a GPU multiplies 4 times as many.
        memory_budget_bytes: What a contender may need above its inputs; 0 for half of what is available.
        longest_s: A contender of which one call takes longer is left out, at greater lengths too.
        imports: Modules that add further contenders.
    """

    operations: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    batch: int = 1
    heads: int = 8
    channels: int = 64
    value_channels: int = 64
    device: str = "cpu"
    dtype: str = ""
    contenders: tuple[str, ...] = ()
    ours_only: bool = False
    threads: int = 0
    seconds: float = 1.0
    repeats: int = 0
    memory: bool = True
    limits: bool = True
    limit_size: int = 2048
    memory_budget_bytes: int = 0
    longest_s: float = 60.0
    imports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("threads", "repeats", "memory_budget_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("seconds", "longest_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("threads", "repeats", "batch", "heads", "channels", "value_channels"):
            if getattr(self, name) > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST}, got {getattr(self, name)}")
        for length in (*self.lengths, self.limit_size):
            self.shape(length)
        for name, known in (("device", DEVICES), ("dtype", ["", *DTYPES])):
            if (value := getattr(self, name)) not in known:
                there = ", ".join(filter(None, known))
                raise ValueError(f"no {name} {value!r}{nearest(value, known)}; there is {there}")

    def shape(self, length: int) -> Shape:
        """The sizes at a length."""
        return Shape(length, self.batch, self.heads, self.channels, self.value_channels)

    def rows(self) -> list[tuple[Operation, list[Contender]]]:
        """Operations and their contenders.

        Raises:
            ValueError: for an unknown name.
        """
        load(self.imports)
        operations = find_operations(self.operations)
        rows = find_contenders(operations, self.contenders)
        if not self.contenders:
            rows = [row for row in rows if row.device in ("", self.device) and (row.ours or not self.ours_only)]
        if self.dtype:
            dtype = DTYPES[self.dtype]
            rows = [replace(row, dtype=dtype) if dtype in (row.dtypes or (dtype,)) else row for row in rows]
        grouped = [(what, [row for row in rows if row.operation == what.name]) for what in operations]
        return [(what, rows) for what, rows in grouped if rows]

    def as_record(self) -> Record:
        """The fields as JSON can say them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`as_record` wrote."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items() if name in known
        }
        return cls(**values)


def run(plan: Plan, keep: Callable[[Record], None], tell: Tell = lambda text: None) -> None:
    """Carry out a plan.

    Records are dictionaries that JSON can say: one ``"run"`` (plan, machine, versions, threads, load), then for each
    operation and length its ``"limit"`` and ``"point"`` records, at last one ``"end"`` (load, and whether the machine
    was busy with other things). An interrupted run keeps the points before the interruption, and has its ``"end"``.

    Args:
        plan: What to measure.
        keep: Called with each record, as soon as it is final.
        tell: Called with a line of progress.

    Raises:
        ValueError: for an unknown name.
        RunError: where there is no such device.
    """
    device = find_device(plan.device)
    groups = [(what, rows, length) for what, rows in plan.rows() for length in plan.lengths or what.lengths]
    with _threads(plan.threads), device.session():
        load_before = _load()
        keep({"record": "run", "plan": plan.as_record(), **_machine(device), "load_before": load_before})
        done = False
        try:
            bench = _Bench(plan, device)
            for number, (what, rows, length) in enumerate(groups):
                place = f"{what.name}, {what.axis} {length:,} ({number + 1} of {len(groups)})"
                bench.group(what, rows, plan.shape(length), keep, lambda text, at=place: tell(f"{at}: {text}"))
            done = True
        finally:
            keep({"record": "end", "finished": done, **_load_after(load_before)})


class _Bench:
    """What one run remembers from point to point."""

    def __init__(self, plan: Plan, device: Device) -> None:
        self.plan, self.device = plan, device
        self.checker = Checker(lambda what, shape, dtype, layout: what.inputs(shape, dtype, layout), device)
        self.limits = make_limits(plan.limit_size, plan.seconds, device) if plan.limits else []
        self.budget = plan.memory_budget_bytes or (device.available_bytes() or 2**62) // 2
        self.too_slow: dict[tuple[str, str], str] = {}

    def group(
        self, what: Operation, rows: list[Contender], shape: Shape, keep: Callable[[Record], None], tell: Tell
    ) -> None:
        """Measure one operation at one length; its records are kept together, once they are timed."""
        points, calls, inputs = [], {}, _Inputs(what, shape, self.device)
        for row in rows:
            tell(f"checking {row.name}")
            point, call = self._prepare(what, row, shape, inputs)
            points.append(point)
            if call is not None:
                calls[row.name] = call.run
        found = self._time(calls, points, tell)
        _compare(points, what, rows, shape, {record["name"]: record["value"] for record in found}, self.device)
        calls.clear()
        del inputs  # the processes that measure memory want room
        self.device.clear()
        try:
            if self.plan.memory and what.measure_memory:
                for point in points:
                    self._measure_memory(point, shape, tell)
        finally:
            for record in found:
                keep({"record": "limit", "operation": what.name, "length": shape.length, **record})
            for point in points:
                keep(point)

    def _prepare(self, what: Operation, row: Contender, shape: Shape, inputs: _Inputs) -> tuple[Record, Call | None]:
        """The point as far as it is known before it is timed, and what to time."""
        point: Record = {
            "record": "point", "operation": what.name, "contender": row.name, "ours": row.ours,
            "dtype": _name_of(row.dtype), "layout": row.layout, **asdict(shape), "unit": what.unit,
            "axis": f"{what.axis}, {what.extent}",
        }  # fmt: skip

        def leave_out(status: str, reason: str) -> tuple[Record, None]:
            return {**point, "status": status, "reason": reason}, None

        needs = row.needs_bytes(shape)
        if needs > self.budget:
            return leave_out("left out", f"needs about {needs / 1e9:.1f} GB of the {self.budget / 1e9:.1f} GB allowed")
        if (what.name, row.name) in self.too_slow:
            return leave_out("left out", self.too_slow[what.name, row.name])
        if reason := _refusal(row, self.plan):
            return leave_out("unavailable", reason)
        try:
            given = inputs.of(row)
            if reason := row.unavailable(given[0]):
                return leave_out("unavailable", reason)
            point["check"] = self.checker.check(what, row, shape).as_record()
            call = _by_turns([what.bind(row.function, one) for one in given])
            patience = self.plan.longest_s if self.device.compiles else self.plan.seconds
            point["estimate_s"] = estimate(call.run, patience, self.device.cost)
            if self.plan.memory and what.measure_memory:
                point |= self._memory_here(call, what.tokens(shape))
        except WrongResultError as error:
            return leave_out("wrong", str(error))
        except torch.OutOfMemoryError:  # of a GPU
            return leave_out("left out", "the GPU's memory is too small")
        except Exception as error:  # whatever a contender raises is a result, and no reason to lose the others
            return leave_out("failed", f"{type(error).__name__}: {error}")
        if point["estimate_s"] > self.plan.longest_s:
            reason = f"a call at {what.axis} {shape.length:,} takes {point.pop('estimate_s'):.0f} s"
            self.too_slow[what.name, row.name] = f"{reason}, more than the {self.plan.longest_s:.0f} s allowed"
            return leave_out("left out", self.too_slow[what.name, row.name])
        return {**point, "status": "timed", "state_bytes": call.state_bytes}, call

    def _time(self, calls: dict[str, Callable[[], Any]], points: list[Record], tell: Tell) -> list[Record]:
        """Time contenders and limits by turns; contenders' times enter their points, limits are returned."""
        if not calls:
            return []
        timed = {point["contender"]: point for point in points if point["status"] == "timed"}
        limits = {f"limit {limit.name}": limit for limit in self.limits}
        everything = {**calls, **{name: limit.run for name, limit in limits.items()}}
        estimates = {name: point.pop("estimate_s") for name, point in timed.items()}
        estimates |= {name: estimate(limit.run, self.plan.seconds, self.device.cost) for name, limit in limits.items()}
        rounds = schedule(estimates, self.plan.seconds, self.plan.repeats)
        samples = interleave(everything, rounds, tell, self.device.seconds)
        for name, point in timed.items():
            point |= _times(samples[name])
        return [_limit_record(limit, samples[name]) for name, limit in limits.items()]

    def _memory_here(self, call: Call, tokens: int) -> Record:
        """The peak of memory, where the device's allocator knows it."""
        used = self.device.peak_bytes(call.run)
        if used is None:
            return {}
        return {"memory": {"peak_bytes": used, "bytes_per_token": used / tokens, "method": "allocator"}}

    def _measure_memory(self, point: Record, shape: Shape, tell: Tell) -> None:
        if point["status"] != "timed" or "memory" in point:
            return
        tell(f"memory of {point['contender']}")
        try:
            point["memory"] = ask(
                "memory", torch.get_num_threads(), imports=self.plan.imports, operation=point["operation"],
                contender=point["contender"], shape=asdict(shape),
            )  # fmt: skip
        except RunError as error:
            point["memory"] = {"reason": str(error)}


class _Inputs:
    """Inputs of one point, made once for each dtype and layout: on the CPU, so that they are the same everywhere."""

    def __init__(self, what: Operation, shape: Shape, device: Device) -> None:
        self._what, self._shape, self._device = what, shape, device
        self._made: dict[tuple[torch.dtype, str], list[Inputs]] = {}

    def of(self, row: Contender) -> list[Inputs]:
        """Those that the calls of a contender take by turns."""
        key = (row.dtype, row.layout)
        if key not in self._made:
            self._made[key] = self._device.copies(self._what.inputs(self._shape, *key))
        return self._made[key]


def _by_turns(calls: Sequence[Call]) -> Call:
    """One call that is each of the given ones by turns."""
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return Call(lambda: next(turns).run(), calls[0].state_bytes)


def _refusal(row: Contender, plan: Plan) -> str | None:
    """Why a contender cannot take part in a plan, or ``None``."""
    if row.device not in ("", plan.device):
        return f"it is for {row.device}, and this is {plan.device}"
    if plan.dtype and row.dtype != DTYPES[plan.dtype]:
        runs, asked = " and ".join(map(_name_of, row.dtypes)), _name_of(DTYPES[plan.dtype])
        return f"it is timed in {runs}, not in {asked}"
    return None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _times(samples: list[float]) -> Record:
    return {"min_ms": 1e3 * min(samples), "median_ms": 1e3 * statistics.median(samples), "calls": len(samples)}


def _limit_record(limit: Limit, samples: list[float]) -> Record:
    return {
        "name": limit.name,
        "value": limit.work / min(samples),
        "unit": limit.unit,
        "size": limit.size,
        **_times(samples),
    }


def _compare(
    points: list[Record], what: Operation, rows: list[Contender], shape: Shape, limits: Mapping[str, float],
    device: Device,
) -> None:  # fmt: skip
    """Add each point's time relative to the first, its rate, and its share of what the machine can do.

    On a GPU that is the product of the contender's own dtype, since that of bfloat16 is many times faster.
    """
    timed = [(point, row) for point, row in zip(points, rows, strict=True) if point["status"] == "timed"]
    times = {row.name: point["min_ms"] for point, row in timed}
    for point, row in timed:
        point["ratio"] = point["min_ms"] / timed[0][0]["min_ms"]
        point["ratio_to"] = timed[0][0]["contender"]
        if row.twin in times:
            point["ratio_to_ours"] = point["min_ms"] / times[row.twin]
        if what.show_rate:
            point["tokens_per_s"] = 1e3 * what.tokens(shape) / point["min_ms"]
        if row.flops is not None:
            point["gflops"] = row.flops(shape) / point["min_ms"] / 1e6
            share, limit = ("share_of_sgemm", SGEMM) if device.name == "cpu" else ("share_of_gemm", PRODUCTS[row.dtype])
            point[share] = point["gflops"] / limits[limit] if limit in limits else None


def _machine(device: Device) -> Record:
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment() | device.describe(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "niceness": os.nice(0) if hasattr(os, "nice") else None,
    }


def _load() -> list[float] | None:
    """Processes that want to run, averaged over 1, 5 and 15 minutes, where the system says so."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _load_after(before: list[float] | None) -> Record:
    """Load after a run, and whether others were at work: before it, or beside our own threads at its end."""
    after = _load()
    busy = None
    if before is not None and after is not None:
        busy = before[0] > BUSY or after[0] > torch.get_num_threads() + BUSY
    return {"load_after": after, "busy": busy}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
