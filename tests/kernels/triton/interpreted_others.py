"""Linear attention, Mobile-Attention and AFT-simple by the Triton kernels; run by test_triton.py beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_cases import reference, variants_of
from torch import Tensor
from triton_comparison import FORMS, both, close, resumed, run

from flowformer import ops
from flowformer.kernels.triton import launch, parts
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
    inside = [t.float() for t in tensors]
    filled = [t if t.ndim < 3 else t.masked_fill(~mask.view(2, 70, *(1,) * (t.ndim - 2)), torch.nan) for t in inside]
    options |= {"mask": mask, "causal": causal, "backend": "triton"}
    assert torch.equal(operation(*filled, **options), operation(*inside, **options))
    options["mask"] = torch.zeros_like(mask)
    assert not operation(*filled, **options).any()


@EACH
def test_resumes_from_a_state(case: str) -> None:
    operation, tensors, options = given(case, 60)
    resumed(operation, tensors, 33, **options)


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
    operation, tensors, options = given(case, 50)
    bounds = torch.tensor([0, 3, 3, 40, 41, 50], dtype=torch.int32)
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


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of NumPy, where a GPU has infinity, and is right
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
    ["causal", "aft", *(pytest.param(c, marks=pytest.mark.slow) for c in ("bidirectional", "weights", "aft means"))],
)
def test_operators(case: str) -> None:
    q, k, v = (t.float().requires_grad_() for t in inputs("linear", 20))
    found = torch.rand(3, 1, 20, HEADS).unbind()
    decay, weight, scale = -found[0].requires_grad_(), found[1].requires_grad_(), (found[2] + 0.5).requires_grad_()
    keys, memory = torch.rand(1, HEADS, 4).double(), torch.rand(1, HEADS, 4, 5).double()
    nothing, operators = torch.zeros(0, dtype=torch.float64), torch.ops.flowformer
    a, b, c = (t.float().requires_grad_() for t in inputs("aft_simple", 20))
    operator, given = {
        "causal": (operators.attend_causal_triton, (q, k, v, None, decay, None, None, keys, memory, 2, 1e-6)),
        "bidirectional": (operators.attend_triton, (q, k, v, None, None, decay, None, None, 2, 1e-6)),
        "weights": (operators.attend_causal_triton, (q, k, v, None, None, weight, scale, nothing, memory, 0, None)),
        "aft": (operators.aft_causal_triton, (a, b, c, None, None, None)),
        "aft means": (operators.aft_means_triton, (b, c, None)),
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
