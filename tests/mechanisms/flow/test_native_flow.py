"""Flow-Attention by the C++ kernels: what the laws do not ask; tests/laws.py holds them to every law besides.

They run in float32, and are compared with float64 of plain PyTorch or of ops/reference.py.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_inputs import (
    LAYOUTS,
    all_close,
    both_forms,
    close,
    competitions,
    exact,
    heads_first,
    inputs,
    native,
    needs_kernels,
    random,
    run_python,
    with_gradients,
    with_states,
)
from law_cases import reference
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowformer import ops
from flowformer.kernels.native import build
from flowformer.kernels.native.kernels import kernels

GOLDEN = Path(__file__).parents[2] / "golden"

pytestmark = needs_kernels


def test_kernels_are_there() -> None:
    assert kernels() is not None, build.why_not()


def test_temperatures_are_left_to_pytorch() -> None:
    q, temperatures = torch.randn(1, 5, 2, 4), torch.ones(3, 2)
    assert ops.explain(ops.flow_attention, q, q, q, None, temperatures, temperature=True).backend == "torch"
    with pytest.raises(ValueError, match="the native kernels have no learned temperatures"):
        ops.flow_attention(q, q, q, None, temperatures, temperature=True, backend="native")


# ------------------------------------------------------------------------------------------------ the published code

# What the golden files call a variant: preset, causal.
VARIANTS = {
    "flow": ("core", False),
    "flow_ts": ("timeseries", False),
    "flow_lra": ("lra", False),
    "flow_causal": ("core", True),
    "flow_causal_nlp": ("wikitext", True),
    "flow_causal_rl": ("decision", True),
}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("flow_*.safetensors")), ids=lambda path: path.stem)
def test_equals_the_published_code(path: Path) -> None:
    with safe_open(path, "pt") as file:
        preset, causal = VARIANTS[file.metadata()["variant"]]
        golden = {
            name: file.get_tensor(name) for name in [*[f"grad_{part}" for part in "qkv"], *"qkv", "out", "grad_out"]
        }
    leaves = [golden[part].float().requires_grad_() for part in "qkv"]
    out = native(*leaves, preset=preset, causal=causal)
    close(out, golden["out"])
    for part, grad in zip("qkv", torch.autograd.grad(out, leaves, golden["grad_out"].float()), strict=True):
        close(grad, golden[f"grad_{part}"])


def test_every_published_variant_is_there() -> None:
    assert len(list(GOLDEN.glob("flow_*.safetensors"))) == 11


# ------------------------------------------------------------------------------------------------------------- shapes

CHANNELS = (1, 3, 8, 16, 20, 64, 72, 128)


@both_forms
@pytest.mark.parametrize("keys", CHANNELS)
def test_any_count_of_channels(keys: int, causal: bool) -> None:
    for values in CHANNELS:
        tensors = inputs(37, batch=1, keys=keys, values=values)
        got = with_gradients(functools.partial(native, causal=causal), *tensors)
        want = with_gradients(
            functools.partial(reference.flow_attention, causal=causal), *(t.double() for t in tensors)
        )
        all_close(got, want)


@pytest.mark.parametrize("keys", CHANNELS)
def test_any_count_of_channels_step_by_step(keys: int) -> None:
    for values in CHANNELS:
        tensors = inputs(5, keys=keys, values=values)
        state = ops.init_flow_state(2, 2, keys, values)
        want, last = exact(*tensors, causal=True, return_state=True)
        for t, token in enumerate(zip(*(x.unbind(1) for x in tensors), strict=True)):
            out, state = ops.flow_attention_step(*token, state, backend="native")
            close(out, want[:, t])
        all_close(state, last)


@both_forms
def test_a_batch_of_none(causal: bool) -> None:
    leaves = [t.requires_grad_() for t in inputs(40, batch=0)]
    out = native(*leaves, causal=causal)
    assert out.shape == (0, 40, 2, 8)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), leaves)] == [t.shape for t in leaves]


@both_forms
@competitions
def test_memory_with_heads_first_gives_the_same_and_is_kept(causal: bool, competition: str | None) -> None:
    for sources in (40,) if causal else (40, 23):
        tensors = inputs(40, sources)
        function = functools.partial(native, causal=causal, competition=competition)
        got, want = with_gradients(function, *map(heads_first, tensors)), with_gradients(function, *tensors)
        like = [tensors[0] if sources != 40 else tensors[2], *tensors]
        for one, other, source in zip(got, want, like, strict=True):
            assert torch.equal(one, other)
            assert one.transpose(1, 2).is_contiguous()
            assert other.is_contiguous()
            assert one.stride() == heads_first(source).stride()


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: str, dtype: torch.dtype, causal: bool) -> None:
    function = functools.partial(native, causal=causal)
    for which in ((0, 1, 2), (0,), (1,), (2,)):
        plain = [t.to(dtype) for t in inputs(40)]
        laid = [LAYOUTS[layout](t) if i in which else t for i, t in enumerate(plain)]
        got, want = (with_gradients(function, *tensors) for tensors in (laid, [t.contiguous() for t in laid]))
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@both_forms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_what_comes_back_does_not_matter(layout: str, causal: bool) -> None:
    leaves = [t.requires_grad_() for t in inputs(40)]
    out = native(*leaves, causal=causal)
    upstream = LAYOUTS[layout](random(*out.shape))
    got, want = (torch.autograd.grad(out, leaves, u, retain_graph=True) for u in (upstream, upstream.contiguous()))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@both_forms
def test_gradient_of_the_plain_sum(causal: bool) -> None:
    leaves, doubles = inputs(40), [t.double() for t in inputs(40)]
    for tensors, function in ((leaves, native), (doubles, reference.flow_attention)):
        function(*(t.requires_grad_() for t in tensors), causal=causal).sum().backward()  # one number for all outputs
    all_close([t.grad for t in leaves], [t.grad for t in doubles])


def test_layout_of_masks_states_and_packing_does_not_matter() -> None:
    tensors = inputs(40)
    mask = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).t() < 0.7
    assert not mask.is_contiguous()
    for causal in (False, True):
        got, want = (native(*tensors, mask=m, causal=causal) for m in (mask, mask.contiguous()))
        assert torch.equal(got, want)
    _, state = native(*inputs(9, batch=1), causal=True, return_state=True)
    wide = ops.FlowState(*(part.expand(2, *part.shape[1:]) for part in state))
    turned = ops.FlowState(*(part.movedim(0, -1).contiguous().movedim(-1, 0) for part in wide))
    plain = ops.FlowState(*(part.contiguous() for part in wide))
    want = native(*tensors, causal=True, initial_state=plain, return_state=True)
    token = [t[:, 0] for t in tensors]
    stepped = ops.flow_attention_step(*token, plain, backend="native")
    for other in (wide, turned):
        got = native(*tensors, causal=True, initial_state=other, return_state=True)
        assert all(torch.equal(a, b) for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True))
        got = ops.flow_attention_step(*(t.movedim(-1, 0).contiguous().movedim(0, -1) for t in token), other)
        assert all(torch.equal(a, b) for a, b in zip([got[0], *got[1]], [stepped[0], *stepped[1]], strict=True))
    packed = [t.flatten(0, 1).unsqueeze(0) for t in tensors]
    bounds = torch.tensor([0, 1, 30, 7, 80, 5])
    got = native(*packed, cu_seqlens=bounds[::2])  # 0, 30, 80: every other, and int64
    assert torch.equal(got, native(*packed, cu_seqlens=torch.tensor([0, 30, 80], dtype=torch.int32)))


@both_forms
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
def test_gradients_of_some_inputs_alone(wanted: str, causal: bool) -> None:
    every = [t.requires_grad_() for t in inputs(40)]
    want = torch.autograd.grad(native(*every, causal=causal).square().sum(), every)
    some = [t.detach().requires_grad_(name in wanted) for name, t in zip("qkv", every, strict=True)]
    native(*some, causal=causal).square().sum().backward()
    for name, tensor, grad in zip("qkv", some, want, strict=True):
        assert (tensor.grad is not None) == (name in wanted)
        assert tensor.grad is None or torch.equal(tensor.grad, grad)


def test_gradients_of_the_final_state_alone_and_of_the_initial_alone() -> None:
    _, start = exact(*inputs(9), causal=True, return_state=True)
    results = []
    for function, dtype in ((native, torch.float32), (exact, torch.float64)):
        q, k, v = (t.to(dtype).requires_grad_() for t in inputs(40))
        _, state = function(q, k, v, causal=True, return_state=True)
        found = list(torch.autograd.grad(state.memory.sum() + state.sums.tanh().sum(), (q, k, v)))
        parts = [part.clone().requires_grad_() for part in start[1:]]
        before = ops.FlowState(start.tokens, *parts)
        out = function(q.detach(), k.detach(), v.detach(), causal=True, initial_state=before)
        results.append([*found, *torch.autograd.grad(out.sum(), parts)])
    all_close(*results)


def test_hard_numbers_of_the_causal_form_overflow_nothing() -> None:
    # As in tests/ops/test_flow.py: O^ far beyond what exp can take, since no clamp bounds it.
    for rest in (1, 10, 100):
        k = torch.cat([torch.full((1, rest, 2, 4), 1e-6), torch.full((1, rest, 2, 4), 1e4)], 1)
        q, v = random(1, 2 * rest, 2, 4), random(1, 2 * rest, 2, 4, seed=1)
        options: dict[str, Any] = {"preset": "timeseries", "feature_map": "relu", "causal": True}
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out, state = native(*leaves, return_state=True, **options)
        assert state.log_normaliser.max() > 800
        for tensor in (out, *state, *torch.autograd.grad(out.sum(), leaves)):
            assert tensor.isfinite().all()
        close(out, reference.flow_attention(q, k, v, **options), 1e-4)


def test_a_sink_without_a_source_is_zero_without_eps_too() -> None:
    none = torch.zeros(2, 6, dtype=torch.bool)
    for masks in (
        {"mask": none},
        {"context_mask": none, "mask": ~none},
        {"context_mask": ~none, "mask": none},
    ):
        leaves = [t.requires_grad_() for t in inputs(6)]
        out = native(*leaves, eps=0.0, **masks)
        for tensor in (out, *torch.autograd.grad(out.sum(), leaves)):
            assert not tensor.any()


def test_bfloat16_is_worth_its_inputs() -> None:
    # No worse than twice what rounding the inputs costs, and one rounding of the result.
    whole = [random(1, 1000, 2, 64, seed=i) for i in range(3)]
    rounded = [t.bfloat16() for t in whole]
    for causal in (False, True):
        got = native(*rounded, causal=causal)
        want, unavoidable = (reference.flow_attention(*t, causal=causal) for t in (whole, rounded))
        assert got.dtype == torch.bfloat16
        worst = 2 * (unavoidable - want).abs().max() + 2**-8 / 2 * want.abs().max()
        assert (got.double() - want).abs().max() <= worst


# The high-water mark of a process's memory in KiB: what the kernels take does not pass through PyTorch.
MEMORY = """
import sys, torch
from flowformer import ops
torch.set_num_threads(2)
length, causal = int(sys.argv[1]), sys.argv[2] == "True"
def run(length):
    leaves = [torch.randn(1, length, 1, 32, requires_grad=True) for _ in "qkv"]
    ops.flow_attention(*leaves, causal=causal, backend="native").sum().backward()
