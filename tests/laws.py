"""The laws of attention, once, for every mechanism of the registry, its variants, both forms, and every implementation.

A mechanism added to the registry is held to them without a change here. Where a backend does not run
there are no cases of it; tests/mechanisms/flow/test_native_flow.py says so of the native kernels.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_cases import Variant, shapes_of, variants_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from flowformer.core import run as core_run
from flowformer.core.backends import ENVIRONMENT_VARIABLE, TORCH, Backend, backends_of, explain
from flowformer.core.scan import scan
from flowformer.mechanisms import Attention, Mechanism, create_attention, find_attention, list_attentions
from flowformer.mechanisms.aft.modules import AFT

HEADS, KEY, VALUE = 2, 4, 5
DIM = 8  # of modules
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
Tensors = Sequence[Tensor]


# --------------------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    """One form of one variant of one mechanism, by one implementation."""

    row: Mechanism
    variant: Variant
    causal: bool
    backend: Backend
    longest: int = 512  # tokens that tables of positions have room for

    def __hash__(self) -> int:  # a row is not hashable, its name is
        return hash((self.row.name, self.variant, self.causal, self.backend.name, self.longest))

    @property
    def dtypes(self) -> Sequence[torch.dtype]:
        return self.backend.dtypes

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    @property
    def tolerance(self) -> float:
        """For what has another dtype than the inputs: states are float64 whatever the inputs are."""
        return TOLERANCE[self.dtype]

    @property
    def in_torch(self) -> Case:
        """The same in plain PyTorch, which computes every dtype."""
        return self._replace(backend=TORCH)

    @property
    def crosses(self) -> bool:
        """Whether there may be another number of queries than of keys."""
        return self.row.can("cross") and not self.causal and not self.variant.decays

    @property
    def permutes(self) -> bool:
        """Whether tokens have no order."""
        return self.row.can("permutation") and not self.variant.decays and not self.variant.ordered

    @property
    def count(self) -> int:
        """How many inputs are of tokens: q, k and v, and log-decays where they are."""
        return 4 if self.variant.by_token else 3

    def takes(self, length: int) -> bool:
        """Whether the backend's laws are checked on so many tokens."""
        return not self.backend.longest or length <= self.backend.longest

    def least(self, length: int) -> int:
        """So many tokens, or as many as the backend's laws are checked on."""
        return length if self.takes(length) else self.backend.longest

    def up_to(self, length: int) -> Case:
        """The same, with tables of positions for ``length`` tokens."""
        return self._replace(longest=length)

    @property
    def options(self) -> dict[str, Any]:
        return {**self.variant.options, **self.variant.for_length(self.longest)}

    def arguments(self) -> dict[str, Any]:
        return {"causal": self.causal, "backend": self.backend.name, **self.options}

    def shapes(self, heads: int = HEADS, key: int = KEY, value: int = VALUE) -> Sequence[tuple[int, ...]]:
        return shapes_of(self.row, heads, key, value)

    def parameters(self, dtype: torch.dtype | None = None, heads: int = HEADS, key: int = KEY) -> list[Tensor]:
        """The learned tensors, those of a pair one after the other; the same at every call."""
        shapes, _ = self._learned(heads, key)
        given = [shape for shape in shapes if shape is not None]
        dtype, scale = dtype or self.dtype, self.variant.scale
        made = [_parameter(shape, seed, dtype, scale) for seed, shape in enumerate(given)]
        if self.variant.decays and not self.variant.by_token:
            made[0] = -0.3 * made[0].abs() - 0.01
        return made

    def _learned(self, heads: int = HEADS, key: int = KEY) -> tuple[list[torch.Size | None], Any]:
        channels = (key,) if self.variant.by_channels else ()
        shapes = self.variant.learned(self.longest, heads, *channels)
        return tree_flatten(shapes, is_leaf=lambda shape: isinstance(shape, torch.Size))

    def drawn(self, q: Tensor) -> list[Tensor]:
        """The random tensors for queries (..., heads, channels); the same at every call."""
        shapes = self.variant.drawn(*q.shape[-2:])
        # Numbers that every dtype has: rounded ones would be others, with other hashes.
        return [
            shape if isinstance(shape, Tensor) else _parameter(shape, 100 + seed, torch.bfloat16, 1.0).to(q.dtype)
            for seed, shape in enumerate(shapes)
        ]

    def _arguments_of(self, parameters: Tensors, q: Tensor) -> tuple[Any, ...]:
        """Random and learned tensors as the operation takes them; the latter of :meth:`parameters` where not given."""
        dtype = q.dtype
        first, parameters = parameters[: self.count - 3], parameters[self.count - 3 :]
        shapes, structure = self._learned()
        heads = q.shape[-2] if self.row.layout.axes.count(",") == 3 else HEADS
        given = iter(parameters or self.parameters(dtype, heads, q.shape[-1]))
        return (
            *first,
            *self.drawn(q),
            *tree_unflatten([None if shape is None else next(given) for shape in shapes], structure),
        )

    def op(self, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor, **arguments: Any) -> Any:
        learned = self._arguments_of(parameters, q)
        return self.row.operation(q, k, v, *learned, **self.arguments(), **arguments)

    def truth(self, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor, **arguments: Any) -> Tensor:
        learned = self._arguments_of(parameters, q)
        return self.row.truth(q, k, v, *learned, causal=self.causal, **self.options, **arguments)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Any]:
        """One token: what there is of it, the state, and learned tensors."""
        of_token, (state, *parameters) = rest[: self.count - 3], rest[self.count - 3 :]
        parameters = (*of_token, *parameters)
        chooses = "backend" in inspect.signature(self.row.step).parameters
        options = {**({"backend": self.backend.name} if chooses else {}), **self.options}
        return self.row.step(q, k, v, state, *self._arguments_of(parameters, q), **options)

    def steps(self, tensors: Tensors, state: Any) -> tuple[Tensor, Any]:
        """Token by token: outputs side by side, and the last state."""
        tensors, parameters = tensors[: self.count], tensors[self.count :]
        outs = []
        for token in zip(*(t.unbind(1) for t in tensors), strict=True):
            out, state = self.step(*token, state, *parameters)
            outs.append(out)
        return torch.stack(outs, 1), state

    def fresh(self, batch: int, dtype: torch.dtype | None = None) -> Any:
        dtype = dtype or self.dtype
        learned = (None,) * (self.count - 3) + self._arguments_of((), torch.empty(HEADS, KEY, dtype=dtype))
        return self.row.init_state(batch, HEADS, KEY, VALUE, *learned, dtype=dtype, **self.options)

    def inputs(
        self,
        length: int,
        sources: int | None = None,
        *,
        batch: int = 2,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> list[Tensor]:
        """Random q, k and v, and log-decays of tokens where the operation takes them."""
        sources = length if sources is None else sources
        random = torch.Generator().manual_seed(1000 * length + 10 * sources + seed)
        sizes = zip((length, sources, sources), self.shapes(), strict=True)
        tensors = [torch.randn(batch, n, *shape, generator=random, dtype=torch.float64) for n, shape in sizes]
        if self.variant.by_token:
            tensors.append(-0.3 * torch.randn(batch, length, HEADS, generator=random, dtype=torch.float64).abs())
        return [t.to(dtype or self.dtype) for t in tensors]


@functools.lru_cache(maxsize=8)
def _parameter(shape: torch.Size, seed: int, dtype: torch.dtype, scale: float) -> Tensor:
    # Of float32, so that float32 and float64 are given the same numbers.
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _backends(row: Mechanism) -> list[Backend]:
    """Those that run here, plain PyTorch first."""
    found = backends_of(row.operation.__name__)
    return [row for row in reversed(found) if not row.refuses(row.device, row.dtypes[0])]


def _computes(case: Case) -> bool:
    """Whether the case's backend has the variant's options."""
    try:
        return explain(case.op, *case.inputs(1)).backend == case.backend.name
    except ValueError:
        return False


def _every_case() -> dict[str, Case]:
    cases = {}
    for name in list_attentions():
        row = find_attention(name)
        for label, variant in variants_of(row).items():
            for form, causal in (("bidirectional", False), ("causal", True))[: 2 if row.can("causal") else 1]:
                if variant.only not in ("", form):
                    continue
                for chosen in _backends(row):
                    suffix = "" if chosen is TORCH else f"-{chosen.name}"
                    case = Case(row, variant, causal, chosen)
                    if chosen is TORCH or _computes(case):
                        cases[f"{name}-{label}-{form}{suffix}"] = case
    return cases


CASES = _every_case()


def each(
    wanted: Callable[[Case], bool] = lambda case: True,
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    of_loops: bool = False,
) -> pytest.MarkDecorator:
    """Every case that is wanted; given dtypes, in every one of them that it computes.

    A law ``of_loops`` takes long, and is slow for variants that run the loops of another.
    """
    chosen = {name: case for name, case in CASES.items() if wanted(case)}

    def marks(case: Case) -> Sequence[pytest.MarkDecorator]:
        same_loops = case.variant.same_loops or case.backend.name in case.variant.same_loops_in
        return [pytest.mark.slow] if of_loops and same_loops else []

    if dtypes is None:
        cases = [pytest.param(case, id=name, marks=marks(case)) for name, case in chosen.items()]
        return pytest.mark.parametrize("case", cases)
    pairs = [
        pytest.param(case, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}", marks=marks(case))
        for name, case in chosen.items()
        for dtype in dtypes
        if dtype in case.dtypes
    ]
    return pytest.mark.parametrize(("case", "dtype"), pairs)


def is_causal(case: Case) -> bool:
    return case.causal


def is_bidirectional(case: Case) -> bool:
    return not case.causal


def crosses(case: Case) -> bool:
    return case.crosses


def has_state(case: Case) -> bool:
    return case.causal and case.row.can("state")


def is_linear(case: Case) -> bool:
    return case.row.can("linear memory") and not case.variant.quadratic


def is_fast(case: Case) -> bool:
    return is_linear(case) and case.row.can("linear time")


def is_scanned(case: Case) -> bool:
    """Whether it runs block by block, which takes longer."""
    return is_fast(case) and (case.causal or case.variant.decays)


def has_fixed_state(case: Case) -> bool:
    return case.causal and case.row.can("fixed state")


def has_parameters(case: Case) -> bool:
    return bool(case.parameters())


def in_torch(case: Case) -> bool:
    return case.backend is TORCH


def is_smooth(case: Case) -> bool:
    return in_torch(case) and case.row.can("smooth")


def at_tokens(mask: Tensor, tensor: Tensor) -> Tensor:
    """A mask (batch, length) with the axes of a tensor (batch, length, ...)."""
    return mask.view(*mask.shape, *(1,) * (tensor.ndim - 2))


def weights_like(out: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The output, and the gradients of a fixed random combination of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights_like(out))]


