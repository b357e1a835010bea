"""What is specific to Flow-Attention; what it shares with every mechanism is in laws.py."""

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
from flowformer.mechanisms.flow import operation as flow_module

PUBLISHED = {name: options for name, options in ops.PRESETS.items() if name != "distance"}
GOLDEN = Path(__file__).parents[2] / "golden"

# What the README of the golden files says reproduces each: preset, causal.
GOLDEN_FILES = {
    "flow_self": ("core", False),
    "flow_cross": ("core", False),
    "flow_wide": ("core", False),
    "flow_timeseries": ("timeseries", False),
    "flow_lra": ("lra", False),
    "flow_lra_value_dim": ("lra", False),
    "flow_causal": ("core", True),
    "flow_causal_long": ("core", True),
    "flow_causal_large_logits": ("core", True),
    "flow_causal_nlp": ("wikitext", True),
    "flow_causal_rl": ("decision", True),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def inputs(length: int, sources: int | None = None, *, heads: int = 3, channels: int = 8) -> list[Tensor]:
    sources = length if sources is None else sources
    return [random(2, n, heads, channels, seed=i) for i, n in enumerate((length, sources, sources))]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# -------------------------------------------------------------------------------------------- the published code


@pytest.mark.parametrize("op", [ops.flow_attention, reference.flow_attention], ids=["op", "reference"])
@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_equals_the_published_code(name: str, op: Any) -> None:
    preset, causal = GOLDEN_FILES[name]
    golden = load_file(GOLDEN / f"{name}.safetensors")
    leaves = [golden[part].requires_grad_() for part in "qkv"]
    out = op(*leaves, preset=preset, causal=causal)
    close(out, golden["out"])
    for part, grad in zip("qkv", torch.autograd.grad(out, leaves, golden["grad_out"]), strict=True):
        close(grad, golden[f"grad_{part}"])


@pytest.mark.parametrize("name", [name for name, (_, causal) in GOLDEN_FILES.items() if causal])
def test_steps_equal_the_published_code(name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    batch, _, heads, channels = golden["q"].shape
    state = ops.init_flow_state(batch, heads, channels, golden["v"].shape[-1], dtype=torch.float64)
    outs = []
    for q, k, v in zip(*(golden[part].unbind(1) for part in "qkv"), strict=True):
        out, state = ops.flow_attention_step(q, k, v, state, preset=GOLDEN_FILES[name][0])
        outs.append(out)
    close(torch.stack(outs, 1), golden["out"])


def test_every_golden_file_is_tested_and_unchanged(shared: Path) -> None:
    published = {path.stem: path for path in (shared / "golden").glob("flow_*.safetensors")}
    assert published.keys() == GOLDEN_FILES.keys()
    for name, path in published.items():
        assert path.read_bytes() == (GOLDEN / path.name).read_bytes(), name


@pytest.mark.parametrize(("name", "preset"), [("flow_self", "vision"), ("flow_causal_nlp", "core")])
def test_presets_are_not_the_same(name: str, preset: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    out = ops.flow_attention(*(golden[part] for part in "qkv"), preset=preset, causal=GOLDEN_FILES[name][1])
    assert (out - golden["out"]).abs().max() > 1e-8


# ------------------------------------------------------------------------------------------- conservation of flow


def flows(monkeypatch: pytest.MonkeyPatch, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Conserved incoming and outgoing flow, as the operation itself computes them before it uses them."""
    seen = []
    times = flow_module._times

    def spy(*arguments: Any) -> Tensor:
        seen.append(times(*arguments))
        return seen[-1]

    monkeypatch.setattr(flow_module, "_times", spy)
    ops.flow_attention(q, k, v, **options)
    _, _, outgoing, incoming = seen  # incoming and outgoing flow come first
    return incoming, outgoing


@pytest.mark.parametrize("feature_map", ["sigmoid", "relu"])
@pytest.mark.parametrize(("length", "sources"), [(50, 50), (20, 80), (80, 20), (1, 7)])
def test_mean_conserved_flows(feature_map: str, length: int, sources: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"feature_map": feature_map, "eps": 0.0, "clamp": None}
    incoming, outgoing = flows(monkeypatch, *inputs(length, sources), **options)
    assert incoming.shape[-1] == length
    assert outgoing.shape[-1] == sources
    close(incoming.mean(-1), torch.full_like(incoming.mean(-1), sources / length))
    close(outgoing.mean(-1), torch.full_like(outgoing.mean(-1), length / sources))


def test_mean_conserved_flows_count_real_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sinks, sources = torch.arange(30).expand(2, -1) < 20, torch.arange(40).expand(2, -1) < 10
    incoming, outgoing = flows(monkeypatch, *inputs(30, 40), eps=0.0, mask=sinks, context_mask=sources)
    close(incoming[..., :20].mean(-1), torch.full((2, 3), 10 / 20, dtype=torch.float64))
    close(outgoing[..., :10].mean(-1), torch.full((2, 3), 20 / 10, dtype=torch.float64))


@pytest.mark.parametrize(("length", "sources"), [(50, 50), (20, 80), (80, 20)])
def test_constant_values_meet_the_gate_alone(length: int, sources: int) -> None:
    # Without competition, sources hand out all of what a sink takes: R = sigmoid(I^ L / S) v, up to eps.
    q, k, _ = inputs(length, sources)
    v = random(1, 1, 3, 8).expand(2, sources, -1, -1)
    out = ops.flow_attention(q, k, v, competition=None, allocation=False)
    close(out, v[:, :1].expand_as(out), 1e-5)
    same = q[:, :1].expand(-1, length, -1, -1)  # equal sinks share alike: each takes S / L, and the gate is sigmoid(1)
    out = ops.flow_attention(same, k, v, competition=None)
    close(out, torch.tensor(1.0).sigmoid() * v[:, :1].expand_as(out), 1e-5)


@pytest.mark.parametrize("length", [1, 5, 100])
def test_constant_tokens_meet_the_known_gate(length: int) -> None:
    q, k, v = (t.expand(-1, length, -1, -1) for t in inputs(1))
    gated = torch.tensor(1.0).sigmoid() * v
    for preset in ("core", "vision", "timeseries", "wikitext", "decision"):
        close(ops.flow_attention(q, k, v, preset=preset), gated, 1e-4)
        close(ops.flow_attention(q, k, v, preset=preset, causal=True), gated, 1e-4)
        close(ops.flow_attention(q, k, v, preset=preset, allocation=False), v, 1e-4)


def test_first_token_of_the_causal_form_is_gated_by_sigmoid_of_one() -> None:
    q, k, v = inputs(70)
    first = 1 / (1 + math.exp(-1)) * v[:, :1]
    close(ops.flow_attention(q, k, v, causal=True)[:, :1], first, 1e-5)
    close(ops.flow_attention(q, k, v, causal=True, eps=0.0)[:, :1], first, 1e-14)
    state = ops.init_flow_state(2, 3, 8, 8, dtype=torch.float64)
    out, _ = ops.flow_attention_step(q[:, 0], k[:, 0], v[:, 0], state, eps=0.0)
    close(out, first[:, 0], 1e-14)


def uniform(tensors: list[Tensor], **options: Any) -> bool:
    """Whether competition makes no difference."""
    out, without = (ops.flow_attention(*tensors, competition=c, **options) for c in ("sequence", None))
    return bool((out - without).abs().max() <= 1e-9 * without.abs().max())


def test_clamp_makes_competition_uniform_where_sinks_outnumber_sources() -> None:
    many_sinks = inputs(200, 20)
    assert uniform(many_sinks)  # as published: conserved outgoing flow is about L / S = 10, clipped to 1
    assert not uniform(many_sinks, rescale=True)
    assert not uniform(many_sinks, clamp=None)
    assert not uniform(inputs(20, 200))  # about 1 / 10, out of the clamp's reach
    assert not uniform(inputs(50, 50))


def test_rescale_makes_no_difference_where_lengths_are_equal() -> None:
    tensors = inputs(40)
    close(ops.flow_attention(*tensors, rescale=True), ops.flow_attention(*tensors))
    for options in ({}, {"clamp": None}):
        rescaled = ops.flow_attention(*inputs(40, 10), rescale=True, **options)
        assert not torch.allclose(rescaled, ops.flow_attention(*inputs(40, 10), **options))


def test_heads_compete_with_heads_of_the_same_token() -> None:
    # One head has nobody to compete with: every source weighs S, whatever its flow.
    q, k, v = inputs(12, 30, heads=1)
    out = ops.flow_attention(q, k, v, competition="heads")
    close(out, 30 * ops.flow_attention(q, k, v, competition=None))


# ------------------------------------------------------------------------------------------ presets and overrides


def test_presets_say_what_was_published() -> None:
    clamps = {name: options.clamp for name, options in PUBLISHED.items()}
    assert clamps == {"core": 1.0, "vision": 1.0, "timeseries": None, "lra": None, "wikitext": 5.0, "decision": 10.0}
    assert {name for name, options in PUBLISHED.items() if options.feature_map == "relu"} == {"lra"}
    assert {name for name, options in PUBLISHED.items() if options.competition == "heads"} == {"lra"}
    assert {name: options.flow_eps for name, options in PUBLISHED.items() if options.flow_eps} == {"vision": 1e-6}
    assert {options.eps for options in PUBLISHED.values()} == {1e-6}
    assert all(options.allocation and not options.rescale for options in PUBLISHED.values())


def test_overrides_depart_from_the_preset() -> None:
    assert ops.flow_options("core", clamp=5.0) == ops.PRESETS["wikitext"]
    assert ops.PRESETS["core"].clamp == 1.0
    tensors = inputs(9)
    close(ops.flow_attention(*tensors, clamp=None), ops.flow_attention(*tensors, preset="timeseries"), 0)


@pytest.mark.parametrize(
    ("preset", "overrides", "kind", "says"),
    [
        ("visoin", {}, ValueError, r"unknown preset 'visoin'; available: core, .*did you mean 'vision'\?"),
        (
            "zzz",
            {},
            ValueError,
            r"unknown preset 'zzz'; available: core, vision, timeseries, lra, wikitext, decision, distance$",
        ),
        ("core", {"clmap": 1.0}, TypeError, r"no option 'clmap'; available: .*did you mean 'clamp'\?"),
        ("core", {"feature_map": "tanh"}, ValueError, "feature_map must be one of sigmoid, .*, got 'tanh'"),
        ("core", {"competition": "tokens"}, ValueError, "competition must be .* got 'tokens'"),
        ("core", {"clamp": 0.0}, ValueError, "clamp must be positive or None, got 0.0"),
        ("core", {"clamp": math.nan}, ValueError, "clamp must be finite, got nan"),
        ("core", {"eps": -1e-6}, ValueError, "eps must not be negative, got -1e-06"),
        ("core", {"flow_eps": math.nan}, ValueError, "flow_eps must be finite, got nan"),
        ("core", {"allocation": 1}, TypeError, "allocation must be True or False, got 1"),
        ("core", {"rescale": "yes"}, TypeError, "rescale must be True or False, got 'yes'"),
    ],
)
def test_what_means_nothing_is_refused(
    preset: str, overrides: dict[str, Any], kind: type[Exception], says: str
) -> None:
    state = ops.init_flow_state(2, 3, 8, 8, dtype=torch.float64)
    tensors = inputs(4)
    token = [t[:, 0] for t in tensors]
    for refuse in (
        lambda: ops.flow_options(preset, **overrides),
        lambda: ops.flow_attention(*tensors, preset=preset, **overrides),
        lambda: ops.flow_attention_step(*token, state, preset=preset, **overrides),
    ):
        with pytest.raises(kind, match=says):
            refuse()


# ----------------------------------------------------------------------------------------------- hard numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rest", [1, 10, 100])
def test_conserved_flow_without_bound_overflows_nothing(rest: int, dtype: torch.dtype) -> None:
    # Tiny sources first leave large weights behind; then a huge one meets them: O^ is far beyond what exp can take.
    k = torch.cat([torch.full((1, rest, 2, 4), 1e-6), torch.full((1, rest, 2, 4), 1e4)], 1).to(dtype)
    q, v = random(1, 2 * rest, 2, 4).to(dtype), random(1, 2 * rest, 2, 4, seed=1).to(dtype)
    options: dict[str, Any] = {"preset": "timeseries", "feature_map": "relu", "causal": True}
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, state = ops.flow_attention(*leaves, return_state=True, **options)
    assert state.log_normaliser.max() > 800  # exp of which is no number
    for tensor in (out, *state, *torch.autograd.grad(out.sum(), leaves)):
        assert tensor.isfinite().all()
    close(out.double(), reference.flow_attention(q, k, v, **options), 1e-10 if dtype == torch.float64 else 1e-4)


def test_a_sink_without_a_source_is_zero_without_eps_too() -> None:
    none = torch.zeros(2, 6, dtype=torch.bool)
    for masks in (
        {"mask": none},
        {"context_mask": none, "mask": ~none},
        {"context_mask": ~none, "mask": none},
    ):
        leaves = [t.requires_grad_() for t in inputs(6)]
        out = ops.flow_attention(*leaves, eps=0.0, **masks)
        for tensor in (out, *torch.autograd.grad(out.sum(), leaves)):
            assert not tensor.any()


# -------------------------------------------------------------------------------------- states and derivatives


def test_step_equals_parallel() -> None:
    tensors = inputs(130)
    want, last = ops.flow_attention(*tensors, causal=True, return_state=True)
    state = ops.init_flow_state(2, 3, 8, 8, dtype=torch.float64)
    for t in range(130):
        before = [part.clone() for part in state]
        out, after = ops.flow_attention_step(*(x[:, t] for x in tensors), state)
        assert all(torch.equal(part, copy) for part, copy in zip(state, before, strict=True)), "mutated"
        close(out, want[:, t])
        state = after
    for part, other in zip(state, last, strict=True):
        close(part, other)
    assert state.tokens.tolist() == [[130] * state.tokens.shape[1]] * 2


def test_state_counts_real_tokens() -> None:
    mask = torch.arange(100).expand(2, -1) < torch.tensor([[30], [0]])
    _, state = ops.flow_attention(*inputs(100), causal=True, mask=mask, return_state=True)
    assert state.tokens[:, 0].tolist() == [30, 0]
    for part, fresh in zip(state, ops.init_flow_state(2, 3, 8, 8), strict=True):
        assert torch.equal(part[1], fresh[1])


def test_gradients_of_gradients_are_refused_where_they_would_be_wrong() -> None:
    leaves = [t.requires_grad_() for t in inputs(9)]
    out = ops.flow_attention(*leaves, causal=True)
    # With a term beside it whose second derivative exists, dropping the first's would go unnoticed.
    with pytest.raises(RuntimeError, match="second-order gradients: omit create_graph"):
        torch.autograd.grad(out.sum() + leaves[0].pow(3).sum(), leaves, create_graph=True)


def test_gradients_of_gradients_of_the_bidirectional_form() -> None:
    leaves = [t[:1, :, :1, :2].detach().requires_grad_() for t in inputs(3)]
    assert torch.autograd.gradgradcheck(ops.flow_attention, leaves)
