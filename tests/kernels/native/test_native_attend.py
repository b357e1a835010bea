"""Linear attention of features by the C++ kernels: what they compute, and as operators of PyTorch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from kernel_inputs import Graphs, close, needs_kernels, random
from torch import Tensor, nn

from flowformer.core.checks import Masks
from flowformer.kernels.native.attend import attend, attend_step

HEADS = 2
SIGMOID, RELU, ELU, GIVEN = range(4)
OPERATORS = torch.ops.flowformer

pytestmark = [
    needs_kernels,
    # where opcheck runs an operator compiled
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Given(NamedTuple):
    """Arguments of attend."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    weight: Tensor | None = None
    scale: Tensor | None = None
    keys: Tensor | None = None
    memory: Tensor | None = None

    def leaves(self) -> Given:
        return Given(*(None if x is None else x.detach().clone().requires_grad_() for x in self))

    def tensors(self) -> list[Tensor]:
        return [x for x in self if x is not None]


def given(length: int, of: str = "", *, batch: int = 2, sources: int | None = None, channels: Any = (5, 7)) -> Given:
    """Arguments; ``of`` names those beside q, k and v: decay or decay-token, weight, scale, keys, memory."""
    keys, values = channels
    sources = length if sources is None else sources
    rows = (batch, length, HEADS)
    others = {
        "log_decay": -0.3 * random(*((HEADS,) if "decay" in of.split() else rows)).abs() if "decay" in of else None,
        "weight": random(batch, sources, HEADS, seed=1).abs() if "weight" in of else None,
        "scale": random(*rows, seed=2) if "scale" in of else None,
        "keys": random(batch, HEADS, keys).abs().double() if "keys" in of else None,
        "memory": random(batch, HEADS, keys, values).double() if "memory" in of else None,
    }
    sizes = ((length, keys), (sources, keys), (sources, values))
    return Given(*(random(batch, n, HEADS, width, seed=i) for i, (n, width) in enumerate(sizes)), **others)


def features(x: Tensor, feature_map: int) -> Tensor:
    x = x.double()
    if feature_map == SIGMOID:
        return x.sigmoid()
    if feature_map == RELU:
        return x.relu() + 1e-6
    return nn.functional.elu(x) + 1 if feature_map == ELU else x


def truth(given: Given, masks: Masks, feature_map: int, eps: float | None, causal: bool) -> tuple[Tensor, ...]:
    """Output, sum of keys and memory in float64, from the matrix of weights; padding has weight 0."""
    q, k, v, log_decay, weight, scale, keys, memory = given
    Q, K, V = features(q, feature_map), features(k, feature_map), v.double()
    if masks.key is not None:
        K = K * masks.key[..., None, None]
    K = K if weight is None else K * weight.double().unsqueeze(-1)
    so_far = torch.zeros(q.shape[:3], dtype=torch.float64)
    if log_decay is not None:
        steps = log_decay.double().clamp(max=0).expand(q.shape[:3])
        so_far = (steps if masks.query is None else steps * masks.query.unsqueeze(-1)).cumsum(1)
    scores = torch.einsum("bihk,bjhk->bhij", Q, K)
    if q.shape[1] == k.shape[1]:
        of_heads = so_far.transpose(1, 2)
        scores = scores * (-(of_heads.unsqueeze(-1) - of_heads.unsqueeze(-2)).abs()).exp()
    scores = scores.tril() if causal else scores
    out, total = torch.einsum("bhij,bjhv->bihv", scores, V), scores.sum(-1).transpose(1, 2)
    kept = so_far.exp().unsqueeze(-1)
    left = (so_far[:, -1:] - so_far).exp().unsqueeze(-1) if causal else 1.0
    keys_after, memory_after = (K * left).sum(1), torch.einsum("bjhk,bjhv->bhkv", K * left, V)
    if memory is not None:
        out = out + torch.einsum("bihk,bhkv->bihv", Q * kept, memory)
        memory_after = memory_after + memory * kept[:, -1].unsqueeze(-1)
    if keys is not None:
        total = total + torch.einsum("bihk,bhk->bih", Q * kept, keys)
        keys_after = keys_after + keys * kept[:, -1]
    out = out if eps is None else out / (total + eps).unsqueeze(-1)
    out = out if scale is None else out * scale.double().unsqueeze(-1)
    out = out if masks.query is None else out * masks.query[..., None, None]
    return out, keys_after, memory_after


def native(given: Given, masks: Masks, feature_map: int, eps: float | None, causal: bool) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, weight, scale, keys, memory = given
    return attend(
        "test", q, k, v, masks, feature_map=feature_map, log_decay=log_decay, weight=weight, scale=scale, eps=eps,
        causal=causal, keys=keys, memory=memory,
    )  # fmt: skip