def close(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Differ by no more than ``tolerance`` of the largest element; NaN is never close."""
    assert got.shape == want.shape
    if not want.is_floating_point() or not want.numel():
        assert torch.equal(got, want)
        return
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    error, size = (got.double() - want.double()).abs().max(), want.double().abs().max()
    assert error <= tolerance * size, f"off by {error:.3g}, {error / size:.3g} of the largest"


def all_close(got: Tensors, want: Tensors, tolerance: float | None = None) -> None:
    for one, other in zip(got, want, strict=True):
        close(one, other, tolerance)


# The truth is the same for every backend, and float64 inputs are the same for every dtype they are rounded to.


@functools.cache
def _truth_of_inputs(case: Case, length: int, sources: int, dtype: torch.dtype) -> Tensor:
    return case.truth(*case.inputs(length, sources, dtype=dtype))


def truth_of_inputs(case: Case, length: int, sources: int | None = None, *, dtype: torch.dtype) -> Tensor:
    """The truth for what ``case.inputs`` makes."""
    return _truth_of_inputs(case.in_torch, length, length if sources is None else sources, dtype)


@functools.lru_cache(maxsize=16)
def _true_gradients(case: Case, length: int, sources: int, dtype: torch.dtype, learning: bool) -> list[Tensor]:
    tensors = [*case.inputs(length, sources, dtype=dtype), *(case.parameters(dtype) if learning else ())]
    return with_gradients(lambda *t: case.truth(*t).to(dtype), *(t.double() for t in tensors))


def true_gradients(
    case: Case, length: int, sources: int, dtype: torch.dtype, *, learning: bool = False
) -> list[Tensor]:
    """The truth for what ``case.inputs`` makes, and its gradients, of learned tensors too if asked."""
    return _true_gradients(case.in_torch, length, sources, dtype, learning)


# ------------------------------------------------------------------------------------------ 1: equals the reference

SHAPES = [(1, 1), (2, 2), (64, 64), (65, 65), (37, 90), (90, 37), (1, 50), (50, 1)]
LENGTHS = [1, 2, 63, 64, 65, 130, 600]


@each(dtypes=[torch.float64, torch.float32])
def test_1_equals_reference(case: Case, dtype: torch.dtype) -> None:
    case = case.up_to(max(LENGTHS))
    for length, sources in SHAPES if case.crosses else [(n, n) for n in LENGTHS if case.takes(n)]:
        tensors = case.inputs(length, sources, dtype=dtype)
        out = case.op(*tensors)
        assert out.dtype == dtype
        close(out, truth_of_inputs(case, length, sources, dtype=dtype))


def half_is_faithful(got: Tensor, want: Tensor, rounded: Tensor) -> None:
    """No worse than twice what rounding the inputs costs, and one rounding of the result."""
    unavoidable = (rounded - want).abs().max()
    one_rounding = torch.finfo(got.dtype).eps / 2 * want.abs().max()
    assert (got.double() - want).abs().max() <= 2 * unavoidable + one_rounding


def check_half(case: Case, dtype: torch.dtype, lengths: Sequence[int]) -> None:
    case = case.up_to(600)
    for length in map(case.least, lengths):
        got = case.op(*case.inputs(length, dtype=dtype))
        want, rounded = (truth_of_inputs(case, length, dtype=of) for of in (torch.float64, dtype))
        assert got.dtype == dtype
        half_is_faithful(got, want, rounded)


@each(dtypes=[torch.bfloat16, torch.float16])
def test_1_half_precision_is_worth_its_inputs(case: Case, dtype: torch.dtype) -> None:
    check_half(case, dtype, (5, 64))


@each(dtypes=[torch.bfloat16, torch.float16], of_loops=True)
def test_1_half_precision_of_many_tokens_is_worth_its_inputs(case: Case, dtype: torch.dtype) -> None:
    check_half(case, dtype, (600,))


def long_run(case: Case, length: int, dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """Outputs of random tokens and of equal tokens, whose sums drift first, and their gradients."""
    token = [t.expand(-1, length, *t.shape[2:]) for t in case.inputs(1, batch=1, dtype=torch.float32)]
    pairs = zip(case.inputs(length, batch=1, dtype=torch.float32), token, strict=True)
    leaves = [torch.cat(pair).to(dtype).requires_grad_(gradients) for pair in pairs]
    out = case.op(*leaves)
    results = [out.detach()]
    if gradients:
        results += torch.autograd.grad(out, leaves, torch.cat([weights_like(out[:1]), torch.ones_like(out[1:])]))
    # Equal tokens compete in vain: their gradients of q and k are nothing but rounding.
    return [row for index, t in enumerate(results) for row in (t if index in (0, 3) else t[:1])]


@functools.lru_cache(maxsize=1)  # of one mechanism, for all of its backends
def long_run_in_float64(case: Case, length: int, gradients: bool) -> list[Tensor]:
    return long_run(case, length, torch.float64, gradients)


def float32_is_float64(case: Case, length: int, gradients: bool) -> None:
    case = case.up_to(length)
    got = long_run(case, length, torch.float32, gradients)
    all_close(got, long_run_in_float64(case.in_torch, length, gradients), TOLERANCE[torch.float32])


# Against float64, which is held to the reference below, slowly; gradients of what is scanned slowly too.
@each(lambda case: is_fast(case) and case.takes(65_536), of_loops=True)
def test_1_float32_at_length_65536(case: Case) -> None:
    float32_is_float64(case, 65_536, gradients=not is_scanned(case))


@pytest.mark.slow
@each(lambda case: is_scanned(case) and case.takes(65_536))
def test_2_float32_gradients_at_length_65536(case: Case) -> None:
    float32_is_float64(case, 65_536, gradients=True)


@pytest.mark.slow
@each(lambda case: is_fast(case) and case.takes(300_000))
def test_1_sums_of_equal_tokens_do_not_drift_at_length_300000(case: Case) -> None:
    case = case.up_to(300_000)
    got = long_run(case, 300_000, torch.float32, gradients=True)
    want = long_run_in_float64(case.in_torch, 300_000, gradients=True)
    for index in (1, 5):  # of equal tokens: the output, the gradient of v
        close(got[index], want[index], TOLERANCE[torch.float32])


def is_first_of_its_kind(case: Case) -> bool:
    kind = [variant for variant in variants_of(case.row).values() if not variant.quadratic]
    return is_fast(case) and case.variant is kind[0]


@pytest.mark.slow
@each(lambda case: is_first_of_its_kind(case) and case.takes(65_536))
def test_1_float32_and_float64_at_length_65536_equal_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # A minute or two of the reference for one variant: the others differ from it in nothing that grows with length.
    monkeypatch.setattr(sys.modules["flowformer.mechanisms.weights"], "ROWS", 128)
    case = case.up_to(65_536)
    tensors = [
        t[:, :, :1, :2] if t.ndim == 4 else t[..., :2] for t in case.inputs(65_536, batch=1, dtype=torch.float32)
    ]
    truth = case.truth(*tensors)
    for dtype in {torch.float32, torch.float64}.intersection(case.dtypes):
        close(case.op(*(t.to(dtype) for t in tensors)), truth)


# ---------------------------------------------------------------------------------------------------- 2: gradients


@each(dtypes=[torch.float64, torch.float32])
def test_2_gradients_equal_reference(case: Case, dtype: torch.dtype) -> None:
    case = case.up_to(600)
    for length, sources in [(65, 65), (37, 90), (90, 37)] if case.crosses else [(5, 5), (130, 130), (600, 600)]:
        if not case.takes(length):
            continue
        tensors = case.inputs(length, sources, dtype=dtype)
        got = with_gradients(case.op, *tensors)
        assert all(grad.dtype == dtype for grad in got)
        all_close(got, true_gradients(case, length, sources, dtype), TOLERANCE[dtype])


@each(has_parameters, dtypes=[torch.float64, torch.float32])
def test_2_gradients_of_parameters_equal_reference(case: Case, dtype: torch.dtype) -> None:
    for length, sources in [(65, 65), (37, 90), (90, 37)] if case.crosses else [(5, 5), (130, 130)]:
        tensors = [*case.inputs(length, sources, dtype=dtype), *case.parameters(dtype)]
        got = with_gradients(case.op, *tensors)
        assert all(grad.dtype == dtype for grad in got)
        all_close(got, true_gradients(case, length, sources, dtype, learning=True))


@each(dtypes=[torch.bfloat16, torch.float16])
def test_2_gradients_in_half_precision_are_worth_their_inputs(case: Case, dtype: torch.dtype) -> None:
    exact = [*case.inputs(100, dtype=torch.float64), *case.parameters(torch.float64)]
    rounded = [t.to(dtype) for t in exact]
    weights = weights_like(case.truth(*exact)).to(dtype)

    def gradients(function: Callable[..., Tensor], tensors: Tensors) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, weights.to(out.dtype))

    of_rounded = gradients(case.truth, [t.double() for t in rounded])
    for got, want, unavoidable in zip(
        gradients(case.op, rounded), gradients(case.truth, exact), of_rounded, strict=True
    ):
        half_is_faithful(got, want, unavoidable)


def narrow(tensors: Tensors) -> list[Tensor]:
    """Few channels, for finite differences take as many runs as there are numbers.

    One of them is positive, lest a flow under relu be as small as the differences.
    """
    few = [torch.stack([t[..., 0].abs() + 0.1, t[..., 1]], -1).requires_grad_() for t in tensors[:3]]
    return [*few, *(t.requires_grad_() for t in tensors[3:])]


def learning(case: Case, key: int = KEY) -> list[Tensor]:
    return [parameter.clone().requires_grad_() for parameter in case.parameters(key=key)]


def along_a_direction(function: Callable[..., Any], tensors: Tensors) -> bool:
    """Gradients of each input along a random direction are the difference quotients: any wrong number shows in them."""
    random = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random, dtype=like.dtype)

    def outputs(tensors: Tensors) -> list[Tensor]:
        found = function(*tensors)
        return [found] if isinstance(found, Tensor) else found

    outs, step = outputs(tensors), 1e-6
    weights = [draw(out) for out in outs]
    # Either end is off by rounding, of each of its terms by a unit in the last place.
    terms = sum((out.detach() * weight).abs().sum() for out, weight in zip(outs, weights, strict=True))
    rounding = 2 * (torch.finfo(torch.float64).eps * terms) / (2 * step)
    for index, grad in enumerate(torch.autograd.grad(outs, tensors, weights)):
        direction, ends = draw(grad), []
        for sign in (1, -1):
            moved = [t.detach() + sign * step * direction if at == index else t for at, t in enumerate(tensors)]
            ends.append(sum((out * weight).sum() for out, weight in zip(outputs(moved), weights, strict=True)))
        quotient, want = (ends[0] - ends[1]) / (2 * step), (grad * direction).sum()
        assert (quotient - want).abs() <= 1e-6 * (grad * direction).abs().sum() + rounding, f"input {index}"
    return True


# Finite differences want float64, which only PyTorch computes: what else there is equals the reference's gradients.
Checker = Callable[[Callable[..., Any], Tensors], bool]


def check_gradients(case: Case, check: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    rechunk(monkeypatch, case, 2, 4)
    for length, sources in [(4, 4), (2, 3)] if case.crosses else [(6, 6)]:
        case = case.up_to(length + sources)
        assert check(case.op, [*narrow(case.inputs(length, sources, batch=1)), *learning(case, 2)])


def check_gradients_with_padding_and_packing(case: Case, check: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    rechunk(monkeypatch, case, 2, 6)
    case = case.up_to(5)
    tensors = [*narrow(case.inputs(5, batch=1)), *learning(case, 2)]
    mask = torch.tensor([[False, True, True, True, False]])
    assert check(functools.partial(case.op, mask=mask), tensors)
    bounds = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert check(functools.partial(case.op, cu_seqlens=bounds), tensors)


@each(is_smooth)
def test_2_gradients_equal_difference_quotients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gradients(case, along_a_direction, monkeypatch)
    check_gradients_with_padding_and_packing(case, along_a_direction, monkeypatch)


# The same from element to element: slow, since a wrong element shows in any random direction too.
@pytest.mark.slow
@each(is_smooth)
def test_2_gradcheck(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gradients(case, torch.autograd.gradcheck, monkeypatch)


@pytest.mark.slow
@each(is_smooth)
def test_2_gradcheck_with_padding_and_packing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gradients_with_padding_and_packing(case, torch.autograd.gradcheck, monkeypatch)


@each(lambda case: has_state(case) and is_smooth(case))
def test_2_gradients_through_states_equal_difference_quotients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gradients_through_states(case, along_a_direction, monkeypatch)


@pytest.mark.slow
@each(lambda case: has_state(case) and is_smooth(case))
def test_2_gradcheck_through_states(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gradients_through_states(case, torch.autograd.gradcheck, monkeypatch)


def check_gradients_through_states(case: Case, check: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    rechunk(monkeypatch, case, 2, 2)
    case = case.up_to(5)
    _, state = case.op(*narrow(case.inputs(2, batch=1)), return_state=True)
    # The logarithm of an empty sum is next to -infinity: no finite difference tells of it.
    # A count without decay is a function of nothing.
    tells = [part.is_floating_point() and part.numel() and part.abs().max() < 1e6 for part in state]
    floating = [i for i, name in enumerate(state._fields) if tells[i] and (name != "tokens" or case.variant.decays)]

    def resume(*tensors: Tensor) -> list[Tensor]:
        before, given = list(state), len(tensors) - len(floating)
        for index, part in zip(floating, tensors[given:], strict=True):
            before[index] = part
        out, after = case.op(*tensors[:given], initial_state=type(state)(*before), return_state=True)
        return [out, *(after[index] for index in floating)]

    parts = [state[index].detach().clone().requires_grad_() for index in floating]
    assert check(resume, [*narrow(case.inputs(3, batch=1)), *learning(case, 2), *parts])


# -------------------------------------------------------------------------------------------------------- 3: causal


@each(is_causal, dtypes=[torch.float32, torch.bfloat16])
def test_3_outputs_do_not_know_the_future(case: Case, dtype: torch.dtype) -> None:
    length = case.least(600)  # crosses chunks of 32 and 64, and the block of 512
    case = case.up_to(length)
    # One row of a batch for each place and size: what later inputs overflow, and what they only round.
    rows = [(t, 1e4) for t in (0, 31, 32, 63, 64, 511, 512)] + [(t, 1.0) for t in (1, 63, 300, 560)]
    rows = [(t, scale) for t, scale in rows if t < length - 1]
    one = case.inputs(length, batch=1, dtype=dtype)
    future = case.inputs(length, batch=len(rows), seed=1, dtype=dtype)
    # Contiguous as what is changed is: features of another layout may be rounded in another way.
    before = case.op(*(t.expand(len(rows), *t.shape[1:]).contiguous() for t in one))
    changed = [
        torch.stack([torch.cat([a[0, : t + 1], scale * b[row, t + 1 :]]) for row, (t, scale) in enumerate(rows)])
        for a, b in zip(one, future, strict=True)
    ]
    for (t, scale), old, new in zip(rows, before, case.op(*changed), strict=True):
        assert torch.equal(old[: t + 1], new[: t + 1]), f"t = {t}, later inputs of size {scale}"
        assert not torch.equal(old[t + 1 :], new[t + 1 :])


@each(is_causal)
def test_3_gradients_do_not_reach_the_future(case: Case) -> None:
    case = case.up_to(600)
    leaves = [t.requires_grad_() for t in case.inputs(case.least(600))]
    for t in (10, 64, 520):
        if not case.takes(t):
            continue
        for grad in torch.autograd.grad(case.op(*leaves)[:, : t + 1].sum(), leaves):
            assert not grad[:, t + 1 :].any()
            assert grad[:, : t + 1].any()


# --------------------------------------------------------------- 4: parallel = chunked = token by token = resumed


def rechunk(monkeypatch: pytest.MonkeyPatch, case: Case, chunk: int, block: int) -> list[int]:
    """Other sizes of what is worked on at a time; returns the list of blocks that the shared scan will have run.

    Whatever a mechanism's own modules call CHUNK, BLOCK, ROWS or SOME_ROWS is such a size.
    """
    ran: list[int] = []

    def rescan(*arguments: Any) -> Any:
        ran.append(block)
        return scan(*arguments, block=block)

    sizes = {"CHUNK": chunk, "BLOCK": block, "ROWS": block}
    for module in own_modules(case):
        for name in [name for name in vars(module) if name.rpartition("_")[2] in sizes]:
            monkeypatch.setattr(module, name, sizes[name.rpartition("_")[2]])
    monkeypatch.setattr(core_run, "scan", rescan)
    return ran


def own_modules(case: Case) -> list[ModuleType]:
    """The module of the operation, or all of its package where it has one."""
    home = case.row.operation.__module__
    package = home.rpartition(".")[0]
    if not package.startswith("flowformer.mechanisms."):
        return [sys.modules[home]]
    return [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")]


def has_own_blocks(case: Case) -> bool:
    """Whether it does without the shared scan."""
    return any("BLOCK" in vars(module) for module in own_modules(case))


def run_with_state(case: Case, tensors: Tensors, state: Any = None, **arguments: Any) -> tuple[list[Tensor], Any]:
    """Output, and gradients of inputs, parameters and initial state, also by way of the final state; and that state."""
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, *case.parameters(tensors[0].dtype))]
    state = case.fresh(len(tensors[0]), tensors[0].dtype) if state is None else state
    state = type(state)(*(p.detach().clone().requires_grad_(p.is_floating_point()) for p in state))
    run = arguments.pop("run", None)
    out, after = case.op(*leaves, initial_state=state, return_state=True) if run is None else run(leaves, state)
    wanted = [*leaves, *(part for part in state if part.is_floating_point())]
    return [out.detach(), *torch.autograd.grad(objective(out, after), wanted, materialize_grads=True)], after


def objective(out: Tensor, state: Any) -> Tensor:
    total = (out * weights_like(out)).sum()
    for part in state:
        # tanh, since the logarithm of an empty sum is next to -infinity and would drown the rest.
        if part.is_floating_point() and part.numel():
            total = total + (part.tanh() * weights_like(part)).sum()
    return total


def works_in_pieces(case: Case) -> bool:
    if not in_torch(case) or (case.causal and not has_state(case)):
        return False
    return has_own_blocks(case) or (case.causal and any("CHUNK" in vars(module) for module in own_modules(case)))


# In PyTorch: the chunks of the native kernels have the size that they were compiled with.
@each(works_in_pieces, of_loops=True)
def test_4_chunk_and_block_do_not_matter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case.inputs(40)

    def run() -> tuple[list[Tensor], Any]:
        return (
            run_with_state(case, tensors) if case.causal else (with_gradients(case.op, *tensors, *learning(case)), ())
        )

    want, last = run()
    with monkeypatch.context() as other_sizes:
        rechunk(other_sizes, case, 3, 9)
        other = made(case, tensors)
    for chunk, block in ((1, 1), (7, 20), (16, 32), (1000, 1000)):
        with monkeypatch.context() as sizes:
            ran = rechunk(sizes, case, chunk, block)
            got, state = run()
            if case.causal:  # else nothing was tested
                assert made(case, tensors) != other if has_own_blocks(case) else ran == [block]
        all_close(got, want)
        all_close(state, last)


def made(case: Case, tensors: Tensors) -> list[torch.Size]:
    """Shapes of all tensors that come to be."""
    with Recorder() as recorder:
        case.op(*tensors)
    return recorder.shapes


@each(has_state)
def test_4_token_by_token(case: Case) -> None:
    _, start = case.op(*case.inputs(9), return_state=True)
    for state in (None, start):
        tensors = case.inputs(70 if case.takes(600) else 10, seed=1)
        want, last = run_with_state(case, tensors, state)
        got, after = run_with_state(case, tensors, state, run=case.steps)
        all_close(got, want, case.tolerance)
        all_close(after, last, case.tolerance)


@each(has_state, dtypes=[torch.float32, torch.bfloat16, torch.float16])
def test_4_token_by_token_in_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    tensors = case.inputs(64, dtype=dtype)
    got, _ = case.steps(tensors, case.fresh(2, dtype))
    want = truth_of_inputs(case, 64, dtype=dtype)
    assert got.dtype == dtype
    # What the whole sequence at once is held to; in half precision, one rounding of the result.
    close(got, want, TOLERANCE.get(dtype, torch.finfo(dtype).eps))


@each(has_state)
def test_4_split_anywhere_and_resumed(case: Case) -> None:
    tensors = case.inputs(130)

    def in_two(leaves: Tensors, state: Any, cut: int) -> tuple[Tensor, Any]:
        tensors, learned = leaves[: case.count], leaves[case.count :]
        first, state = case.op(*(t[:, :cut] for t in tensors), *learned, initial_state=state, return_state=True)
        second, state = case.op(*(t[:, cut:] for t in tensors), *learned, initial_state=state, return_state=True)
        return torch.cat([first, second], 1), state

    want, last = run_with_state(case, tensors)
    for cut in (1, 5, 63, 64, 65, 129):
        got, state = run_with_state(case, tensors, run=functools.partial(in_two, cut=cut))
        all_close(got, want, case.tolerance)
        all_close(state, last, case.tolerance)


@each(has_state, of_loops=True)
def test_4_splitting_costs_no_precision_in_float32(case: Case) -> None:
    case, length = case.up_to(1200), case.least(1200)
    tensors, part = case.inputs(length, dtype=torch.float32), length // 12
    state, outs = case.fresh(2, torch.float32), []
    for start in range(0, length, part):
        out, state = case.op(*(t[:, start : start + part] for t in tensors), initial_state=state, return_state=True)
        outs.append(out)
    close(torch.cat(outs, 1), truth_of_inputs(case, length, dtype=torch.float32))


@each(has_state)
def test_4_states_are_never_mutated(case: Case) -> None:
    tensors = case.inputs(70)
    _, state = case.op(*tensors, return_state=True)
    kept = [part.clone() for part in state]
    case.op(*tensors, initial_state=state, return_state=True)
    case.steps([t[:, :3] for t in tensors], state)
    run_with_state(case, tensors, state)
    assert all(torch.equal(part, copy) for part, copy in zip(state, kept, strict=True))


# ------------------------------------------------------------------------------------------ 5: padding is invisible


def pad(tensor: Tensor, count: int, side: str, filler: float) -> Tensor:
    padding = tensor.new_full((len(tensor), count, *tensor.shape[2:]), filler)
    return torch.cat([padding, tensor] if side == "left" else [tensor, padding], 1)


def unpad(tensor: Tensor, count: int, side: str) -> tuple[Tensor, Tensor]:
    """The real tokens, and the padding."""
    length = tensor.shape[1] - count
    return (tensor[:, count:], tensor[:, :count]) if side == "left" else (tensor[:, :length], tensor[:, length:])


def real(batch: int, length: int, count: int, side: str) -> Tensor:
    ones = torch.ones(batch, length, dtype=torch.bool)
    padding = torch.zeros(batch, count, dtype=torch.bool)
    return torch.cat([padding, ones] if side == "left" else [ones, padding], 1)


FILLERS = (1e4, torch.nan, torch.inf, -torch.inf)


def pad_rows(tensor: Tensor, count: int, side: str, fillers: Sequence[float]) -> Tensor:
    """Each row of a batch with a filler of its own."""
    return torch.cat([pad(row, count, side, filler) for row, filler in zip(tensor.split(1), fillers, strict=True)])


@pytest.mark.parametrize("side", ["left", "right"])
@each()
def test_5_padding_is_invisible(case: Case, side: str) -> None:
    case = case.up_to(1020)
    tensors = case.inputs(20, batch=len(FILLERS))
    want = with_gradients(case.op, *tensors, *case.parameters())
    for count in (0, 7, 1000 if case.takes(1000) else 70):
        mask = real(len(FILLERS), 20, count, side)
        leaves = [*(pad_rows(t, count, side, FILLERS).requires_grad_() for t in tensors), *learning(case)]
        out = case.op(*leaves, mask=mask)
        upstream = pad(weights_like(want[0]), count, side, 1.0)
        got = [out, *torch.autograd.grad(out, leaves, upstream)]
        for padded, one in zip(got[: case.count + 1], want[: case.count + 1], strict=True):
            real_tokens, padding = unpad(padded, count, side)
            for filler, row, wanted, beside in zip(FILLERS, real_tokens, one, padding, strict=True):
                close(row, wanted)
                assert not beside.any(), f"padding of {filler}"  # zeros; NaN would be True
        all_close(got[case.count + 1 :], want[case.count + 1 :])


@pytest.mark.parametrize(("sinks", "sources"), [(0, 9), (9, 0), (3, 9), (14, 9)])
@each(crosses)
def test_5_padding_is_invisible_in_cross_attention(case: Case, sinks: int, sources: int) -> None:
    tensors = case.inputs(20, 25)  # 14 and 9 make the lengths equal
    want = with_gradients(case.op, *tensors)
    counts = (sinks, sources, sources)
    leaves = [pad(t, n, "right", torch.nan).requires_grad_() for t, n in zip(tensors, counts, strict=True)]
    masks = {"mask": real(2, 20, sinks, "right"), "context_mask": real(2, 25, sources, "right")}
    out = case.op(*leaves, **masks)
    got = [out, *torch.autograd.grad(out, leaves, pad(weights_like(want[0]), sinks, "right", 1.0))]
    for each_got, each_want, count in zip(got, want, (sinks, *counts), strict=True):
        tokens, padding = unpad(each_got, count, "right")
        close(tokens, each_want)
        assert not padding.any()


@each()
def test_5_padding_anywhere_equals_reference(case: Case) -> None:
    tensors = case.inputs(140, batch=3)
    mask = torch.rand(3, 140, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.9], [0.5], [0.02]])
    poisoned = [t.masked_fill(~at_tokens(mask, t), torch.nan) for t in tensors]
    close(case.op(*poisoned, mask=mask), case.truth(*tensors, mask=mask))


@each(crosses)
def test_5_masks_of_queries_and_keys_are_two_things(case: Case) -> None:
    tensors = case.inputs(9)
    masks = {"context_mask": torch.arange(9).expand(2, -1) < 6, "mask": real(2, 7, 2, "left")}
    close(case.op(*tensors, **masks), case.truth(*tensors, **masks))


@each(has_state)
def test_5_a_state_does_not_know_of_padding(case: Case) -> None:
    start, rest = case.inputs(20), case.inputs(30, seed=1)
    _, state = case.op(*start, return_state=True)
    want, _ = case.op(*rest, initial_state=state, return_state=True)
    for side in ("left", "right"):
        mask = real(2, 20, 50, side)
        _, state = case.op(*(pad(t, 50, side, torch.nan) for t in start), mask=mask, return_state=True)
        got, _ = case.op(*rest, initial_state=state, return_state=True)
        close(got, want)


def packed(case: Case, lengths: Sequence[int]) -> tuple[list[Tensor], Tensor, list[list[Tensor]]]:
    """A packed batch, its boundaries, and its sequences."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tensors = case.inputs(sum(lengths), batch=1)
    return tensors, bounds, [list(piece) for piece in zip(*(t.split(list(lengths), 1) for t in tensors), strict=True)]


def one_by_one(case: Case, sequences: Sequence[Tensors]) -> list[Tensor]:
    """Outputs and gradients of inputs side by side; gradients of parameters added up."""
    results = [with_gradients_of_part(case, [*s, *case.parameters()]) for s in sequences if s[0].shape[1]]
    parts = list(zip(*results, strict=True))
    of_tokens, learned = parts[: case.count + 1], parts[case.count + 1 :]
    return [*(torch.cat(part, 1) for part in of_tokens), *(torch.stack(part).sum(0) for part in learned)]


def with_gradients_of_part(case: Case, tensors: Tensors) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = case.op(*leaves)
    return [out.detach(), *torch.autograd.grad(uneven(out), leaves)]


def uneven(out: Tensor) -> Tensor:
    """A sum over tokens that changes with the length of outputs, and with their direction alone."""
    return (out.square() + out).sum()


def check_packed(case: Case, lengths: Sequence[int]) -> None:
    tensors, bounds, sequences = packed(case, lengths)
    leaves = [*(t.requires_grad_() for t in tensors), *learning(case)]
    out = case.op(*leaves, cu_seqlens=bounds)
    all_close([out, *torch.autograd.grad(uneven(out), leaves)], one_by_one(case, sequences))


@pytest.mark.parametrize("lengths", [[5, 1, 0, 130, 64, 3, 0], [2], [0, 33, 0, 0, 65, 2]], ids=str)
@each()
def test_5_packed_equals_one_by_one(case: Case, lengths: list[int]) -> None:
    check_packed(case, lengths)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any))
