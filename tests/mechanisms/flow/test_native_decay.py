"""Flow-Attention with decay by the C++ kernels: both forms, forward and backward, and the step.

They run in float32, and are compared with float64 of plain PyTorch or of the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_inputs import all_close, both_forms, close, competitions, exact, inputs, native, needs_kernels, random
from law_cases import reference
from torch import Tensor

from flowformer import ops
from flowformer.mechanisms.flow import step

pytestmark = needs_kernels

kinds = pytest.mark.parametrize("by_token", [False, True], ids=["heads", "tokens"])


def decays(length: int, *, by_token: bool, batch: int = 2, heads: int = 2) -> Tensor:
    """Log-decays: of heads, the last of which is slow; or of tokens, from none to strong."""
    if not by_token:
        return -torch.logspace(-1, -3, heads) if heads > 1 else torch.tensor([-0.01])
    return -(10 ** random(batch, length, heads, seed=3).clamp(max=2) / 10)


def start(batch: int, *, by_token: bool, heads: int = 2, keys: int = 8, values: int = 8, **options: Any) -> Any:
    """A state with a past."""
    tensors = inputs(50, batch=batch, heads=heads, keys=keys, values=values)
    log_decay = decays(50, by_token=by_token, batch=batch, heads=heads).double()
    return exact(*tensors, log_decay, causal=True, return_state=True, **options)[1]


def everything(
    function: Callable[..., Any], tensors: list[Tensor], log_decay: Tensor, state: Any = None, **arguments: Any
) -> list[Tensor]:
    """Output, final state, and gradients of both for q, k, v, log-decays and the initial state."""
    leaves = [t.detach().requires_grad_() for t in (*tensors, log_decay)]
    parts = [] if state is None else [part.detach().requires_grad_() for part in state]
    before = None if state is None else ops.FlowState(*parts)
    out, after = function(*leaves, causal=True, initial_state=before, return_state=True, **arguments)
    outputs = [out, *after]
    upstream = [random(*o.shape, seed=1).to(o) / o.detach().abs().max().clamp(max=1e9) for o in outputs]
    if arguments.get("competition", "sequence") != "sequence":
        del parts[2:3], outputs[3], upstream[3]  # the normaliser is no part of it
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, [*leaves, *parts], upstream)]


def output_and_gradients(
    function: Callable[..., Any], tensors: list[Tensor], log_decay: Tensor, **arguments: Any
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (*tensors, log_decay)]
    out = function(*leaves, **arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, random(*out.shape).to(out))]


def agree_bidirectional(tensors: list[Tensor], log_decay: Tensor, **arguments: Any) -> list[Tensor]:
    """The same of the bidirectional form, which has no state."""
    got = output_and_gradients(native, tensors, log_decay, **arguments)
    doubles = [t.double() for t in tensors]
    all_close(got, output_and_gradients(exact, doubles, log_decay.double(), **arguments))
    return got


def agree(tensors: list[Tensor], log_decay: Tensor, state: Any = None, **arguments: Any) -> list[Tensor]:
    """Compare kernels with plain PyTorch in float64; return what the kernels gave."""
    got = everything(native, tensors, log_decay, state, **arguments)
    doubles = [t.double() for t in tensors]
    all_close(got, everything(exact, doubles, log_decay.double(), state, **arguments))
    return got


@kinds
@competitions
@pytest.mark.parametrize(("keys", "values"), [(8, 8), (3, 20), (64, 64)])
def test_equals_plain_pytorch(keys: int, values: int, competition: str | None, by_token: bool) -> None:
    state = start(2, by_token=by_token, keys=keys, values=values, competition=competition)
    for length, before in ((100, None), (37, state)):
        tensors = inputs(length, keys=keys, values=values)
        agree(tensors, decays(length, by_token=by_token), before, competition=competition)
        agree_bidirectional(tensors, decays(length, by_token=by_token), competition=competition)


@kinds
@both_forms
@pytest.mark.parametrize("preset", ops.PRESETS)
def test_equals_the_truth(preset: str, causal: bool, by_token: bool) -> None:
    tensors, log_decay = inputs(70, keys=5), decays(70, by_token=by_token)
    leaves = [[t.to(dtype).requires_grad_() for t in (*tensors, log_decay)] for dtype in (torch.float32, torch.float64)]
    options: dict[str, Any] = {"causal": causal, "preset": preset, "eps": 0.01, "flow_eps": 0.02}
    outs = native(*leaves[0], **options), reference.flow_attention(*leaves[1], **options)
    grads = [
        torch.autograd.grad(out, given, random(*out.shape).to(out)) for out, given in zip(outs, leaves, strict=True)
    ]
    all_close([outs[0], *grads[0]], [outs[1], *grads[1]])


@kinds
@pytest.mark.parametrize("where", ["left", "right", "inside", "all of one row"])
def test_padding_does_not_decay(where: str, by_token: bool) -> None:
    tensors, log_decay = inputs(90), decays(90, by_token=by_token)
    mask = torch.ones(2, 90, dtype=torch.bool)
    spans = {"left": slice(0, 40), "right": slice(50, 90), "inside": slice(3, 70), "all of one row": slice(0, 90)}
    mask[0, spans[where]] = False
    padded = [t.masked_fill(~mask.view(2, 90, 1, 1), torch.nan) for t in tensors]
    if by_token:
        log_decay = log_decay.masked_fill(~mask.unsqueeze(-1), torch.nan)
    got = agree(padded, log_decay, start(2, by_token=by_token), mask=mask)
    got += agree_bidirectional(padded, log_decay, mask=mask)
    assert all(t.isfinite().all() for t in got)
    if where != "all of one row":
        alone = [t[:1, mask[0]] for t in tensors]
        decay = log_decay[:1, mask[0]] if by_token else log_decay
        for causal in (False, True):
            among = native(*padded, log_decay, causal=causal, mask=mask)[:1, mask[0]]
            assert torch.equal(among, native(*alone, decay, causal=causal))


@kinds
def test_a_packed_batch_equals_its_sequences(by_token: bool) -> None:
    bounds = torch.tensor([0, 40, 40, 41, 150])
    tensors, log_decay = inputs(150, batch=1), decays(150, by_token=by_token, batch=1)
    agree(tensors, log_decay, start(4, by_token=by_token), cu_seqlens=bounds)
    agree_bidirectional(tensors, log_decay, cu_seqlens=bounds)
    for causal in (False, True):
        packed = native(*tensors, log_decay, causal=causal, cu_seqlens=bounds)
        for first, last in ((0, 40), (40, 41), (41, 150)):
            decay = log_decay[:, first:last] if by_token else log_decay
            alone = native(*(t[:, first:last] for t in tensors), decay, causal=causal)
            assert torch.equal(packed[:, first:last], alone)


@kinds
@competitions
def test_a_sequence_in_parts_and_token_by_token(competition: str | None, by_token: bool) -> None:
    tensors, log_decay = inputs(70), decays(70, by_token=by_token)
    options: dict[str, Any] = {"competition": competition}
    whole, last = exact(*tensors, log_decay.double(), causal=True, return_state=True, **options)
    for split in (1, 32, 45):
        state, outs = None, []
        for part in (slice(0, split), slice(split, 70)):
            decay = log_decay[:, part] if by_token else log_decay
            out, state = native(
                *(t[:, part] for t in tensors), decay, causal=True, initial_state=state, return_state=True, **options
            )
            outs.append(out)
        all_close([torch.cat(outs, 1), *state], [whole, *last])
    state = ops.init_flow_state(2, 2, 8, 8)
    for t in range(70):
        decay = log_decay[:, t] if by_token else log_decay
        out, state = ops.flow_attention_step(*(x[:, t] for x in tensors), state, decay, backend="native", **options)
        close(out, whole[:, t])
    all_close(state, last)


@kinds
def test_a_step_has_gradients(by_token: bool) -> None:
    found = []
    for backend, dtype in (("native", torch.float32), ("torch", torch.float64)):
        token = [t[:, 0].to(dtype) for t in inputs(1)]
        decay = decays(1, by_token=by_token).to(dtype)
        leaves = [t.clone().requires_grad_() for t in (*token, decay[:, 0] if by_token else decay)]
        state = ops.FlowState(*(part.clone().requires_grad_() for part in start(2, by_token=by_token)))
        out, after = ops.flow_attention_step(*leaves[:3], state, leaves[3], backend=backend)
        total = out.square().sum() + sum(part.tanh().sum() for part in after)
        found.append(torch.autograd.grad(total, [*leaves, *state]))
    all_close(*found)


def test_a_plain_step_with_decay_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(step, "check_step", None)  # what a step that takes the long way calls
    token, state = [t[:, 0] for t in inputs(1)], ops.init_flow_state(2, 2, 8, 8)
    for dtype in (torch.float32, torch.float64):
        for decay in (torch.full((2,), -0.1, dtype=dtype), torch.full((2, 2), -0.1, dtype=dtype)):
            ops.flow_attention_step(*token, state, decay, backend="native")
    for decay in (-torch.ones(3), -torch.ones(2, requires_grad=True), (-torch.ones(4))[::2]):
        with pytest.raises(TypeError, match="not callable"):
            ops.flow_attention_step(*token, state, decay, backend="native")


@pytest.mark.parametrize("strong", [-5.0, -50.0, -1e4, float("-inf")])
@competitions
@both_forms
def test_strong_decays(competition: str | None, strong: float, causal: bool) -> None:
    """Gradients of log-decays too are right to their own size, where those of plain PyTorch are rounding."""
    tensors, log_decay = inputs(100), torch.full((2, 100, 2), strong)
    tensors[2] = tensors[2] + 1
    options: dict[str, Any] = {"causal": causal, "competition": competition, "preset": "timeseries"}
    leaves = [t.clone().requires_grad_() for t in (*tensors, log_decay)]
    out = native(*leaves, **options)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(t.isfinite().all() for t in (out, *grads))
    # Tokens that are as good as alone: the gradient is exp(g) times what it would be per unit of gamma at 0.
    largest = grads[3].abs().max()
    assert largest <= 100 * torch.tensor(strong, dtype=torch.float64).exp()
    if strong == -5:
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        other = exact(*doubles, **options)
        all_close([out, grads[3]], [other, torch.autograd.grad(other.sum(), doubles)[3]])
        assert largest > 0
    if strong == -50:
        assert largest > 0
        softer = leaves[3].detach() * 0 - 45
        other = native(*tensors, softer.requires_grad_(), **options)
        (of_softer,) = torch.autograd.grad(other.sum(), softer)
        close(grads[3] * torch.tensor(5.0).exp(), of_softer)


@both_forms
def test_strong_decays_among_weak_ones_hide_nothing(causal: bool) -> None:
    """A large flow before a strong decay is not in the scale of the competition after it."""
    tensors = inputs(100)
    tensors[1] = tensors[1] * 50
    log_decay = torch.full((2, 100, 2), -1e-3)
    log_decay[:, 40] = -2000.0
    for preset in ("timeseries", "lra"):
        options: dict[str, Any] = {"preset": preset, "feature_map": "relu", "competition": "sequence", "causal": causal}
        got = native(*tensors, log_decay, **options)
        close(got, exact(*tensors, log_decay.double(), **options))
        alone = native(*(t[:, 40:] for t in tensors), log_decay[:, 40:], **options)
        close(got[:, 40:], alone)


@both_forms
def test_no_decay_equals_none_and_values_above_zero_count_as_zero(causal: bool) -> None:
    tensors = inputs(100)
    zero = torch.zeros(2, requires_grad=True)
    without, with_zero = native(*tensors, causal=causal), native(*tensors, zero, causal=causal)
    close(with_zero, without)
    assert torch.autograd.grad(with_zero.sum(), zero)[0].all()
    above = torch.tensor([0.5, 3.0], requires_grad=True)
    out = native(*tensors, above, causal=causal)
    assert torch.equal(out, with_zero)
    assert not torch.autograd.grad(out.sum(), above)[0].any()


@pytest.mark.parametrize("feature_map", ["elu", "softmax", "learned"])
@kinds
def test_feature_maps(feature_map: str, by_token: bool) -> None:
    weights = random(2, 2, 8, 8) if feature_map == "learned" else None
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.7
    tensors = [3 * t for t in inputs(70)]
    options: dict[str, Any] = {"feature_map": feature_map, "causal": True, "return_state": True}
    results = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "torch")):
        given = [*tensors, decays(70, by_token=by_token), *([] if weights is None else [weights])]
        leaves = [t.to(dtype).requires_grad_() for t in given]
        learned = (leaves[3], None, leaves[4]) if weights is not None else (leaves[3],)
        out, state = ops.flow_attention(*leaves[:3], *learned, mask=mask, backend=backend, **options)
        grads = torch.autograd.grad(out, leaves, random(*out.shape).to(out))
        token = [t.detach()[:, 0] for t in leaves[:3]]
        decay = leaves[3].detach()[:, 0] if by_token else leaves[3].detach()
        stepped, after = ops.flow_attention_step(
            *token, state, decay, *(t if t is None else t.detach() for t in learned[1:]), feature_map=feature_map,
            backend=backend,
        )  # fmt: skip
        results.append([out, *state, *grads, stepped, *after])
    all_close(*results)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_feature_maps_without_decay(feature_map: str, causal: bool) -> None:
    tensors = [3 * t for t in inputs(70, 70 if causal else 40)]
    options: dict[str, Any] = {"feature_map": feature_map, "causal": causal}
    results = []
    for function, dtype in ((native, torch.float32), (exact, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves, **options)
        results.append([out, *torch.autograd.grad(out, leaves, random(*out.shape).to(out))])
    all_close(*results)
    assert native(*(t.bfloat16() for t in tensors), **options).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- long, and threads


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@competitions
def test_threads_do_not_matter_to_the_bidirectional_form(competition: str | None, threads: Any) -> None:
    tensors, log_decay = inputs(600, heads=3), decays(600, by_token=True, heads=3)
    threads(1)
    want = agree_bidirectional(tensors, log_decay, competition=competition)
    threads(8)
    got = output_and_gradients(native, tensors, log_decay, competition=competition)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@kinds
@competitions
def test_threads_do_not_matter(competition: str | None, by_token: bool, threads: Any) -> None:
    # 3,000 tokens make two pieces of at least 1,024.
    tensors, state = inputs(3000, batch=1, heads=1), start(1, by_token=by_token, heads=1, competition=competition)
    # Slow enough for a piece to depend on the one before it.
    log_decay = decays(3000, by_token=by_token, batch=1, heads=1) / 1000
    want = everything(exact, [t.double() for t in tensors], log_decay.double(), state, competition=competition)
    results = {}
    for count in (1, 2, 8):
        threads(count)
        results[count] = everything(native, tensors, log_decay, state, competition=competition)
        all_close(results[count], want)
    assert not all(torch.equal(a, b) for a, b in zip(results[8], results[1], strict=True)), "nothing was cut"


def test_threads_do_not_matter_to_packed_and_padded_batches(threads: Any) -> None:
    lengths = (2100, 0, 3, 1030, 3000)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    mask = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.8], [0.3]])
    threads(16)
    log_decay = torch.tensor([-1e-3])
    agree(inputs(sum(lengths), batch=1, heads=1), log_decay, start(5, by_token=False, heads=1), cu_seqlens=bounds)
    agree(inputs(4000, heads=1), log_decay, start(2, by_token=False, heads=1), mask=mask)


@pytest.mark.slow
@kinds
def test_a_long_sequence(by_token: bool) -> None:
    length, heads = 65_536, 3
    tensors = inputs(length, batch=1, heads=heads)
    log_decay = torch.tensor([-1e-1, -1e-5, -1e-9])
    if by_token:
        log_decay = log_decay * torch.rand(1, length, heads, generator=torch.Generator().manual_seed(0))
    agree(tensors, log_decay)
    agree_bidirectional(tensors, log_decay)


@kinds
@both_forms
def test_bfloat16_is_worth_its_inputs(causal: bool, by_token: bool) -> None:
    whole = [random(1, 1000, 2, 64, seed=i) for i in range(3)]
    rounded = [t.bfloat16() for t in whole]
    log_decay = decays(1000, by_token=by_token, batch=1)
    got = native(*rounded, log_decay, causal=causal)
    function = functools.partial(exact, causal=causal)
    want, unavoidable = function(*whole, log_decay.double()), function(*rounded, log_decay.double())
    assert got.dtype == torch.bfloat16
    worst = 2 * (unavoidable - want).abs().max() + 2**-8 / 2 * want.abs().max()
    assert (got.double() - want).abs().max() <= worst
    leaves = [t.clone().requires_grad_() for t in (*rounded, log_decay)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    upstream = random(*got.shape).bfloat16()
    grads = torch.autograd.grad(native(*leaves, causal=causal), leaves, upstream)
    others = torch.autograd.grad(function(*doubles), doubles, upstream.double())
    all_close(grads, others, 2**-7)
