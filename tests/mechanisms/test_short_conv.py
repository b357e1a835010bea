"""The short convolution: its definition, its gradients, and what traces and transforms it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from flowformer.mechanisms import ModuleState, ShortConv
from flowformer.mechanisms.short_conv import check_recent

CHANNELS = 5
FORMS = [(width, causal) for width in (2, 3, 4, 16) for causal in (False, True)]
each_form = pytest.mark.parametrize(("width", "causal"), FORMS)


def build(width: int, causal: bool, dtype: torch.dtype = torch.float64) -> ShortConv:
    torch.manual_seed(0)
    return ShortConv(CHANNELS, width, causal=causal, dtype=torch.float64).to(dtype)


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, CHANNELS, generator=random, dtype=torch.float64)


def define(conv: ShortConv, x: Tensor, recent: Tensor | None = None) -> Tensor:
    """One sequence (length, channels), token by token."""
    first = -(conv.width - 1) if conv.causal else -((conv.width - 1) // 2)
    known = dict(enumerate(x))
    if recent is not None:
        known |= {t - len(recent): row for t, row in enumerate(recent)}
    rows = []
    for t in range(len(x)):
        total = conv.bias
        for tap in range(conv.width):
            if t + first + tap in known:
                total = total + conv.weight[:, tap] * known[t + first + tap]
        rows.append(x[t] + total * total.sigmoid())
    return torch.stack(rows)


@each_form
@pytest.mark.parametrize("length", [1, 2, 9, 40])
def test_is_a_sum_over_neighbours(width: int, causal: bool, length: int) -> None:
    conv, x = build(width, causal), tokens(length)
    out, last = conv(x)
    torch.testing.assert_close(out, torch.stack([define(conv, row) for row in x]))
    if not causal:
        assert last is None
        return
    both, _ = conv(torch.cat([x, tokens(7, seed=1)], 1))
    rest, _ = conv(tokens(7, seed=1), recent=last)
    torch.testing.assert_close(rest, both[:, length:])


@each_form
def test_float32_is_float64(width: int, causal: bool) -> None:
    conv, x = build(width, causal), tokens(300)
    single = build(width, causal, torch.float32)
    leaves = [x.clone().requires_grad_(), x.float().requires_grad_()]
    upstream = tokens(300, seed=2)
    for got, want in zip(single(leaves[1])[:1], conv(leaves[0])[:1], strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
    grads = [
        torch.autograd.grad(one(leaf)[0], [leaf, *one.parameters()], upstream.to(leaf))
        for one, leaf in zip((conv, single), leaves, strict=True)
    ]
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 50])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, length: int) -> None:
    conv, x = build(16, True, dtype), tokens(length).to(dtype)
    out, last = conv(x)
    assert out.dtype == last.dtype == dtype
    want, _ = build(16, True, dtype).double()(x.double())
    torch.testing.assert_close(out, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    single = build(16, True, torch.float32)
    want, _ = single(x.float())
    with torch.autocast("cpu", dtype):
        out, _ = single(x.float())
    assert torch.equal(out, want)


@pytest.mark.parametrize(("width", "causal"), [(2, True), (3, False), (4, True), (4, False)])
def test_gradcheck(width: int, causal: bool) -> None:
    conv, x = build(width, causal), tokens(5).requires_grad_()
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    recent = tokens(width - 1, seed=1).requires_grad_() if causal else None
    names = [name for name, _ in conv.named_parameters()]

    def run(*given: Any, **arguments: Any) -> Any:
        x, recent, *parameters = given
        out, last = functional_call(
            conv, dict(zip(names, parameters, strict=True)), (x,), {"recent": recent, **arguments}
        )
        return (out, last) if causal else out

    torch.autograd.gradcheck(run, (x, recent, *conv.parameters()))
    torch.autograd.gradgradcheck(run, (x, recent, *conv.parameters()))
    torch.autograd.gradcheck(lambda *given: run(*given, mask=mask), (x, recent, *conv.parameters()))
    packed = recent if recent is None else torch.cat([recent, recent[:1]])
    torch.autograd.gradcheck(lambda *given: run(*given, cu_seqlens=bounds), (x[:1], packed, *conv.parameters()))


@each_form
def test_padding_and_packing(width: int, causal: bool) -> None:
    conv, x, lengths = build(width, causal), tokens(30, batch=1)[0], [3, 0, 20, 6, 1]
    pieces = x.split(lengths)
    recent = tokens(width - 1, batch=5, seed=1) if causal else None
    before = [None] * 5 if recent is None else list(recent)
    want = torch.cat([define(conv, *pair) for pair in zip(pieces, before, strict=True) if len(pair[0])])
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    out, last = conv(x.unsqueeze(0), cu_seqlens=bounds, recent=recent)
    torch.testing.assert_close(out[0], want)
    mask = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(n)) < n for n in lengths])
    padded = torch.full((5, 32, CHANNELS), 1e9, dtype=x.dtype).masked_scatter(mask.unsqueeze(-1), x)
    out, last_of_padded = conv(padded, mask, recent=recent)
    torch.testing.assert_close(out[mask], want)
    assert out.isfinite().all()
    if recent is not None:
        together = [torch.cat(pair)[-(width - 1) :] for pair in zip(recent, pieces, strict=True)]
        torch.testing.assert_close(last, torch.stack(together))
        torch.testing.assert_close(last_of_padded, torch.stack(together))


def test_steps_are_the_whole() -> None:
    conv, x = build(4, True), tokens(9)
    want, last = conv(x)
    recent, outs = conv.init_recent(2, x.dtype, x.device), []
    for token in x.unbind(1):
        out, recent = conv.step(token, recent)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), want)
    assert torch.equal(recent, last)


def test_state_does_not_keep_the_sequence_in_memory() -> None:
    _, last = build(4, True)(tokens(1000))
    assert last.untyped_storage().nbytes() == last.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_outputs_do_not_know_the_future(dtype: torch.dtype) -> None:
    conv, x = build(4, True, dtype), tokens(500).to(dtype)
    before, _ = conv(x)
    for t in (0, 1, 63, 498):
        after, _ = conv(torch.cat([x[:, : t + 1], 1e4 * tokens(499 - t, seed=1).to(dtype)], 1))
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])


def test_parameters_are_drawn_as_those_of_a_depthwise_conv1d() -> None:
    torch.manual_seed(0)
    conv = ShortConv(4000, 4, causal=True)
    other = nn.Conv1d(4000, 4000, 4, groups=4000)
    for one, like in ((conv.weight, other.weight), (conv.bias, other.bias)):
        assert one.abs().max() <= 0.5
        assert abs(one.std() - like.std()) < 0.01
    was = conv.weight.clone()
    conv.reset_parameters()
    assert not torch.equal(conv.weight, was)


@each_form
def test_one_exported_program_for_all_sizes(width: int, causal: bool) -> None:
    conv = build(width, causal, torch.float32)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
    program = torch.export.export(conv, (torch.randn(2, 40, CHANNELS),), dynamic_shapes=(sizes,)).module()
    for batch, length in ((3, 7), (1, 2), (2, 130), (1, 512)):
        x = torch.randn(batch, length, CHANNELS)
        torch.testing.assert_close(program(x)[0], conv(x)[0])


def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    conv, x = build(3, True, torch.float32), torch.randn(2, 20, CHANNELS)
    compiled = torch.compile(conv, fullgraph=True, backend="eager")
    mask = torch.rand(2, 20) < 0.7
    bounds = torch.tensor([0, 5, 20], dtype=torch.int32)
    for arguments in ({}, {"mask": mask}, {"cu_seqlens": bounds}):
        given = x[:1] if "cu_seqlens" in arguments else x
        (out, last), (want, last_wanted) = compiled(given, **arguments), conv(given, **arguments)
        real = arguments.get("mask", torch.ones(given.shape[:2], dtype=torch.bool))
        torch.testing.assert_close(out[real], want[real])
        torch.testing.assert_close(last, last_wanted)


def test_gradients_for_each_sample() -> None:
    conv, x = build(4, True, torch.float32), tokens(9, batch=3).float()
    parameters = dict(conv.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(conv, parameters, (x.unsqueeze(0),))[0].square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for row in range(3):
        wanted = torch.autograd.grad(loss(parameters, x[row]), list(parameters.values()))
        for name, want in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(each[name][row], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "kind", "says"),
    [
        (1, ValueError, "conv must be 0 for no convolution, or a width from 2 to 16, got 1"),
        (17, ValueError, "a width from 2 to 16, got 17"),
        (-2, ValueError, "a width from 2 to 16, got -2"),
        (4.0, TypeError, "conv must be a whole number, got 4.0"),
        (True, TypeError, "conv must be a whole number, got True"),
    ],
)
def test_other_widths_are_refused(width: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        ShortConv(4, width, causal=True)


def test_other_states_are_refused() -> None:
    convs = (build(4, True), build(4, True), build(4, True))
    part = tokens(3)
    check_recent("state", ModuleState(part, part, part, None), convs, 2, part.device)
    with pytest.raises(TypeError, match="state must be a ModuleState, got tuple"):
        check_recent("state", (part, part, part, None), convs, 2, part.device)
    for bad in (part[:1], part[:, 1:], part[..., 1:], part.long(), part.to("meta"), None, [1.0]):
        with pytest.raises(ValueError, match=r"state\.k must be \(2, 3, 5\) of floating point on cpu, got "):
            check_recent("state", ModuleState(part, bad, part, None), convs, 2, part.device)