@each()
def test_5_packed_equals_one_by_one_for_any_lengths(case: Case, lengths: list[int]) -> None:
    check_packed(case, lengths)


@each(has_fixed_state)
def test_5_packed_with_states_equals_one_by_one(case: Case) -> None:
    lengths = [5, 1, 0, 130, 64, 3]
    tensors, bounds, sequences = packed(case, lengths)
    _, state = case.op(*case.inputs(11, batch=len(lengths)), return_state=True)
    out, after = case.op(*tensors, cu_seqlens=bounds, initial_state=state, return_state=True)
    outs = []
    for index, sequence in enumerate(sequences):
        own = type(state)(*(part[index : index + 1] for part in state))
        last = own
        if lengths[index]:
            piece, last = case.op(*sequence, initial_state=own, return_state=True)
            outs.append(piece)
        all_close([part[index : index + 1] for part in after], last, case.tolerance)
    close(out, torch.cat(outs, 1))


@each()
def test_5_a_row_without_a_token_gives_zeros(case: Case) -> None:
    mask = torch.tensor([[True] * 70, [False] * 70])
    want = with_gradients(case.op, *(t[:1] for t in case.inputs(70)))
    leaves = [t.requires_grad_() for t in case.inputs(70)]
    out = case.op(*leaves, mask=mask)
    upstream = torch.cat([weights_like(want[0])] * 2)
    for got, first in zip([out, *torch.autograd.grad(out, leaves, upstream)], want, strict=True):
        close(got[:1], first)
        assert not got[1].any()


