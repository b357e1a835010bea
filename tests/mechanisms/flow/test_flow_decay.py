"""Flow-Attention with decay: the conservation identities, what it is without decay, and its module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowformer import FlowAttention, create_attention, ops
from flowformer.core.decay import default_log_decay
from flowformer.mechanisms import find_attention
from flowformer.mechanisms.decay import LogDecay
from flowformer.mechanisms.flow.weights import flows, weights

HEADS = 4


def tensors(length: int = 60, batch: int = 2, channels: int = 6) -> list[Tensor]:
    random = torch.Generator().manual_seed(length)
    return [torch.randn(batch, length, HEADS, channels, generator=random, dtype=torch.float64) for _ in range(3)]


def by_token(length: int = 60, batch: int = 2) -> Tensor:
    return -torch.rand(batch, length, HEADS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("feature_map", ["sigmoid", "elu", "softmax"])
def test_flows_are_conserved_with_any_decay(feature_map: str) -> None:
    q, k, _ = (t[0] for t in tensors())
    for log_decay in (default_log_decay(HEADS).double(), by_token()[0]):
        found = flows(q, k, log_decay, feature_map=feature_map, eps=0.0)
        for flow in (found.conserved_incoming, found.conserved_outgoing):
            torch.testing.assert_close(flow.mean(0), torch.ones(HEADS, dtype=torch.float64))


MAPS = {
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "relu": lambda x: x.clamp(min=0) + 1e-6,
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "softmax": lambda x: x.shape[-1] * torch.cat([s.exp() / s.exp().sum(-1, keepdim=True) for s in (x, -x)], -1),
}


def by_the_equations(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, ones: Tensor, feature_map: str) -> Tensor:
    """One sequence (heads, length, channels) with every gamma(i, j), (heads, L, L), and temperatures (3, heads)."""
    Q, K, e = MAPS[feature_map](q), MAPS[feature_map](k), 1e-6
    n = gamma.sum(-1)
    given = n if (gamma.triu(1) == 0).all() else torch.ones_like(n)
    incoming = ((Q + e) * (gamma @ K + e)).sum(-1)
    outgoing = ((K + e) * (gamma @ Q + e)).sum(-1)
    conserved_in = ((Q + e) * (gamma @ (K * (given / outgoing)[..., None]) + e)).sum(-1) / given
    conserved_out = ((K + e) * (gamma @ (Q * (given / incoming)[..., None]) + e)).sum(-1) / given
    competing, allocating, offset = ones[..., None]
    exponents = (competing * (conserved_out - 1)).clamp(-1, 1).exp()
    competition = n * exponents / (gamma @ exponents[..., None])[..., 0]
    allocation = 1 / (1 + (-allocating * (conserved_in - 1) - offset).exp())
    weights = gamma * (Q @ K.transpose(1, 2)) * competition[:, None] * (allocation / incoming)[..., None]
    return weights @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_operation_and_reference_are_the_equations(causal: bool, feature_map: str) -> None:
    temperatures = torch.tensor([[0.5, 1, 2, 3], [2, 1, 0.3, 1], [0, 1, -1, 2]], dtype=torch.float64)
    so_far = by_token().cumsum(1).transpose(1, 2)
    gamma = (-(so_far[..., None] - so_far[..., None, :]).abs()).exp()
    gamma = gamma.tril() if causal else gamma
    options: dict[str, Any] = {"temperature": True, "feature_map": feature_map, "causal": causal}
    want = [
        by_the_equations(*(t[row].transpose(0, 1) for t in tensors()), gamma[row], temperatures, feature_map)
        for row in range(2)
    ]
    for function in (ops.flow_attention, find_attention("flow").truth):
        got = function(*tensors(), by_token(), temperatures, **options)
        torch.testing.assert_close(got, torch.stack(want).transpose(1, 2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("competition", ["sequence", "heads", None])
def test_a_factor_of_one_is_no_decay(causal: bool, competition: str | None) -> None:
    given: dict[str, Any] = {"causal": causal, "competition": competition, "backend": "torch"}
    want = ops.flow_attention(*tensors(), **given)
    for zeros in (torch.zeros(HEADS), torch.zeros(2, 60, HEADS), torch.ones(HEADS)):
        got = ops.flow_attention(*tensors(), zeros.double(), **given)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(HEADS,), (2, 60, HEADS)])
def test_a_factor_of_one_can_be_learned_away(causal: bool, shape: tuple[int, ...]) -> None:
    given = [t.float() for t in tensors()]
    grads = []
    for backend in ("torch", "auto"):
        log_decay = torch.zeros(shape, requires_grad=True)
        ops.flow_attention(*given, log_decay, causal=causal, backend=backend).square().sum().backward()
        grads.append(log_decay.grad)
    assert grads[0] is not None
    assert grads[0].any()
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_decays_of_heads_are_those_of_all_their_tokens(causal: bool) -> None:
    log_decay = default_log_decay(HEADS).double()
    want = ops.flow_attention(*tensors(), log_decay, causal=causal, backend="torch")
    got = ops.flow_attention(*tensors(), log_decay.expand(2, 60, -1), causal=causal, backend="torch")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ops.flow_attention(*tensors(), causal=causal, decay="fixed"), want)


def test_rows_are_what_the_operation_weighs_values_with() -> None:
    q, k, v = tensors()
    for causal in (False, True):
        rows = weights(q[0], k[0], by_token()[0], causal=causal)(torch.arange(60))
        want = torch.einsum("hij,jhv->ihv", rows, v[0])
        torch.testing.assert_close(ops.flow_attention(q, k, v, by_token(), causal=causal, backend="torch")[0], want)


def test_forgetting_everything_leaves_a_token_to_itself() -> None:
    q, k, v = tensors()
    log_decay = torch.full((HEADS,), -1e4, dtype=torch.float64)
    gate = torch.ones((), dtype=torch.float64).sigmoid()
    for causal in (False, True):
        out = ops.flow_attention(q, k, v, log_decay, causal=causal, backend="torch", eps=0.0)
        torch.testing.assert_close(out, gate * v)


def test_cross_attention_has_no_distance() -> None:
    q, k, v = tensors()
    for given, says in (
        ((q[:, :5], k, v), "the same length, got 5 and 60"),
        ((q, k, v), "pass mask, not context_mask"),
    ):
        mask = torch.ones(2, 60, dtype=torch.bool) if given[0].shape == k.shape else None
        with pytest.raises(ValueError, match=f"weights decay with the distance of tokens: .*{says}"):
            ops.flow_attention(*given, decay="fixed", context_mask=mask)


def test_learned_tensors_and_options_go_together() -> None:
    q, k, v = tensors()
    for learned, options, says in (
        ((None,), {"decay": "learned"}, "log_decay must be a tensor with decay='learned', got None"),
        ((None, torch.ones(3, HEADS)), {}, "temperatures must be None without the option for it, got"),
        ((None, None), {"temperature": True}, r"temperatures must be a tensor \(3, 4\), got NoneType"),
        ((None, None, torch.ones(2, HEADS, 6, 6)), {}, "feature_weights must be None"),
        ((), {"feature_map": "learned"}, r"feature_weights must be a tensor \(2, 4, 6, 6\), got NoneType"),
    ):
        with pytest.raises(TypeError, match=says):
            ops.flow_attention(q, k, v, *learned, **options)


def test_temperatures_of_one_are_the_published_gates_but_for_the_clamp() -> None:
    ones = torch.ones(3, HEADS, dtype=torch.float64)
    for causal in (False, True):
        got = ops.flow_attention(*tensors(), None, ones, temperature=True, clamp=None, causal=causal)
        torch.testing.assert_close(got, ops.flow_attention(*tensors(), clamp=None, causal=causal))


def test_learned_features_start_as_softmax_features() -> None:
    eye = torch.eye(6, dtype=torch.float64).expand(2, HEADS, 6, 6)
    for causal in (False, True):
        got = ops.flow_attention(*tensors(), None, None, eye, feature_map="learned", causal=causal, backend="torch")
        torch.testing.assert_close(got, ops.flow_attention(*tensors(), feature_map="softmax", causal=causal))


@pytest.mark.parametrize("kind", ["fixed", "learned", "token"])
def test_a_module_starts_at_the_fixed_time_constants(kind: str) -> None:
    decay = LogDecay(kind, 12, HEADS)
    found = decay(torch.randn(2, 5, 12))
    assert found.shape == ((2, 5, HEADS) if kind == "token" else (HEADS,))
    torch.testing.assert_close(found, default_log_decay(HEADS).expand_as(found))
    with torch.no_grad():
        for parameter in decay.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert decay.reset_parameters() is None
    torch.testing.assert_close(decay(torch.randn(2, 5, 12)), default_log_decay(HEADS).expand_as(found))


@pytest.mark.parametrize("name", ["flow", "linear", "softmax"])
@pytest.mark.parametrize("kind", ["fixed", "learned", "token"])
def test_modules_decay(name: str, kind: str) -> None:
    with torch.device("meta"):
        create_attention(name, 16, HEADS, decay=kind)
    module = create_attention(name, 16, HEADS, causal=True, decay=kind)
    x = torch.randn(2, 30, 16)
    out, last = module(x, return_state=True)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    state = module.init_state(2)
    for t in range(30):
        got, state = module.step(x[:, t], state)
        torch.testing.assert_close(got, out[:, t], rtol=1e-4, atol=1e-5)
    for part, other in zip(state, last, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)
    again = create_attention(name, 16, HEADS, causal=True, decay=kind)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))
    with pytest.raises(ValueError, match="decay must be one of fixed, learned, token or None, got 'much'"):
        create_attention(name, 16, HEADS, decay="much")


def test_the_preset_is_more_than_options_of_the_operation() -> None:
    module = FlowAttention(16, HEADS, causal=True, preset="distance")
    assert (module.conv, module.output_norm, module.output_gate, module.options.decay) == (4, True, True, "token")
    plain = FlowAttention(16, HEADS, causal=True, preset="distance", conv=0, output_norm=False, output_gate=False)
    assert {name.partition(".")[0] for name, _ in plain.named_parameters()} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "log_decay"
    }  # fmt: skip
    assert not FlowAttention(16, HEADS).conv
