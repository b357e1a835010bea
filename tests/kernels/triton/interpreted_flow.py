"""Flow-Attention by the Triton kernels against its float64 reference; run by test_triton.py beside it.

The interpreter takes seconds for what a GPU does in microseconds: of options that are independent of each other not
every combination is in the default suite, the others are slow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from law_cases import reference, variants_of
from torch import Tensor
from triton_comparison import FORMS, close, resumed, run
from triton_comparison import both as both_backends

from flowformer import ops
from flowformer.kernels.triton import launch, parts
from flowformer.mechanisms import find_attention

HEADS = 2
VARIANTS = {name: v for name, v in variants_of(find_attention("flow")).items() if name != "temperature"}
TEMPERATURES = torch.tensor([[0.5, -2.0], [2.0, 0.25], [0.0, 1.5]], dtype=torch.float64)
SLOW = pytest.mark.slow
# Decays of heads are those of tokens, spread over them: they are among the variants, channels and states below.
DECAYS = pytest.mark.parametrize("decay", [None, pytest.param("head", marks=SLOW), "token"])


def inputs(length: int, sources: int | None = None, *, decay: str | None = None, **sizes: int) -> list[Tensor]:
    """q, k, v, and log-decays where there are any, in float64 with the digits of float32."""
    batch, key, value = (sizes.get(name, default) for name, default in (("batch", 1), ("key", 4), ("value", 5)))
    random = torch.Generator().manual_seed(100 * length + key)
    shapes = (length, key), (sources or length, key), (sources or length, value)
    found = [torch.randn(batch, n, HEADS, c, generator=random) for n, c in shapes]
    if decay == "head":
        found.append(torch.tensor([-0.3, -0.02]))
    if decay == "token":
        found.append(-0.3 * torch.rand(batch, length, HEADS, generator=random))
        found[3][:, length // 3] = -30.0  # forgets
    return [t.double() for t in found]


def both(tensors: list[Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Compare with plain PyTorch in float64."""
    both_backends(ops.flow_attention, tensors, dtype, **options)


OF_TEMPERATURES = [
    {"clamp": None, "competition": "heads"}, {"competition": None}, {"allocation": False}, {"feature_map": "softmax"},
]  # fmt: skip


@FORMS
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[SLOW] * variant.same_loops) for name, variant in VARIANTS.items()]
)
def test_equals_the_reference(name: str, causal: bool) -> None:
    variant = VARIANTS[name]
    tensors = inputs(40, decay="token" if variant.by_token else "head" if variant.decays else None)
    want = run(reference.flow_attention, tensors, torch.float64, causal=causal, **variant.options)
    options = {"causal": causal, "backend": "triton", **variant.options}
    close(run(ops.flow_attention, tensors, torch.float32, **options), want, 1e-5)


def with_temperatures(q: Tensor, k: Tensor, v: Tensor, temperatures: Tensor, *log_decay: Tensor, **options: Any) -> Any:
    """Flow-Attention with the learned tensors in another order."""
    return ops.flow_attention(q, k, v, *(log_decay or (None,)), temperatures, temperature=True, **options)


@FORMS
@pytest.mark.parametrize("decay", [None, "token"])
@pytest.mark.parametrize("options", [{"clamp": 0.5}, *(pytest.param(o, marks=SLOW) for o in OF_TEMPERATURES)])
def test_learned_temperatures(options: dict[str, Any], decay: str | None, causal: bool) -> None:
    tensors = inputs(20, decay=decay, batch=2)
    tensors.insert(3, TEMPERATURES)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    both_backends(with_temperatures, tensors, causal=causal, mask=mask, **options)


OTHER_HALVES = [(None, False), ("head", False), ("head", True), ("token", True)]
OTHERS = {"rescale": True, "clamp": None, "flow_eps": 1e-6}


@pytest.mark.parametrize(
    ("length", "sources", "options"),
    [
        (37, 70, {}), (50, 1, {}), pytest.param(70, 37, OTHERS, marks=SLOW), pytest.param(1, 50, {}, marks=SLOW),
        *(pytest.param(37, 70, OTHERS, marks=SLOW), pytest.param(70, 37, {}, marks=SLOW)),
        *(pytest.param(1, 50, OTHERS, marks=SLOW), pytest.param(50, 1, OTHERS, marks=SLOW)),
    ],
)  # fmt: skip
def test_cross_attention(length: int, sources: int, options: dict[str, Any]) -> None:
    both(inputs(length, sources), **options)
    masks = torch.rand(2, length) < 0.7, torch.rand(2, sources) < 0.7
    both(inputs(length, sources, batch=2), mask=masks[0], context_mask=masks[1], **options)


@pytest.mark.parametrize(
    ("decay", "causal"),
    [(None, True), ("token", False), *(pytest.param(decay, causal, marks=SLOW) for decay, causal in OTHER_HALVES)],
)
def test_half_precision(decay: str | None, causal: bool) -> None:
    both(inputs(40, decay=decay), torch.float16, causal=causal)