@each(crosses)
def test_5_cross_attention_with_a_side_without_a_token_gives_zeros(case: Case) -> None:
    some, none = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    for masks in ((some, none), (none, some), (none, none)):
        leaves = [t.requires_grad_() for t in case.inputs(6)]
        out = case.op(*leaves, mask=masks[0], context_mask=masks[1])
        assert not out.any()
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert not grad.any()


# Modules: the gradients of projections, too, which are products with the inputs.


# Options that every module has.
MODULE_OPTIONS: dict[str, dict[str, Any]] = {
    "conv": {"conv": 4},
    "conv-norm-gate": {"conv": 3, "output_norm": True, "output_gate": True},
}


def is_first_variant(case: Case) -> bool:
    return case.variant == next(iter(variants_of(case.row).values()))


def each_module(
    wanted: Callable[[Case], bool] = lambda case: True, *, every_variant: bool = False
) -> pytest.MarkDecorator:
    """The first variant of a mechanism, without and with options of modules; every variant without them, if asked."""
    chosen = {name: case for name, case in CASES.items() if wanted(case)}
    pairs = {name: (case, {}) for name, case in chosen.items() if every_variant or is_first_variant(case)}
    for name, case in chosen.items():
        if is_first_variant(case):
            pairs |= {f"{name}-{label}": (case, options) for label, options in MODULE_OPTIONS.items()}
    return pytest.mark.parametrize(("case", "options"), pairs.values(), ids=pairs.keys())


