"""Check the library on a CUDA GPU against float64, time it there, and train with it.

    python tools/gpu_check.py --out runs/gpu               everything, in at most 8 minutes
    python tools/gpu_check.py --only correctness           one part: correctness, times or training
    python tools/gpu_check.py --dry-run --out runs/dry     every part in small on the CPU, where there is no GPU

Results are JSON lines in ``results.jsonl`` of the output folder, written as they come. A second run with the same
folder continues where the first stopped. What is wrong is never timed. The exit status is 1 if any check failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_flatten, tree_unflatten

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

# The ways to call each mechanism are those in which the laws are checked.
from law_cases import reference, shapes_of, variants_of

from flowformer import create_attention, create_model, list_attentions, ops
from flowformer.bench.device import DEVICES, Device
from flowformer.bench.limits import make_limits
from flowformer.bench.rows.models import chosen
from flowformer.bench.rows.peers import fla_linear, fla_missing, sdpa_flash
from flowformer.bench.timing import estimate, interleave, schedule
from flowformer.core.backends import backends_of, explain, find_backend
from flowformer.mechanisms import find_attention

PACKAGE = Path(ops.__file__).parent

LIMITS_S = {"correctness": 130, "times": 170, "training": 180}  # of each part: below 8 minutes together
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest element
PEER_TOLERANCE = 3e-2  # of the largest element: other libraries in bfloat16
HALF = (torch.bfloat16, torch.float16)
Tensors = Sequence[Tensor]


class Setup(NamedTuple):
    """Where a run takes place, and how large its inputs are."""

    device: str
    heads: int
    key: int
    value: int
    length: int  # of checks against the reference
    long: int  # of checks for drift
    steps: int  # that follow a state
    lengths: tuple[int, ...]  # of times
    shape: tuple[int, int]  # batch and heads of times
    channels: tuple[int, ...]  # of a head, in times
    model: str
    tokens: int  # of a training step
    train_length: int
    train_lengths: tuple[int, ...]  # of training steps that are timed only
    train_seconds: float


GPU = Setup(
    device="cuda", heads=3, key=32, value=40, length=400, long=65_536, steps=20,
    lengths=(1_024, 4_096, 16_384, 65_536), shape=(8, 16), channels=(64, 128),
    model="flowformer_gpt2", tokens=16_384, train_length=1_024, train_seconds=36.0,
    train_lengths=(4_096, 16_384, 65_536),
)  # fmt: skip
DRY = Setup(
    device="cpu", heads=2, key=4, value=5, length=20, long=700, steps=2,
    lengths=(40,), shape=(1, 2), channels=(8,),
    model="flowformer_gpt_nano", tokens=64, train_length=32, train_lengths=(64,), train_seconds=0.05,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- results


class Job(NamedTuple):
    """One measurement: ``run()`` returns its figures, of which ``ok`` says whether it was right."""

    name: str
    run: Callable[[], dict[str, Any]]


class Results:
    """The lines of ``results.jsonl``; those of an earlier run in the same place count as done.

    Raises:
        ValueError: if the earlier run was on another machine or of another commit.
    """

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.lines: list[dict[str, Any]] = []
        if self.path.exists():
            self.lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        if not self.lines:
            self.add({"part": "machine", **machine})
        elif {"part": "machine", **machine} != self.lines[0]:
            raise ValueError(f"{self.path} is of another machine or commit: give another --out")

    def add(self, line: dict[str, Any]) -> None:
        """Append one line to the file."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, part: str) -> list[dict[str, Any]]:
        """The lines of one part."""
        return [line for line in self.lines if line["part"] == part]

    def run(self, part: str, jobs: Sequence[Job], limit_s: float) -> None:
        """Run the jobs that are not done yet, in their order, until time is up."""
        done = {line["name"] for line in self.of(part)}
        until = time.monotonic() + limit_s
        for job in jobs:
            if job.name not in done and time.monotonic() < until:
                self.add({"part": part, "name": job.name, **attempt(job.run)})
        missing = len({job.name for job in jobs} - {line["name"] for line in self.of(part)})
        if missing:
            print(f"{part}: out of time, {missing} of {len(jobs)} not measured", flush=True)


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a job; an exception is a failure, with the line of the library that raised it."""
    start = time.monotonic()
    try:
        figures = run()
    except torch.cuda.OutOfMemoryError:
        figures = {"ok": None, "skipped": "out of memory"}
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PACKAGE)]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        figures = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}", "where": where}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**figures, "seconds": round(time.monotonic() - start, 3)}


def machine(setup: Setup) -> dict[str, Any]:
    """What the results depend on beside the code of this file."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PACKAGE, capture_output=True, text=True, check=False)
    stamp = PACKAGE.parent / "COMMIT"  # beside a copy of the package that is no git repository
    dry = {"name": "none: a dry run on the CPU", "torch": torch.__version__}
    card = device_of(setup).describe().get("device", dry)
    return {
        "card": card.pop("name"),
        **card,
        "commit": stamp.read_text().strip() if stamp.exists() else commit.stdout.strip(),
    }


def device_of(setup: Setup) -> Device:
    """The device, which times calls and knows their memory."""
    return DEVICES[setup.device]()


# --------------------------------------------------------------------------------------------------------- correctness


