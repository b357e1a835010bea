"""The C++ kernels of AFT-simple: against the reference, at any size, layout, padding, state and number of threads."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from kernel_inputs import Graphs, Recorder, all_close, both_forms, close, needs_kernels, with_gradients
from kernel_inputs import random as random_tensor
from law_cases import reference
from torch import Tensor

from flowformer import ops
from flowformer.mechanisms.aft.native import RUN

OPERATORS = torch.ops.flowformer

pytestmark = [
    needs_kernels,
    # PyTorch's own, where opcheck runs an operator compiled
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

native = functools.partial(ops.aft_simple, backend="native")


def exact(*tensors: Tensor, **arguments: Any) -> Any:
    """Plain PyTorch in float64, which has states."""
    return ops.aft_simple(*(t.double() for t in tensors), backend="torch", **arguments)


def truth(*tensors: Tensor, **arguments: Any) -> Tensor:
    return reference.aft_simple(*(t.double() for t in tensors), **arguments)


def inputs(length: int, sources: int | None = None, *, batch: int = 2, channels: int = 8) -> list[Tensor]:
    sources = length if sources is None else sources
    return [random_tensor(batch, n, channels, seed=i) for i, n in enumerate((length, sources, sources))]


def equals_truth(*tensors: Tensor, tolerance: float = 1e-6, **arguments: Any) -> None:
    """Outputs and gradients."""
    want = with_gradients(functools.partial(truth, **arguments), *(t.double() for t in tensors))
    all_close(with_gradients(functools.partial(native, **arguments), *tensors), want, tolerance)


# ------------------------------------------------------------------------------------------------------- any sizes


@both_forms
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 100, 513, 1100])
def test_any_count_of_channels(channels: int, causal: bool) -> None:
    equals_truth(*inputs(RUN + 5, channels=channels), causal=causal)


@both_forms
@pytest.mark.parametrize("length", [1, 2, RUN - 1, RUN, RUN + 1, 2 * RUN, 3 * RUN + 1])
def test_any_length(length: int, causal: bool) -> None:
    equals_truth(*inputs(length), causal=causal)


@both_forms
def test_a_batch_of_none(causal: bool) -> None:
    leaves = [t[:0].requires_grad_() for t in inputs(9)]
    out = native(*leaves, causal=causal)
    assert out.shape == (0, 9, 8)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), leaves)] == [(0, 9, 8)] * 3


# --------------------------------------------------------------------------------------------------- random samples


class Sample(NamedTuple):
    """Arguments of one call."""

    tensors: list[Tensor]
    arguments: dict[str, Any]
    threads: int
    words: str

    def run(self, op: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Output and gradients, in float64."""
        leaves = [t.to(dtype).detach().requires_grad_() for t in self.tensors]
        out = op(*leaves, **self.arguments)
        grads: Sequence[Tensor] = [torch.zeros_like(t) for t in leaves]
        if out.requires_grad:  # else the reference has met no token at all
            upstream = random_tensor(*out.shape, seed=1).to(out.dtype)
            grads = torch.autograd.grad(out, leaves, upstream, materialize_grads=True)
        return [t.detach().double() for t in (out, *grads)]


def in_a_larger(x: Tensor) -> Tensor:
    return x.new_full([n + 3 for n in x.shape], torch.nan)[1:-2, 2:-1, 1:-2].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "length first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.mT.contiguous().mT,
    "part of a larger": in_a_larger,
    "channels apart": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "first of the batch for all": lambda x: x[:1].expand_as(x),
    "first token for all": lambda x: x[:, :1].expand_as(x),
    "first channel for all": lambda x: x[..., :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1].expand_as(x),
}
LENGTHS = (1, 2, 3, 15, 31, 32, 33, 64, 65, 97, 130, 333)
CHANNELS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 40, 64, 65, 130)


