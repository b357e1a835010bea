"""What is specific to the forms of AFT: constants, jumps of keys, biases, filters where the published form cancels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_cases import reference
from torch import Tensor

from flowformer import ops
from flowformer.mechanisms.aft import means

# torch.compile and torch.func make use of what PyTorch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

CHANNELS, HEADS, LONGEST = 6, 2, 320


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(length: int, *, batch: int = 2, dtype: torch.dtype = torch.float64, keys: int = CHANNELS) -> list[Tensor]:
    widths = (CHANNELS, keys, CHANNELS)
    return [randn(batch, length, width, seed=10 * length + i, dtype=dtype) for i, width in enumerate(widths)]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    error, size = (got.double() - want.double()).abs().max(), want.double().abs().max()
    assert error <= tolerance * size, f"off by {error / size:.3g} of the largest"


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(LONGEST, 3, seed=1, dtype=dtype), randn(LONGEST, 3, seed=2, dtype=dtype)


class Form:
    """One form with its parameters: the operation, its truth, its step."""

    def __init__(self, name: str, *parameters: Any, keys: int = CHANNELS, **options: Any) -> None:
        self.name, self.parameters, self.keys, self.options = name, parameters, keys, options

    def _run(self, function: Callable[..., Any], tensors: list[Tensor], **arguments: Any) -> Any:
        dtype = tensors[0].dtype
        parameters = [
            tuple(part.to(dtype) for part in p) if isinstance(p, tuple) else p.to(dtype) for p in self.parameters
        ]
        return function(*tensors, *parameters, **self.options, **arguments)

    def op(self, *tensors: Tensor, **arguments: Any) -> Any:
        return self._run(getattr(ops, f"aft_{self.name}"), list(tensors), backend="torch", **arguments)

    def truth(self, *tensors: Tensor, **arguments: Any) -> Tensor:
        return self._run(getattr(reference, f"aft_{self.name}"), list(tensors), **arguments)


FORMS = {
    "simple": Form("simple"),
    "full": Form("full", randn(LONGEST, LONGEST)),
    "full-factors": Form("full", factors()),
    "local": Form("local", randn(LONGEST, LONGEST), window=9),
    "local-hard": Form("local", factors(), window=9, hard=True),
    "conv": Form("conv", randn(HEADS, 9), keys=HEADS),
    "conv-hard": Form("conv", randn(HEADS, 9), keys=HEADS, hard=True),
}
each = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
both = pytest.mark.parametrize("causal", [False, True])


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], **arguments: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, **arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, seed=9, dtype=out.dtype))]


# ------------------------------------------------------------------------------------------------- what is known


@both
@each
def test_constant_values_give_the_gate_times_the_constant(form: Form, causal: bool) -> None:
    q, k, v = tokens(100, keys=form.keys)
    constant = randn(CHANNELS, seed=5)
    out = form.op(q, 3 * k, constant.expand_as(v), causal=causal)
    torch.testing.assert_close(out, q.sigmoid() * constant, rtol=1e-14, atol=0)


@both
def test_a_bias_of_two_factors_is_their_product(causal: bool) -> None:
    q, k, v = tokens(150)
    u, w = factors()
    product = u @ w.T
    close(ops.aft_full(q, k, v, (u, w), causal=causal), ops.aft_full(q, k, v, product, causal=causal))
    close(ops.aft_local(q, k, v, (u, w), 20, causal=causal), ops.aft_local(q, k, v, product, 20, causal=causal))


@both
@pytest.mark.parametrize("window", [1, 2, 64, 65, 200])
def test_local_is_full_with_zeros_outside_of_the_window(window: int, causal: bool) -> None:
    q, k, v = tokens(150)
    w = randn(150, 150)
    place = torch.arange(150)
    far = (place - place[:, None]).abs() >= window
    want = ops.aft_full(q, k, v, w.masked_fill(far, 0), causal=causal)
    close(ops.aft_local(q, k, v, w, window, causal=causal), want)
    want = ops.aft_full(q, k, v, w.masked_fill(far, -torch.inf), causal=causal)
    close(ops.aft_local(q, k, v, w, window, hard=True, causal=causal), want)


@both
@pytest.mark.parametrize("taps", [1, 7, 129])
def test_conv_is_full_with_a_bias_by_distance(taps: int, causal: bool) -> None:
    q, k, v = tokens(100, keys=HEADS)
    filters = randn(HEADS, taps)
    place = torch.arange(100)
    tap = place - place[:, None] + (taps - 1 if causal else taps // 2)
    outside = (tap < 0) | (tap >= taps)
    outs = []
    for head, (one_q, one_v) in enumerate(zip(q.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True)):
        w = filters[head][tap.clamp(0, taps - 1)].masked_fill(outside, 0)
        outs.append(ops.aft_full(one_q, k[..., head, None].expand_as(one_v), one_v, w, causal=causal))
    close(ops.aft_conv(q, k, v, filters, causal=causal), torch.cat(outs, -1))


@both
def test_without_a_bias_all_are_simple(causal: bool) -> None:
    q, k, v = tokens(100, keys=HEADS)
    wide = k.repeat_interleave(CHANNELS // HEADS, -1)
    want = ops.aft_simple(q, wide, v, causal=causal)
    nothing = torch.zeros(100, 100, dtype=q.dtype)
    close(ops.aft_full(q, wide, v, nothing, causal=causal), want)
    close(ops.aft_local(q, wide, v, nothing, 7, causal=causal), want)
    close(ops.aft_conv(q, k, v, nothing[:HEADS, :7], causal=causal), want)


# ------------------------------------------------------------------------------------------ keys and biases that jump


def jumps(length: int) -> dict[str, Tensor]:
    rising = torch.linspace(0, 1, length, dtype=torch.float64)
    spike = torch.zeros(length, dtype=torch.float64)
    spike[length // 2] = 1
    return {
        "rising": 1e4 * rising,
        "falling": 1e4 * rising.flip(0),
        "a spike": 1e4 * spike,
        "a hole": -1e4 * spike,
        "steps of 41": 41 * torch.arange(length).div(10).floor(),
        "noise": 100 * randn(length),
    }


@both
@each
def test_keys_that_jump_are_exact(form: Form, causal: bool) -> None:
    for name, k in jumps(150).items():
        q, noise, v = tokens(150, dtype=torch.float32, keys=form.keys)
        k = (k.view(1, -1, 1) + noise).float()
        exact = gradients(form.truth, [t.double() for t in (q, k, v)], causal=causal)
        # Where one key has all the weight, its gradient is p (v - y) = 0: beside that of v it is rounding.
        size = max(want.abs().max() for want in exact)
        for label, got, want in zip("oqkv", gradients(form.op, [q, k, v], causal=causal), exact, strict=True):
            assert (got - want).abs().max() <= 1e-5 * size, f"{label}, {name}"


@both
@each
def test_entries_are_repaired_where_keys_jump_and_only_there(
    form: Form, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    repairs = means._repairs

    def spied(bad: Tensor, *arguments: Any) -> Any:
        found.append(int(bad.sum()))
        return repairs(bad, *arguments)

    monkeypatch.setattr(means, "_repairs", spied)
    q, k, v = tokens(192, dtype=torch.float32, keys=form.keys)
    form.op(q, 3 * k, v, causal=causal)
    assert not found
    if causal or form.options.get("hard"):
        k = k + 50 * torch.arange(192).view(1, -1, 1)
        form.op(q, k, v, causal=causal)
        assert sum(found) > 100  # else the test above has tested nothing


@both
@pytest.mark.parametrize("hidden", [0.0, -1e4])
def test_biases_as_large_as_the_keys_are_exact(hidden: float, causal: bool) -> None:
    # The largest keys have the smallest bias: neither alone says where the weight is.
    length = 90
    w = torch.full((length, length), hidden, dtype=torch.float64)
    place = torch.arange(length)
    w[:, place % 3 == 0] = -1e4
    q, k, v = tokens(length)
    k[:, place % 3 == 0] += 1e4 - 1
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-3)):  # 1e4 - 1 has four digits left in float32
        tensors = [t.to(dtype) for t in (q, k, v)]
        truth = gradients(lambda *t: reference.aft_full(*t, w, causal=causal), [q, k, v])
        got = gradients(lambda *t, d=dtype: ops.aft_full(*t, w.to(d), causal=causal), tensors)
        for one, other in zip(got, truth, strict=True):
            close(one, other, tolerance)


def test_a_large_key_to_come_does_not_destroy_the_past() -> None:
    q, k, v = tokens(200, dtype=torch.float32)
    want = ops.aft_simple(q, k, v, causal=True, backend="torch")[:, :100]
    k[:, 100:] = 1e4
    got = ops.aft_simple(q, k, v, causal=True, backend="torch")
    assert torch.equal(got[:, :100], want)
    close(got[:, 100], q[:, 100].sigmoid() * v[:, 100], 1e-6)


@each
def test_gradients_of_gradients_are_refused(form: Form) -> None:
    tensors = [t.requires_grad_() for t in tokens(20, keys=form.keys)]
    out = form.op(*tensors, causal=True)
    with pytest.raises(RuntimeError, match="not support second-order gradients"):
        torch.autograd.grad(out.square().sum(), tensors, create_graph=True)


# ----------------------------------------------------------------------------------------------------------- filters


def published(q: Tensor, k: Tensor, v: Tensor, filters: Tensor) -> Tensor:
    """The paper's form: a convolution with exp(w) - 1, and a sum over all keys."""
    heads, taps = filters.shape
    e = (k - k.amax(1, keepdim=True)).exp().mT
    ev = e.repeat_interleave(v.shape[-1] // heads, 1) * v.mT
    kernel = filters.expm1().unsqueeze(1)
    total = torch.nn.functional.conv1d(e, kernel, padding=taps // 2, groups=heads) + e.sum(-1, keepdim=True)
    kernel = kernel.repeat_interleave(v.shape[-1] // heads, 0)
    out = torch.nn.functional.conv1d(ev, kernel, padding=taps // 2, groups=len(kernel)) + ev.sum(-1, keepdim=True)
    return q.sigmoid() * (out / total.repeat_interleave(v.shape[-1] // heads, 1)).mT


def test_the_published_form_is_the_same_where_it_does_not_cancel() -> None:
    q, k, v = tokens(60, keys=HEADS)
    filters = randn(HEADS, 7)
    close(ops.aft_conv(q, k, v, filters), published(q, k, v, filters))


def test_nothing_cancels_where_the_window_holds_most_of_the_mass() -> None:
    q, k, v = tokens(60, keys=HEADS, dtype=torch.float32)
    k[:, 28:33] += 20  # nearly all of the mass, which queries around 30 see through a filter that hides it
    filters = torch.full((HEADS, 15), -30.0)
    exact = reference.aft_conv(q, k, v, filters)
    close(ops.aft_conv(q, k, v, filters), exact, 1e-6)
    cancelled = (published(q, k, v, filters)[:, 30] - exact[:, 30]).abs().max()
    assert not cancelled <= 0.1 * exact[:, 30].abs().max()  # or NaN


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (5, 7), (14, 14)])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (11, 11)])
@pytest.mark.parametrize("hard", [False, True])
def test_images_equal_the_reference(grid: tuple[int, int], size: tuple[int, int], hard: bool) -> None:
    q, k, v = (randn(2, *grid, width, seed=width) for width in (CHANNELS, HEADS, CHANNELS))
    filters = randn(HEADS, *size)
    mask = torch.rand(2, *grid, generator=torch.Generator().manual_seed(0)) < 0.7
    for where in ({}, {"mask": mask}):

        def truth(*t: Tensor, where: Any = where) -> Tensor:
            return reference.aft_conv(*t, hard=hard, **where)

        def op(*t: Tensor, where: Any = where) -> Tensor:
            return ops.aft_conv(*t, hard=hard, **where)

        for got, want in zip(gradients(op, [q, k, v, filters]), gradients(truth, [q, k, v, filters]), strict=True):
            close(got, want) if want.any() else torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("hard", [False, True])
def test_keys_of_images_that_jump_are_exact(hard: bool) -> None:
    q, k, v = (randn(2, 9, 8, width, seed=width, dtype=torch.float32) for width in (CHANNELS, HEADS, CHANNELS))
    filters = torch.full((HEADS, 5, 5), -70.0)
    for spike in (1e4, 75.0, -1e4):
        keys = k.clone()
        keys[:, 4, 3] += spike
        exact = gradients(lambda *t: reference.aft_conv(*t, hard=hard), [t.double() for t in (q, keys, v, filters)])
        size = max(want.abs().max() for want in exact)
        got = gradients(lambda *t: ops.aft_conv(*t, hard=hard), [q, keys, v, filters])
        for label, one, other in zip("oqkvw", got, exact, strict=True):
            assert (one - other).abs().max() <= 1e-5 * size, f"{label}, {spike}"


def test_padding_of_images_is_invisible() -> None:
    q, k, v = (randn(2, 6, 5, width, seed=width) for width in (CHANNELS, HEADS, CHANNELS))
    filters = randn(HEADS, 3, 7)
    want = ops.aft_conv(q, k, v, filters)
    for left, right, top, bottom in ((0, 3, 0, 2), (4, 0, 1, 0)):
        sides = (0, 0, left, right, top, bottom)
        wide = [torch.nn.functional.pad(x, sides, value=torch.nan) for x in (q, k, v)]
        mask = torch.nn.functional.pad(torch.ones(2, 6, 5, dtype=torch.bool), sides[2:])
        got = ops.aft_conv(*wide, filters, mask=mask)
        close(got[:, top : top + 6, left : left + 5], want)
        assert not got[~mask].any()


def test_what_is_wrong_with_images_is_said() -> None:
    q, k, v = (randn(2, 4, 5, width) for width in (CHANNELS, HEADS, CHANNELS))
    filters = randn(HEADS, 3, 3)
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"q must be \(batch, height, width, channels\) like q, got \(2, 20, 6\)"):
        ops.aft_conv(*flat, filters)
    with pytest.raises(ValueError, match=r"k must be \(batch, height, width, channels\) like q, got \(2, 4, 4, 2\)"):
        ops.aft_conv(q, k[:, :, :4], v, filters)
    with pytest.raises(ValueError, match=r"mask must be \(batch, height, width\) like q, got \(2, 20\)"):
        ops.aft_conv(q, k, v, filters, mask=torch.ones(2, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="bidirectional filters must have odd sizes, got"):
        ops.aft_conv(q, k, v, filters[:, :2])
    with pytest.raises(ValueError, match=r"one filter for each of 2 heads, got \(1, 3, 3\)"):
        ops.aft_conv(q, k, v, filters[:1])
    with pytest.raises(ValueError, match=r"q must be \(batch, length, channels\), got \(2, 4, 5, 6\)"):
        ops.aft_conv(q, k, v, filters[..., 0])
    with pytest.raises(ValueError, match="not supported for images"):
        ops.aft_conv(q, k, v, filters, return_state=True)
    with pytest.raises(ValueError, match=r"must be \(heads, taps\), got \(2, 3, 3\)"):
        ops.aft_conv(*flat, filters, causal=True)


# ---------------------------------------------------------------------------------------------------- tables, windows


@both
def test_longer_than_the_table_is_refused_and_shorter_slices_it(causal: bool) -> None:
    q, k, v = tokens(50)
    w, (u, z) = randn(50, 50), (part[:50] for part in factors())
    for bias in (w, (u, z)):
        longer = [torch.cat([x, x[:, :1]], 1) for x in (q, k, v)]
        shorter = w[:20, :20] if bias is w else (u[:20], z[:20])
        start = [x[:, :20] for x in (q, k, v)]
        for name, rest in (("aft_full", ()), ("aft_local", (4,))):
            op = getattr(ops, name)
            with pytest.raises(ValueError, match=f"{name}: position_bias has 50 positions, got 51 tokens"):
                op(*longer, bias, *rest, causal=causal)
            close(op(*start, bias, *rest, causal=causal), op(*start, shorter, *rest, causal=causal))
            # Positions count real tokens: padding needs no room.
            mask = torch.arange(51).expand(2, -1) > 0
            close(op(*(x.roll(1, 1) for x in longer), bias, *rest, causal=causal, mask=mask)[:, 1:],
                  op(q, k, v, bias, *rest, causal=causal))  # fmt: skip


def test_a_step_beyond_the_table_is_refused() -> None:
    tensors = tokens(5)
    w = randn(5, 5)
    for name, rest in (("aft_full", ()), ("aft_local", (2,))):
        _, state = getattr(ops, name)(*tensors, w, *rest, causal=True, return_state=True)
        with pytest.raises(ValueError, match="position_bias has 5 positions, got 6 tokens"):
            getattr(ops, f"{name}_step")(*(t[:, 0] for t in tensors), state, w, *rest)


@pytest.mark.parametrize(
    ("window", "kind", "says"),
    [(0, ValueError, "window must be at least 1"), (2.0, TypeError, "window must be an integer, got float")],
)
def test_windows_that_mean_nothing_are_refused(window: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        ops.aft_local(*tokens(5), randn(5, 5), window)


def test_tables_that_are_none_are_refused() -> None:
    for bias, says in (
        (randn(5, 6), r"\(T, T\), or two factors .* got \(5, 6\)"),
        ((randn(5, 2), randn(6, 2)), r"two factors .* got \(5, 2\) .* \(6, 2\)"),
        ((randn(5, 2),) * 3, "two factors"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            ops.aft_full(*tokens(5), bias)


# --------------------------------------------------------------------------------------------- compiled, transformed


def check_compiled(form: Form, causal: bool) -> None:
    tensors = tokens(100, keys=form.keys)
    mask = torch.arange(100).expand(2, -1) % 5 > 0
    compiled = torch.compile(lambda *t: form.op(*t, causal=causal, mask=mask), backend="aot_eager", fullgraph=True)
    for got, want in zip(
        gradients(compiled, tensors), gradients(form.op, tensors, causal=causal, mask=mask), strict=True
    ):
        close(got, want)


# The windows of aft_conv are those of aft_local; by itself it is compiled below.
@pytest.mark.parametrize("name", ["simple", "full-factors", "local"])
def test_compiled_is_the_same(name: str) -> None:
    check_compiled(FORMS[name], causal=True)


@pytest.mark.slow
@both
@each
def test_all_compiled_is_the_same(form: Form, causal: bool) -> None:
    check_compiled(form, causal)


@both
@each
def test_torch_func_is_the_same(form: Form, causal: bool) -> None:
    q, k, v = tokens(70, keys=form.keys)
    op = lambda *t: form.op(*t, causal=causal)  # noqa: E731
    want = gradients(op, [q, k, v])
    upstream = randn(*want[0].shape, seed=9)
    got = torch.func.grad(lambda *t: (op(*t) * upstream).sum(), argnums=(0, 1, 2))(q, k, v)
    for one, other in zip(got, want[1:], strict=True):
        close(one, other)
    rows = torch.func.vmap(lambda *t: op(*(x.unsqueeze(0) for x in t)).squeeze(0))(q, k, v)
    close(rows, want[0])
    tangents = [randn(*x.shape, seed=20 + i) for i, x in enumerate((q, k, v))]
    _, along = torch.func.jvp(op, (q, k, v), tuple(tangents))
    close((along * upstream).sum(), sum((t * g).sum() for t, g in zip(tangents, want[1:], strict=True)), 1e-9)