class Case(NamedTuple):
    """One form of one variant of one mechanism."""

    name: str
    row: Any
    variant: Any
    causal: bool
    setup: Setup
    backend: str = "auto"

    def options(self, length: int) -> dict[str, Any]:
        """Options for sequences of up to ``length`` tokens, or of the length of checks if that is more."""
        return {**self.variant.options, **self.variant.for_length(max(length, self.setup.length))}

    @property
    def count(self) -> int:
        """How many inputs are of tokens: q, k and v, and log-decays where they are."""
        return 4 if self.variant.by_token else 3

    def parameters(self, length: int) -> list[Tensor]:
        """The learned tensors, of float32 numbers."""
        shapes, _ = self._learned(length)
        there = (shape for shape in shapes if shape is not None)
        made = [(self.variant.scale * normal(shape, seed)).float().double() for seed, shape in enumerate(there)]
        if self.variant.decays and not self.variant.by_token:
            made[0] = -made[0].abs() / 4
        return made

    def _learned(self, length: int) -> tuple[list[Any], Any]:
        """Shapes of the learned tensors, ``None`` for one that is absent, and the structure that holds them."""
        channels = (self.setup.key,) if self.variant.by_channels else ()
        shapes = self.variant.learned(length, self.setup.heads, *channels)
        return tree_flatten(shapes, is_leaf=lambda shape: isinstance(shape, torch.Size))

    def drawn(self, like: Tensor) -> list[Tensor]:
        """The random tensors that are not learned, for queries (..., heads, channels) and where they are."""
        # Numbers that every dtype has: rounded ones would be others, with other hashes.
        return [
            shape.to(like.device) if isinstance(shape, Tensor) else normal(shape, 100 + seed).bfloat16().to(like)
            for seed, shape in enumerate(self.variant.drawn(*like.shape[-2:]))
        ]

    def inputs(self, length: int, sources: int | None = None, batch: int = 2) -> list[Tensor]:
        """q, k, v, log-decays of tokens and the learned tensors: float64, on the CPU, of float32 numbers."""
        sizes = shapes_of(self.row, self.setup.heads, self.setup.key, self.setup.value)
        lengths = (length, sources or length, sources or length)
        tensors = [
            normal((batch, n, *size), seed + 7) for seed, (n, size) in enumerate(zip(lengths, sizes, strict=True))
        ]
        if self.variant.by_token:
            tensors.append(-normal((batch, length, self.setup.heads), 12).abs() / 4)
        return tensors + self.parameters(length)

    def learned(self, tensors: Tensors, length: int) -> tuple[Any, ...]:
        """What an operation takes after q, k and v, of :meth:`inputs` or of one token of them."""
        shapes, structure = self._learned(max(length, 1))
        given = iter(tensors[self.count :])
        leaves = [None if shape is None else next(given) for shape in shapes]
        return *tensors[3 : self.count], *self.drawn(tensors[0]), *tree_unflatten(leaves, structure)

    def _call(self, function: Callable[..., Any], tensors: Tensors, **arguments: Any) -> Any:
        length = tensors[0].shape[1]
        learned = self.learned(tensors, length)
        return function(*tensors[:3], *learned, causal=self.causal, **self.options(length), **arguments)

    def op(self, *tensors: Tensor, **arguments: Any) -> Any:
        """The operation on q, k, v and the learned tensors."""
        chosen = {} if self.backend == "auto" else {"backend": self.backend}
        return self._call(self.row.operation, tensors, **chosen, **arguments)

    def truth(self, *tensors: Tensor, **arguments: Any) -> Any:
        """The reference on the same."""
        return self._call(self.row.truth, tensors, **arguments)

    def step(self, tensors: Tensors, state: Any) -> tuple[Tensor, Any]:
        """One token, of tensors without the axis of length."""
        length = self.setup.length
        return self.row.step(*tensors[:3], state, *self.learned(tensors, length), **self.options(length))


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Random numbers of float32, as float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def cases(setup: Setup, names: Sequence[str]) -> Iterator[Case]:
    """Every form of the variants of the mechanisms: first by the backends that run only on request.

    Mechanisms in plain PyTorch alone come last, in their first variant: time goes first to kernels.
    """
    every = []
    for row in sorted(map(find_attention, names), key=lambda row: not has_kernels(row)):
        variants = list(variants_of(row).items())
        for label, variant in variants if has_kernels(row) else variants[:1]:
            for form, causal in (("bidirectional", False), ("causal", True))[: 2 if row.can("causal") else 1]:
                if variant.only in ("", form):
                    every.append(Case(f"{row.name} {label} {form}", row, variant, causal, setup))
    for case in every:
        for backend in backends_of(case.row.operation.__name__):
            asked = case._replace(name=f"{case.name} {backend.name}", backend=backend.name)
            if backend.by_request and computes(asked):
                yield asked
    yield from every


def has_kernels(row: Any) -> bool:
    """Whether an operation has backends besides plain PyTorch."""
    return len(backends_of(row.operation.__name__)) > 1


def computes(case: Case) -> bool:
    """Whether the case's backend computes it here."""
    tensors = [t.to(case.setup.device, torch.float32) for t in case.inputs(1)]
    try:
        return explain(case.op, *tensors).backend == case.backend
    except ValueError:
        return False


