"""Compile the Triton kernels for a GPU, without one: registers, spills, shared memory, matrix units.

    python tests/kernels/triton/compiled.py --target 90 --dtype bfloat16 --channels 64        one JSON line per kernel

The launches are those of both passes of every form of every mechanism, recorded in place of being run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from flowformer import ops
from flowformer.kernels.triton import device, launch, linear
from flowformer.kernels.triton.attend import GIVEN
from flowformer.mechanisms.aft.triton import CHUNK, walk
from flowformer.mechanisms.aft.triton.step import run_step as run_aft_step
from flowformer.mechanisms.flow.equations import Learned
from flowformer.mechanisms.flow.options import PRESETS
from flowformer.mechanisms.flow.triton import bidirectional, causal, decayed
from flowformer.mechanisms.flow.triton.setting import Flows
from flowformer.mechanisms.flow.triton.step import run_step
from flowformer.mechanisms.linear.triton.step import run_step as run_linear_step
from flowformer.mechanisms.mobile.options import MobileOptions
from flowformer.mechanisms.mobile.triton.step import run_step as run_mobile_step

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.int64: "i64",
}  # fmt: skip
SHOWN = ("C", "BM", "BO", "DOT", "DECAY", "REVERSE", "LOCAL", "OTHER", "WEIGHTED", "num_warps", "num_stages")
COMPILER = ("num_warps", "num_stages")


class Launches:
    """Launches by what they are compiled for."""

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Any, ASTSource, dict[str, Any]]] = {}

    def record(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Take the place of ``launch.run``."""
        compiler = {name: options.pop(name) for name in COMPILER if name in options}
        signature, constants, attributes = {}, dict(options), {}
        for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
            name = parameter.name
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and not parameter.do_not_specialize:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        signature.update(dict.fromkeys(options, "constexpr"))
        ordered = {parameter.name: signature[parameter.name] for parameter in kernel.params}
        key = (kernel.fn.__name__, str(ordered), str(constants), str(compiler))
        self.found.setdefault(key, (kernel, ASTSource(kernel, ordered, constants, attributes), compiler))


def record(dtype: torch.dtype, channels: int, length: int = 1_024) -> Launches:
    """Record both passes of every form for inputs of a dtype, with as many channels of keys as of values."""
    launches = Launches()
    before, launch.run = launch.run, launches.record
    try:
        q, k, v = (torch.randn(1, length, 2, channels).to(dtype) for _ in range(3))
        _linear(q, k, v)
        if dtype == torch.float32:
            _features(channels, length)
        _aft(*(x.flatten(2) for x in (q, k, v)))
        _steps(q[:, 0], k[:, 0], v[:, 0])
        numbers = torch.ones(2, length)
        for log_decay, preset in ((None, "core"), (-torch.rand(1, length, 2), "distance")):
            options = PRESETS[preset].values()
            state = ops.init_flow_state(1, 2, channels, channels)
            learned = Learned(log_decay)
            causal.forward(q, k, v, None, learned, state, options)
            flows = Flows(numbers, numbers, numbers, numbers)
            given = (v, flows, v, [None] * 4, log_decay is not None)
            causal.backward(q, k, v, None, learned, state, options, *given)
            of_token = Learned(None if log_decay is None else log_decay[:, 0], torch.ones(3, 2))
            for one in (of_token, of_token._replace(temperatures=None)):
                run_step(q[:, 0], k[:, 0], v[:, 0], one, state, options)
            form = bidirectional if log_decay is None else decayed
            form.forward(q, k, v, None, None, learned, options)
            flat = torch.ones(8 * length)
            form.backward(q, k, v, None, None, learned, options, v, flat, v, log_decay is not None)
    finally:
        launch.run = before
    return launches