def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
run(10)
before = most()
run(length)
print(most() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how much memory it took")
@both_forms
def test_working_space_is_linear_in_length(causal: bool) -> None:
    length = 2**16
    size_kib = length * 32 * 4 // 1024
    got = int(run_python(MEMORY, length, causal))
    # q, k, v, the output, what comes back of it and three gradients are eight; L x K x V would be 32 more.
    assert 6 * size_kib <= got <= 12 * size_kib


# ------------------------------------------------------------------------------------------------------------ threads


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2])
@both_forms
@competitions
def test_threads_do_not_matter(competition: str | None, causal: bool, rows: int, threads: Any) -> None:
    # Pieces of a sequence have at least 1,024 tokens: 3,000 make two of them, and the last is shorter.
    tensors = inputs(3000, batch=1, heads=rows)
    options: dict[str, Any] = {"causal": causal, "competition": competition}

    def run(function: Any) -> list[Tensor]:
        return with_gradients(functools.partial(function, **options), *tensors)

    def run_doubles(*doubles: Tensor, **options: Any) -> Tensor:
        return exact(*doubles, **options)

    want = with_gradients(functools.partial(run_doubles, **options), *(t.double() for t in tensors))
    results = {}
    for count in (1, 2, 8):
        threads(count)
        results[count] = run(native)
        all_close(results[count], want)
    for count in (2, 8):
        all_close(results[count], results[1])
    assert not all(torch.equal(a, b) for a, b in zip(results[8], results[1], strict=True)), "nothing was cut"