def draw(seed: int) -> Sample:
    """The sample of a seed: sizes, size of keys, padding or packing, layouts, threads."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    causal, batch, channels = choose.random() < 0.5, choose.randint(1, 3), choose.choice(CHANNELS)
    length = choose.choice(LENGTHS)
    sources = length if causal or choose.random() < 0.5 else choose.choice(LENGTHS)
    arguments: dict[str, Any] = {"causal": causal}
    if choose.random() < 0.25 and sources == length:
        cuts = sorted(choose.randint(0, length * batch) for _ in range(choose.randint(0, 6)))
        length, sources, batch = length * batch, length * batch, 1
        arguments["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=torch.int32)
    elif choose.random() < 0.5:
        share = choose.choice((0.1, 0.5, 0.9))
        of_keys = torch.rand(batch, sources, generator=generator) < share
        if not causal and choose.random() < 0.5:
            arguments["mask"] = torch.rand(batch, length, generator=generator) < share
        if causal or (sources == length and "mask" not in arguments):
            arguments["mask"] = of_keys
        else:
            arguments["context_mask"] = of_keys
    names = choose.choices(list(LAYOUTS), k=3)
    tensors = [torch.randn(batch, n, channels, generator=generator) for n in (length, sources, sources)]
    tensors[1] *= choose.choice((1, 1, 5, 30))
    tensors = [LAYOUTS[name](t) for name, t in zip(names, tensors, strict=True)]
    threads = choose.choice((1, 2, 3))
    shown = {key: tuple(x.shape) if isinstance(x, Tensor) else x for key, x in arguments.items()}
    words = f"seed {seed}: {[tuple(t.shape) for t in tensors]}, {names}, {shown}, {threads} threads"
    return Sample(tensors, arguments, threads, words)


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def search(seeds: range, threads: Any) -> list[str]:
    """What is out of tolerance."""
    wrong = []
    for seed in seeds:
        sample = draw(seed)
        threads(sample.threads)
        got, want = sample.run(native, torch.float32), sample.run(reference.aft_simple, torch.float64)
        errors = [float((one - other).abs().max()) for one, other in zip(got, want, strict=True)]
        sizes = [float(t.abs().max()) for t in want]
        # Where values cancel in their means, a tenth of the largest. The gradient of k is that of v times differences
        # between values: where one key outweighs all others, or all values are the same, nothing is left of these but
        # their rounding.
        largest = float(sample.tensors[2].abs().max())
        sizes[:3] = max(sizes[0], largest / 10), max(sizes[1], largest / 10), max(sizes[2], sizes[3] * largest)
        if not all(error <= 2e-6 * size for error, size in zip(errors, sizes, strict=True)):
            wrong.append(f"{sample.words}\n    out and gradients of q, k, v off by {errors}, largest {sizes}")
    return wrong


def test_eighty_random_samples(threads: Any) -> None:
    wrong = search(range(80), threads)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_two_thousand_random_samples(threads: Any) -> None:
    wrong = search(range(2000), threads)
    assert not wrong, "\n".join(wrong)


def exercise(seeds: range) -> None:
    """Every kernel on what may be read or written wrongly; nothing is compared."""
    for seed in seeds:
        sample = draw(seed)
        torch.set_num_threads(sample.threads)
        for dtype in (torch.float32, torch.bfloat16):
            sample.run(native, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@both_forms
def test_layout_of_what_comes_back_does_not_matter(layout: str, causal: bool) -> None:
    tensors = [t.requires_grad_() for t in inputs(20)]
    out = native(*tensors, causal=causal)
    upstream = LAYOUTS[layout](random_tensor(*out.shape))
    got = torch.autograd.grad(out, tensors, upstream, retain_graph=True)
    assert all(map(torch.equal, got, torch.autograd.grad(out, tensors, upstream.contiguous())))


@both_forms
def test_bfloat16_is_worth_its_inputs(causal: bool) -> None:
    tensors = [t.bfloat16() for t in inputs(200)]
    want = with_gradients(functools.partial(truth, causal=causal), *(t.double() for t in tensors))
    got = with_gradients(functools.partial(native, causal=causal), *tensors)
    # What comes back is one upstream of float32, and one rounded to bfloat16.
    assert all(t.dtype == torch.bfloat16 for t in got)
    all_close(got, want, 2**-7)


# ------------------------------------------------------------------------------------------------------- large keys


def keys_that(kind: str, length: int, channels: int) -> Tensor:
    noise, ramp = random_tensor(2, length, channels), torch.linspace(-1, 1, length).unsqueeze(-1)
    return {
        "rise": 1e4 * ramp + noise,
        "fall": -1e4 * ramp + noise,
        "rise slowly": 40 * ramp + noise,
        "jump once": torch.where(ramp > 0.3, 1e4, 0.0) + noise,
        "jump to and fro": 1e4 * noise.sign(),
        "are anywhere": 1e4 * noise,
        "are all large": 1e4 + noise,
        "are all small": -1e4 + noise,
        "spread": 8 * noise,
    }[kind].expand(2, -1, channels)


@both_forms
@pytest.mark.parametrize(
    "kind",
    ["rise", "fall", "rise slowly", "jump once", "jump to and fro", "are anywhere", "are all large", "are all small"],
)
def test_large_keys(kind: str, causal: bool) -> None:
    q, _, v = inputs(150)
    k = keys_that(kind, 150, 8)
    want = with_gradients(functools.partial(truth, causal=causal), *(t.double() for t in (q, k, v)))
    got = with_gradients(functools.partial(native, causal=causal), q, k, v)
    for index in (0, 1, 3):
        close(got[index], want[index], 2e-6)
    assert (got[2].double() - want[2]).abs().max() <= 2e-6 * max(want[2].abs().max(), want[3].abs().max())


def test_nothing_cancels_where_one_key_outweighs_the_others() -> None:
    q, _, v = inputs(150)
    for k in (keys_that("rise slowly", 150, 8), keys_that("spread", 150, 8)):
        equals_truth(q, k, v, causal=True, tolerance=5e-6)
    k = torch.zeros_like(v)
    k[:, 3], k[:, 100] = 30.0, 60.0
    want = with_gradients(functools.partial(truth, causal=True), *(t[:, :100].double() for t in (q, k, v)))
    got = with_gradients(functools.partial(native, causal=True), *(t[:, :100] for t in (q, k, v)))
    # What the gradient is past the large key: e^-30 beside the rest.
    close(got[2][:, 4:], want[2][:, 4:], 1e-5)


def test_not_a_number_spreads_as_far_as_it_matters() -> None:
    for which, reach in ((0, slice(50, 51)), (1, slice(50, None)), (2, slice(50, None))):
        tensors = inputs(100)
        clean = native(*tensors, causal=True)
        tensors[which][0, 50, 3] = torch.nan
        out = native(*tensors, causal=True)
        assert out[0, reach, 3].isnan().all()
        out[0, reach, 3] = clean[0, reach, 3]
        assert torch.equal(out, clean)


# ------------------------------------------------------------------------------------------------------------ threads


@both_forms
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_do_not_matter_to_a_single_bit(batch: int, causal: bool, threads: Any) -> None:
    tensors, results = inputs(200, batch=batch, channels=300), []
    for count in (1, 2, 8):
        threads(count)
        results.append(with_gradients(functools.partial(native, causal=causal), *tensors))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_future_is_unknown_to_a_single_bit(count: int, threads: Any) -> None:
    threads(count)
    tensors = inputs(300, channels=40)
    before, _ = native(*(t[:, :250] for t in tensors), causal=True, return_state=True)
    for t in (1, 31, 32, 33, 200, 249):
        for scale in (1.5, 1e4):
            changed = [torch.cat([x[:, :t], scale * x[:, t:]], 1) for x in tensors]
            after = native(*changed, causal=True)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t:], after[:, t:250])


# ------------------------------------------------------------------------------------------------------------- states


def with_states(function: Callable[..., Any], *tensors: Tensor, state: Any, **arguments: Any) -> list[Tensor]:
    """Output and final state, and the gradients of inputs and initial state."""
    leaves = [t.detach().requires_grad_() for t in (*tensors, *state)]
    before = ops.AFTSimpleState(*leaves[3:])
    out, after = function(*leaves[:3], causal=True, initial_state=before, return_state=True, **arguments)
    outputs = [out, *after]
    upstream = [random_tensor(*o.shape, seed=1).to(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize("height", [-70.0, -30.0, 0.0, 5.0, 70.0])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 150])
def test_states_and_their_gradients(length: int, height: float) -> None:
    """``height``: of the past's keys above those that come."""
    start = inputs(20)
    start[1] += height
    _, state = exact(*start, causal=True, return_state=True)
    tensors, mask = inputs(length), torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.7
    for arguments in ({}, {"mask": mask}):
        doubles = (t.double() for t in tensors)
        got = with_states(native, *tensors, state=state, **arguments)
        all_close(got, with_states(exact, *doubles, state=state, **arguments))