def evaluate(function: Callable[..., Tensor], tensors: Tensors, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of a fixed combination of it, as float64 on the CPU."""
    leaves = [t.detach().to(device, dtype, copy=True).requires_grad_() for t in tensors]
    out = function(*leaves)
    if out.dtype != dtype and device != "cpu":
        raise TypeError(f"the output is {out.dtype}, the inputs are {dtype}")
    eighths = torch.randint(-16, 17, out.shape, generator=torch.Generator().manual_seed(5)) / 8  # exact in any dtype
    grads = torch.autograd.grad(out, leaves, eighths.to(out))
    return [t.detach().double().cpu() for t in (out, *grads)]


def compare(got: Tensors, want: Tensors, tolerance: float) -> dict[str, Any]:
    """The largest difference relative to the largest element, over outputs and gradients."""
    errors = [_largest(g - w) / max(_largest(w), 1e-30) for g, w in zip(got, want, strict=True)]
    return _worst(errors, tolerance)


def compare_half(got: Tensors, want: Tensors, rounded: Tensors, dtype: torch.dtype) -> dict[str, Any]:
    """The error relative to twice that of rounding the inputs, and one rounding of the result."""
    errors = []
    for g, w, r in zip(got, want, rounded, strict=True):
        allowed = 2 * _largest(r - w) + torch.finfo(dtype).eps / 2 * _largest(w)
        errors.append(_largest(g - w) / max(allowed, 1e-30))
    return _worst(errors, 1.0)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _worst(errors: Sequence[float], tolerance: float) -> dict[str, Any]:
    names = ["out", "dq", "dk", "dv", *(f"dp{index}" for index in range(len(errors)))]
    # NaN is the worst of all.
    worst = max(range(len(errors)), key=lambda i: math.inf if math.isnan(errors[i]) else errors[i])
    return {"ok": errors[worst] <= tolerance, "error": errors[worst], "of": names[worst], "allowed": tolerance}


def check_dtypes(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Outputs and gradients in one dtype."""
    exact, device = case.inputs(case.setup.length), case.setup.device
    got, want = evaluate(case.op, exact, device, dtype), truth_of(case)
    if dtype in TOLERANCE:
        return compare(got, want, TOLERANCE[dtype])
    rounded = evaluate(case.truth, [t.to(dtype) for t in exact], "cpu", torch.float64)
    return compare_half(got, want, rounded, dtype)


_TRUTHS: dict[Any, list[Tensor]] = {}


def truth_of(case: Case) -> list[Tensor]:
    """Outputs and gradients of the reference; kept, since several checks want them."""
    key = (case.name, case.setup.length, id(case.row))
    if key not in _TRUTHS:
        _TRUTHS[key] = evaluate(case.truth, case.inputs(case.setup.length), "cpu", torch.float64)
    return _TRUTHS[key]


def check_cross(case: Case) -> dict[str, Any]:
    """Another number of queries than of keys."""
    tensors = case.inputs(case.setup.length, case.setup.length // 2)
    got = evaluate(case.op, tensors, case.setup.device, torch.float32)
    return compare(got, evaluate(case.truth, tensors, "cpu", torch.float64), TOLERANCE[torch.float32])


def check_padding(case: Case) -> dict[str, Any]:
    """NaN at padding, which lies anywhere."""
    tensors, length = case.inputs(case.setup.length), case.setup.length
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < torch.tensor([[0.8], [0.3]])
    poisoned = [t.masked_fill(~mask.view(2, length, *(1,) * (t.ndim - 2)), math.nan) for t in tensors[: case.count]]
    on_device = {"mask": mask.to(case.setup.device)}
    got = evaluate(
        lambda *t: case.op(*t, **on_device), poisoned + tensors[case.count :], case.setup.device, torch.float32
    )
    want = evaluate(lambda *t: case.truth(*t, **{"mask": mask}), tensors, "cpu", torch.float64)
    return compare(got, want, TOLERANCE[torch.float32])


def check_packing(case: Case) -> dict[str, Any]:
    """Several sequences in one, an empty one among them."""
    length = case.setup.length
    bounds = torch.tensor([0, 3, 4, 4, length // 2, length], dtype=torch.int32)
    tensors, device = case.inputs(length, batch=1), case.setup.device
    got = evaluate(lambda *t: case.op(*t, cu_seqlens=bounds.to(device)), tensors, device, torch.float32)
    want = evaluate(lambda *t: case.truth(*t, cu_seqlens=bounds), tensors, "cpu", torch.float64)
    return compare(got, want, TOLERANCE[torch.float32])


def check_steps(case: Case) -> dict[str, Any]:
    """Half of a sequence at once, and some tokens one by one from its state."""
    tensors = case.inputs(case.setup.length)
    on_device = [t.to(case.setup.device, torch.float32) for t in tensors]
    split, stop = case.setup.length // 2, case.setup.length // 2 + case.setup.steps
    of_tokens, learned = on_device[: case.count], on_device[case.count :]
    out, state = case.op(*(t[:, :split] for t in of_tokens), *learned, return_state=True)
    outs = [out]
    for token in range(split, stop):
        out, state = case.step([*(t[:, token] for t in of_tokens), *learned], state)
        outs.append(out.unsqueeze(1))
    got = torch.cat(outs, 1).double().cpu()
    return compare([got], [case.truth(*tensors)[:, : got.shape[1]]], TOLERANCE[torch.float32])


def check_autocast(case: Case) -> dict[str, Any]:
    """Autocast to bfloat16 changes nothing: operations choose the precision of their sums."""
    device = case.setup.device

    def op(*tensors: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return case.op(*tensors)

    got = evaluate(op, case.inputs(case.setup.length), device, torch.float32)
    return compare(got, truth_of(case), TOLERANCE[torch.float32])


def check_no_waiting(case: Case) -> dict[str, Any]:
    """The host never waits for the device, with and without padding, forward and backward."""
    if case.setup.device != "cuda":
        return {"ok": None, "skipped": "no GPU"}
    leaves = [t.to("cuda", torch.float32).requires_grad_() for t in case.inputs(case.setup.length)]
    mask = torch.ones(2, case.setup.length, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for arguments in ({}, {"mask": mask}):
            out = case.op(*leaves, **arguments)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


def check_reference(case: Case) -> dict[str, Any]:
    """The reference itself gives on the device what it gives on the CPU."""
    got = evaluate(case.truth, case.inputs(case.setup.length), case.setup.device, torch.float64)
    return compare(got, truth_of(case), TOLERANCE[torch.float64])


def check_drift(case: Case) -> dict[str, Any]:
    """float32 against float64 on the device: like tokens, where sums drift, and random ones."""
    device, long = case.setup.device, case.setup.long
    found = []
    for alike in (True, False):
        tensors = [t[:, :1].expand(-1, long, *t.shape[2:]) for t in case.inputs(1, batch=1)[: case.count]]
        tensors = (tensors if alike else case.inputs(long, batch=1)[: case.count]) + case.parameters(long)
        got, want = (evaluate(case.op, tensors, device, dtype) for dtype in (torch.float32, torch.float64))
        # Like tokens compete in vain, so that gradients of q and k are nothing but rounding.
        kept = [0, 3] if alike else range(len(got))
        found.append(compare([got[i] for i in kept], [want[i] for i in kept], TOLERANCE[torch.float32]))
    return max(found, key=lambda figures: math.inf if math.isnan(figures["error"]) else figures["error"])


def check_module(case: Case) -> dict[str, Any]:
    """The module and its steps in float32, against the same module in float64 on the CPU."""
    setup, name = case.setup, case.name.split()[0]
    torch.manual_seed(0)
    module = create_attention(name, 24, setup.heads, causal=case.causal, max_length=setup.length).double()
    x = normal((2, setup.length, 24), 11)
    want = evaluate(module, [x], "cpu", torch.float64)
    module = module.to(setup.device, torch.float32)
    got = evaluate(module, [x], setup.device, torch.float32)
    if case.causal:
        state, outs = module.init_state(2), []
        with torch.no_grad():
            for token in x[:, : setup.steps].to(setup.device, torch.float32).unbind(1):
                out, state = module.step(token, state)
                outs.append(out)
        got, want = [*got, torch.stack(outs, 1).double().cpu()], [*want, want[0][:, : setup.steps]]
    return compare(got, want, 2 * TOLERANCE[torch.float32])  # of projections too


def of_dtype(of: Sequence[Case], dtype: torch.dtype) -> list[Case]:
    """Those that are computed in a dtype."""
    return [case for case in of if case.backend == "auto" or dtype in find_backend(case.backend).dtypes]


def correctness(setup: Setup, names: Sequence[str]) -> list[Job]:
    """The most telling checks first; those of mechanisms in plain PyTorch alone after all others."""
    every = list(cases(setup, names))
    linear = [case for case in every if case.row.can("linear time", "linear memory") and not case.variant.quadratic]
    linear = [case for case in linear if not case.variant.same_loops]  # sums drift in loops
    first = [case for case in every if case.variant is next(iter(variants_of(case.row).values()))]
    checks: list[tuple[str, Callable[[Case], dict[str, Any]], Sequence[Case]]] = [
        ("float32", functools.partial(check_dtypes, dtype=torch.float32), every),
        ("bfloat16", functools.partial(check_dtypes, dtype=torch.bfloat16), of_dtype(every, torch.bfloat16)),
        ("float16", functools.partial(check_dtypes, dtype=torch.float16), every),
        ("padding", check_padding, every),
        ("packing", check_packing, every),
        ("steps", check_steps, [case for case in every if case.causal and case.row.can("state")]),
        ("module", check_module, [case for case in first if case.backend == "auto"]),
        ("no waiting", check_no_waiting, every),
        (
            "cross",
            check_cross,
            [case for case in every if case.row.can("cross") and not case.causal and not case.variant.decays],
        ),
        ("autocast", check_autocast, first),
        ("reference", check_reference, [case for case in first if case.backend == "auto"]),
        ("float64", functools.partial(check_dtypes, dtype=torch.float64), of_dtype(every, torch.float64)),
        ("drift", check_drift, [case for case in linear if case in first]),
        ("drift", check_drift, [case for case in linear if case not in first]),
    ]
    jobs = [
        (case, Job(f"{case.name}: {kind}", functools.partial(check, case))) for kind, check, of in checks for case in of
    ]
    return [job for _, job in sorted(jobs, key=lambda pair: not has_kernels(pair[0].row))]


# --------------------------------------------------------------------------------------------------------------- times


class Contender(NamedTuple):
    """What is timed: ``op(q, k, v, causal=...)`` on (batch, length, heads, channels), and its reference."""

    op: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    forms: tuple[bool, ...] = (True, False)  # causal, bidirectional
    ours: bool = True
    heads_first: bool = False  # the layout that it likes


def flow(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Flow-Attention as the library runs it."""
    return ops.flow_attention(q, k, v, causal=causal)


def contenders(setup: Setup) -> dict[str, Contender]:
    """Everything that can run here, by name."""
    rows = {
        "flow": Contender(flow, reference.flow_attention),
        "softmax (flash)": Contender(sdpa_flash, reference.softmax_attention, ours=False, heads_first=True),
        "linear": Contender(ops.linear_attention, reference.linear_attention),
    }
    if setup.device == "cuda":
        by_triton = functools.partial(ops.flow_attention, backend="triton")
        decay = {"decay": "fixed"}
        decayed = functools.partial(by_triton, **decay), functools.partial(reference.flow_attention, **decay)
        rows["flow (Triton)"] = Contender(by_triton, reference.flow_attention)
        rows["flow, decay (Triton)"] = Contender(*decayed)
        linear = functools.partial(ops.linear_attention, backend="triton")
        rows["linear (Triton)"] = Contender(linear, reference.linear_attention)
        if missing := fla_missing():
            print(f"linear (fla) is left out: {missing}")
        else:
            rows["linear (fla)"] = Contender(fla_linear, reference.linear_attention, forms=(True,), ours=False)
    return rows


class Bench:
    """Checks and times on one device."""

    def __init__(self, setup: Setup, rows: dict[str, Contender]) -> None:
        self.setup, self.rows, self.device = setup, rows, device_of(setup)
        self.dtype = torch.bfloat16
        self.checked: dict[Any, dict[str, Any]] = {}

    def inputs(self, batch: int, length: int, heads: int, channels: int, heads_first: bool) -> list[Tensor]:
        """q, k, v and a gradient of the output."""
        torch.manual_seed(length)
        shape = (batch, heads, length, channels) if heads_first else (batch, length, heads, channels)
        tensors = [torch.randn(shape, device=self.setup.device, dtype=self.dtype) for _ in range(4)]
        return [t.transpose(1, 2) for t in tensors] if heads_first else tensors

    def check(self, name: str, causal: bool, channels: int) -> dict[str, Any]:
        """Outputs and gradients against the reference; once for each form and number of channels."""
        key = (name, causal, channels)
        if key not in self.checked:
            self.checked[key] = attempt(lambda: self._check(self.rows[name], causal, channels))
        return self.checked[key]

    def _check(self, row: Contender, causal: bool, channels: int) -> dict[str, Any]:
        exact = [normal((1, self.setup.lengths[0], 2, channels), seed) for seed in range(3)]
        truth = functools.partial(row.truth, causal=causal)
        got = evaluate(functools.partial(row.op, causal=causal), exact, self.setup.device, self.dtype)
        rounded = evaluate(truth, [t.to(self.dtype) for t in exact], "cpu", torch.float64)
        if not row.ours:
            return compare(got, rounded, PEER_TOLERANCE)
        return compare_half(got, evaluate(truth, exact, "cpu", torch.float64), rounded, self.dtype)

    def call(self, row: Contender, causal: bool, backward: bool, inputs: Tensors) -> Callable[[], Any]:
        """What is timed."""
        *tensors, upstream = inputs
        if not backward:
            return lambda: row.op(*tensors, causal=causal)
        leaves = [t.detach().requires_grad_() for t in tensors]
        return lambda: torch.autograd.grad(row.op(*leaves, causal=causal), leaves, upstream)

    def group(self, causal: bool, backward: bool, length: int, channels: int) -> dict[str, Any]:
        """All contenders at one shape, in turns. Only what is right takes part."""
        batch, heads = self.setup.shape
        inputs = {first: self.inputs(batch, length, heads, channels, first) for first in (False, True)}
        calls, figures = {}, {}
        for name, row in self.rows.items():
            if causal in row.forms:
                found = self.check(name, causal, channels)
                figures[name] = {"check": found}
                if found["ok"]:
                    calls[name] = self.call(row, causal, backward, inputs[row.heads_first])
        for name in list(calls):
            figures[name] |= self.memory(calls, name)
        for name in ("flow", "flow (Triton)"):
            if name in calls and not backward and length <= 16_384:
                calls |= self.graphed(name, calls[name], figures)
        return self.timed(calls, figures)

    def timed(self, calls: dict[str, Callable[[], Any]], figures: dict[str, Any]) -> dict[str, Any]:
        """The figures with the times of the calls."""
        for name, times in self.in_turns(calls).items():
            measured = {"ms": 1e3 * statistics.median(times), "least_ms": 1e3 * min(times), "calls": len(times)}
            figures.setdefault(name, {}).update(measured)
        return {"ok": all(f.get("check", {}).get("ok", True) for f in figures.values()), "contenders": figures}

    def memory(self, calls: dict[str, Callable[[], Any]], name: str) -> dict[str, Any]:
        """Peak memory of a call above what is held before it; a call that runs out of memory leaves the race."""
        try:
            calls[name]()  # compiles and tunes what is compiled and tuned
            return {"peak_bytes": self.device.peak_bytes(calls[name]) or 0}
        except torch.cuda.OutOfMemoryError:
            del calls[name]
            return {"skipped": "out of memory"}
        except Exception as error:
            del calls[name]
            return {"check": {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}}
        finally:
            self.device.clear()

    def graphed(self, name: str, call: Callable[[], Tensor], figures: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        """The same call as one CUDA graph, without the host's work between kernels; its result must be the same."""
        if self.setup.device != "cuda":
            return {}
        name = f"{name}, CUDA graph"
        try:
            want, graph = call(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = call()
            graph.replay()
            apart = _largest((out - want).float()) / _largest(want.float())
            figures[name] = {"check": {"ok": apart <= 2 * torch.finfo(self.dtype).eps, "error": apart}}
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            figures[name] = {"skipped": str(error)[:200]}
            return {}
        return {name: graph.replay} if figures[name]["check"]["ok"] else {}

    def in_turns(self, calls: dict[str, Callable[[], Any]], seconds: float = 2.0) -> dict[str, list[float]]:
        """Seconds of each, called by turns: 3 times at least, 20 times at most."""
        each = seconds / max(len(calls), 1) if self.setup.device == "cuda" else 0.0
        estimates = {name: estimate(call, each / 10, self.device.cost) for name, call in calls.items()}
        return interleave(calls, schedule(estimates, each, repeats=20), clock=self.device.seconds)

    def limits(self) -> dict[str, Any]:
        """What the card can do: a copy, and matrix products."""
        found = make_limits(2_048 if self.setup.device == "cuda" else 16, 1.0, self.device)
        times = self.in_turns({limit.name: limit.run for limit in found})
        rates = {limit.name: limit.work / statistics.median(times[limit.name]) / 1e3 for limit in found}
        names = {"copy": "copy_TB_s", "bf16 gemm": "bf16_TFLOP_s", "sgemm": "fp32_TFLOP_s", "fp16 gemm": "fp16_TFLOP_s"}
        return {"ok": True, **{names[name]: rate for name, rate in rates.items()}}

    def steps(self) -> dict[str, Any]:
        """One token of decoding: the state of Flow-Attention and of linear attention, and stored keys and values."""
        (batch, heads), channels, device = self.setup.shape, self.setup.channels[0], self.setup.device
        make = functools.partial(torch.randn, batch, heads, channels, device=device, dtype=self.dtype)
        token, calls, figures = (make(), make(), make()), {}, {}
        for name in ("flow", "linear"):
            figures[name] = {"check": attempt(functools.partial(self._check_step, name))}
            row = find_attention(name)
            state = row.init_state(batch, heads, channels, channels, dtype=self.dtype, device=device)
            if figures[name]["check"]["ok"]:
                calls[name] = functools.partial(row.step, *token, state)
        if "flow" in calls and "triton" in step_backends(device, self.dtype):
            calls["flow (Triton)"] = functools.partial(calls["flow"], backend="triton")
            found = attempt(lambda: compare_steps(calls["flow (Triton)"], calls["flow"], self.dtype))
            figures["flow (Triton)"] = {"check": found}
            calls = {name: call for name, call in calls.items() if figures[name]["check"]["ok"]}
        for name in [name for name in calls if name.startswith("flow")]:
            step = calls[name]
            calls |= self.graphed(name, lambda step=step: step()[0], figures)
        query = token[0].unsqueeze(2)
        for length in self.setup.lengths[:3]:
            shape, name = (batch, heads, length, channels), f"softmax, {length} stored"
            stored = [torch.randn(shape, device=device, dtype=self.dtype) for _ in range(2)]
            figures[name] = {"check": attempt(functools.partial(check_stored, query, *stored))}
            if figures[name]["check"]["ok"]:
                calls[name] = functools.partial(scaled_dot_product_attention, query, *stored)
        return self.timed(calls, figures)

    def _check_step(self, name: str) -> dict[str, Any]:
        case = next(c for c in cases(self.setup, [name]) if c.causal)
        return check_steps(case)


def step_backends(device: str, dtype: torch.dtype) -> list[str]:
    """The backends that compute a step of Flow-Attention on a device."""
    return [row.name for row in backends_of("flow_attention_step") if not row.refuses(device, dtype)]


def compare_steps(one: Callable[[], Any], other: Callable[[], Any], dtype: torch.dtype) -> dict[str, Any]:
    """Outputs of a step, and states after it, by two backends: both round the same sums, of float64."""
    (out, state), (want, after) = one(), other()
    found = compare([out.double()], [want.double()], 2 * torch.finfo(dtype).eps)
    return found if not found["ok"] else {**found, **compare(list(state), list(after), 1e-5)}


def generation(setup: Setup) -> dict[str, Any]:
    """New tokens a second of a whole model, by single kernels and by one CUDA graph a token: the same tokens."""
    torch.manual_seed(0)
    count, on_gpu = (512, True) if setup.device == "cuda" else (4, False)
    prompts = torch.randint(256, (8, 16))
    model = build(setup.model, "flow", prompts.shape[1] + count).to(setup.device)
    ways: dict[str, dict[str, Any]] = {"kernels": {}, **({"CUDA graph": {"cuda_graph": True}} if on_gpu else {})}
    rows, speeds = {}, {}
    for name, options in ways.items():
        write = functools.partial(model.generate, prompts, temperature=0.8, seed=0, **options)
        write(max_new_tokens=2)
        start = time.perf_counter()
        rows[name] = torch.stack(write(max_new_tokens=count)).cpu()
        speeds[f"{name}_tokens_per_s"] = prompts.shape[0] * count / (time.perf_counter() - start)
    same = all(torch.equal(found, rows["kernels"]) for found in rows.values())
    return {"ok": same, "batch": prompts.shape[0], "new_tokens": count, **speeds}


def check_stored(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Any]:
    """Softmax attention of one token to stored keys and values, (batch, heads, length, channels)."""
    got = scaled_dot_product_attention(query, keys, values)
    scores = query.double() @ keys.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    return compare([got.double()], [scores.softmax(-1) @ values.double()], PEER_TOLERANCE)


def compiled(setup: Setup) -> dict[str, Contender]:
    """Flow-Attention as it is, and by torch.compile."""
    row = Contender(flow, reference.flow_attention)
    return {"flow": row, "flow (compiled)": row._replace(op=torch.compile(flow, dynamic=False))}


def times(setup: Setup) -> list[Job]:
    """The first number of channels at every length; compiled; other numbers of channels but at the longest."""
    bench, groups = Bench(setup, contenders(setup)), []
    for channels in setup.channels:
        lengths = setup.lengths if channels == setup.channels[0] else setup.lengths[:-1]
        groups += [(c, b, length, channels) for b in (False, True) for c in (True, False) for length in lengths]
    jobs = [Job(shape_name(*group), functools.partial(bench.group, *group)) for group in groups]
    first = 4 * len(setup.lengths)
    apart = Bench(setup, compiled(setup)) if setup.device == "cuda" else bench
    length, channels = setup.lengths[-1] if setup.device != "cuda" else 16_384, setup.channels[0]
    of_compiled = [
        Job(
            f"compiled: {shape_name(False, back, length, channels)}",
            functools.partial(apart.group, False, back, length, channels),
        )
        for back in (False, True)
    ]
    limits, token = Job("limits of the card", bench.limits), Job("one token", bench.steps)
    written = Job("generation", functools.partial(generation, setup))
    return [limits, *jobs[:first], token, written, *jobs[first:], *of_compiled]


def shape_name(causal: bool, backward: bool, length: int, channels: int) -> str:
    """What is timed, in words."""
    form, passes = "causal" if causal else "bidirectional", "forward+backward" if backward else "forward"
    return f"{form} {passes}, {channels} channels, length {length}"


# ------------------------------------------------------------------------------------------------------------ training


class Text:
    """Bytes to learn from, of which the last tenth is held out."""

    def __init__(self, path: Path | None, device: str) -> None:
        if path is None:  # no file given: the library's own source
            files = sorted(PACKAGE.rglob("*.py"))
            data = b"".join(file.read_bytes() for file in files)
        else:
            data = path.read_bytes()
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        self.train, self.held_out = whole.split([len(whole) - len(whole) // 10, len(whole) // 10])

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Random pieces, and the bytes that follow each byte of them."""
        starts = torch.randint(len(self.train) - length - 1, (rows, 1), device=self.train.device)
        pieces = self.train[starts + torch.arange(length + 1, device=starts.device)].long()
        return pieces[:, :-1], pieces[:, 1:]

    def test(self, rows: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Held-out bytes, 16 batches at most."""
        count = min(16 * rows, (len(self.held_out) - 1) // length)
        tokens = self.held_out[: count * length + 1].long()
        inputs, targets = (t.view(count, length).split(rows) for t in (tokens[:-1], tokens[1:]))
        yield from zip(inputs, targets, strict=True)


class Trainer:
    """A language model of bytes with one of the mechanisms, in bfloat16 by autocast."""

    def __init__(self, setup: Setup, attention: str, text: Text, length: int) -> None:
        torch.manual_seed(0)
        self.setup, self.text, self.length, self.device = setup, text, length, device_of(setup)
        attention, self.backend = of_backend(attention)
        self.rows = max(1, setup.tokens // length)
        self.model = build(setup.model, attention, length).to(setup.device)
        groups = self.model.parameters()
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
        self.count = 0

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats."""
        with torch.autocast(self.setup.device, torch.bfloat16), chosen(self.backend):
            return self.model.loss(tokens, targets)

    def step(self) -> None:
        """One step of the optimizer, with a rate that rises for 100 steps."""
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, self.count / 100)
        self.loss(*self.text.batch(self.rows, self.length)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run_steps(self, count: int, seconds: float) -> float:
        """Some steps, fewer if time is up, with a look at the clock after every ten; returns the time they took."""
        start = self.wait()
        for index in range(count):
            self.step()
            if index % 10 == 9 and self.wait() - start > seconds:
                break
        return self.wait() - start

    @torch.no_grad()
    def bits_per_byte(self) -> float:
        """Mean cross-entropy of held-out bytes, in bits."""
        self.model.eval()
        losses = [self.loss(*batch).double() for batch in self.text.test(self.rows, self.length)]
        self.model.train()
        return (torch.stack(losses).mean() / math.log(2)).item()

    def wait(self) -> float:
        """The time when the device has done all that it was given."""
        self.device.synchronize()
        return time.monotonic()

    def waits(self) -> int:
        """How often the host waits for the device in one step."""
        if self.setup.device != "cuda":
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.step()
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


def of_backend(attention: str) -> tuple[str, str | None]:
    """The mechanism, and the backend after it in parentheses, where one is named."""
    name, _, backend = attention.partition(" (")
    return name, backend.rstrip(")").lower() or None


def build(name: str, attention: str, length: int) -> Any:
    """A model of bytes."""
    return create_model(name, vocab_size=256, max_length=length, attention=attention)


@functools.cache
def check_model(setup: Setup, attention: str, text: Text) -> dict[str, Any]:
    """Loss and gradients of a small model in float32, against float64 on the CPU; the loss in autocast, coarsely."""
    torch.manual_seed(1)
    attention, backend = of_backend(attention)
    model = build("flowformer_gpt_nano", attention, 64).double().eval()
    batch = [t.cpu() for t in text.batch(2, 64)]
    want = with_gradients(model, batch)
    model, batch = model.to(setup.device, torch.float32), [t.to(setup.device) for t in batch]
    with chosen(backend):
        figures = compare(with_gradients(model, batch), want, 1e-4)
    with torch.autocast(setup.device, torch.bfloat16), chosen(backend):
        apart = abs(model.loss(*batch).item() / want[0].item() - 1)
    return {**figures, "ok": figures["ok"] and apart < 1e-2, "autocast_error": apart}


def with_gradients(model: Any, batch: Tensors) -> list[Tensor]:
    """The loss, and the gradients of all parameters side by side: some, alone, are nothing but rounding."""
    loss = model.loss(*batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach().double().cpu(), torch.cat([g.flatten() for g in grads]).double().cpu()]


def train(setup: Setup, attention: str, text: Text) -> dict[str, Any]:
    """Train for a fixed time; held-out bits per byte every 100 steps (not counted) and in the end."""
    found = check_model(setup, attention, text)
    if not found["ok"]:
        return found
    trainer, curve, spent = Trainer(setup, attention, text, setup.train_length), [], 0.0
    waits = trainer.waits()
    trainer.step()
    before = trainer.count
    reset_peak(setup)
    while spent < setup.train_seconds:
        spent += trainer.run_steps(100 if setup.device == "cuda" else 1, setup.train_seconds - spent)
        curve.append({"step": trainer.count, "s": round(spent, 2), "bits_per_byte": trainer.bits_per_byte()})
    speed = (trainer.count - before) * trainer.rows * trainer.length / spent
    return {
        "ok": True,
        "check": found,
        "tokens_per_s": speed,
        "peak_bytes": peak(setup),
        "waits": waits,
        "curve": curve,
    }


def throughput(setup: Setup, attention: str, text: Text, length: int) -> dict[str, Any]:
    """Tokens a second of training steps at one length, without training on."""
    found = check_model(setup, attention, text)
    if not found["ok"]:
        return found
    trainer = Trainer(setup._replace(tokens=4 * setup.tokens), attention, text, length)
    trainer.step()
    reset_peak(setup)
    seconds = []
    for _ in range(5):
        start = trainer.wait()
        trainer.step()
        seconds.append(trainer.wait() - start)
    tokens = trainer.rows * length
    return {
        "ok": True,
        "tokens_per_s": tokens / statistics.median(seconds),
        "peak_bytes": peak(setup),
        "tokens": tokens,
    }


def reset_peak(setup: Setup) -> None:
    """Start to look for the largest memory."""
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(setup: Setup) -> int:
    """The largest memory since, in bytes, weights and optimizer included."""
    return torch.cuda.max_memory_allocated() if setup.device == "cuda" else 0


def training(setup: Setup, data: Path | None) -> list[Job]:
    """Training first, then training steps at longer lengths."""
    of_flow = "flow (Triton)" if setup.device == "cuda" else "flow"
    text, names = Text(data, setup.device), (of_flow, "softmax", "linear")
    jobs = [
        Job(
            f"{name}, {setup.train_seconds:g} s at length {setup.train_length}",
            functools.partial(train, setup, name, text),
        )
        for name in names
    ]
    for length in setup.train_lengths:
        for name in names:
            run = functools.partial(throughput, setup, name, text, length)
            jobs.append(Job(f"{name}, steps at length {length}", run))
    return jobs


# -------------------------------------------------------------------------------------------------------------- tables


def show(results: Results) -> bool:
    """Print everything; whether nothing failed."""
    print(*(f"{key} {value}" for key, value in results.lines[0].items() if key != "part"), sep=", ")
    show_correctness(results.of("correctness"))
    for line in results.of("times"):
        show_times(line)
    for line in results.of("training"):
        show_training(line)
    failed = [line for whole in results.lines for line in failures(whole)]
    print(f"\n{len(failed)} failed")
    for line in failed:
        print(
            " ",
            line["part"],
            "|",
            line["name"],
            "|",
            *(f"{k} {line[k]}" for k in ("error", "of", "where") if k in line),
        )
    return not failed


def failures(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The line itself, if it failed, or what failed in it."""
    checks = [(name, figures.get("check", {})) for name, figures in line.get("contenders", {}).items()]
    wrong = [{**line, **check, "name": f"{line['name']}: {name}"} for name, check in checks if check.get("ok") is False]
    return wrong or ([line] if line.get("ok") is False else [])


def show_correctness(lines: Sequence[dict[str, Any]]) -> None:
    """How many of each kind of check were right, and the worst error relative to what is allowed."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(line["name"].rpartition(": ")[2], []).append(line)
    for kind, of in kinds.items():
        shares = [line["error"] / line["allowed"] for line in of if line["ok"] and "allowed" in line]
        skipped = sum(line["ok"] is None for line in of)
        worst = f", worst {max(shares):.2f} of the allowed error" if shares else ""
        print(f"{kind:12s} {sum(line['ok'] is True for line in of)} of {len(of) - skipped} right{worst}")


def show_times(line: dict[str, Any]) -> None:
    """One line for each contender; without a time where the result was wrong."""
    print(f"\n{line['name']}", *(f"{key} {line[key]:.3g}" for key in line if key.endswith("_s")))
    for name, figures in line.get("contenders", {}).items():
        if "ms" in figures:
            peak_mb = f"{figures['peak_bytes'] / 1e6:10.1f} MB" if "peak_bytes" in figures else ""
            print(f"  {name:24s}{figures['ms']:10.4f} ms{peak_mb}")
        else:
            print(f"  {name:24s}{figures.get('skipped') or 'wrong, not timed'}")


def show_training(line: dict[str, Any]) -> None:
    """Speed, memory and the last point of the curve."""
    if not line.get("tokens_per_s"):
        print(f"\n{line['name']}: {line.get('skipped', 'failed')}")
        return
    last = line.get("curve", [{}])[-1]
    print(f"\n{line['name']}: {line['tokens_per_s']:,.0f} tokens/s, {line['peak_bytes'] / 1e9:.2f} GB", last)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of results.jsonl")
    parser.add_argument("--only", choices=LIMITS_S, help="one part")
    parser.add_argument("--mechanisms", default=",".join(list_attentions()), help="those whose correctness is checked")
    parser.add_argument("--data", type=Path, help="file of bytes to train on; the library's source if absent")
    parser.add_argument("--dry-run", action="store_true", help="everything in small on the CPU")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA GPU here: --dry-run does without")
    setup = DRY if given.dry_run else GPU
    results = Results(given.out, machine(setup))
    parts = {
        "correctness": lambda: correctness(setup, given.mechanisms.split(",")),
        "times": lambda: times(setup),
        "training": lambda: training(setup, given.data),
    }
    for part, jobs in parts.items():
        if given.only in (None, part):
            results.run(part, jobs(), LIMITS_S[part])
    return 0 if show(results) else 1


if __name__ == "__main__":
    sys.exit(main())
