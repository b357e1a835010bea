"""One token by one kernel: linear attention, Mobile-Attention, AFT-simple; run by test_triton.py beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_comparison import close

from flowformer import ops
from flowformer.mechanisms import Mechanism, find_attention

HEADS = 3
SLOW = pytest.mark.slow
CASES = {
    "linear": {}, "linear-head": {"decay": "head"}, "linear-token": {"decay": "token", "eps": 1e-2}, "mobile": {},
    "mobile-free": {"clamp": None, "normalize": True}, "mobile-heads": {"competition": "heads", "normalize": True},
    "mobile-relu": {"feature_map": "relu", "eps": 1e-2, "clamp": 0.5},
    "mobile-plain": {"competition": None, "allocation": False}, "aft_simple": {},
}  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES)
OPERATORS = {"linear": "linear_step_triton", "mobile": "mobile_step_triton", "aft_simple": "aft_step_triton"}


def given(
    case: str, length: int, batch: int = 2, heads: int = HEADS, sizes: tuple[int, int] = (5, 21)
) -> tuple[Mechanism, list[Tensor], dict[str, Any]]:
    """The mechanism, q, k, v and log-decays where there are any, in float64 with the digits of float16; options."""
    options, name = dict(CASES[case]), case.partition("-")[0]
    decay = options.pop("decay", None)
    random = torch.Generator().manual_seed(length + sizes[0])
    shapes = [(heads, sizes[0])] * 2 + [(heads, sizes[1])] if name != "aft_simple" else [(40 * sizes[0],)] * 3
    tensors = [torch.randn(batch, length, *shape, generator=random) for shape in shapes]
    if name == "aft_simple":
        tensors[1] *= 4  # weights of very different size
    if decay == "head":
        tensors.append(torch.tensor([-0.3, 0.5, -0.02]))  # above 0 counts as 0
    if decay == "token":
        tensors.append(-0.3 * torch.rand(batch, length, heads, generator=random))
        tensors[3][:, length // 2] = -30.0  # forgets
    return find_attention(name), [t.half().double() for t in tensors], options


def token_at(tensors: list[Tensor], t: int) -> list[Tensor]:
    return [x if x.ndim == 1 else x[:, t] for x in tensors]


def start(row: Mechanism, tensors: list[Tensor]) -> Any:
    q, _, v = tensors[:3]
    sizes = (q.shape[2], q.shape[3], v.shape[3]) if q.ndim == 4 else (1, 1, q.shape[2])
    assert row.init_state is not None
    return row.init_state(len(q), *sizes, dtype=torch.float32)


def step_by_step(case: str, dtype: torch.dtype, backend: str, length: int = 4, **sizes: Any) -> list[Tensor]:
    """Outputs of all tokens one by one, and the state after them."""
    row, tensors, options = given(case, length, **sizes)
    state, outs = start(row, tensors), []
    tensors = [*(t.to(dtype) for t in tensors[:3]), *(t.to(max(dtype, torch.float32, key=_bits)) for t in tensors[3:])]
    assert row.step is not None
    for t in range(length):
        q, k, v, *decays = token_at(tensors, t)
        kept = [part.clone() for part in state]
        out, after = row.step(q, k, v, state, *decays, backend=backend, **options)
        assert all(torch.equal(part, copy) for part, copy in zip(state, kept, strict=True))
        assert out.dtype == dtype
        state = after
        outs.append(out)
    return [torch.stack(outs, 1), *state]


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def compare(case: str, dtype: torch.dtype, **sizes: Any) -> None:
    want = step_by_step(case, torch.float64, "torch", **sizes)
    got = step_by_step(case, dtype, "triton", **sizes)
    assert [part.dtype for part in got[1:]] == [part.dtype for part in want[1:]]
    close(got[:1], want[:1], {torch.float32: 1e-6, torch.float16: 1e-3}[dtype])
    close(got[1:], want[1:], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@EACH
def test_a_state_advances_step_by_step(case: str, dtype: torch.dtype) -> None:
    compare(case, dtype)


@pytest.mark.parametrize(
    ("heads", "sizes"), [(1, (1, 1)), (5, (33, 70)), (2, (256, 256)), pytest.param(17, (100, 256), marks=SLOW)]
)
@pytest.mark.parametrize("name", OPERATORS)
def test_heads_and_channels(name: str, heads: int, sizes: tuple[int, int]) -> None:
    compare(name, torch.float32, length=2, heads=heads, sizes=sizes)


@pytest.mark.parametrize(
    "name", ["mobile", *(pytest.param(name, marks=SLOW) for name in ("linear-token", "aft_simple"))]
)
def test_a_step_has_gradients_and_compiles(name: str) -> None:
    row, tensors, options = given(name, 3)
    step: Any = row.step
    tensors = [t.float() for t in tensors]
    token = token_at(tensors, 2)
    state = start(row, tensors)
    for t in range(2):
        q, k, v, *decays = token_at(tensors, t)
        _, state = step(q, k, v, state, *decays, backend="torch", **options)

    def take(backend: str, q: Tensor, k: Tensor, v: Tensor, *decays: Tensor) -> Any:
        return step(q, k, v, state, *decays, backend=backend, **options)

    found = {}
    for backend in ("torch", "triton"):
        leaves = [t.clone().requires_grad_() for t in token]
        out, after = take(backend, *leaves)
        loss = out.double().square().sum() + after[-1].square().sum()
        found[backend] = [out.detach(), *torch.autograd.grad(loss, leaves)]
    close(found["triton"], [t.double() for t in found["torch"]], 1e-5)

    compiled = torch.compile(lambda *t: take("triton", *t)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*token), take("triton", *token)[0])
    operator = getattr(torch.ops.flowformer, OPERATORS[name.partition("-")[0]])
    others = {
        "linear-token": (token[-1], *state, 1e-6), "aft_simple": tuple(state),
        "mobile": (*state, "sigmoid", 1.0, 1e-6, "sequence", True, False),
    }[name]  # fmt: skip
    torch.library.opcheck(operator, (*token[:3], *others))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_of_an_empty_batch_and_of_any_layout(name: str) -> None:
    row, tensors, _ = given(name, 1)
    step: Any = row.step
    token, state = [t[:, 0].float() for t in tensors], start(row, tensors)
    want, after = step(*token, state, backend="triton")
    moved = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in token]
    assert torch.equal(step(*moved, state, backend="triton")[0], want)
    out, none = step(*(t[:0] for t in token), type(state)(*(part[:0] for part in state)), backend="triton")
    assert out.shape == (0, *want.shape[1:])
    assert [part.shape for part in none] == [(0, *part.shape[1:]) for part in after]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_is_explained(name: str) -> None:
    row, tensors, _ = given(name, 1)
    token = [t[:, 0].float() for t in tensors]
    assert row.step is not None
    told = ops.explain(row.step.__name__, *token, start(row, tensors), backend="triton")
    assert told.backend == "triton"


def test_too_many_channels_are_refused() -> None:
    q = torch.randn(1, 2, 257)
    for name, state in (("linear", ops.init_linear_state), ("mobile", ops.init_mobile_state)):
        step: Any = find_attention(name).step
        with pytest.raises(ValueError, match=f"{name}_attention_step: .* 256 channels at most, got 257"):
            step(q, q, q, state(1, 2, 257, 257), backend="triton")
