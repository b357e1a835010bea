"""A batch of no sequences, as the last part of a data set split over devices may be, through every model."""

from __future__ import annotations

import pytest
import torch

from flowformer import create_model, list_attentions
from flowformer.mechanisms import AFTConv, find_attention
from flowformer.models.swap.multihead import DropInMultiheadAttention

each = pytest.mark.parametrize("attention", list_attentions())
MASKS = (None, torch.ones(0, 9, dtype=torch.bool))


@each
def test_series(attention: str) -> None:
    model = create_model("flowformer_timeseries", in_chans=2, num_classes=3, max_length=9, dim=8, num_heads=2,
                         ffn_dim=8, attention=attention)  # fmt: skip
    for mask in MASKS:
        out = model(torch.randn(0, 9, 2), mask)
        assert out.shape == (0, 3)
        out.sum().backward()


@pytest.mark.parametrize("attention", [name for name in list_attentions() if find_attention(name).can("causal")])
def test_language(attention: str) -> None:
    model = create_model("flowformer_gpt_nano", vocab_size=11, max_length=9, dim=8, num_heads=2, num_layers=1,
                         attention=attention)  # fmt: skip
    tokens = torch.zeros(0, 9, dtype=torch.int64)
    for mask in MASKS:
        out = model(tokens, mask)
        assert out.shape == (0, 9, 11)
        out.sum().backward()
        loss = model.loss(tokens, mask=mask)
        loss.backward()
        assert loss.item() == 0
        out, state = model(tokens, mask, return_state=True)
        assert state.length.shape == (0,)
    out, state = model.step(tokens[:, 0], model.init_state(0))
    assert out.shape == (0, 11)


@each
def test_images(attention: str) -> None:
    model = create_model("flowformer_vision_small", num_classes=5, img_size=16, embed_dims=(8, 8), depths=(1, 1),
                         num_heads=2, attention=attention)  # fmt: skip
    out = model(torch.randn(0, 3, 16, 16))
    assert out.shape == (0, 5)
    out.sum().backward()
    assert [len(features) for features in model.features(torch.randn(0, 3, 16, 16))] == [0, 0]


def test_attention_over_images() -> None:
    attention = AFTConv(8, 2, kernel_size=(3, 3))
    for mask in (None, torch.ones(0, 4, 5, dtype=torch.bool)):
        out = attention(torch.randn(0, 4, 5, 8), mask=mask)
        assert out.shape == (0, 4, 5, 8)
        out.sum().backward()


@pytest.mark.parametrize(
    "attention", [name for name in list_attentions() if name not in ("aft_conv", "reformer", "soft")]
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_in_place_of_pytorchs_module(attention: str, batch_first: bool) -> None:
    lengths = {"max_length": 9} if find_attention(attention).module.learns_positions else {}
    module = DropInMultiheadAttention(8, 2, mechanism=attention, batch_first=batch_first, **lengths)
    x = torch.randn(*((0, 9, 8) if batch_first else (9, 0, 8)), requires_grad=True)
    for padding in (None, torch.zeros(0, 9, dtype=torch.bool)):
        out, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
        assert out.shape == x.shape
        out.sum().backward()