@pytest.mark.parametrize("rows", [1, 2])
@competitions
def test_threads_do_not_matter_to_states(competition: str | None, rows: int, threads: Any) -> None:
    tensors = inputs(3000, batch=rows, heads=1)
    _, start = exact(*inputs(700, batch=rows, heads=1), causal=True, competition=competition, return_state=True)
    want = with_states(functools.partial(exact, competition=competition), *tensors, state=start)
    results = {}
    for count in (1, 2, 8):
        threads(count)
        results[count] = with_states(functools.partial(native, competition=competition), *tensors, state=start)
        all_close(results[count], want)
        all_close(results[count], results[1])
    assert not all(torch.equal(a, b) for a, b in zip(results[8], results[1], strict=True)), "nothing was cut"


@both_forms
def test_threads_do_not_matter_to_packed_and_padded_batches(causal: bool, threads: Any) -> None:
    lengths = (2100, 0, 3, 1030, 3000)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    mask = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.8], [0.3]])
    for tensors, arguments in (
        (inputs(sum(lengths), batch=1, heads=1), {"cu_seqlens": bounds}),
        (inputs(4000, heads=1), {"mask": mask}),
    ):
        function = functools.partial(native, causal=causal, **arguments)
        want = with_gradients(functools.partial(exact, causal=causal, **arguments), *(t.double() for t in tensors))
        for count in (1, 16):
            threads(count)
            all_close(with_gradients(function, *tensors), want)