def test_a_past_that_is_everything_or_nothing() -> None:
    q, k, v = inputs(100)
    log_weight, mean = (random_tensor(2, 8, seed=seed).double() for seed in (3, 4))
    everything, nothing = (ops.AFTSimpleState(log_weight + height, mean) for height in (1e4, -1e4))
    close(native(q, k, v, causal=True, initial_state=everything), q.sigmoid() * mean.unsqueeze(1).float(), 1e-6)
    close(native(q, k, v, causal=True, initial_state=nothing), native(q, k, v, causal=True), 1e-6)


def test_gradients_of_the_final_state_alone_and_of_the_initial_alone() -> None:
    _, start = exact(*inputs(9), causal=True, return_state=True)
    grads = functools.partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
    results = []
    for function, dtype in ((native, torch.float32), (exact, torch.float64)):
        q, k, v = (t.to(dtype).requires_grad_() for t in inputs(40))
        _, state = function(q, k, v, causal=True, return_state=True)
        found = [grad for part in state for grad in grads(part.sum(), (k, v))]
        parts = [part.clone().requires_grad_() for part in start]
        out = function(q.detach(), k.detach(), v.detach(), causal=True, initial_state=ops.AFTSimpleState(*parts))
        results.append([*found, *torch.autograd.grad(out.sum(), parts)])
    got, want = results
    all_close(got[:1] + got[2:], want[:1] + want[2:])
    assert not got[1].any()  # the log-sum knows no values
    assert not want[1].any()


