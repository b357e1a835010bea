"""Linear attention, Mobile-Attention, AFT-simple, and random and other features; run by test_triton.py beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_cases import reference, variants_of
from torch import Tensor
from triton_comparison import FORMS, both, close, resumed, run, spoilt

from flowformer import ops
from flowformer.core.feature_products import products_in_chunks
from flowformer.kernels.triton import attend, launch, parts
from flowformer.mechanisms import find_attention

HEADS = 3
NAMES = ("linear", "mobile", "aft_simple")
OPERATIONS = {name: find_attention(name).operation for name in NAMES}
MECHANISMS = pytest.mark.parametrize("name", NAMES)
CASES = {
    "linear": {}, "linear-head": {"decay": "head"}, "linear-token": {"decay": "token"}, "mobile": {},
    "mobile-free": {"clamp": None}, "mobile-heads": {"competition": "heads", "normalize": True},
    "mobile-plain": {"competition": None, "allocation": False}, "mobile-relu": {"feature_map": "relu", "eps": 1e-2},
    "aft_simple": {},
}  # fmt: skip
SLOW = {"linear-head", "mobile-free", "mobile-plain", "mobile-relu"}  # what their kernels compute, others do too
EACH = pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])


def inputs(name: str, length: int, sources: int | None = None, *, decay: str | None = None, batch: int = 1,
           sizes: tuple[int, int] = (4, 5)) -> list[Tensor]:  # fmt: skip
    """q, k, v, and log-decays where there are any, in float64 with the digits of float32."""
    random = torch.Generator().manual_seed(100 * length + sizes[0])
    key, value = (HEADS, sizes[0]), (HEADS, sizes[1])
    shapes = (key, key, value) if name != "aft_simple" else ((40,), (40,), (40,))
    lengths = (length, sources or length, sources or length)
    found = [torch.randn(batch, n, *shape, generator=random) for n, shape in zip(lengths, shapes, strict=True)]
    if name == "aft_simple":
        found[1] *= 4  # weights of very different size
    if decay == "head":
        found.append(torch.tensor([-0.3, -0.02, 0.0]))
    if decay == "token":
        found.append(-0.3 * torch.rand(batch, length, HEADS, generator=random))
        found[3][:, length // 3] = -30.0  # forgets
    return [t.double() for t in found]


def given(case: str, length: int, **sizes: Any) -> tuple[Callable[..., Any], list[Tensor], dict[str, Any]]:
    """The operation of a case, its inputs and options."""
    options = dict(CASES[case])
    name = case.partition("-")[0]
    return OPERATIONS[name], inputs(name, length, decay=options.pop("decay", None), **sizes), options


@FORMS
@MECHANISMS
def test_equals_the_reference(name: str, causal: bool) -> None:
    variant = variants_of(find_attention(name)).get("default")
    assert variant is None or not variant.options
    tensors = inputs(name, 40)
    want = run(getattr(reference, OPERATIONS[name].__name__), tensors, torch.float64, causal=causal)
    close(run(OPERATIONS[name], tensors, torch.float32, causal=causal, backend="triton"), want, 1e-5)


@FORMS
@EACH
def test_padding_segments_and_what_is_in_padding(case: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SEGMENT", 32)
    operation, tensors, options = given(case, 70, batch=2)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0, :3], mask[1, 40:] = False, False
    both(operation, tensors, mask=mask, causal=causal, **options)
    options |= {"mask": torch.zeros_like(mask), "causal": causal, "backend": "triton"}
    assert not operation(*spoilt([t.float() for t in tensors], options["mask"]), **options).any()


@EACH
def test_resumes_from_a_state(case: str) -> None:
    operation, tensors, options = given(case, 60)
    resumed(operation, tensors, 33, **options)


def test_a_fresh_state_is_none_at_all() -> None:
    tensors = [t.float() for t in inputs("aft_simple", 5)]
    options = {"causal": True, "backend": "triton"}
    fresh = ops.init_aft_simple_state(1, tensors[0].shape[-1])
    assert torch.equal(ops.aft_simple(*tensors, initial_state=fresh, **options), ops.aft_simple(*tensors, **options))


def test_gradients_of_decays_do_not_reach_the_future() -> None:
    *tensors, decay = (t.float() for t in inputs("linear", 40, decay="token"))
    decay.requires_grad_()
    out = ops.linear_attention(*tensors, decay, causal=True, backend="triton")
    (grad,) = torch.autograd.grad(out[:, :20].sum(), [decay])
    assert not grad[:, 20:].any()
    assert grad[:, :20].any()


@pytest.mark.slow
def test_in_parts_of_a_batch_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    operation, tensors, _ = given("linear-token", 20, batch=2)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    whole = run(operation, tensors, torch.float16, mask=mask, backend="triton")
    monkeypatch.setattr(parts, "SMALLEST", 1)
    monkeypatch.setattr(parts, "MOST", 2)
    assert parts.parts_of(tensors[0])[1].batch == slice(1, 2)
    cut = run(operation, tensors, torch.float16, mask=mask, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(cut, whole, strict=True))


@pytest.mark.parametrize("name", ["linear", "mobile", "aft_simple"])
def test_gradients_of_the_state_alone(name: str) -> None:
    grads = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs(name, 20)]
        _, state = OPERATIONS[name](*leaves, causal=True, return_state=True, backend=backend)
        grads.append(torch.autograd.grad(state[-1].square().sum(), leaves, materialize_grads=True))
    close(list(grads[1][1:]), list(grads[0][1:]), 1e-5)


@FORMS
@pytest.mark.parametrize("case", ["linear-token", "mobile", "aft_simple"])
def test_packed_sequences(case: str, causal: bool) -> None:
    operation, tensors, options = given(case, 37)
    bounds = torch.tensor([0, 3, 3, 36, 37], dtype=torch.int32)  # within a chunk, none, more than one, one
    both(operation, tensors, cu_seqlens=bounds, causal=causal, **options)


@FORMS
@pytest.mark.parametrize("case", ["linear", "linear-token", "mobile", "aft_simple"])
def test_half_precision(case: str, causal: bool) -> None:
    operation, tensors, options = given(case, 40)
    both(operation, tensors, torch.float16, causal=causal, **options)


@pytest.mark.parametrize("name", ["linear", "aft_simple"])
@pytest.mark.parametrize(("length", "sources"), [(37, 70), pytest.param(1, 50, marks=pytest.mark.slow)])
def test_cross_attention(name: str, length: int, sources: int) -> None:
    both(OPERATIONS[name], inputs(name, length, sources))
    masks = torch.rand(2, length) < 0.7, torch.rand(2, sources) < 0.7
    both(OPERATIONS[name], inputs(name, length, sources, batch=2), mask=masks[0], context_mask=masks[1])


# With one channel of keys, outputs of linear attention do not depend on queries: their gradients are rounding alone.
@pytest.mark.parametrize("sizes", [(2, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in ((80, 3), (3, 130)))])
def test_channels(sizes: tuple[int, int]) -> None:
    for case, causal in (("linear-head", True), ("linear", False), ("mobile", True)):
        operation, tensors, options = given(case, 40, sizes=sizes)
        both(operation, tensors, causal=causal, **options)


@EACH
def test_outputs_do_not_know_the_future(case: str) -> None:
    operation, tensors, options = given(case, 70)
    tensors = [t.float() for t in tensors]
    options |= {"causal": True, "backend": "triton"}
    before = operation(*tensors, **options)
    for t in (0, 31, 64):  # the second is the last of its chunk, the third the first
        changed = [x.clone() for x in tensors]
        for x in changed:
            if x.ndim > 1:
                x[:, t + 1 :] *= 100
        assert torch.equal(before[:, : t + 1], operation(*changed, **options)[:, : t + 1])


def test_keys_of_any_size() -> None:
    q, k, v = inputs("aft_simple", 100)
    steps = torch.linspace(-1, 1, 100)[None, :, None]
    for keys in (k * 2_500, k + 3e3 * steps, k - 1e4 * steps):
        tensors = [q, keys.float().double(), v]
        want = run(ops.aft_simple, tensors, torch.float64, causal=True, backend="torch")
        got = run(ops.aft_simple, tensors, torch.float32, causal=True, backend="triton")
        for index in (0, 1, 3):  # the gradient of keys so far apart is next to nothing
            close([got[index]], [want[index]], 1e-5)
        assert got[2].isfinite().all()


@FORMS
@MECHANISMS
def test_any_layout_and_an_empty_batch(name: str, causal: bool) -> None:
    operation, tensors = OPERATIONS[name], [t.float() for t in inputs(name, 40)]
    options = {"causal": causal, "backend": "triton"}
    want = operation(*tensors, **options)
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    assert torch.equal(operation(*moved, **options), want)
    assert operation(*(t[:0] for t in tensors), **options).shape == (0, *want.shape[1:])


# Of opcheck, where it runs an operator compiled, and where PyTorch loads what that takes.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "case",
    [
        "causal",
        "aft",
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in ("bidirectional", "weights", "sums", "causal sums", "means")
        ),
    ],
)
def test_operators(case: str) -> None:
    q, k, v = (t.float().requires_grad_() for t in inputs("linear", 20))
    found = torch.rand(3, 1, 20, HEADS).unbind()
    decay, weight, scale = -found[0].requires_grad_(), found[1].requires_grad_(), (found[2] + 0.5).requires_grad_()
    keys, memory = torch.rand(1, HEADS, 4).double(), torch.rand(1, HEADS, 4, 5).double()
    nothing, operators = torch.zeros(0, dtype=torch.float64), torch.ops.flowformer
    a, b, c = (t.float().requires_grad_() for t in inputs("aft_simple", 20))
    operator, given = {
        "causal": (operators.attend_causal_triton, (q, k, v, None, decay, None, None, keys, memory, 2, 1e-6, False)),
        "bidirectional": (operators.attend_triton, (q, k, v, None, None, decay, None, None, 2, 1e-6, False)),
        "weights": (
            operators.attend_causal_triton,
            (q, k, v, None, None, weight, scale, nothing, memory, 0, None, False),
        ),
        "sums": (operators.attend_triton, (q, k, v, None, None, None, None, None, 3, None, True)),
        "causal sums": (
            operators.attend_causal_triton,
            (q, k, v, None, decay, None, None, keys, memory, 3, None, True),
        ),
        "aft": (operators.aft_causal_triton, (a, b, c, None, None, None)),
        "means": (operators.aft_means_triton, (b, c, None)),
    }[case]
    torch.library.opcheck(operator, given)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_compiles_into_one_graph(name: str) -> None:
    tensors = inputs(name, 40)

    def attend(*tensors: Tensor) -> Tensor:
        return OPERATIONS[name](*tensors, causal=True, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    want = run(attend, tensors, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, tensors, torch.float32), want, strict=True))


@MECHANISMS
def test_second_gradients_are_refused(name: str) -> None:
    leaves = [t.float().requires_grad_() for t in inputs(name, 20)]
    out = OPERATIONS[name](*leaves, causal=True, backend="triton")
    with pytest.raises(RuntimeError, match="second-order gradients"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)


def test_too_many_channels_are_refused() -> None:
    q = torch.randn(1, 5, 2, 257)
    with pytest.raises(ValueError, match="linear_attention: the Triton kernels have 256 channels at most, got 257"):
        ops.linear_attention(q, q, q, backend="triton")


# ---------------------------------------------------------------------------------------------- features by PyTorch

SOME = {"rfa": ops.rfa_attention, "performer": ops.performer_attention, "cosformer": ops.cosformer_attention}
FEATURES = {
    "performer": {}, "rfa": {}, "rfa-gate": {"gate": True}, "cosformer": {"max_length": 40},
    "performer-relu": {"kernel": "relu", "sum_eps": 1e-6}, "performer-all": {"maximum": "all"},
    "performer-lra": {"eps": 1e-6, "least": 1e-6}, "rfa-absolute": {"bound": "absolute", "least": 0.1},
    "cosformer-free": {},
}  # fmt: skip
FEW = ("performer", "rfa-gate", "cosformer")
LESS = {"performer-relu", "performer-all", "performer-lra", "rfa-absolute", "cosformer-free"}  # the same kernels
KINDS = [
    pytest.param(case, causal, marks=[pytest.mark.slow] * (case in LESS))
    for case in FEATURES
    for causal in (False, True)
    if causal or case != "rfa-gate"
]


def featured(case: str, length: int, **sizes: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """An operation with its random matrix and options, and its inputs, gates among them."""
    # Under relu, a query of few channels may have one that is positive: then its gradient is rounding alone.
    sizes = {"sizes": (6, 2), **sizes}
    options = dict(FEATURES[case])
    name, gate = case.partition("-")[0], options.pop("gate", False)
    tensors = inputs("linear", length, decay="token" if gate else None, **sizes)
    random = torch.Generator().manual_seed(3)
    matrix = torch.randn(*((HEADS,) if name == "rfa" else ()), 5, tensors[0].shape[-1], generator=random)

    def operation(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, **given: Any) -> Any:
        learned = {"performer": (matrix,), "rfa": (*(gates or (None,)), matrix), "cosformer": ()}[name]
        return SOME[name](q, k, v, *learned, **options, **given)

    return operation, tensors


@pytest.mark.parametrize("case", ["bidirectional", "causal", "decay"])
def test_sums_over_keys(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Totals and products, both with gradients, of features in two groups; of the past too."""
    monkeypatch.setattr(launch, "SEGMENT", 32)
    monkeypatch.setattr(attend, "MOST_FEATURES", 3)
    q, k, v, decay = (t[:, :32] for t in inputs("linear", 40, decay="token"))
    decay[:, 10] = -30.0
    random = torch.Generator().manual_seed(0)
    past = [torch.randn(1, HEADS, 4, *sizes, generator=random).double() for sizes in ((), (5,))]
    given = {"bidirectional": [], "causal": past, "decay": [*past, decay]}[case]

    def results(products: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        others = [t.clone().requires_grad_() for t in given]
        past = tuple(others[:2]) or None
        total, product, after = products(*leaves, past, *others[2:])
        found = [total, product, *(after or ())]
        random = torch.Generator().manual_seed(1)
        loss = sum((x.double() * torch.randn(x.shape, generator=random)).sum() for x in found)
        return [*(x.detach() for x in found), *torch.autograd.grad(loss, [*leaves, *others])]

    want = results(functools.partial(products_in_chunks, chunk=16), torch.float64)
    close(results(functools.partial(attend.products, "it"), torch.float32), want, 1e-5)


@pytest.mark.parametrize(("case", "causal"), KINDS)
def test_features_and_padding(case: str, causal: bool) -> None:
    operation, tensors = featured(case, 24, batch=2)
    mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0, :3], mask[1, 10:] = False, False
    both(operation, tensors, mask=mask, causal=causal)
    inside = [t.float() for t in tensors]
    filled = [t.masked_fill(~mask.view(2, 24, *(1,) * (t.ndim - 2)), torch.nan) for t in inside]
    options = {"mask": mask, "causal": causal, "backend": "triton"}
    assert torch.equal(operation(*filled, **options), operation(*inside, **options))


