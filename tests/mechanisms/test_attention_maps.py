"""Maps of modules and of whole models."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowformer
from flowformer.mechanisms import create_attention, find_attention, list_attentions
from flowformer.mechanisms.aft.modules import AFT
from flowformer.mechanisms.maps import attention_rows, flow_maps, has_flows, model_maps
from flowformer.mechanisms.yoso import YosoAttention
from flowformer.models.language import LanguageModel
from flowformer.models.timeseries import SeriesClassifier
from flowformer.models.vision import VisionModel

DIM, HEADS = 12, 3
# Options of modules, by mechanism; of AFT but its convolution, one channel in a head: each is weighed by itself.
OPTIONS: dict[str, list[dict[str, Any]]] = defaultdict(
    lambda: [{}],
    {
        "flow": [{}, {"preset": "lra"}, {"preset": "vision", "competition": None}, {"rescale": True, "head_dim": 5}],
        "mobile": [{}, {"normalize": True, "competition": "heads"}],
        "linear": [{"eps": 0.1}],
        "softmax": [{"bias": False}],
        "linformer": [{"rank": 5}, {"rank": 5, "share_heads": False, "share_values": True}],
        "nystromformer": [{"num_landmarks": 4, "value_conv": 3}],
        "synthesizer": [{}, {"kind": "dense", "dot_product": False}],
        "reformer": [{"chunk_length": 4, "num_hashes": 2, "num_buckets": 4}, {"form": "hf", "num_hashes": 2}],
        "routing": [{"window": 3, "num_clusters": 2}, {"window": 3, "num_clusters": 2, "shared_qk": True}],
        "sinkhorn": [{"bucket_length": 4}, {"bucket_length": 4, "num_top": 2}],
        "yoso": [{}, {"num_hashes": 20, "hash_code_len": 3}],
        "soft": [{"num_landmarks": 4, "value_conv": 3}],
        "local": [{"window": 3}, {"window": 3, "exact_window": True}],
        "sparse": [{"stride": 3}, {"stride": 4, "pattern": "fixed", "released": "lra"}],
        "longformer": [{"window": 4}],
        "bigbird": [{"block": 2}],
        "aft_full": [{}, {"position_dim": None}],
        "aft_local": [{"window": 3}, {"window": 3, "hard": True}],
        "aft_simple": [{}],
        "aft_conv": [{"kernel_size": 5}, {"kernel_size": 5, "hard": True}],
    },
)
WITH_ROWS = [name for name in list_attentions() if find_attention(name).rows]
MODULES = [
    pytest.param(name, options, causal, id=f"{name}-{number}-{'causal' if causal else 'bidirectional'}")
    for name in WITH_ROWS
    for number, options in enumerate(OPTIONS[name])
    for causal in ((False, True) if find_attention(name).can("causal") else (False,))
]


def build(name: str, options: dict[str, Any], causal: bool) -> Any:
    torch.manual_seed(0)
    heads = DIM if name.startswith("aft") and name != "aft_conv" else HEADS
    module = create_attention(name, DIM, heads, causal=causal, max_length=20, **options).double()
    for parameter in module.parameters():  # filters of AFT-conv begin as zeros
        nn.init.normal_(parameter, std=0.5)
    if hasattr(module, "null_value"):  # which no token has
        nn.init.zeros_(module.null_value)
    return module


def before_projection(module: Any, *inputs: Tensor, **arguments: Any) -> Tensor:
    """What the output projection sees, (batch, length, width)."""
    seen = []
    hook = module.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(*inputs, **arguments)
    hook.remove()
    return seen[0]


def add_up(module: Any, weights: Tensor, x: Tensor, source: Tensor, rows: list[int]) -> Tensor:
    values = module.v_proj(source).unflatten(-1, (weights.shape[1], -1))
    out = torch.einsum("bhrs,bshv->brhv", weights, values)
    if isinstance(module, YosoAttention):
        out = nn.functional.normalize(out, dim=-1)
    out = out.flatten(2)
    return module.q_proj(x[:, rows]).sigmoid() * out if isinstance(module, AFT) else out


@pytest.mark.parametrize(("name", "options", "causal"), MODULES)
def test_rows_times_values_are_what_the_output_projection_sees(name, options, causal) -> None:
    module = build(name, options, causal)
    x, rows = torch.randn(2, 14, DIM, dtype=torch.float64), [13, 0, 6]
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, :4] = mask[1, 10:] = False
    for masked in (None, mask):
        weights = attention_rows(module, x, rows, mask=masked)
        want = before_projection(module, x, mask=masked)[:, rows]
        torch.testing.assert_close(add_up(module, weights, x, x, rows), want, rtol=1e-10, atol=1e-10)
        assert not weights.requires_grad
    assert weights[0, :, 1].count_nonzero() == 0
    assert weights[0, :, :, :4].count_nonzero() == 0


@pytest.mark.parametrize("name", [name for name in WITH_ROWS if find_attention(name).can("cross")])
@pytest.mark.parametrize("sources", [9, 14])
def test_rows_of_cross_attention(name: str, sources: int) -> None:
    module = build(name, OPTIONS[name][0], False)
    x, context, rows = torch.randn(2, 14, DIM).double(), torch.randn(2, sources, DIM).double(), [0, 13]
    key, query = torch.ones(2, sources, dtype=torch.bool), torch.ones(2, 14, dtype=torch.bool)
    key[0, 5:], query[1, 0] = False, False
    for masks in ({}, {"context_mask": key}, {"context_mask": key, "mask": query}):
        weights = attention_rows(module, x, rows, context, **masks)
        assert weights.shape[2:] == (2, sources)
        want = before_projection(module, x, context, **masks)[:, rows]
        torch.testing.assert_close(add_up(module, weights, x, context, rows), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("hard", [False, True])
def test_rows_of_images(hard: bool) -> None:
    module = build("aft_conv", {"kernel_size": (3, 5), "hard": hard}, False)
    x, rows = torch.randn(2, 4, 5, DIM).double(), [0, 7, 19]
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[1, :, 3:] = False
    for masked in (None, mask):
        weights = attention_rows(module, x, rows, mask=masked)
        assert weights.shape == (2, HEADS, 3, 20)
        want = before_projection(module, x, mask=masked).flatten(1, 2)[:, rows]
        flat = x.flatten(1, 2)
        torch.testing.assert_close(add_up(module, weights, flat, flat, rows), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WITH_ROWS)
def test_a_packed_batch_is_its_sequences(name: str) -> None:
    module = build(name, OPTIONS[name][0], find_attention(name).can("causal"))
    one, other = torch.randn(1, 9, DIM).double(), torch.randn(1, 5, DIM).double()
    bounds = torch.tensor([0, 9, 14], dtype=torch.int32)
    packed = torch.cat([one, other], 1)
    weights = attention_rows(module, packed, [4, 7], cu_seqlens=bounds)
    assert weights.shape[2:] == (2, 9)
    torch.testing.assert_close(weights[:1], attention_rows(module, one, [4, 7]))
    torch.testing.assert_close(weights[1:, :, :1, :5], attention_rows(module, other, [4]))
    assert weights[1, :, 1].count_nonzero() == 0
    if has_flows(module):
        flows = flow_maps(module, packed, cu_seqlens=bounds)
        torch.testing.assert_close(flows.competition[1:, :, :5], flow_maps(module, other).competition)
    with pytest.raises(ValueError, match="not both"):
        attention_rows(module, packed, [4], cu_seqlens=bounds, mask=torch.ones(1, 14, dtype=torch.bool))


def test_flow_maps_of_modules() -> None:
    x, context = torch.randn(2, 14, DIM).double(), torch.randn(2, 7, DIM).double()
    module = build("flow", {"preset": "timeseries"}, False)
    flows = flow_maps(module, x, context)
    assert flows.incoming.shape == flows.allocation.shape == (2, HEADS, 14)
    assert flows.outgoing.shape == flows.competition.shape == (2, HEADS, 7)
    torch.testing.assert_close(
        flows.conserved_incoming.mean(-1), torch.full((2, HEADS), 0.5).double(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        flows.conserved_outgoing.mean(-1), torch.full((2, HEADS), 2.0).double(), rtol=1e-4, atol=0
    )
    assert not flow_maps(build("mobile", {}, True), x).allocation.requires_grad
    assert [name for name in list_attentions() if has_flows(build(name, OPTIONS[name][0], False))] == ["flow", "mobile"]


def test_bad_input_is_refused() -> None:
    x = torch.randn(1, 14, DIM).double()
    with pytest.raises(TypeError, match="FlowAttention and MobileAttention have flows, got SoftmaxAttention"):
        flow_maps(build("softmax", {}, False), x)
    with pytest.raises(TypeError, match="got Linear"):
        attention_rows(nn.Linear(2, 2), x, [0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="context is not supported"):
        attention_rows(build("mobile", {}, False), x, [0], x.clone())
    with pytest.raises(ValueError, match=r"x must be \(batch, length, 12\)"):
        attention_rows(build("flow", {}, False), x[0], [0])
    with pytest.raises(ValueError, match="from 0 to 13"):
        attention_rows(build("flow", {}, False), x, [14])
    with pytest.raises(ValueError, match="contains no attention module"):
        model_maps(nn.Linear(2, 2), x, rows=[0])


# -------------------------------------------------------------------------------------------------------------- models


def test_maps_of_a_classifier_of_series() -> None:
    model = SeriesClassifier(2, 3, 10, dim=8, num_heads=2, num_layers=2, ffn_dim=8).eval()
    x = torch.randn(2, 10, 2)
    mask = torch.arange(10) < torch.tensor([[8], [5]])
    found = model_maps(model, x, mask, rows=[2, 6], flows=True)
    assert list(found) == ["encoder.blocks.0.attention", "encoder.blocks.1.attention"]
    layer = found["encoder.blocks.1.attention"]
    assert layer.module is model.encoder.blocks[1].attention
    assert layer.rows == (2, 6)
    assert layer.weights.shape == (2, 2, 2, 8)  # padding that all share is not packed
    assert layer.weights[1, :, 0, 5:].count_nonzero() == layer.weights[1, :, 1].count_nonzero() == 0
    assert layer.flows is not None
    alone = model_maps(model, x[1:, :5], mask[1:, :5], rows=[2])["encoder.blocks.1.attention"]
    torch.testing.assert_close(layer.weights[1:, :, :1, :5], alone.weights, rtol=1e-4, atol=1e-6)
    assert alone.flows is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_maps_of_a_language_model() -> None:
    model = LanguageModel(20, dim=8, num_layers=2, num_heads=2, max_length=20, attention="softmax").eval()
    tokens = torch.randint(20, (1, 9))
    found = model_maps(model, tokens, rows=lambda name, length: [length - 1], flows=True)
    assert [layer.rows for layer in found.values()] == [(8,), (8,)]
    assert all(layer.flows is None for layer in found.values())
    total = torch.stack([layer.weights.sum(-1) for layer in found.values()])
    torch.testing.assert_close(total, torch.ones_like(total))
    with pytest.raises(ValueError, match="continues from a state"):
        model_maps(model, tokens, rows=[0], initial_state=model(tokens, return_state=True)[1])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("attention", ["flow", "aft_conv"])
def test_maps_of_a_model_of_images(attention: str) -> None:
    model = VisionModel(
        4, img_size=16, patch_size=2, embed_dims=(8, 16), depths=(1, 2), num_heads=2, attention=attention
    ).eval()  # fmt: skip
    asked = {}

    def centre(name: str, tokens: int) -> list[int]:
        asked[name] = tokens
        return [tokens // 2]

    found = model_maps(model, torch.randn(1, 3, 16, 16), rows=centre)
    assert list(asked.values()) == [64, 16, 16]
    assert [tuple(layer.weights.shape) for layer in found.values()] == [(1, 2, 1, n) for n in asked.values()]


def test_any_model_that_holds_a_module() -> None:
    model = nn.Sequential(nn.Linear(4, 8), flowformer.FlowAttention(8, 2), nn.Linear(8, 2))
    x = torch.randn(3, 6, 4)
    found = model_maps(model, x, rows=[1])
    assert torch.equal(found["1"].weights, attention_rows(model[1], model[0](x), [1]))