def test_layout_of_masks_and_states_does_not_matter() -> None:
    tensors = inputs(40, batch=3)
    mask = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).T < 0.7
    _, state = exact(*inputs(9, batch=3), causal=True, return_state=True)
    turned = ops.AFTSimpleState(*(part.T.contiguous().T for part in state))
    got = native(*tensors, causal=True, mask=mask, initial_state=turned)
    assert torch.equal(got, native(*tensors, causal=True, mask=mask.contiguous(), initial_state=state))


def test_states_are_interchangeable_between_implementations() -> None:
    tensors = inputs(150)
    want = exact(*tensors, causal=True)[:, 100:]
    for made_by, used_by in (("native", "torch"), ("torch", "native")):
        _, state = ops.aft_simple(*(t[:, :100] for t in tensors), causal=True, return_state=True, backend=made_by)
        rest = [t[:, 100:] for t in tensors]
        close(ops.aft_simple(*rest, causal=True, initial_state=state, backend=used_by), want)
        for t in range(50):
            out, state = ops.aft_simple_step(*(x[:, t] for x in rest), state)
            close(out, want[:, t])


def test_steps_after_a_million_tokens() -> None:
    block, state = inputs(65_536, batch=1, channels=2), None
    for _ in range(16):
        _, state = native(*block, causal=True, initial_state=state, return_state=True)
    _, k, v = (t.double() for t in block)
    assert state is not None
    close(state.log_weight, k.logsumexp(1) + torch.tensor(16.0).double().log(), 1e-7)
    close(state.mean, (k.softmax(1) * v).sum(1), 1e-6)