def module_of(case: Case, monkeypatch: pytest.MonkeyPatch, module_options: Mapping[str, Any]) -> Attention:
    """The mechanism's module with the variant's options, by the case's implementation."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, case.backend.name)
    torch.manual_seed(0)
    options: dict[str, Any] = dict(case.variant.options)
    if issubclass(case.row.module, AFT) and case.row.module.learns_positions:
        options |= {"position_dim": None if case.variant.quadratic else 2, "position_std": 1.0}
    options |= module_options
    module = create_attention(case.row.name, DIM, HEADS, causal=case.causal, max_length=64, **options)
    return module.to(case.dtype)


def tokens_of(case: Case, length: int, seed: int = 0, batch: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(length + seed)
    return torch.randn(batch, length, DIM, generator=random, dtype=torch.float64).to(case.dtype)


def through_module(
    module: Attention, inputs: Tensors, upstream: Tensor | None = None, **arguments: Any
) -> list[Tensor]:
    """The output, gradients of the inputs, and gradients of all parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = module(*leaves, **arguments)
    grads = torch.autograd.grad(
        out, [*leaves, *module.parameters()], weights_like(out) if upstream is None else upstream, allow_unused=True
    )
    return [out.detach(), *(torch.zeros(()).to(out) if grad is None else grad for grad in grads)]


def module_is_blind(got: Tensors, want: Tensors, counts: Sequence[int], side: str) -> None:
    """Output and gradients of inputs are those without padding, zeros at it; gradients of parameters are the same."""
    for padded, one, count in zip(got, want[: len(counts)], counts, strict=False):
        tokens, padding = unpad(padded, count, side)
        close(tokens, one)
        assert not padding.any()
    largest = max(float(grad.abs().max()) for grad in want[len(counts) :])
    for one, other in zip(got[len(counts) :], want[len(counts) :], strict=True):
        # A gradient that is zero but for rounding, as that of a key's bias, is measured by the others.
        assert one.shape == other.shape
        assert (one - other).abs().max() <= TOLERANCE[one.dtype] * largest


