"""The C++ kernels on random input, at every length, at each level of instructions, and under sanitizers: slow."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from kernel_inputs import LAYOUTS, needs_kernels, run_python
from law_cases import reference
from torch import Tensor

from flowformer import ops
from flowformer.kernels.native import build, compiler
from flowformer.mechanisms.flow.options import OPTIONS

REPOSITORY = Path(__file__).parents[3]

pytestmark = needs_kernels


# ------------------------------------------------------------------------------------------------------- random input


class Sample(NamedTuple):
    """Arguments of one call."""

    tensors: list[Tensor]
    arguments: dict[str, Any]
    threads: int
    words: str

    def upstream(self, out: Tensor) -> Tensor:
        return torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out.dtype)

    def run(self, op: Callable[..., Tensor], dtype: torch.dtype, **backend: str) -> list[Tensor]:
        """Output and gradients, in float64."""
        leaves = [t.to(dtype).detach().requires_grad_() for t in self.tensors]
        out = op(*leaves, **self.arguments, **backend)
        grads = [torch.zeros_like(t) for t in leaves]
        if out.requires_grad:  # else the reference has met no token at all
            grads = torch.autograd.grad(out, leaves, self.upstream(out), materialize_grads=True)
        return [t.detach().double() for t in (out, *grads)]


LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 97, 130, 200, 333)
CHANNELS = (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65)


# Equal tokens, or features of one channel, make flows that are the same whatever the numbers: the gradients of q and k
# are then nothing but rounding, or those at the very edge of the clamp.
DISTINCT = ["plain", *(name for name in LAYOUTS if not name.endswith("for all") and name != "one number")]


def draw(seed: int) -> Sample:
    """The sample of a seed: sizes, options, padding or packing, layouts, threads."""
    choose = random.Random(seed)
    causal = choose.random() < 0.5
    long = choose.random() < 0.03  # cut into pieces, where threads outnumber heads
    length = choose.choice((2049, 2600)) if long else choose.choice(LENGTHS)
    sources = length if causal or choose.random() < 0.5 else choose.choice(LENGTHS)
    batch, heads = (1, choose.choice((1, 2))) if long else (choose.randint(1, 3), choose.randint(1, 5))
    keys, values = choose.choice(CHANNELS), choose.choice((1, *CHANNELS))
    arguments: dict[str, Any] = {
        "causal": causal,
        "preset": choose.choice([name for name in ops.PRESETS if name != "distance"]),
    }
    for name, found in (
        ("competition", ("sequence", "heads", None)),
        ("feature_map", ("sigmoid", "relu")),
        ("clamp", (None, 0.9, 1.0, 3.0)),
        ("eps", (0.0, 1e-6, 1e-3)),
        ("flow_eps", (0.0, 1e-6, 0.1)),
        ("allocation", (True, False)),
        ("rescale", (True, False)),
    ):
        if choose.random() < 0.3:
            arguments[name] = choose.choice(found)
    generator = torch.Generator().manual_seed(seed)
    packed = choose.random() < 0.25 and sources == length
    if packed:
        cuts = sorted(choose.randint(0, length * batch) for _ in range(choose.randint(0, 6)))
        arguments["cu_seqlens"] = torch.tensor([0, *cuts, length * batch], dtype=torch.int32)
        length, sources, batch = length * batch, length * batch, 1
    elif choose.random() < 0.4:
        share = choose.choice((0.1, 0.5, 0.9))
        of_keys = torch.rand(batch, sources, generator=generator) < share
        if not causal and choose.random() < 0.5:
            arguments["mask"] = torch.rand(batch, length, generator=generator) < share
        if causal or (sources == length and "mask" not in arguments):
            arguments["mask"] = of_keys
        else:
            arguments["context_mask"] = of_keys
    sizes = ((length, keys), (sources, keys), (sources, values))
    names = [choose.choice(layouts) for layouts in (DISTINCT, DISTINCT, ["plain", *LAYOUTS])]
    tensors = [torch.randn(batch, n, heads, channels, generator=generator) for n, channels in sizes]
    tensors = [LAYOUTS[name](t) if name in LAYOUTS else t for name, t in zip(names, tensors, strict=True)]
    threads = 8 if long else choose.choice((1, 1, 2, 3))
    shown = {key: tuple(x.shape) if isinstance(x, Tensor) else x for key, x in arguments.items()}
    words = f"seed {seed}: {[tuple(t.shape) for t in tensors]}, {names}, {shown}, {threads} threads"
    return Sample(tensors, arguments, threads, words)


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [float((one - other).abs().max()) for one, other in zip(got, want, strict=True)]


def sizes(sample: Sample, want: list[Tensor]) -> list[float]:
    """The largest element of each; for the gradients of q and k, a tenth of the largest term that they sum, if larger.

    They change flows, which change the size of whole outputs: they are sums of terms as large as upstream times output,
    and where these cancel nothing is left but their rounding.
    """
    terms = float((sample.upstream(want[0]) * want[0]).abs().sum(-1).max())
    own = [float(t.abs().max()) for t in want]
    return [own[0], max(own[1], terms / 10), max(own[2], terms / 10), own[3]]


def run_native(sample: Sample) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(sample.threads)
    try:
        return sample.run(ops.flow_attention, torch.float32, backend="native")
    finally:
        torch.set_num_threads(before)


def usual_and_unavoidable(sample: Sample) -> tuple[list[float], list[float]]:
    """Errors where inputs are off by a rounding, in many ways: of the kernels the median, of PyTorch the largest."""
    native, torch_ = [], []
    for seed in range(32):
        generator = torch.Generator().manual_seed(seed)
        nudged = [t * (1 + (torch.rand(t.shape, generator=generator).double() - 0.5) * 2**-23) for t in sample.tensors]
        other = sample._replace(tensors=[t.float() for t in nudged])
        want = other.run(reference.flow_attention, torch.float64)
        native.append(errors(run_native(other), want))
        torch_.append(errors(other.run(ops.flow_attention, torch.float32, backend="torch"), want))
    return [sorted(each)[16] for each in zip(*native, strict=True)], [max(each) for each in zip(*torch_, strict=True)]


def search(seeds: range) -> list[str]:
    """What is out of tolerance."""
    wrong = []
    for seed in seeds:
        sample = draw(seed)
        want = sample.run(reference.flow_attention, torch.float64)
        large = sizes(sample, want)
        if all(error <= 1e-5 * size for error, size in zip(errors(run_native(sample), want), large, strict=True)):
            continue
        # The numbers on the way may be so large that float32 has no 1e-5 to give: then PyTorch has no more either.
        usual, unavoidable = usual_and_unavoidable(sample)
        bounds = [max(1e-5 * size, 2 * error) for size, error in zip(large, unavoidable, strict=True)]
        if not all(error <= bound for error, bound in zip(usual, bounds, strict=True)):
            shown = ", ".join(f"{a:.1e} (bound {b:.1e})" for a, b in zip(usual, bounds, strict=True))
            wrong.append(f"{sample.words}\n    out and gradients of q, k, v off by {shown}")
    return wrong


def test_thirty_random_samples() -> None:
    wrong = search(range(30))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_random_samples(part: int) -> None:
    wrong = search(range(100 * part, 100 * part + 100))
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------------------------------------------------- exactness

LENGTHS_OF_TABLE = (1, 7, 1000, 65_536, 262_144)


def relative_errors(length: int, causal: bool, backend: str) -> list[float]:
    """Of the output and the gradients of q, k and v, next to the largest element, against float64 of PyTorch."""
    generator = torch.Generator().manual_seed(length)
    tensors = [torch.randn(1, length, 2, 16, generator=generator) for _ in range(4)]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        q, k, v, upstream = (t.to(dtype) for t in tensors)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        # Not "core": of half a million tokens whose mean is its clamp, one may come to lie on the other side.
        out = ops.flow_attention(*leaves, causal=causal, preset="wikitext", backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    want = run(torch.float64, "torch")
    return [
        float((got.double() - exact).abs().max() / exact.abs().max())
        for got, exact in zip(run(torch.float32, backend), want, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_exact_at_any_length(causal: bool) -> None:
    rows = {length: relative_errors(length, causal, "native") for length in LENGTHS_OF_TABLE}
    print(f"\n{'causal' if causal else 'bidirectional'}: largest error next to the largest element, float32")
    print(f"{'length':>8}" + "".join(f"{name:>12}" for name in ("output", "grad q", "grad k", "grad v")))
    for length, row in rows.items():
        print(f"{length:>8}" + "".join(f"{error:>12.1e}" for error in row))
    for length, (out, *grads) in rows.items():
        assert out <= 2e-6, f"length {length}"
        if length > 1:  # one token has nothing to compete with: the gradients of q and k are nothing but rounding
            assert max(grads) <= 1e-5, f"length {length}"


# --------------------------------------------------------------------------------------------- levels and sanitizers


# Not loaded: what sanitizes itself cannot be, without their library.
BUILD = """
from flowformer.kernels.native import cache, compiler
assert compiler.shipped_library() is None, "what ships would be tested"
print(cache.cached_library(compiler.SOURCE, compiler.find_compiler()).path)
"""


def built(folder: Path, **environment: str) -> dict[str, str]:
    """The environment of processes whose kernels another compiler has built, in a cache of their own."""
    environment["FLOWFORMER_CACHE"] = str(folder)
    assert Path(run_python(BUILD, timeout_s=1200, **environment).strip()).parent == folder
    return environment


def hold_laws(**environment: str) -> None:
    command = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    names = ("tests/laws.py", *(f"tests/mechanisms/{op}/test_native_{op}.py" for op in ("flow", "aft")))
    files = [str(REPOSITORY / name) for name in names]
    options = ["-q", "-k", "native", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(REPOSITORY)]
    said = run_python(command, *files, *options, timeout_s=1800, **environment)
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("level", compiler.LEVEL_FLAGS)
def test_laws_hold_at_each_level(level: str) -> None:
    library = build.load()
    assert library is not None
    if level not in library.levels:
        pytest.skip(f"this CPU has no {level}")
    hold_laws(FLOWFORMER_NATIVE_LEVEL=level)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_laws_hold_for_the_widest_code_on_a_narrower_machine(tmp_path: Path) -> None:
    found = compiler.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    hold_laws(**built(tmp_path, CXX=f"{found} -DFLOWFORMER_LANES=16"))


def exercise(seeds: range) -> None:
    """Every kernel on what may be read or written wrongly; nothing is compared."""
    for seed in seeds:
        sample = draw(seed)
        torch.set_num_threads(sample.threads)
        for dtype in (torch.float32, torch.bfloat16):
            sample.run(ops.flow_attention, dtype, backend="native")
        q, k, v = (t[:, 0] for t in sample.tensors)
        state = ops.init_flow_state(*q.shape, v.shape[-1])
        options = {name: x for name, x in sample.arguments.items() if name in (*OPTIONS, "preset")}
        for _ in range(3):
            _, state = ops.flow_attention_step(q, k, v, state, backend="native", **options)


SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
LIBRARIES = (
    "libasan.so",
    "libstdc++.so",
)  # without the second the first does not find what throws PyTorch's exceptions
EXERCISE = """
import sys
tests = sys.argv[1]
sys.path[:0] = [tests, tests + "/kernels/native", tests + "/mechanisms/aft"]
import test_native_aft, test_native_search
for module in (test_native_search, test_native_aft):
    module.exercise(range(int(sys.argv[2])))