# ---------------------------------------------------------------------------------------------------------- operators


def with_leaves(arguments: Sequence[Any]) -> list[Any]:
    return [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    ]


masked = pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])


@masked
def test_operators_of_the_causal_form_are_as_pytorch_wants_them(masked: bool) -> None:
    tensors, mask = inputs(40, channels=5), torch.rand(2, 40) < 0.7 if masked else None
    _, state = native(*inputs(4, channels=5), causal=True, return_state=True)
    for before in (state, (None, None)):
        torch.library.opcheck(OPERATORS.aft_simple_causal.default, with_leaves([*tensors, mask, *before]))
    *_, marks = OPERATORS.aft_simple_causal(*tensors, mask, *state)
    upstream = [random_tensor(2, 40, 5), *(random_tensor(2, 5).double() for _ in range(2))]
    for grads in (upstream, [upstream[0], None, None]):
        torch.library.opcheck(OPERATORS.aft_simple_causal_backward.default, (*tensors, mask, marks, *grads))


@masked
def test_operators_of_the_bidirectional_form_are_as_pytorch_wants_them(masked: bool) -> None:
    tensors = inputs(9, 7, channels=5)
    masks = (torch.rand(2, 7) < 0.7, torch.rand(2, 9) < 0.7) if masked else (None, None)
    torch.library.opcheck(OPERATORS.aft_simple_bidirectional.default, with_leaves([*tensors, *masks]))
    _, marks = OPERATORS.aft_simple_bidirectional(*tensors, *masks)
    upstream = random_tensor(2, 9, 5)
    torch.library.opcheck(OPERATORS.aft_simple_bidirectional_backward.default, (*tensors, *masks, marks, upstream))


@both_forms
def test_gradients_of_gradients_are_refused(causal: bool) -> None:
    leaves = [t.requires_grad_() for t in inputs(9)]
    out = native(*leaves, causal=causal)
    with pytest.raises(RuntimeError, match="native kernels have no gradients of gradients: leave out create_graph"):
        torch.autograd.grad(out.sum() + leaves[0].pow(3).sum(), leaves, create_graph=True)


@pytest.fixture
def compiled_afresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@both_forms
@pytest.mark.usefixtures("compiled_afresh")
def test_compiles_whole_and_once_for_every_length(causal: bool) -> None:
    graphs, function = Graphs(), functools.partial(ops.aft_simple, causal=causal)
    compiled = torch.compile(function, fullgraph=True, backend=graphs.backend, dynamic=True)
    for length in (40, 33, 1000):
        all_close(with_gradients(compiled, *inputs(length)), with_gradients(function, *inputs(length)), 1e-6)
    name = f"flowformer.aft_simple_{'causal' if causal else 'bidirectional'}"
    assert graphs.operators() == [[f"{name}.default"], [f"{name}_backward.default"]]


def test_native_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWFORMER_BACKEND", raising=False)
    tensors = inputs(9)

    def ran(*tensors: Tensor, **arguments: Any) -> list[str]:
        with Recorder() as recorder:
            ops.aft_simple(*tensors, **arguments)
        return recorder.ran

    assert ran(*tensors) == ran(*(t.bfloat16() for t in tensors)) == ["aft_simple_bidirectional"]
    assert ran(*tensors, causal=True) == ["aft_simple_causal"]
    packed = [t.flatten(0, 1).unsqueeze(0) for t in tensors]
    bounds = torch.tensor([0, 9, 18], dtype=torch.int32)
    assert ran(*packed, cu_seqlens=bounds, causal=True) == ["aft_simple_causal"]
    assert ran(*tensors, backend="torch") == ran(*(t.double() for t in tensors)) == []