@FORMS
@DECAYS
def test_padding_anywhere_and_what_is_in_it(decay: str | None, causal: bool) -> None:
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0, :3], mask[1, 30:] = False, False
    tensors = inputs(45, decay=decay, batch=2)
    both(tensors, mask=mask, causal=causal)
    none = torch.zeros(2, 45, dtype=torch.bool)
    assert not ops.flow_attention(*(t.float() for t in tensors), causal=causal, mask=none, backend="triton").any()


@FORMS
@pytest.mark.parametrize("decay", [pytest.param(None, marks=SLOW), "token"])
def test_packed_sequences(decay: str | None, causal: bool) -> None:
    bounds = torch.tensor([0, 3, 3, 36, 37], dtype=torch.int32)  # within a chunk, none, more than one, one
    both(inputs(37, decay=decay), cu_seqlens=bounds, causal=causal)


@FORMS
@DECAYS
def test_several_segments(decay: str | None, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SEGMENT", 32)
    both(inputs(80, decay=decay), causal=causal)


def test_in_parts_of_heads_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # With AVX-512, torch.sigmoid rounds a vector's lanes otherwise than what is left over: a part has whole vectors.
    length = 64
    tensors = inputs(length, decay="token")
    tensors.insert(3, TEMPERATURES)
    mask = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.7
    whole = run(with_temperatures, tensors, torch.float16, mask=mask, backend="triton")
    monkeypatch.setattr(parts, "SMALLEST", 1)
    assert len(parts.parts_of(tensors[0])) == HEADS
    cut = run(with_temperatures, tensors, torch.float16, mask=mask, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(cut, whole, strict=True))


RESUMED = [(None, {}), ("head", {"clamp": None}), ("token", {"competition": "heads"}), ("token", {"competition": None})]


@pytest.mark.parametrize(
    ("decay", "options"),
    [
        pytest.param(decay, options, marks=[SLOW] * ((decay, options) not in RESUMED))
        for decay in (None, "head", "token")
        for options in ({}, {"clamp": None}, {"competition": "heads"}, {"competition": None})
    ],
)
def test_resumes_from_a_state(decay: str | None, options: dict[str, Any]) -> None:
    resumed(ops.flow_attention, inputs(60, decay=decay), 33, **options)


@pytest.mark.parametrize(
    ("key", "value"), [(1, 1), *(pytest.param(*sizes, marks=SLOW) for sizes in ((80, 3), (3, 130), (130, 70)))]
)
def test_channels(key: int, value: int) -> None:
    for decay, causal in (("head", True), (None, False)):
        both(inputs(40, decay=decay, key=key, value=value), causal=causal)


@pytest.mark.parametrize("decay", [None, "token"])
def test_outputs_do_not_know_the_future(decay: str | None) -> None:
    tensors = [t.float() for t in inputs(70, decay=decay)]
    given = {"causal": True, "backend": "triton"}
    before = ops.flow_attention(*tensors, **given)
    for t in (0, 31, 64):  # the second is the last of its chunk, the third the first
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, t + 1 :] *= 100
        assert torch.equal(before[:, : t + 1], ops.flow_attention(*changed, **given)[:, : t + 1])


def step_by_step(tensors: list[Tensor], dtype: torch.dtype, backend: str, **options: Any) -> list[Tensor]:
    """Outputs of all tokens one by one, and the state after them."""
    leaves = [t.to(torch.float32 if t.ndim < 4 and dtype != torch.float64 else dtype) for t in tensors]
    batch, length, heads, key = leaves[0].shape
    given = {"feature_map": options["feature_map"]} if "feature_map" in options else {}
    state = ops.init_flow_state(
        batch, heads, key, leaves[2].shape[-1], preset=options.get("preset", "core"), **given
    )  # fmt: skip
    outs = []
    for t in range(length):
        token = [x if x.ndim == 1 else x[:, t] for x in leaves]
        learned = (*(token[3:] or (None,)), TEMPERATURES if "temperature" in options else None)
        out, state = ops.flow_attention_step(*token[:3], state, *learned, backend=backend, **options)
        outs.append(out)
    return [torch.stack(outs, 1), *state]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("options", "decay"),
    [
        *(({"preset": preset}, None) for preset in ("core", "wikitext", "decision")),
        ({"preset": "core", "feature_map": "elu"}, "head"), ({"preset": "core", "feature_map": "softmax"}, "token"),
        ({"preset": "core", "competition": "heads", "feature_map": "relu"}, "token"),
        ({"preset": "core", "competition": None, "allocation": False, "clamp": None}, "head"),
        ({"temperature": True, "clamp": 0.5}, None),
        pytest.param({"temperature": True, "competition": "heads"}, "token", marks=SLOW),
    ],
)  # fmt: skip
def test_a_state_advances_step_by_step(options: dict[str, Any], decay: str | None, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype).double() if t.ndim == 4 else t for t in inputs(6, decay=decay, batch=2, value=21)]
    want = step_by_step(tensors, torch.float64, "torch", **options)
    got = step_by_step(tensors, dtype, "triton", **options)
    close(got[:1], want[:1], {torch.float32: 1e-6, torch.float16: 1e-3}[dtype])
    close(got[1:], want[1:], {torch.float32: 1e-6, torch.float16: 1e-6}[dtype])