def compare(
    arguments: Given, masks: Masks, feature_map: int, eps: float | None, causal: bool, tolerance: float
) -> None:
    """Outputs, states, and gradients of all that was given."""
    results = []
    for function in (truth, native):
        leaves = arguments.leaves()
        found = [x for x in function(leaves, masks, feature_map, eps, causal) if x is not None]
        if causal and eps is None and function is truth:
            del found[1]
        found = found if causal else found[:1]
        if not results:
            # Next to the size of each, lest the largest drown the others.
            upstream = [random(*x.shape, seed=3).double() / x.detach().abs().max() for x in found]
        loss = sum((x.double() * y).sum() for x, y in zip(found, upstream, strict=True))
        results.append([*found, *torch.autograd.grad(loss, leaves.tensors())])
    for want, got in zip(*results, strict=True):
        close(got, want, tolerance)


CASES = [
    (GIVEN, None, ""), (ELU, 1e-6, ""), (SIGMOID, 1e-6, "keys memory"), (RELU, None, "weight scale memory"),
    (ELU, 1e-3, "weight scale keys memory"), (ELU, 1e-6, "decay keys memory"), (SIGMOID, None, "decay-token memory"),
    (ELU, 1e-3, "decay-token weight scale keys memory"), (GIVEN, None, "decay weight scale"),
]  # fmt: skip
cases = pytest.mark.parametrize(("feature_map", "eps", "of"), CASES)
both_forms = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
NO_MASKS = Masks(None, None)


def without_state(of: str, causal: bool) -> str:
    return of if causal else of.replace("keys", "").replace("memory", "")


@both_forms
@pytest.mark.parametrize("channels", [(5, 7), (64, 64), (24, 16)])
@cases
def test_equals_its_truth(feature_map: int, eps: float | None, of: str, channels: Any, causal: bool) -> None:
    arguments = given(77, without_state(of, causal), channels=channels)
    compare(arguments, NO_MASKS, feature_map, eps, causal, 1e-5)


@both_forms
@cases
def test_padding_is_invisible(feature_map: int, eps: float | None, of: str, causal: bool) -> None:
    mask = torch.rand(2, 77, generator=torch.Generator().manual_seed(0)) < 0.6
    arguments = given(77, without_state(of, causal))
    compare(arguments, Masks(mask, mask), feature_map, eps, causal, 1e-5)
    spoilt = arguments._replace(v=arguments.v.masked_fill(~mask[..., None, None], torch.nan))
    (out, *_), (want, *_) = (native(x, Masks(mask, mask), feature_map, eps, causal) for x in (spoilt, arguments))
    assert torch.equal(out, want)


@pytest.mark.parametrize(("feature_map", "eps", "of"), [case for case in CASES if "decay" not in case[2]])
def test_queries_may_be_of_other_tokens(feature_map: int, eps: float | None, of: str) -> None:
    key = torch.rand(2, 77, generator=torch.Generator().manual_seed(0)) < 0.6
    query = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    arguments = given(40, without_state(of, False), sources=77)
    compare(arguments, NO_MASKS, feature_map, eps, False, 1e-5)
    compare(arguments, Masks(key, query), feature_map, eps, False, 1e-5)


@both_forms
@pytest.mark.parametrize("of", ["", "decay", "decay-token weight scale"])
def test_packed_sequences_are_those_one_by_one(of: str, causal: bool) -> None:
    bounds, arguments = [0, 5, 5, 70, 100], given(100, of, batch=1)
    parts = []
    for first, last in pairwise(bounds):
        part = Given(*(x if x is None or x.ndim == 1 else x[:, first:last] for x in arguments))
        if last > first:
            parts.append(truth(part, NO_MASKS, ELU, 1e-6, causal)[0])
    q, k, v, log_decay, weight, scale, _, _ = arguments
    out, _, _ = attend(
        "test", q, k, v, NO_MASKS, feature_map=ELU, log_decay=log_decay, weight=weight, scale=scale, eps=1e-6,
        causal=causal, cu_seqlens=torch.tensor(bounds),
    )  # fmt: skip
    close(out, torch.cat(parts, 1))


@both_forms
def test_gradients_of_decay_hold_over_many_chunks(causal: bool) -> None:
    """They are sums of differences that are taken anew at every 512th token."""
    compare(given(1100, "decay-token", batch=1), NO_MASKS, ELU, 1e-6, causal, 1e-5)


@both_forms
@pytest.mark.parametrize("log_decay", [-1e-6, -50.0, -1e4])
def test_decays_at_the_ends_of_their_range(log_decay: float, causal: bool) -> None:
    arguments = given(77)._replace(log_decay=torch.full((2, 77, HEADS), log_decay))
    arguments.log_decay[..., 0] = -0.1  # else nothing but rounding would be left of the gradient, which is 0
    compare(arguments, NO_MASKS, ELU, None, causal, 1e-5)


@both_forms
@pytest.mark.parametrize("of", ["", "weight scale decay"])
def test_bfloat16_is_summed_in_float32(of: str, causal: bool) -> None:
    rounded = given(77, of)
    rounded = rounded._replace(**{name: getattr(rounded, name).bfloat16() for name in "qkv"})
    want = truth(rounded, NO_MASKS, ELU, 1e-6, causal)[0]
    out, *_ = native(rounded, NO_MASKS, ELU, 1e-6, causal)
    assert out is not None
    assert out.dtype == torch.bfloat16
    close(out, want, 2**-8)