@pytest.mark.parametrize("case", FEW)
def test_features_resume_from_a_state(case: str) -> None:
    operation, tensors = featured(case, 20)
    resumed(operation, tensors, 9)


@pytest.mark.parametrize("case", FEW)
def test_features_do_not_know_the_future(case: str) -> None:
    operation, tensors = featured(case, 40)
    tensors, options = [t.float() for t in tensors], {"causal": True, "backend": "triton"}
    before = operation(*tensors, **options)
    for t in (0, 31):  # the second is the last of its chunk
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, t + 1 :] *= 100
        assert torch.equal(before[:, : t + 1], operation(*changed, **options)[:, : t + 1])


@pytest.mark.parametrize(
    ("case", "causal"),
    [("performer", True), ("cosformer-free", False), pytest.param("rfa-gate", True, marks=pytest.mark.slow)],
)
def test_features_of_packed_sequences(case: str, causal: bool) -> None:
    operation, tensors = featured(case, 20)
    both(operation, tensors, cu_seqlens=torch.tensor([0, 3, 3, 12, 20], dtype=torch.int32), causal=causal)


@pytest.mark.parametrize(
    "case", ["rfa-gate", *(pytest.param(c, marks=pytest.mark.slow) for c in FEW if c != "rfa-gate")]
)
def test_features_of_half_precision(case: str) -> None:
    both(*featured(case, 20), torch.float16, causal=True)


@pytest.mark.parametrize("case", ["performer", "cosformer-free", pytest.param("rfa", marks=pytest.mark.slow)])
def test_features_in_cross_attention(case: str) -> None:
    operation, tensors = featured(case, 10, sources=20, batch=2)
    random = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, length, generator=random) < 0.7 for length in (10, 20))
    both(operation, tensors, **dict(zip(("mask", "context_mask"), masks, strict=True)))