def test_a_step_has_gradients_and_compiles() -> None:
    tensors = [t.float() for t in inputs(9, decay="token")]
    _, state = ops.flow_attention(*tensors, causal=True, return_state=True, backend="torch")
    token = [t[:, 0] for t in tensors]

    def step(*token: Tensor) -> Tensor:
        return ops.flow_attention_step(*token[:3], state, token[3], backend="triton")[0]

    plain = [t.clone().requires_grad_() for t in token]
    want = ops.flow_attention_step(*plain[:3], state, plain[3], backend="torch")[0]
    leaves = [t.clone().requires_grad_() for t in token]
    out = step(*leaves)
    close([out.detach()], [want.detach().double()], 1e-5)
    pairs = zip(*(torch.autograd.grad(x.square().sum(), y) for x, y in ((out, leaves), (want, plain))), strict=True)
    for one, other in pairs:
        close([one], [other.double()], 1e-4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*token), step(*token))
    torch.library.opcheck(
        torch.ops.flowformer.flow_step_triton,
        (*token, None, *state, "sigmoid", 1.0, 1e-6, 0.0, "sequence", True, False),
    )


@FORMS
def test_log_decays_at_their_limits(causal: bool) -> None:
    tensors = inputs(40, decay="token")
    tensors[3][:, 20] = -torch.inf
    given = {"causal": causal, "backend": "triton"}
    want = ops.flow_attention(*tensors, causal=causal, backend="torch")
    close([ops.flow_attention(*(t.float() for t in tensors), **given)], [want], 1e-5)
    assert ops.flow_attention(*(t.float() for t in tensors[:3]), torch.full((2,), torch.nan), **given).isnan().all()


@FORMS
def test_any_layout_and_an_empty_batch(causal: bool) -> None:
    tensors = [t.float() for t in inputs(40)]
    given = {"causal": causal, "backend": "triton"}
    want = ops.flow_attention(*tensors, **given)
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    assert torch.equal(ops.flow_attention(*moved, **given), want)
    spread = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    assert torch.equal(ops.flow_attention(*spread, **given), want)
    assert ops.flow_attention(*(t[:0] for t in tensors), **given).shape == (0, 40, HEADS, 5)


@pytest.mark.parametrize("causal", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("decay", [pytest.param(None, marks=SLOW), "token"])
def test_compiles_into_one_graph(decay: str | None, causal: bool) -> None:
    tensors = inputs(40, decay=decay)

    def attend(*tensors: Tensor) -> Tensor:
        return ops.flow_attention(*tensors, causal=causal, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    want = run(attend, tensors, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, tensors, torch.float32), want, strict=True))


# Of opcheck, where it runs an operator compiled, and where PyTorch loads what that takes.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("causal", [pytest.param(False, marks=SLOW), True])
def test_operators(causal: bool) -> None:
    tensors = [t.float().requires_grad_() for t in inputs(20, decay="token")]
    temperatures = TEMPERATURES.float().requires_grad_()
    options = ("sigmoid", 1.0, 1e-6, 0.0, "sequence", True, False)
    if causal:
        _, state = ops.flow_attention(*tensors, causal=True, return_state=True, backend="torch")
        state = [part.detach() for part in state]
        given = (*tensors[:3], None, tensors[3], temperatures, *state, *options)
        torch.library.opcheck(torch.ops.flowformer.flow_causal_triton, given)
    else:
        torch.library.opcheck(
            torch.ops.flowformer.flow_bidirectional_triton,
            (*tensors[:3], None, None, tensors[3], temperatures, *options),
        )


def test_gradients_of_the_state_alone() -> None:
    grads = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs(20)]
        _, state = ops.flow_attention(*leaves, causal=True, return_state=True, backend=backend)
        grads.append(torch.autograd.grad(state.memory.square().sum() + state.sums.sum(), leaves))
    close(list(grads[1]), list(grads[0]), 1e-5)


def test_too_many_channels_are_refused() -> None:
    q = torch.randn(1, 5, 2, 257)
    with pytest.raises(ValueError, match="256 channels at most, got 257"):
        ops.flow_attention(q, q, q, backend="triton")


def test_second_gradients_are_refused() -> None:
    leaves = [t.float().requires_grad_() for t in inputs(20)]
    out = ops.flow_attention(*leaves, causal=True, backend="triton")
    with pytest.raises(RuntimeError, match="second-order gradients"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)


def test_it_says_that_it_interprets() -> None:
    q = torch.randn(1, 5, 2, 4)
    found = ops.explain(ops.flow_attention, q, q, q, backend="triton")
    assert found.backend == "triton"
    assert "interpreted on the CPU" in found.why
    assert ops.explain(ops.flow_attention, q, q, q).backend != "triton"
    with pytest.raises(ValueError, match="support float32 and float16, not bfloat16"):
        ops.flow_attention(*(q.bfloat16(),) * 3, backend="triton")
