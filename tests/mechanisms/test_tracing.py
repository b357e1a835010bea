"""Modules in traced graphs: exported for any length and batch, and packed without a look at the boundaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowformer import create_attention, list_attentions
from flowformer.core import tracing
from flowformer.core.tracing import count_chunks, cumulate, cut, frame, log_add, log_cumsum, shift, window_tokens
from flowformer.mechanisms import find_attention

BATCH = torch.export.Dim("batch", min=1, max=64)
LENGTH = torch.export.Dim("length", min=2, max=512)
SIZES = ((3, 7), (1, 2), (2, 130), (1, 512), (5, 64))

FORMS = [(name, causal) for name in list_attentions() for causal in (False, True)
         if not causal or find_attention(name).can("causal")]  # fmt: skip
# These plan their buckets for the length that is traced.
ONE_LENGTH = [form for form in FORMS if form[0] in ("reformer", "routing", "sinkhorn")]
ANY_LENGTH = [form for form in FORMS if form not in ONE_LENGTH]
QUICK = [("linear", False), ("linear", True), ("softmax", True)]
each_form = pytest.mark.parametrize(
    ("name", "causal"), [pytest.param(*form, marks=() if form in QUICK else pytest.mark.slow) for form in ANY_LENGTH]
)


def build(name: str, causal: bool) -> Any:
    torch.manual_seed(0)
    options = {"window": 4} if name == "aft_local" else {}
    return create_attention(name, 16, 2, causal=causal, max_length=600, **options).eval()


def export(module: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    shapes = tuple({0: BATCH, 1: LENGTH} for _ in example)
    return torch.export.export(module, example, dynamic_shapes=shapes).module()


@each_form
def test_one_exported_program_for_all_lengths_and_batches(name: str, causal: bool) -> None:
    attention = build(name, causal)
    program = export(attention, (torch.randn(2, 40, 16),))
    for batch, length in SIZES:
        x = torch.randn(batch, length, 16)
        torch.testing.assert_close(program(x), attention(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
@each_form
def test_torch_jit_keeps_length_and_batch_free(name: str, causal: bool) -> None:
    attention = build(name, causal)
    with torch.no_grad():
        program = torch.jit.trace(attention, (torch.randn(2, 40, 16),), check_trace=False)
        for batch, length in SIZES:
            x = torch.randn(batch, length, 16)
            torch.testing.assert_close(program(x), attention(x), rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "causal"), ONE_LENGTH)
def test_an_exported_program_for_one_length(name: str, causal: bool) -> None:
    attention = build(name, causal)
    program = torch.export.export(attention, (torch.randn(2, 40, 16),)).module()
    x = torch.randn(2, 40, 16)
    torch.testing.assert_close(program(x), attention(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "causal"), ANY_LENGTH)
def test_one_exported_program_for_all_masks(name: str, causal: bool) -> None:
    attention = Masked(build(name, causal))
    program = export(attention, (torch.randn(2, 40, 16), torch.rand(2, 40) < 0.8))
    for batch, length in SIZES:
        x, mask = torch.randn(batch, length, 16), torch.rand(batch, length) < 0.7
        x = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
        torch.testing.assert_close(program(x, mask), attention(x, mask), rtol=1e-4, atol=1e-5)


PACKED_QUICK = [("flow", True), ("linear", True), ("aft_simple", False)]


@pytest.mark.parametrize(
    ("name", "causal"), [pytest.param(*form, marks=() if form in PACKED_QUICK else pytest.mark.slow) for form in FORMS]
)
def test_packing_compiles_into_one_graph(name: str, causal: bool) -> None:
    torch._dynamo.reset()
    attention, x = build(name, causal), torch.randn(1, 30, 16)
    compiled = torch.compile(attention, fullgraph=True, backend="eager", dynamic=False)
    for bounds in ([0, 5, 5, 25, 30], [0, 1, 9, 10, 30]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        want = attention(x, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(compiled(x, cu_seqlens=cu_seqlens), want, rtol=1e-4, atol=1e-5)


def results() -> list[Tensor]:
    """What each operation of core.tracing gives."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 6, 3, generator=random, dtype=torch.float64)
    flat = torch.randn(2, 50, generator=random, dtype=torch.float64) * 30
    return [
        cut(x, 4), shift(x, 7.0), shift(x, -1.0, 2, 1), frame(x, 3, 15, 9.0), window_tokens(x, 3, 2, 5),
        window_tokens(x, 2, 5, 5), log_cumsum(flat), log_add(flat, flat.flip(1)),
    ]  # fmt: skip


def test_exported_graphs_compute_the_same_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    want = results()
    monkeypatch.setattr(tracing, "is_exporting", lambda: True)
    torch.testing.assert_close(results(), want)
    x = torch.arange(10.0).expand(2, -1)
    (sums,) = cumulate([x], lambda one, other: [one[0] + other[0]], [0.0], 1)
    torch.testing.assert_close(sums, x.cumsum(1))
    assert [count_chunks(length, 64) for length in (1, 64, 65, 128)] == [2, 2, 3, 3]


def test_log_sums_of_an_exported_graph_neither_overflow_nor_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "is_exporting", lambda: True)
    x = torch.tensor([-1e30, -1e30, -900.0, 900.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(log_cumsum(x), x.logcumsumexp(-1))
    assert log_add(x[0], x[1]) == -1e30