@pytest.mark.parametrize(("feature_map", "eps", "of"), CASES)
def test_token_by_token(feature_map: int, eps: float | None, of: str) -> None:
    arguments = given(9, of + " memory" + (" keys" if eps else ""), batch=3)
    q, k, v, log_decay, weight, scale, keys, memory = arguments
    want, keys_after, memory_after = truth(arguments, NO_MASKS, feature_map, eps, True)
    outs = []
    for t in range(9):
        at = {"weight": weight, "scale": scale, "log_decay": log_decay}
        at = {name: x if x is None or x.ndim == 1 else x[:, t] for name, x in at.items()}
        out, keys, memory = attend_step(
            q[:, t], k[:, t], v[:, t], feature_map=feature_map, eps=eps, keys=keys, memory=memory, **at
        )
        outs.append(out)
    close(torch.stack(outs, 1), want)
    close(memory, memory_after, 1e-6)
    assert (keys is None) == (eps is None)
    if eps is not None:
        close(keys, keys_after, 1e-6)


def test_a_step_has_gradients() -> None:
    q, k, v, log_decay, weight, scale, keys, memory = given(1, "decay-token weight scale keys memory").leaves()
    leaves, token = [q, k, v, log_decay, weight, scale, keys, memory], [x[:, 0] for x in (q, k, v)]
    numbers = {"log_decay": log_decay[:, 0], "weight": weight[:, 0], "scale": scale[:, 0]}
    out, *_ = attend_step(*token, feature_map=ELU, eps=1e-3, keys=keys, memory=memory, **numbers)
    want, *_ = truth(Given(q, k, v, log_decay, weight, scale, keys, memory), NO_MASKS, ELU, 1e-3, True)
    for got, expected in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (out, want)), strict=True):
        close(got, expected)


# ------------------------------------------------------------------------------------------------------- as operators

KINDS = {
    "plain": "",
    "masked": "weight scale keys memory",
    "packed": "",
    "decay": "decay",
    "token": "decay-token weight",
}


def operator_arguments(kind: str, causal: bool) -> tuple[list[Any], float | None]:
    q, k, v, *numbers, keys, memory = given(9, without_state(KINDS[kind], causal), channels=(3, 5))
    eps = 1e-3 if kind in ("masked", "packed", "token") else None
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.7 if kind == "masked" else None
    bounds = None
    if kind == "packed":
        q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
        bounds = torch.tensor([0, 3, 3, 18])
    state, masks = ([keys, memory], [mask]) if causal else ([], [mask, mask])
    return [q, k, v, *masks, bounds, *numbers, *state], eps


@both_forms
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("masked", "packed"))) for kind in KINDS]
)
def test_operators_are_as_pytorch_wants_them(kind: str, causal: bool) -> None:
    arguments, eps = operator_arguments(kind, causal)
    leaves = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in arguments]
    name = "attend_causal_native" if causal else "attend_native"
    operator, backward = getattr(OPERATORS, name), getattr(OPERATORS, f"{name}_backward")
    torch.library.opcheck(operator.default, (*leaves, ELU, eps))
    upstream = [random(*arguments[2].shape), *((None, None) if causal else ())]
    torch.library.opcheck(backward.default, (*arguments, *upstream, True, ELU, eps))


def test_the_step_is_as_pytorch_wants_it() -> None:
    q, k, v, log_decay, weight, scale, keys, memory = given(1, "decay weight scale keys memory")
    token = [q[:, 0], k[:, 0], v[:, 0], log_decay, weight[:, 0], scale[:, 0]]
    torch.library.opcheck(OPERATORS.attend_step_native.default, (*token, keys, memory, ELU, 1e-3))


@both_forms
def test_gradients_of_gradients_are_refused(causal: bool) -> None:
    arguments = given(9).leaves()
    out = native(arguments, NO_MASKS, ELU, 1e-6, causal)[0]
    assert out is not None
    with pytest.raises(RuntimeError, match="native kernels do not support second-order gradients: omit create_graph"):
        torch.autograd.grad(out.sum() + arguments.q.pow(3).sum(), arguments.tensors(), create_graph=True)


@both_forms
def test_compiles_whole_for_every_length(causal: bool) -> None:
    torch._dynamo.reset()
    graphs = Graphs()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend("test", q, k, v, NO_MASKS, feature_map=ELU, eps=1e-6, causal=causal)[0]
        return out.square()

    compiled = torch.compile(function, fullgraph=True, backend=graphs.backend, dynamic=True)
    for length in (40, 33):
        leaves = given(length).leaves().tensors()
        for got, want in zip(
            *(torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, function)), strict=True
        ):
            close(got, want, 1e-6)
    name = "flowformer.attend_causal_native" if causal else "flowformer.attend_native"
    assert graphs.operators() == [[f"{name}.default"], [f"{name}_backward.default"]]
    torch._dynamo.reset()