def _linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Linear attention by elu divided by sums of weights, and by sigmoid with weights and scales (Mobile-Attention)."""
    _, length, heads, channels = q.shape
    number = torch.ones(1, length, heads)
    keys, memory = torch.zeros(1, heads, channels).double(), torch.zeros(1, heads, channels, channels).double()
    totals = torch.ones(heads, length)
    for log_decay in (None, -number):
        for with_state in (True, False):
            for numbers, eps, feature_map in (((None, None), 1e-6, 2), ((number, number), None, 0)):
                given = linear.Inputs(q, k, v, None, None, log_decay, *numbers, feature_map, eps)
                state = linear.State(None if eps is None else keys, memory) if with_state else None
                linear.forward(given, state, with_state)
                linear.backward(given, state, with_state, v, totals, linear.OfResults(v), None, log_decay is not None)


def _features(channels: int, length: int) -> None:
    """Sums over keys of features that PyTorch computes (Performer, rfa, cosFormer), twice as many as there are values.

    They are float32, whatever the inputs are. A decay goes with a state.
    """
    q, k, v = (torch.randn(1, length, 2, width) for width in (2 * channels, 2 * channels, channels))
    keys, totals = torch.zeros(1, 2, 2 * channels).double(), torch.ones(2, length)
    state = linear.State(keys, torch.zeros(1, 2, 2 * channels, channels).double())
    for log_decay, before in ((None, None), (None, state), (-torch.ones(1, length, 2), state)):
        given = linear.Inputs(q, k, v, None, None, log_decay, None, None, GIVEN, None, True)
        linear.forward(given, before, before is not None)
        of_results = linear.OfResults(v, totals)
        linear.backward(given, before, before is not None, v, totals, of_results, None, log_decay is not None)


def _aft(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Both forms of AFT-simple."""
    form = walk.Form(k, v, None, CHUNK)
    *_, log_weight, mean, marks = walk.causal_forward(form, q, None, None)
    walk.causal_backward(form, q, marks, q, None, mean)
    walk.means_backward(form, marks, log_weight, mean)


def _steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """One token of linear attention, of Mobile-Attention with 16 heads, and of AFT-simple."""
    _, heads, channels = q.shape
    keys, memory = torch.zeros(1, heads, channels).double(), torch.zeros(1, heads, channels, channels).double()
    for log_decay in (None, -torch.ones(1, heads)):
        run_linear_step(q, k, v, log_decay, keys, memory, 1e-6)
    q, k, v = (x.repeat(1, 8, 1) for x in (q, k, v))
    state = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8 * heads).double(), memory.repeat(1, 8, 1, 1)
    for options in ({}, {"competition": "heads", "clamp": None, "normalize": True}):
        run_mobile_step(q, k, v, *state, MobileOptions(**options))
    number = torch.zeros(1, heads * channels).double()
    run_aft_step(*(x[:, :heads].flatten(1) for x in (q, k, v)), number, number)


def figures(kernel: Any, source: ASTSource, compiler: dict[str, Any], target: str) -> dict[str, Any]:
    """Compile one kernel, and return what the assembler says of it."""
    if target.startswith("gfx"):
        compiled = compile(source, target=GPUTarget("hip", target, 64), options=compiler)
        measured, units = _of_amd(compiled.asm["amdgcn"]), ("mfma",)
        assembly = compiled.asm["amdgcn"]
    else:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            compiled = compile(source, target=GPUTarget("cuda", int(target), 32), options=compiler)
        measured, units = _of_nvidia(said.getvalue()), ("wgmma", "mma.sync", "tcgen05")
        assembly = compiled.asm["ptx"]
    constants = {**{key[0] if isinstance(key, tuple) else key: value for key, value in source.constants.items()}}
    named = {parameter.name: constants.get(parameter.num, constants.get(parameter.name)) for parameter in kernel.params}
    return {
        "kernel": kernel.fn.__name__,
        **measured,
        "shared_bytes": compiled.metadata.shared,
        "matrix_units": [unit for unit in units if unit in assembly],
        **{name: value for name in SHOWN if (value := {**named, **compiler}.get(name)) is not None},
    }


def _of_nvidia(said: str) -> dict[str, int]:
    """Registers and spilled bytes of a thread, as the assembler counts them where Triton runs it."""
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", said)[-1]),
    }


def _of_amd(assembly: str) -> dict[str, int]:
    """Likewise, for an AMD GPU: of 4 bytes each."""
    found = {name: int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1]) for name in ("vgpr_count", "vgpr_spill_count")}
    return {"registers": found["vgpr_count"], "spilled_bytes": 4 * found["vgpr_spill_count"]}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="90", help="80, 89, 90, 100, 120; or of AMD, gfx942")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--kernel", nargs="+", help="names of kernels; all if absent")
    values = parser.parse_args()
    if values.target.startswith("gfx"):  # as on a PyTorch for AMD
        device.ONE_TF32 = device.THREE_TF32 = tl.constexpr("ieee")
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    for kernel, source, compiler in record(getattr(torch, values.dtype), values.channels).found.values():
        if values.kernel and kernel.fn.__name__ not in values.kernel:
            continue
        row = {"target": values.target, "dtype": values.dtype, "channels": values.channels}
        print(json.dumps({**row, **figures(kernel, source, compiler, values.target)}), flush=True)


if __name__ == "__main__":
    main()