print("done")
"""
BEYOND = """
import torch
from flowformer import ops
from flowformer.mechanisms.flow import native
native.check_bounds = lambda *_: None  # it would refuse them
x, bounds = torch.zeros(1, 40, 1, 8), torch.tensor([0, 41], dtype=torch.int32)
torch.ops.flowformer.flow_bidirectional(x, x, x, None, None, bounds, *ops.PRESETS["core"].values())
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that runs kernels which check every access to memory."""
    gcc = shutil.which("g++")
    if gcc is None or not sys.platform.startswith("linux"):
        pytest.skip("there is no g++, or the sanitizer's library is not loaded as Linux does")
    folder = tmp_path_factory.mktemp("sanitized")
    script = folder / "compiler"  # a script, since the last -O counts, and compiler.py's come after those of CXX
    script.write_text(f'#!/bin/sh\nexec {gcc} "$@" {SANITIZE}\n')
    script.chmod(0o755)
    environment = built(folder / "cache", CXX=str(script))
    found = [subprocess.check_output([gcc, f"-print-file-name={name}"], text=True).strip() for name in LIBRARIES]
    return {**environment, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("level", compiler.LEVEL_FLAGS)
def test_sanitizers_find_nothing(level: str, sanitized: dict[str, str]) -> None:
    library = build.load()
    assert library is not None
    if level not in library.levels:
        pytest.skip(f"this CPU has no {level}")
    sanitized = {**sanitized, "FLOWFORMER_NATIVE_LEVEL": level}
    assert "done" in run_python(EXERCISE, Path(__file__).parents[2], 150, timeout_s=1800, **sanitized)
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):  # else they see nothing at all
        run_python(BEYOND, **sanitized)