@each_module(every_variant=True)
def test_5_padding_is_invisible_to_modules_and_their_weights(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = module_of(case, monkeypatch, options), tokens_of(case, 20)
    want = through_module(module, [x])
    for side, filler in (("left", torch.nan), ("right", torch.inf), ("right", -torch.inf), ("right", torch.nan)):
        upstream = pad(weights_like(want[0]), 7, side, 1.0)
        got = through_module(module, [pad(x, 7, side, filler)], upstream, mask=real(2, 20, 7, side))
        module_is_blind(got, want, (7, 7), side)


@each_module(crosses, every_variant=True)
def test_5_padding_is_invisible_to_modules_in_cross_attention(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x, context = module_of(case, monkeypatch, options), tokens_of(case, 20), tokens_of(case, 25)
    want = through_module(module, [x, context])
    for sinks, sources, filler in ((0, 9, torch.nan), (9, 0, torch.inf), (14, 9, -torch.inf), (14, 9, torch.nan)):
        masks = {"mask": real(2, 20, sinks, "right"), "context_mask": real(2, 25, sources, "right")}
        masks = {name: mask for name, mask in masks.items() if not mask.all()}
        inputs = [pad(x, sinks, "right", filler), pad(context, sources, "right", filler)]
        got = through_module(module, inputs, pad(weights_like(want[0]), sinks, "right", 1.0), **masks)
        module_is_blind(got, want, (sinks, sinks, sources), "right")


@each_module(every_variant=True)
def test_5_packed_modules_equal_sequences_one_by_one(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, lengths = module_of(case, monkeypatch, options), [5, 0, 20, 1]
    x = tokens_of(case, sum(lengths), batch=1)
    out = module(x)
    upstream = weights_like(out)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    got = through_module(module, [x], upstream, cu_seqlens=bounds)
    pairs = zip(x.split(lengths, 1), upstream.split(lengths, 1), strict=True)
    alone = list(zip(*(through_module(module, [one], above) for one, above in pairs if one.shape[1]), strict=True))
    want = [*(torch.cat(parts, 1) for parts in alone[:2]), *(torch.stack(parts).sum(0) for parts in alone[2:])]
    module_is_blind(got, want, (0, 0), "right")


@each_module()
def test_5_padding_between_tokens_is_invisible_to_modules(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = module_of(case, monkeypatch, options), tokens_of(case, 20)
    want = through_module(module, [x])
    random = torch.Generator().manual_seed(0)
    mask = torch.stack([torch.randperm(55, generator=random) < 20 for _ in range(2)])

    def scatter(tensor: Tensor, filler: float) -> Tensor:
        return tensor.new_full((2, 55, DIM), filler).masked_scatter(mask.unsqueeze(-1), tensor)

    for filler in (torch.nan, torch.inf):
        out, grad, *grads = through_module(module, [scatter(x, filler)], scatter(weights_like(want[0]), 1.0), mask=mask)
        assert not out[~mask].any()
        assert not grad[~mask].any()
        module_is_blind([out[mask].view_as(x), grad[mask].view_as(x), *grads], want, (0, 0), "right")


# Modules with states: what the operation is held to above holds with what stands around it.


@each_module(is_causal)
def test_3_modules_do_not_know_the_future(case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, future = module_of(case, monkeypatch, options), tokens_of(case, 50), tokens_of(case, 50, seed=1)
    before = module(x)
    for t in (0, 1, 3, 20, 48):
        after = module(torch.cat([x[:, : t + 1], 1e4 * future[:, t + 1 :]], 1))
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


def module_in_pieces(module: Attention, x: Tensor, state: Any, lengths: Sequence[int]) -> tuple[Tensor, Any]:
    outs = []
    for piece in x.split(list(lengths), 1):
        out, state = module(piece, initial_state=state, return_state=True)
        outs.append(out)
    return torch.cat(outs, 1), state


def module_by_steps(module: Attention, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    state, outs = module.init_state(len(x)) if state is None else state, []
    for token in x.unbind(1):
        out, state = module.step(token, state)
        outs.append(out)
    return torch.stack(outs, 1), state


def with_module_state(
    module: Attention, x: Tensor, run: Callable[..., tuple[Tensor, Any]], state: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and parts of the last state; and gradients of the input and of all parameters through both."""
    x = x.detach().clone().requires_grad_()
    out, last = run(module, x, state)
    parts = [out, *tree_leaves(last)]
    learning = [part for part in parts if part.requires_grad]
    loss = torch.stack([(part * weights_like(part)).double().sum() for part in learning]).sum()
    return [part.detach() for part in parts], list(torch.autograd.grad(loss, [x, *module.parameters()]))


@each_module(has_state)
def test_4_modules_resumed_and_token_by_token(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = module_of(case, monkeypatch, options), tokens_of(case, 12)
    _, start = module(tokens_of(case, 2, seed=1), return_state=True)
    start = tree_map(torch.Tensor.detach, start)
    kept = tree_map(torch.clone, start)
    runs = [functools.partial(module_in_pieces, lengths=lengths) for lengths in ([12], [1, 11], [2, 1, 1, 8])]
    for state in (None, start):
        (parts, grads), *others = (with_module_state(module, x, run, state) for run in (*runs, module_by_steps))
        largest = max(float(grad.abs().max()) for grad in grads)
        for other_parts, other_grads in others:
            all_close(other_parts, parts, case.tolerance)
            for one, other in zip(grads, other_grads, strict=True):
                assert (one - other).abs().max() <= case.tolerance * largest
    assert all(map(torch.equal, tree_leaves(start), tree_leaves(kept)))


@each_module(has_state)
def test_5_states_of_modules_do_not_know_of_padding(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x, rest = module_of(case, monkeypatch, options), tokens_of(case, 20), tokens_of(case, 5, seed=1)
    for length in (1, 2, 20):
        _, state = module(x[:, :length], return_state=True)
        want = module(rest, initial_state=state)
        for side in ("left", "right"):
            padded, mask = pad(x[:, :length], 9, side, torch.nan), real(2, length, 9, side)
            _, state = module(padded, mask=mask, return_state=True)
            close(module(rest, initial_state=state), want)
            later = pad(rest, 9, side, torch.inf)
            got = module(later, mask=real(2, 5, 9, side), initial_state=state)
            close(unpad(got, 9, side)[0], want)


@each_module(has_fixed_state)
def test_5_packed_modules_with_states_equal_sequences_one_by_one(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, lengths = module_of(case, monkeypatch, options), [5, 0, 20, 1]
    x = tokens_of(case, sum(lengths), batch=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    _, state = module(tokens_of(case, 7, batch=4), return_state=True)
    out, after = module(x, cu_seqlens=bounds, initial_state=state, return_state=True)
    outs = []
    for row, piece in enumerate(x.split(lengths, 1)):
        last = own = tree_map(lambda part, row=row: part[row : row + 1], state)
        if lengths[row]:
            one, last = module(piece, initial_state=own, return_state=True)
            outs.append(one)
        got = tree_map(lambda part, row=row: part[row : row + 1], after)
        all_close(tree_leaves(got), tree_leaves(last), case.tolerance)
    close(out, torch.cat(outs, 1))


# --------------------------------------------------------------------------------------------------- 6: symmetries


@each()
def test_6_rows_of_a_batch_are_independent(case: Case) -> None:
    tensors = case.inputs(70, batch=3)
    leaves = [t.requires_grad_() for t in tensors]
    out = case.op(*leaves)
    for row in range(3):
        close(out[row : row + 1], case.op(*(t[row : row + 1] for t in tensors)))
        for grad in torch.autograd.grad(out[row].sum(), leaves, retain_graph=True):
            others = [other for other in range(3) if other != row]
            assert grad[row].any()
            assert not grad[others].any()


@each()
def test_6_a_batch_may_have_no_sequence(case: Case) -> None:
    for length, sources in [(1, 1), (33, 33)] + [(5, 9), (9, 5)] * case.crosses:
        masks = {"mask": torch.ones(0, length, dtype=torch.bool)}
        if case.crosses:
            masks["context_mask"] = torch.ones(0, sources, dtype=torch.bool)
        for given_masks in ({}, masks):
            leaves = [t.requires_grad_() for t in (*case.inputs(length, sources, batch=0), *learning(case))]
            out = case.op(*leaves, **given_masks)
            assert (out.shape[:2], out.dtype) == ((0, length), case.dtype)
            for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves, materialize_grads=True), strict=True):
                assert grad.shape == leaf.shape
                assert not grad.any()


@each(has_state)
def test_6_a_batch_of_no_sequence_has_a_state(case: Case) -> None:
    for masks in ({}, {"mask": torch.ones(0, 70, dtype=torch.bool)}):
        leaves = [t.requires_grad_() for t in case.inputs(70, batch=0)]
        out, state = case.op(*leaves, initial_state=case.fresh(0), return_state=True, **masks)
        assert out.shape[:2] == (0, 70)
        assert all(len(part) == 0 for part in state)
        torch.autograd.grad(objective(out, state), leaves, materialize_grads=True)
        step = [t[:, 0].detach().requires_grad_() for t in leaves]
        out, after = case.step(*step, state)
        assert out.shape[0] == 0
        assert [part.shape[0] for part in after] == [0] * len(state)
        torch.autograd.grad(objective(out, after), step, materialize_grads=True)


@each_module(every_variant=True)
def test_6_modules_take_a_batch_of_no_sequence(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = module_of(case, monkeypatch, options), tokens_of(case, 20, batch=0)
    for arguments in ({}, {"mask": torch.ones(0, 20, dtype=torch.bool)}):
        out, *grads = through_module(module, [x], **arguments)
        assert out.shape == x.shape
        assert not any(grad.any() for grad in grads)
    if case.crosses:
        assert module(x, x[:, :7]).shape == x.shape
    if has_state(case):
        state = module.init_state(0)
        out, state = module(x, initial_state=state, return_state=True)
        assert module.step(x[:, 0], state)[0].shape == (0, DIM)


def permuted(case: Case, length: int, sources: int) -> tuple[Tensor, Tensor]:
    """Outputs for queries and keys in another order, and outputs in the order of the queries."""
    q, k, v, *decays = case.inputs(length, sources)
    random = torch.Generator().manual_seed(0)
    sinks = torch.randperm(length, generator=random)
    others = torch.randperm(sources, generator=random) if case.crosses else sinks
    of_tokens = [t[:, sinks] for t in decays]
    return case.op(q[:, sinks], k[:, others], v[:, others], *of_tokens), case.op(q, k, v, *decays)[:, sinks]


@each(lambda case: is_bidirectional(case) and case.permutes)
def test_6_tokens_have_no_order(case: Case) -> None:
    close(*permuted(case, 30, 50 if case.crosses else 30))


@each(lambda case: is_bidirectional(case) and not case.permutes)
def test_6_tokens_have_an_order(case: Case) -> None:
    assert not torch.allclose(*permuted(case, 30, 30))


@each(is_causal)
def test_6_causal_tokens_have_an_order(case: Case) -> None:
    q, k, v, *others = case.inputs(30)
    assert not torch.allclose(case.op(q, k.flip(1), v.flip(1), *others), case.op(q, k, v, *others))


# ------------------------------------------------------------------------------------------------------- 7: finite


def extremes(case: Case, length: int, size: float, dtype: torch.dtype, values: float) -> list[Tensor]:
    """Inputs as large as can be, two rows of a kind: of either sign, of one sign, and tiny beside the largest."""
    random = torch.Generator().manual_seed(length)
    of_q, of_k, of_v = case.shapes()

    def signs(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-1, 2, (2, length, *shape), generator=random).double()

    def ones(shape: tuple[int, ...]) -> Tensor:
        return torch.ones(2, length, *shape, dtype=torch.float64)

    def rising(shape: tuple[int, ...]) -> Tensor:
        return at_tokens(torch.linspace(0, 1, length).double().unsqueeze(0) ** 8, ones(shape)) * ones(shape)

    kinds = [
        (signs(of_q), signs(of_k)),
        (ones(of_q), ones(of_k)),
        (-ones(of_q), -ones(of_k)),
        (ones(of_q), -ones(of_k)),
        (-ones(of_q), ones(of_k)),
        (rising(of_q), rising(of_k).flip(1)),
        (0 * ones(of_q), rising(of_k) * signs(of_k)),
    ]
    made = [[(size * q).to(dtype), (size * k).to(dtype), (values * signs(of_v)).to(dtype)] for q, k in kinds]
    if case.variant.by_token:  # some forget everything
        made = [[*tensors, (-size * signs((HEADS,)).relu()).to(dtype)] for tensors in made]
    return [torch.cat(tensors) for tensors in zip(*made, strict=True)]


# How large inputs and values are, and what is above the outputs.
LARGE = {
    torch.float32: (1e4, 1e4, 1.0),
    torch.bfloat16: (1e4, 1e4, 1.0),
    # With 1 above them some gradients are 2e7, by the mathematics: more than float16 can say.
    torch.float16: (6e4, 1.0, 1e-3),
}


@each(dtypes=LARGE)
def test_7_large_inputs_stay_finite(case: Case, dtype: torch.dtype) -> None:
    check_large(case, dtype, (1, 2, 33, 65))  # a chunk of native kernels and one token more; of PyTorch


@each(dtypes=LARGE, of_loops=True)
def test_7_many_large_inputs_stay_finite(case: Case, dtype: torch.dtype) -> None:
    check_large(case, dtype, (513,))


def check_large(case: Case, dtype: torch.dtype, lengths: Sequence[int]) -> None:
    size, values, upstream = LARGE[dtype]
    case = case.up_to(513)
    for length in map(case.least, lengths):
        tensors = extremes(case, length, size, dtype, values)
        got, wanted = large(case.op, tensors, upstream), []
        for index, tensor in enumerate(got):
            if dtype == torch.float16 and not tensor.isfinite().all():
                wanted = wanted or large(case.truth, [t.double() for t in tensors], upstream)
                tensor = tensor.masked_fill(tensor.isinf() & is_beyond(dtype, wanted[index]), 0)
            for kind, rows in enumerate(tensor.split(2)):
                assert rows.isfinite().all(), f"{'oqkvd'[index]} of kind {kind} at length {length}"


def large(function: Callable[..., Tensor], tensors: Tensors, upstream: float) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.full_like(out, upstream))]


def is_beyond(dtype: torch.dtype, truth: Tensor) -> Tensor:
    """Where the mathematics itself gives more than a dtype can say."""
    return truth.abs() > 0.99 * torch.finfo(dtype).max


@each(has_state)
def test_7_large_inputs_stay_finite_token_by_token(case: Case) -> None:
    tensors = extremes(case, 12, 1e4, torch.float32, 1e4)
    out, state = case.steps(tensors, case.fresh(len(tensors[0]), torch.float32))
    for kind, rows in enumerate(out.split(2)):
        assert rows.isfinite().all(), f"kind {kind}"
    assert all(part.isfinite().all() for part in state)


def million(case: Case) -> Tensor:
    case = case.up_to(1_000_000)
    thousand = case.inputs(1_000, batch=1, dtype=torch.float32)
    tensors = [t.repeat(1, 1_000, *(1,) * (t.ndim - 2)) for t in thousand]
    # Of one head, and log-decays with it.
    tensors = [t[:, :, :1] if t.ndim == 4 or index == 3 else t for index, t in enumerate(tensors)]
    return case.op(*(t[..., :2] for t in tensors))


@each(lambda case: is_fast(case) and not is_scanned(case) and case.takes(1_000_000), of_loops=True)
def test_7_a_million_tokens(case: Case) -> None:
    assert million(case).isfinite().all()


@pytest.mark.slow
@each(lambda case: is_scanned(case) and case.takes(1_000_000))
def test_7_a_million_tokens_scanned(case: Case) -> None:
    assert million(case).isfinite().all()


# --------------------------------------------------------------------------------------------------- 8: bad input


def bools(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


Bad = dict[str, tuple[dict[str, Any], type[Exception], str]]  # what changes, what is raised, what it says


def bad_inputs(q: Tensor, k: Tensor, v: Tensor) -> Bad:
    """What no mechanism takes, beside float32 tensors of two rows and six tokens."""
    return {
        "a list": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        "no value": ({"v": None}, TypeError, "v must be a tensor, got NoneType"),
        "integers": ({"k": k.long()}, TypeError, "k must be float16.* got torch.int64"),
        "mixed dtypes": ({"v": v.double()}, TypeError, "have the same dtype, got .*float32.*float64"),
        "no token": ({"q": q[:, :0]}, ValueError, r"at least one token.* got \(2, 0, "),
        "no channel": ({"v": v[..., :0]}, ValueError, r"at least one .* got \(2, 6, .*0\)"),
        "batch": ({"q": torch.cat([q, q[:1]])}, ValueError, r"q and k must agree .* got q \(3, 6, .*k \(2, 6, "),
        "values' length": ({"v": v[:, :5]}, ValueError, r"k and v must agree .* v \(2, 5, "),
        "device": ({"v": v.to("meta")}, ValueError, "on the same device, got .*cpu.*meta"),
        "mask of integers": (
            {"mask": zeros(2, 6, dtype=torch.int64)},
            TypeError,
            r"mask must be a boolean tensor .* got \(2, 6\) int64",
        ),
        "mask of floats": ({"mask": zeros(2, 6)}, TypeError, "mask must be a boolean tensor"),
        "mask as a list": ({"mask": [True] * 6}, TypeError, "boolean tensor .* got list"),
        "mask's shape": ({"mask": bools(2, 5)}, ValueError, r"must have shape \(2, 6\), got \(2, 5\)"),
        "mask's rank": ({"mask": bools(6)}, ValueError, r"must have shape \(2, 6\), got \(6,\)"),
        "mask's device": ({"mask": bools(2, 6).to("meta")}, ValueError, "mask must be on cpu"),
        "backend": (
            {"backend": "abacus"},
            ValueError,
            "unknown backend 'abacus' .*available: auto, triton, native, torch",
        ),
        "option": ({"no_such_option": 1}, TypeError, "no_such_option"),
        "packing of floats": ({"cu_seqlens": zeros(2)}, TypeError, "cu_seqlens must be an int32 tensor, got .*float32"),
        "packing as a list": ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be an int32 tensor, got list"),
        "packing and mask": (
            {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32), "mask": bools(2, 6)},
            ValueError,
            "cu_seqlens or masks, not both",
        ),
        "packing of a batch": (
            {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
            ValueError,
            rf"a packed batch is \({axes(q).replace('batch, length', '1, total length')}\)",
        ),
        "rank": ({"q": q[:, 0]}, ValueError, rf"q must be \({axes(q)}\), got \(2, "),
    }


def bad_inputs_with_heads(q: Tensor, k: Tensor, v: Tensor) -> Bad:
    """The same for (batch, length, heads, channels)."""
    return {
        "no head": ({"v": v[:, :, :0]}, ValueError, r"at least one token, head and channel, got \(2, 6, 0, 5\)"),
        "heads": ({"q": torch.cat([q, q], 2)}, ValueError, r"q and k must agree .* got q \(2, 6, 4, 4\)"),
        "channels": ({"k": k[..., :3]}, ValueError, r"q and k must agree .* k \(2, 6, 2, 3\)"),
        "values' heads": ({"v": v[:, :, :1]}, ValueError, r"k and v must agree .* v \(2, 6, 1, 5\)"),
    }


def bad_inputs_without_heads(q: Tensor, k: Tensor, v: Tensor) -> Bad:
    """The same for (batch, length, channels); keys may be one for each head, into which the channels split."""
    bad: Bad = {"channels": ({"q": q[..., :-1]}, ValueError, "q and v in channels, got q")}
    if k.shape == v.shape:
        bad["keys' channels"] = ({"k": k[..., :-1]}, ValueError, "k and v must agree in batch, length and channels")
    else:
        three = torch.cat([k, k[..., :1]], -1)
        bad["heads"] = ({"k": three}, ValueError, "the number of heads must divide the channels of v")
    return bad


BAD_BIDIRECTIONAL: Bad = {
    "context mask's shape": ({"context_mask": bools(2, 7)}, ValueError, r"context_mask must have shape \(2, 6\)"),
    "context mask's type": ({"context_mask": zeros(2, 6)}, TypeError, "context_mask must be a boolean tensor"),
    "return_state": ({"return_state": True}, ValueError, "initial_state and return_state require causal=True"),
    "initial_state": ({"initial_state": ()}, ValueError, "initial_state and return_state require causal=True"),
}
BAD_CAUSAL: Bad = {
    "state's type": ({"initial_state": (1, 2)}, TypeError, "state must be a .*State, got tuple"),
}


def every_bad_input(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Bad:
    bad = bad_inputs(q, k, v) | (bad_inputs_with_heads if q.ndim == 4 else bad_inputs_without_heads)(q, k, v)
    if not case.causal:
        bad |= BAD_BIDIRECTIONAL
    elif has_state(case):
        bad |= BAD_CAUSAL
    if not case.crosses:
        longer = torch.cat([q, q[:, :1]], 1)
        says = "self-attention, since .* the same length, got 7 and 6"
        bad["lengths"] = ({"q": longer}, ValueError, says)
        says = "self-attention, since .* pass mask, not context_mask"
        bad["context mask"] = ({"context_mask": bools(2, 6)}, ValueError, says)
    if not case.row.can("causal"):
        bad["causal"] = ({"causal": True}, ValueError, "no causal form")
    return bad


def axes(tensor: Tensor, of_a_step: bool = False) -> str:
    names = "batch, length, heads, channels" if tensor.ndim == (3 if of_a_step else 4) else "batch, length, channels"
    return names.replace("length, ", "") if of_a_step else names


def refuses(function: Callable[..., Any], arguments: Mapping[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        function(**arguments)


@each()
def test_8_bad_input_is_refused_in_words(case: Case) -> None:
    tensors = case.inputs(6, dtype=torch.float32)
    arguments = {**dict(zip("qkv", tensors, strict=False)), **case.arguments()}
    op = with_parameters(case)
    op(**arguments)  # what is spoilt below is accepted as it is
    for bad, kind, says in every_bad_input(case, *tensors[:3]).values():
        refuses(op, {**arguments, **bad}, kind, says)


def with_parameters(case: Case) -> Callable[..., Any]:
    """The operation with good parameters, and all else by name."""
    tensors = case.inputs(6, dtype=torch.float32)
    learned = (*tensors[3:], *case._arguments_of((), tensors[0]))
    return lambda q, k, v, **arguments: case.row.operation(q, k, v, *learned, **arguments)


@each(has_parameters)
def test_8_bad_parameters_are_refused_in_words(case: Case) -> None:
    tensors, parameters = case.inputs(6), case.parameters()
    for index, parameter in enumerate(parameters):
        for bad in (None, [1.0], parameter.long(), parameter.to("meta"), parameter[None], parameter[..., :0]):
            spoilt = [bad if at == index else other for at, other in enumerate(parameters)]
            with pytest.raises((TypeError, ValueError), match=r"must .* got"):
                case.op(*tensors, *spoilt)
            if has_state(case):
                with pytest.raises((TypeError, ValueError), match=r"must .* got"):
                    case.step(*(t[:, 0] for t in tensors), case.fresh(2), *spoilt)


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ([0, 5], r"rise from 0 to the total length 6, got \[0, 5\]"),
        ([1, 6], "rise from 0"),
        ([0, 4, 3, 6], "rise from 0"),
        ([6], "boundaries of N sequences"),
        ([[0, 6]], "boundaries of N sequences"),
    ],
)
@each()
def test_8_bad_packing_is_refused_in_words(case: Case, bounds: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        case.op(*case.inputs(6, batch=1), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@each(has_state)
def test_8_bad_states_are_refused_in_words(case: Case) -> None:
    tensors = case.inputs(6)
    token = [t[:, 0] for t in tensors]
    _, state = case.op(*tensors, return_state=True)
    for index, (name, part) in enumerate(zip(state._fields, state, strict=True)):
        for bad in (part[:1], part.to(torch.float16), part.to("meta"), [1.0], None):
            spoilt = type(state)(*(bad if at == index else other for at, other in enumerate(state)))
            with pytest.raises((TypeError, ValueError), match=rf"state\.{name} must be .* got"):
                case.op(*tensors, initial_state=spoilt)
            with pytest.raises((TypeError, ValueError), match=rf"state\.{name} must be .* got"):
                case.step(*token, spoilt)


@each(has_state)
def test_8_bad_steps_are_refused_in_words(case: Case) -> None:
    q, k, v, *others = (t[:, 0] for t in case.inputs(6))
    state = case.fresh(2)
    for tensors, kind, says in (
        ((q.unsqueeze(1), k, v), ValueError, rf"q of one step must be \({axes(q, True)}\), got \(2, 1, "),
        ((q, k, v[0]), ValueError, "v of one step must be"),
        ((q, k, v.half()), TypeError, "have the same dtype"),
        ((q.long(), k, v), TypeError, "q must be float16.* got torch.int64"),
        ((q, k, [1.0]), TypeError, "v must be a tensor, got list"),
        ((q[:1], k, v), ValueError, "q and k must agree"),
        ((q[:1], k[:1], v[:1]), ValueError, r"state\.\w+ must be"),
    ):
        with pytest.raises(kind, match=says):
            case.step(*tensors, *others, state)
    with pytest.raises(TypeError, match=r"state must be a \w+State, got NoneType"):
        case.step(q, k, v, *others, None)


# ------------------------------------------------------------------------------------------------------ 9: memory


class Recorder(TorchDispatchMode):
    """Bytes of the largest tensor that comes to be, and the shapes of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.shapes = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
                self.shapes.append(tensor.shape)
        return out


def memory(case: Case, length: int, channels: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the largest tensor, and of all that is kept for the backward pass."""
    tensors = [torch.randn(1, length, *shape) for shape in case.shapes(1, channels, channels)]
    if case.variant.by_token:
        tensors.append(-torch.rand(1, length, 1))
    parameters = case.parameters(torch.float32, heads=1, key=channels)
    leaves = [t.requires_grad_() for t in (*tensors, *(p.clone() for p in parameters))]
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Recorder() as recorder:
        # Not of the backward pass: what it computes again of a block is released with the block.
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = case.op(*leaves, **arguments).sum()
        out.backward()
    return recorder.largest, sum(kept.values())


@each(lambda case: is_linear(case) and case.takes(4096), of_loops=True)
def test_9_memory_is_linear_in_length(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_own_blocks(case):
        rechunk(monkeypatch, case, 32, 64)  # rows of an L x L table, a block at a time, are to be few beside channels
    length, channels = 2048, 32
    case = case.up_to(2 * length)
    size = 4 * length * channels
    calls: list[dict[str, Any]] = [
        {"mask": torch.ones(1, length, dtype=torch.bool)},
        {"cu_seqlens": torch.tensor([0, length], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, length // 2, length], dtype=torch.int32)},
    ]
    once, kept_once = memory(case, length, channels, {})
    for largest, kept in ((once, kept_once), *(memory(case, length, channels, arguments) for arguments in calls)):
        # L x K x V would be 32 times the size of q, L x L too.
        assert size <= largest <= 3 * size
        assert kept <= 15 * size
    twice, kept_twice = memory(case, 2 * length, channels, {})
    assert twice <= 2 * once
    assert kept_twice <= 2.1 * kept_once
