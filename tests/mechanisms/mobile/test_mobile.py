"""What is specific to Mobile-Attention; what it shares with every mechanism is in laws.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from law_cases import reference
from safetensors.torch import load_file
from torch import Tensor

from flowformer import ops
from flowformer.mechanisms.mobile import operation as mobile

GOLDEN = Path(__file__).parents[2] / "golden"
GOLDEN_FILES = ("mobile", "mobile_single_token")

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "normalized": {"normalize": True},
    "no competition": {"competition": None},
    "no competition, normalized": {"competition": None, "normalize": True},
    "heads": {"competition": "heads"},
    "no allocation": {"allocation": False},
    "no clamp": {"clamp": None},
    "relu": {"feature_map": "relu", "eps": 1e-2},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def inputs(length: int, *, heads: int = 3, channels: int = 8) -> list[Tensor]:
    return [random(2, length, heads, channels, seed=i) for i in range(3)]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# -------------------------------------------------------------------------------------------- the published code


@pytest.mark.parametrize("op", [ops.mobile_attention, reference.mobile_attention], ids=["op", "reference"])
@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_equals_the_published_code(name: str, op: Any) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    leaves = [golden[part].requires_grad_() for part in "qkv"]
    out = op(*leaves)
    close(out, golden["out"])
    for part, grad in zip("qkv", torch.autograd.grad(out, leaves, golden["grad_out"]), strict=True):
        close(grad, golden[f"grad_{part}"])


def test_every_golden_file_is_tested_and_unchanged(shared: Path) -> None:
    published = {path.stem: path for path in (shared / "golden").glob("mobile*.safetensors")}
    assert published.keys() == set(GOLDEN_FILES)
    for name, path in published.items():
        assert path.read_bytes() == (GOLDEN / path.name).read_bytes(), name


def by_the_formulas(q: Tensor, k: Tensor, v: Tensor, e: float = 1e-6) -> Tensor:
    """The equations of the published form, one after the other: sums over heads are sums over axis 2."""
    Q, K, tokens = q.sigmoid(), k.sigmoid(), q.shape[1]
    I = torch.einsum("nlhd,nld->nlh", Q + e, K.sum(2) + e)
    O = torch.einsum("nlhd,nld->nlh", K + e, Q.sum(2) + e)
    I_conserved = torch.einsum("nlhd,nld->nlh", Q + e, (K / O[..., None]).sum(2) + e)
    O_conserved = torch.einsum("nlhd,nld->nlh", K + e, (Q / I[..., None]).sum(2) + e).clamp(-1, 1)
    C = tokens * O_conserved.softmax(1)
    attention = torch.einsum("nlh,nlhd,nshd->nhls", I_conserved.sigmoid() / I, Q, K)
    return torch.einsum("nhls,nsh,nshv->nlhv", attention, C, v)


@pytest.mark.parametrize("length", [1, 2, 50])
def test_equals_the_published_formulas(length: int) -> None:
    tensors = inputs(length)
    close(ops.mobile_attention(*tensors), by_the_formulas(*tensors))


# ---------------------------------------------------------------------------------------------- the causal form


@each_variant
def test_causal_outputs_are_those_of_the_sequence_cut_after_them(options: dict[str, Any]) -> None:
    tensors = inputs(70)
    out = ops.mobile_attention(*tensors, causal=True, **options)
    for t in (0, 1, 30, 31, 32, 63, 64, 69):
        prefix = ops.mobile_attention(*(x[:, : t + 1] for x in tensors), **options)
        close(out[:, t], prefix[:, t])


def test_causal_outputs_are_those_of_prefixes_with_padding_too() -> None:
    tensors = inputs(70)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    out = ops.mobile_attention(*tensors, causal=True, mask=mask)
    for t in range(5, 70, 7):
        prefix = ops.mobile_attention(*(x[:, : t + 1] for x in tensors), mask=mask[:, : t + 1])
        close(out[:, t], prefix[:, t])


@each_variant
def test_steps_and_the_sequence_have_the_same_state(options: dict[str, Any]) -> None:
    tensors = inputs(70)
    want, last = ops.mobile_attention(*tensors, causal=True, return_state=True, **options)
    state, outs = ops.init_mobile_state(2, 3, 8, 8, dtype=torch.float64), []
    for token in zip(*(x.unbind(1) for x in tensors), strict=True):
        out, state = ops.mobile_attention_step(*token, state, **options)
        outs.append(out)
    close(torch.stack(outs, 1), want)
    assert state.length.tolist() == last.length.tolist() == [70, 70]
    close(state.log_normaliser, last.log_normaliser)
    close(state.memory, last.memory)


# ------------------------------------------------------------------------------------------ conservation, gates


def conserved_outgoing(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    chosen = ops.mobile_options(clamp=None, **options)
    Q, K = (mobile.features(x, None, chosen.feature_map) for x in (q, k))
    return mobile.gates_and_logits(Q, K, None, chosen)[1]


@pytest.mark.parametrize("feature_map", ["sigmoid", "relu"])
def test_flow_is_conserved_among_the_heads_of_a_token(feature_map: str) -> None:
    q, k, _ = inputs(20, heads=6)
    flow = conserved_outgoing(3 * q, 3 * k, eps=0.0, feature_map=feature_map)
    assert flow.std() > 0.1
    close(flow.sum(-1), torch.full((2, 20), 6.0, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 100])
def test_equal_tokens_of_one_head_meet_the_known_gate(length: int, causal: bool) -> None:
    # One head takes in and gives out 1, so the gate is sigmoid(1); a sum over n equal tokens is n of them.
    q, k, v = (x.expand(-1, length, -1, -1) for x in inputs(1, heads=1))
    gated = v / (1 + math.exp(-1))
    close(ops.mobile_attention(q, k, v, causal=causal, eps=0.0, normalize=True), gated)
    tokens = torch.arange(1, length + 1).view(1, -1, 1, 1) if causal else length
    close(ops.mobile_attention(q, k, v, causal=causal, eps=0.0), tokens * gated)
    close(ops.mobile_attention(q, k, v, causal=causal, eps=0.0, allocation=False, normalize=True), v)


def test_competition_moves_weight_between_tokens_and_not_between_heads() -> None:
    q, k, v = inputs(40)
    ones = torch.ones_like(v)
    assert not torch.allclose(ops.mobile_attention(q, k, v), ops.mobile_attention(q, k, v, competition=None))
    alike = k[:, :1].expand_as(k), q[:, :1].expand_as(q)  # equal flows: nobody wins
    for causal in (False, True):
        close(
            ops.mobile_attention(alike[1], alike[0], ones, causal=causal),
            ops.mobile_attention(alike[1], alike[0], ones, causal=causal, competition=None),
        )


@pytest.mark.parametrize("causal", [False, True])
def test_heads_compete_with_heads_of_the_same_token(causal: bool) -> None:
    # One head has nobody to compete with; of several, the mean weight is 1.
    tensors = inputs(12, heads=1)
    close(
        ops.mobile_attention(*tensors, competition="heads", causal=causal),
        ops.mobile_attention(*tensors, competition=None, causal=causal),
    )
    q, k, v = inputs(1)
    weighed, plain = (ops.mobile_attention(q, k, v, competition=c, causal=causal) for c in ("heads", None))
    close((weighed / plain).mean(2), torch.ones(2, 1, 8, dtype=torch.float64))
    assert (weighed / plain).std() > 1e-3


# ---------------------------------------------------------------------------------------------- growth with tokens


def rms(tokens: int, **options: Any) -> float:
    q, k, v = (random(1, tokens, 8, 8, seed=i) for i in range(3))
    return ops.mobile_attention(q, k, v + 1, **options).square().mean().sqrt().item()


def test_published_outputs_grow_with_the_number_of_tokens() -> None:
    # Recorded from the published code: papers.md, 1.6.
    for tokens, published in ((49, 4.6), (196, 18), (784, 72), (3136, 288)):
        assert abs(rms(tokens) / published - 1) < 0.02


def test_normalized_outputs_do_not_grow() -> None:
    sizes = [rms(tokens, normalize=True) for tokens in (49, 196, 784, 3136)]
    assert max(sizes) / min(sizes) < 1.05


@pytest.mark.parametrize("causal", [False, True])
def test_normalize_divides_by_the_real_tokens(causal: bool) -> None:
    tensors = inputs(40)
    mask = torch.arange(40).expand(2, -1) < torch.tensor([[40], [10]])
    published, normalized = (
        ops.mobile_attention(*tensors, causal=causal, mask=mask, normalize=n) for n in (False, True)
    )
    count = mask.cumsum(1) if causal else mask.sum(1, keepdim=True)
    close(normalized, published / count[..., None, None])


# --------------------------------------------------------------------------------------------------- hard numbers


def one_head_takes_all(heads: int, length: int) -> list[Tensor]:
    """Tokens each of which sends nearly all of its flow, as much as there are heads, out of one head."""
    q, k, v = (random(1, length, heads, 4, seed=i) for i in range(3))
    k = k - 16
    for token in range(length):
        k[:, token, (7 * token) % heads] += 20
    return [q, k, v]


@pytest.mark.parametrize("heads", [128, 1024])
@pytest.mark.parametrize("causal", [False, True])
def test_many_heads_without_clamp(heads: int, causal: bool) -> None:
    exact = one_head_takes_all(heads, 150)
    flow = conserved_outgoing(*exact[:2])
    assert flow.max() > 0.9 * heads  # exp of which is no float32
    assert flow.min() < 0.1
    options: dict[str, Any] = {"clamp": None, "causal": causal, "normalize": True}
    leaves = [t.float().requires_grad_() for t in exact]
    out = ops.mobile_attention(*leaves, **options)
    for tensor in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert tensor.isfinite().all()
    # The flow itself is a float32 of size ``heads``, and exp makes of its rounding a relative error.
    truth = reference.mobile_attention(*(t.detach().double() for t in leaves), **options)
    assert (out.double() - truth).abs().max() <= 10 * heads * 2**-24 * truth.abs().max()
    # Nothing of a small flow is lost beside a large one that comes later.
    close(ops.mobile_attention(*exact, **options), reference.mobile_attention(*exact, **options))


def test_a_large_flow_does_not_drown_what_comes_before_it() -> None:
    # Head 0 has next to no flow in 40 tokens, and nearly all of it in the next: in one chunk.
    q, k, v = (random(1, 41, 128, 4, seed=i).float() for i in range(3))
    k[:, :40, 0] -= 16
    k[:, 40, 1:] -= 16
    out = ops.mobile_attention(q, k, v, clamp=None, causal=True)
    before = ops.mobile_attention(q[:, :40], k[:, :40], v[:, :40], clamp=None, causal=True)
    assert torch.equal(out[:, :40], before)
    assert out[:, :40, 0].abs().amin(-1).min() > 0
    state, token = ops.init_mobile_state(1, 128, 4, 4), None
    for t in range(41):
        token, state = ops.mobile_attention_step(q[:, t], k[:, t], v[:, t], state, clamp=None)
        assert token.isfinite().all()
    assert token is not None
    close(token, out[:, 40], 1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_invisible_without_eps_too(causal: bool) -> None:
    # The flow of padding is then 0, and is divided by.
    mask = torch.arange(40).expand(2, -1) < torch.tensor([[20], [0]])
    leaves = [t.requires_grad_() for t in inputs(40)]
    out = ops.mobile_attention(*leaves, causal=causal, mask=mask, eps=0.0)
    close(out[:1, :20], ops.mobile_attention(*(t[:1, :20] for t in leaves), causal=causal, eps=0.0))
    for tensor in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert tensor.isfinite().all()
        assert not tensor[0, 20:].any()
        assert not tensor[1].any()


def test_state_counts_real_tokens() -> None:
    mask = torch.arange(100).expand(2, -1) < torch.tensor([[30], [0]])
    _, state = ops.mobile_attention(*inputs(100), causal=True, mask=mask, return_state=True)
    assert state.length.tolist() == [30, 0]
    for part, fresh in zip(state, ops.init_mobile_state(2, 3, 8, 8), strict=True):
        assert torch.equal(part[1], fresh[1])


# ------------------------------------------------------------------------------------------ options, and bad ones


def test_defaults_are_what_was_published() -> None:
    published = ops.MobileOptions("sigmoid", 1.0, 1e-6, "sequence", True, False)
    assert ops.mobile_options() == ops.MobileOptions() == published
    assert ops.mobile_options(clamp=None) == ops.MobileOptions(clamp=None)


@pytest.mark.parametrize(
    ("overrides", "kind", "says"),
    [
        ({"clmap": 1.0}, TypeError, r"Mobile-Attention has no option 'clmap'; available: .*did you mean 'clamp'\?"),
        ({"rescale": True}, TypeError, "no option 'rescale'; available: feature_map, clamp, eps, .*normalize"),
        ({"preset": "core"}, TypeError, "no option 'preset'"),
        ({"feature_map": "elu"}, ValueError, "feature_map must be 'sigmoid' or 'relu', got 'elu'"),
        ({"competition": "tokens"}, ValueError, "competition must be .* got 'tokens'"),
        ({"clamp": 0.0}, ValueError, "clamp must be positive or None, got 0.0"),
        ({"clamp": math.nan}, ValueError, "clamp must be finite, got nan"),
        ({"eps": -1e-6}, ValueError, "eps must not be negative, got -1e-06"),
        ({"allocation": 1}, TypeError, "allocation must be True or False, got 1"),
        ({"normalize": "yes"}, TypeError, "normalize must be True or False, got 'yes'"),
    ],
)
def test_what_means_nothing_is_refused(overrides: dict[str, Any], kind: type[Exception], says: str) -> None:
    state, tensors = ops.init_mobile_state(2, 3, 8, 8, dtype=torch.float64), inputs(4)
    for refuse in (
        lambda: ops.mobile_options(**overrides),
        lambda: ops.mobile_attention(*tensors, **overrides),
        lambda: ops.mobile_attention_step(*(t[:, 0] for t in tensors), state, **overrides),
    ):
        with pytest.raises(kind, match=says):
            refuse()


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_self_attention(causal: bool) -> None:
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match=r"mobile_attention: .* the same length, got 5 and 6"):
        ops.mobile_attention(q[:, :5], k, v, causal=causal)
    mask = torch.ones(2, 6, dtype=torch.bool)
    says = "mobile_attention: this is self-attention, since .*: pass mask, not context_mask"
    with pytest.raises(ValueError, match=says):
        ops.mobile_attention(q, k, v, causal=causal, mask=mask, context_mask=mask)