def test_causal_with_threads_does_not_know_the_future(threads: Any) -> None:
    threads(8)
    tensors = inputs(5000, batch=1, heads=1)
    before = native(*tensors, causal=True)
    for t in (1, 1535, 1536, 2560, 4999):
        changed = [torch.cat([x[:, :t], 1e4 * x[:, t:]], 1) for x in tensors]
        after = native(*changed, causal=True)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


def test_python_threads_do_not_disturb_each_other(threads: Any) -> None:
    threads(2)
    jobs = [inputs(2100 + n, batch=1) for n in range(12)]
    function = functools.partial(with_gradients, functools.partial(native, causal=True))
    want = [function(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for got, one in zip(pool.map(lambda job: function(*job), jobs), want, strict=True):
            all_close(got, one, 1e-6)


def _compute(connection: Any, tensors: list[Tensor]) -> None:
    assert torch.get_num_threads() == 2  # a fork that asks for the parent's threads waits for them for ever
    connection.send([t.numpy() for t in with_gradients(functools.partial(native, causal=True), *tensors)])
    connection.close()


# In a process of its own: PyTorch refuses gradients in a fork of one that has run torch.compile.
@pytest.mark.skipif(not hasattr(multiprocessing, "get_context") or sys.platform == "win32", reason="forks")
def test_runs_after_a_fork() -> None:
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {folders}; import test_native_flow; test_native_flow.compute_after_a_fork()"
    run_python(code, timeout_s=120)


def compute_after_a_fork() -> None:
    """A child that is forked computes what its parent did, and the parent goes on computing."""
    torch.set_num_threads(2)
    tensors = inputs(3000, batch=1, heads=1)  # small enough for PyTorch's own operations to want no threads
    want = with_gradients(functools.partial(native, causal=True), *tensors)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_compute, args=(sender, tensors), daemon=True)
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        all_close([torch.from_numpy(part) for part in receiver.recv()], want)
        child.join(10)
        assert child.exitcode == 0
    finally:
        child.kill()
    all_close(with_gradients(functools.partial(native, causal=True), *tensors), want)  # the parent still runs


class Attended(Dataset):
    """Attention as a worker that loads data would compute it."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return native(*inputs(1000 + index, batch=1), causal=True)[0, -1]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_runs_in_the_workers_that_load_data(threads: Any) -> None:
    threads(2)
    want = torch.stack([Attended()[index] for index in range(6)])
    loader = DataLoader(Attended(), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60)
    close(torch.cat(list(loader)), want)


# ----------------------------------------------------------------------------------------------------------- decoding


def decode(tensors: list[Tensor], state: ops.FlowState, **arguments: Any) -> tuple[Tensor, ops.FlowState]:
    outs = []
    for token in zip(*(t.unbind(1) for t in tensors), strict=True):
        out, state = ops.flow_attention_step(*token, state, **{"backend": "native", **arguments})
        outs.append(out)
    return torch.stack(outs, 1), state


def prefill(tensors: list[Tensor], **arguments: Any) -> ops.FlowState:
    return native(*tensors, causal=True, return_state=True, **arguments)[1]


def parts_of(state: ops.FlowState, change: Any) -> ops.FlowState:
    return ops.FlowState(*(change(part) for part in state))


@pytest.mark.parametrize("preset", [preset for preset in ops.PRESETS if preset != "distance"])
def test_prefill_and_steps_equal_the_whole(preset: str) -> None:
    tensors = inputs(150, keys=20, values=12)
    want, last = native(*tensors, causal=True, preset=preset, return_state=True)
    exactly, exact_last = exact(*tensors, causal=True, preset=preset, return_state=True)
    state = prefill([t[:, :100] for t in tensors], preset=preset)
    got, after = decode([t[:, 100:] for t in tensors], state, preset=preset)
    close(got, want[:, 100:])
    close(got, exactly[:, 100:])
    all_close(after, last)
    all_close(after, exact_last)


def test_states_are_interchangeable_between_implementations() -> None:
    tensors = inputs(150)
    first, rest = [t[:, :100] for t in tensors], [t[:, 100:] for t in tensors]
    want = exact(*tensors, causal=True)[:, 100:]
    for made_by, used_by in (("native", "torch"), ("torch", "native")):
        _, state = ops.flow_attention(*first, causal=True, return_state=True, backend=made_by)
        close(ops.flow_attention(*rest, causal=True, initial_state=state, backend=used_by), want)
        close(decode(rest, state, backend=used_by)[0], want)


def test_states_are_saved_and_loaded() -> None:
    start, rest = inputs(100), [random(2, 5, 2, 8, seed=9)] * 3
    state = prefill(start)
    file = io.BytesIO()
    torch.save(tuple(state), file)
    file.seek(0)
    loaded = ops.FlowState(*torch.load(file, weights_only=True))
    moved = parts_of(state, lambda part: part.to("cpu", copy=True))
    for other in (loaded, moved):
        assert torch.equal(decode(rest, other)[0], decode(rest, state)[0])


def test_states_are_batched_and_reordered() -> None:
    starts = [inputs(length, batch=1) for length in (30, 77, 1)]
    states = [prefill(start) for start in starts]
    rest = [random(3, 6, 2, 8, seed=seed) for seed in range(3)]
    together = ops.FlowState(*(torch.cat(parts) for parts in zip(*states, strict=True)))
    got, _ = decode(rest, together)
    alone = [decode([t[i : i + 1] for t in rest], state)[0] for i, state in enumerate(states)]
    close(got, torch.cat(alone), 1e-7)
    order = torch.tensor([2, 0, 0, 1])  # beams: one twice
    chosen = parts_of(together, lambda part: part.index_select(0, order))
    turned, _ = decode([t[order] for t in rest], chosen)
    close(turned, got[order], 1e-7)


def test_states_fork_into_continuations_that_do_not_disturb_each_other() -> None:
    state = prefill(inputs(100))
    kept = parts_of(state, torch.clone)
    one, other = ([random(2, 6, 2, 8, seed=10 * n + i) for i in range(3)] for n in (1, 2))
    alone, _ = decode(one, state)
    a = b = state
    outs = []
    for t in range(6):  # in turns
        out, a = ops.flow_attention_step(*(x[:, t] for x in one), a, backend="native")
        _, b = ops.flow_attention_step(*(x[:, t] for x in other), b, backend="native")
        outs.append(out)
    assert torch.equal(torch.stack(outs, 1), alone)
    assert all(torch.equal(part, copy) for part, copy in zip(state, kept, strict=True))


def test_steps_after_a_million_tokens() -> None:
    block, state = inputs(65_536, batch=1), None
    for _ in range(16):
        _, state = native(*block, causal=True, initial_state=state, return_state=True)
    assert state.tokens.unique().tolist() == [2**20]
    # The first two sums are those of the features, which are known.
    for which, tensor in ((0, block[1]), (1, block[0])):
        close(state.sums[:, :, which], 16 * tensor.double().sigmoid().sum(1), 1e-6)
    tokens = inputs(20, batch=1)
    got, after = decode(tokens, state)
    want, last = decode([t.double() for t in tokens], state, backend="torch")
    close(got, want)
    all_close(after, last, 1e-7)
    close(native(*tokens, causal=True, initial_state=state), want)
