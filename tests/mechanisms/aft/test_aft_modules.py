"""What the modules of AFT have and others do not: positions, filters, images, and the sizes of the published models."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowformer import ops
from flowformer.mechanisms import AFTConv, AFTFull, AFTLocal, AFTSimple, Attention
from flowformer.mechanisms.aft.modules import AFT

DIM, LENGTH = 12, 20


def tokens(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=random, dtype=torch.float64)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max()


def build(kind: Callable[..., Attention], *sizes: int, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(DIM, *sizes, **options).double().eval()


def trained(module: AFTConv) -> AFTConv:
    """With filters that are not zero."""
    with torch.no_grad():
        module.gamma.copy_(torch.linspace(0.5, 1.5, module.num_heads))
        module.beta.copy_(torch.linspace(-0.3, 0.4, module.num_heads))
    return module


# -------------------------------------------------------------------------- the formula, written without an operation


def formula(module: AFT, x: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    """A module's output for x (batch, n, dim), by the definition: bias (n, n, channels or 1), seen (n, n) boolean."""
    q, k, v = (project(x) for project in (module.q_proj, module.k_proj, module.v_proj))
    k = k.repeat_interleave(v.shape[-1] // k.shape[-1], -1)
    weights = (k.unsqueeze(1) + bias).exp() * seen.unsqueeze(-1)
    means = (weights * v.unsqueeze(1)).sum(2) / weights.sum(2)
    return module.out_proj(q.sigmoid() * means)


def equal(module: AFT, got: Tensor, want: Tensor) -> None:
    """The same output, and the same gradients of every parameter."""
    close(got, want)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), [*module.parameters()]) for out in (got, want))
    # Beside the largest of all: where a number is added to all keys alike, the gradient is nothing but rounding.
    largest = max(gradient.abs().max() for gradient in theirs)
    for (name, _), one, other in zip(module.named_parameters(), ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-10 * largest, name


def everything(causal: bool) -> Tensor:
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return seen.tril() if causal else seen


def offsets() -> Tensor:
    place = torch.arange(LENGTH)
    return place - place.unsqueeze(1)


both_forms = pytest.mark.parametrize("causal", [False, True])


@both_forms
@pytest.mark.parametrize("position_dim", [7, None])
def test_full_is_the_formula(causal: bool, position_dim: int | None) -> None:
    module = build(AFTFull, max_length=30, causal=causal, position_dim=position_dim, position_std=1.0)
    table = module.position_table if position_dim is None else module.query_positions @ module.key_positions.T
    x = tokens(2, LENGTH)
    equal(module, module(x), formula(module, x, table[:LENGTH, :LENGTH].unsqueeze(-1), everything(causal)))


@both_forms
@pytest.mark.parametrize("position_dim", [7, None])
@pytest.mark.parametrize(("window", "hard"), [(1, False), (4, False), (4, True), (50, False)])
def test_local_is_the_formula(causal: bool, position_dim: int | None, window: int, hard: bool) -> None:
    module = build(
        AFTLocal, max_length=30, causal=causal, window=window, hard=hard, position_dim=position_dim, position_std=1.0
    )
    table = module.position_table if position_dim is None else module.query_positions @ module.key_positions.T
    near = offsets().abs() < window
    bias = (table[:LENGTH, :LENGTH] * near).unsqueeze(-1)
    x, seen = tokens(2, LENGTH), everything(causal)
    equal(module, module(x), formula(module, x, bias, seen & near if hard else seen))
    if causal:
        steps(module, x, module(x))


@both_forms
def test_simple_is_the_formula(causal: bool) -> None:
    module, x = build(AFTSimple, causal=causal), tokens(2, LENGTH)
    equal(module, module(x), formula(module, x, torch.zeros(1), everything(causal)))


@pytest.mark.parametrize(("causal", "taps"), [(False, 1), (False, 5), (False, 61), (True, 1), (True, 4), (True, 60)])
@pytest.mark.parametrize("hard", [False, True])
def test_conv_is_the_formula(causal: bool, taps: int, hard: bool) -> None:
    module, x = trained(build(AFTConv, 3, kernel_size=taps, causal=causal, hard=hard)), tokens(2, LENGTH)
    tap = offsets() + (taps - 1 if causal else taps // 2)
    near = (tap >= 0) & (tap < taps)
    bias = (module.filters[:, tap.clamp(0, taps - 1)] * near).movedim(0, -1).repeat_interleave(4, -1)
    seen = everything(causal)
    equal(module, module(x), formula(module, x, bias, seen & near if hard else seen))
    if causal:
        steps(module, x, module(x))


def image_bias(filters: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Biases (pixels, pixels, heads) of filters (heads, rows, columns), and who is within their reach."""
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    rows, columns = filters.shape[1:]
    at_row = row - row.unsqueeze(1) + rows // 2
    at_column = column - column.unsqueeze(1) + columns // 2
    near = (at_row >= 0) & (at_row < rows) & (at_column >= 0) & (at_column < columns)
    bias = filters[:, at_row.clamp(0, rows - 1), at_column.clamp(0, columns - 1)] * near
    return bias.movedim(0, -1), near


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 5), [5, 3], (11, 11)])
def test_conv_over_images_is_the_formula(kernel_size: Any, hard: bool) -> None:
    module, x = trained(build(AFTConv, 3, kernel_size=kernel_size, hard=hard)), tokens(2, 4, 6)
    bias, near = image_bias(module.filters, 4, 6)
    seen = near if hard else torch.ones_like(near)
    want = formula(module, x.flatten(1, 2), bias.repeat_interleave(4, -1), seen)
    equal(module, module(x), want.unflatten(1, (4, 6)))


def steps(module: AFT, x: Tensor, want: Tensor) -> None:
    state, outs = module.init_state(len(x)), []
    for token in x.unbind(1):
        out, state = module.step(token, state)
        outs.append(out)
    close(torch.stack(outs, 1), want)


# ------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("kind", [AFTFull, AFTLocal])
def test_positions_are_parameters_of_the_published_shape(kind: type[AFT]) -> None:
    module = build(kind, max_length=400, position_dim=64)
    own = dict(module.named_parameters(recurse=False))
    assert {name: tuple(parameter.shape) for name, parameter in own.items()} == {
        "query_positions": (400, 64),
        "key_positions": (400, 64),
    }
    assert all(abs(parameter.std() - 0.1) < 2e-3 for parameter in own.values())  # N(0, 10^-2), a variance
    other = build(kind, max_length=400, position_dim=None, position_std=0.5)
    assert [name for name, _ in other.named_parameters(recurse=False)] == ["position_table"]
    assert other.position_table.shape == (400, 400)
    assert abs(other.position_table.std() - 0.5) < 1e-2


def test_published_sizes_are_the_defaults() -> None:
    full, local = AFTFull(DIM, max_length=8), AFTLocal(DIM, max_length=8)
    assert full.query_positions.shape == full.key_positions.shape == (8, 128)  # ImageNet
    assert local.query_positions.shape == local.key_positions.shape == (8, 256)  # Enwik8
    assert local.window == 32
    assert AFTConv(DIM, 3).kernel.shape == (3, 11)


@both_forms
@pytest.mark.parametrize("kind", [AFTFull, AFTLocal])
def test_every_position_learns(kind: type[AFT], causal: bool) -> None:
    module = build(kind, max_length=LENGTH + 3, causal=causal)
    module(tokens(2, LENGTH)).square().sum().backward()
    for name, parameter in module.named_parameters(recurse=False):
        used = parameter.grad.abs().sum(1) > 0
        first = 1 if causal and name == "query_positions" else 0  # the first token has but itself to weigh
        assert used[first:LENGTH].all()
        assert not used[LENGTH:].any()


@both_forms
@pytest.mark.parametrize("kind", [AFTFull, AFTLocal])
def test_sequences_longer_than_the_table_are_refused(kind: type[AFT], causal: bool) -> None:
    module = build(kind, max_length=LENGTH, causal=causal)
    says = "position_bias has 20 positions, got 21 tokens"
    with pytest.raises(ValueError, match=says):
        module(tokens(2, LENGTH + 1))
    if causal:
        _, state = module(tokens(2, LENGTH), return_state=True)
        for further in (lambda: module.step(tokens(2), state), lambda: module(tokens(2, 1), initial_state=state)):
            with pytest.raises(ValueError, match=says):
                further()
    elif kind is AFTFull:
        for pair in ((tokens(2, 5), tokens(2, LENGTH + 1)), (tokens(2, LENGTH + 1), tokens(2, 5))):
            with pytest.raises(ValueError, match=says):
                module(*pair)


@both_forms
@pytest.mark.parametrize("kind", [AFTFull, AFTLocal])
def test_each_packed_sequence_begins_at_the_first_position(kind: type[AFT], causal: bool) -> None:
    module, x = build(kind, max_length=LENGTH, causal=causal, position_std=1.0), tokens(1, 3 * LENGTH)
    cuts = [0, 13, 13, 33, 53, 60]  # in all longer than the table
    out = module(x, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    pieces = [module(x[:, a:b]) for a, b in pairwise(cuts) if a < b]
    close(out, torch.cat(pieces, 1))
    assert not torch.allclose(pieces[1], module(x[:, 13:20])[:, :1])  # positions matter
    with pytest.raises(ValueError, match="has 20 positions, got 50 tokens"):
        module(x, cu_seqlens=torch.tensor([0, 10, 60], dtype=torch.int32))


def test_local_with_a_window_beyond_the_table_is_full() -> None:
    full = build(AFTFull, max_length=LENGTH, position_dim=64)
    local = build(AFTLocal, max_length=LENGTH, position_dim=64, window=LENGTH)
    x = tokens(2, LENGTH)
    close(local(x), full(x))
    assert not torch.allclose(build(AFTLocal, max_length=LENGTH, position_dim=64, window=5)(x), full(x))


@both_forms
@pytest.mark.parametrize("kind", [AFTFull, AFTLocal, AFTSimple])
def test_num_heads_changes_nothing_but_the_width(kind: type[AFT], causal: bool) -> None:
    options: dict[str, Any] = {"max_length": LENGTH} if kind.learns_positions else {}
    x = tokens(2, LENGTH)
    want = build(kind, causal=causal, **options)(x)
    for num_heads in (1, 3, 12):
        close(build(kind, num_heads, causal=causal, **options)(x), want, 0)
    assert build(kind, 3, head_dim=5, **options).q_proj.out_features == 15


# --------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("kernel_size", [1, 5, (3, 5)])
def test_fresh_conv_is_simple(kernel_size: int | tuple[int, int]) -> None:
    module = build(AFTConv, 3, kernel_size=kernel_size)
    x = tokens(2, 4, 6) if isinstance(kernel_size, tuple) else tokens(2, 24)
    assert not module.filters.any()
    q, k, v = (project(x.view(2, 24, DIM)) for project in (module.q_proj, module.k_proj, module.v_proj))
    close(module(x).view(2, 24, DIM), module.out_proj(ops.aft_simple(q, k.repeat_interleave(4, -1), v)))
    assert not torch.allclose(trained(module)(x).view(2, 24, DIM), module.out_proj(torch.zeros_like(v)))


@pytest.mark.parametrize("kernel_size", [5, (3, 5)])
def test_filters_have_the_mean_and_deviation_that_are_learned(kernel_size: Any) -> None:
    module = trained(build(AFTConv, 3, kernel_size=kernel_size))
    taps = module.filters.flatten(1)
    close(taps.mean(1), module.beta)
    close(taps.std(1, correction=0), module.gamma, 1e-5)  # 1e-6 beside a variance of about 1
    before = module.filters.detach().clone()
    with torch.no_grad():
        module.kernel.mul_(3).add_(7)
    close(module.filters, before, 1e-5)


@pytest.mark.parametrize("kernel_size", [1, 5, (1, 1), (3, 5)])
def test_filters_learn_from_the_start(kernel_size: Any) -> None:
    module = build(AFTConv, 3, kernel_size=kernel_size)
    x = tokens(2, 4, 6) if isinstance(kernel_size, tuple) else tokens(2, 24)
    one_tap = module.kernel[0].numel() == 1

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(module(x).square().sum(), [module.beta, module.gamma, module.kernel]))

    beta, gamma, kernel = gradients()
    assert beta.all()
    assert gamma.any() != one_tap  # the only tap is the mean
    assert not kernel.any()
    with torch.no_grad():
        module.gamma.sub_(gamma)
        module.beta.sub_(beta)
    for gradient in gradients():
        assert gradient.isfinite().all()
    assert gradients()[2].any() != one_tap


def test_padding_of_images_is_invisible_and_zero() -> None:
    module, x = trained(build(AFTConv, 3, kernel_size=(3, 5))), tokens(2, 4, 6)
    mask = torch.zeros(2, 7, 9, dtype=torch.bool)
    mask[:, :4, :6] = True
    padded = torch.full((2, 7, 9, DIM), torch.nan, dtype=x.dtype)
    padded[:, :4, :6] = x
    out = module(padded, mask=mask)
    close(out[:, :4, :6], module(x))
    assert not out[~mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel_size", [1, 5, (3, 5)])
def test_conv_in_half_precision(kernel_size: Any, dtype: torch.dtype) -> None:
    module = trained(build(AFTConv, 3, kernel_size=kernel_size))
    x = tokens(2, 4, 6) if isinstance(kernel_size, tuple) else tokens(2, 24)
    want = module(x)
    out = module.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    close(out, want, 2e-2)


@pytest.mark.parametrize("module", ["modules", "conv_module"])
def test_examples_in_docstrings_run(module: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"flowformer.mechanisms.aft.{module}"))
    assert outcome.attempted
    assert not outcome.failed


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", [AFTFull, AFTLocal])
def test_bad_positions_are_refused_in_words(kind: type[AFT]) -> None:
    name = kind.__name__
    with pytest.raises(ValueError, match=f"{name}: max_length is required, the length of the longest sequence"):
        kind(DIM)
    for bad in ({"max_length": 0}, {"max_length": 8, "position_dim": 0}):
        with pytest.raises(ValueError, match=f"{name}: max_length and position_dim must be positive, got "):
            kind(DIM, **bad)
    for bad in ({"position_std": -1.0, "position_dim": None}, {"position_std": 0.0}):
        with pytest.raises(ValueError, match=rf"{name}: position_std must be positive \(0 for a free table"):
            kind(DIM, max_length=8, **bad)
    assert not kind(DIM, max_length=8, position_dim=None, position_std=0.0).position_table.any()


def test_bad_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        AFTLocal(DIM, max_length=8, window=0)


def test_bad_kernel_sizes_are_refused_in_words() -> None:
    for bad in (0, -3, (3, 0), (3, 3, 3), (), 3.0, (3, 2.0)):
        with pytest.raises(ValueError, match="AFTConv: kernel_size must be a positive number or a pair of them, got"):
            AFTConv(DIM, 3, kernel_size=bad)
    for bad in (4, (3, 4), (2, 3)):
        with pytest.raises(ValueError, match="AFTConv: kernel_size must be odd, got"):
            AFTConv(DIM, 3, kernel_size=bad)
    with pytest.raises(ValueError, match="images have no causal form: kernel_size must be a single number, got"):
        AFTConv(DIM, 3, kernel_size=(3, 3), causal=True)
    assert AFTConv(DIM, 3, kernel_size=4, causal=True).kernel.shape == (3, 4)


def test_images_and_sequences_are_not_confused() -> None:
    sequence, image = build(AFTConv, 3), build(AFTConv, 3, kernel_size=(3, 3))
    with pytest.raises(ValueError, match=r"AFTConv: x must be \(batch, length, 12\), got \(2, 4, 6, 12\)"):
        sequence(tokens(2, 4, 6))
    with pytest.raises(ValueError, match=r"AFTConv: x must be \(batch, height, width, 12\), got \(2, 24, 12\)"):
        image(tokens(2, 24))
    with pytest.raises(ValueError, match=r"mask must be .*height, width.* got \(2, 24\)"):
        image(tokens(2, 4, 6), mask=torch.ones(2, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="not supported for images"):
        image(tokens(1, 4, 6), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="only a causal module has a state"):
        image.init_state(2)


def test_windows_and_filters_take_no_context() -> None:
    for module, what in ((build(AFTLocal, max_length=LENGTH), "window"), (build(AFTConv, 3), "filter")):
        with pytest.raises(
            ValueError,
            match=f"context is not supported, since a {what} requires queries and keys at the same positions",
        ):
            module(tokens(2, 6), tokens(2, 6))


# ---------------------------------------------------------------------------------------- sizes of published models


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def deit(dim: int, attention: Attention, *, tokens: int, layers: int = 12) -> float:
    """Millions of parameters of DeiT with this attention; ``tokens`` have learned positions, the first is the class."""
    patches = 3 * 16 * 16 * dim + dim
    positions = tokens * dim + dim if tokens else 0
    feed_forward = (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim)
    norms = 2 * 2 * dim
    head = 2 * dim + dim * 1000 + 1000
    return (patches + positions + layers * (parameters(attention) + feed_forward + norms) + head) / 1e6


def test_the_count_of_the_rest_is_that_of_deit() -> None:
    # timm's deit_tiny_patch16_224 and deit_small_patch16_224 have 5,717,416 and 22,050,664.
    for dim, want in ((192, 5.717416), (384, 22.050664)):
        softmax = nn.MultiheadAttention(dim, dim // 64)  # of as many parameters as DeiT's own
        assert deit(dim, softmax, tokens=197) == pytest.approx(want, abs=1e-9)  # pyright: ignore[reportArgumentType]


# Zhai et al., 2021, table 7: millions of parameters.
@pytest.mark.parametrize(("dim", "published"), [(192, 6.3), (384, 22.6)])
def test_sizes_of_published_aft_full(dim: int, published: float) -> None:
    size = deit(dim, AFTFull(dim, max_length=197), tokens=197)
    print(f"AFT-full, dim {dim}: {size:.3f} M, published {published} M")
    assert abs(size - published) < 0.1


@pytest.mark.parametrize(
    ("dim", "kernel", "heads", "published"),
    [(192, 11, 32, 5.4), (192, 11, 192, 5.9), (384, 11, 16, 20.3), (384, 11, 384, 22.5), (384, 15, 384, 23.0)],
)
def test_sizes_of_published_aft_conv(dim: int, kernel: int, heads: int, published: float) -> None:
    # No class token and no positions: the filters know where.
    size = deit(dim, AFTConv(dim, heads, kernel_size=(kernel, kernel)), tokens=0)
    print(f"AFT-conv ({kernel}, {heads}), dim {dim}: {size:.3f} M, published {published} M")
    assert abs(size - published) < 0.1
