"""Models whose attention has a short convolution, an output norm and an output gate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowformer.mechanisms import ModuleState
from flowformer.models.language import LanguageModel
from flowformer.models.timeseries import SeriesClassifier
from flowformer.models.vision import VisionModel

OPTIONS: dict[str, Any] = {"conv": 4, "output_norm": True, "output_gate": True}
VOCABULARY = 31
each = pytest.mark.parametrize("attention", ["flow", "softmax", "aft_simple"])


def build(attention: str) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(
        VOCABULARY, dim=16, num_layers=2, num_heads=2, max_length=40, attention=attention, attention_options=OPTIONS
    )
    for parameter in model.parameters():  # of a size to matter
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def draw(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@each
def test_rows_of_other_lengths_decode_as_alone(attention: str) -> None:
    model, tokens, after = build(attention), draw(3, 9), draw(3, 5)
    mask = torch.arange(9) >= torch.tensor([[0], [5], [8]])
    _, state = model(tokens, mask, return_state=True)
    assert all(isinstance(layer, ModuleState) for layer in state.layers)
    more = torch.tensor([[True, True], [False, True], [True, True]])
    second, state = model(after[:, :2], more, initial_state=state, return_state=True)
    logits, state = model.step(after[:, 2], state)
    for row in range(3):
        whole = torch.cat((tokens[row][mask[row]], after[row, :2][more[row]], after[row, 2:3]))
        alone = model(whole.unsqueeze(0)).squeeze(0)
        same(logits[row], alone[-1])
        same(second[row][more[row]], alone[mask[row].sum() : -1])


@each
def test_generates_what_it_reads(attention: str) -> None:
    model = build(attention)
    rows = model.generate([[1, 2, 3, 4, 5, 6], [7]], max_new_tokens=8, temperature=0)
    for row in rows:
        scores = model(row.unsqueeze(0))[0]
        assert torch.equal(scores[-9:-1].argmax(-1), row[-8:])


@pytest.mark.parametrize(("init", "deviation"), [("gpt", 0.02), ("fairseq", math.sqrt(2 / 128) / math.sqrt(2))])
def test_gates_begin_as_the_other_projections(init: str, deviation: float) -> None:
    torch.manual_seed(0)
    model = LanguageModel(50, dim=64, num_layers=2, num_heads=4, max_length=9, attention_options=OPTIONS, init=init)
    for block in model.decoder.layers:
        attention = block.attention
        assert attention.gate_proj.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert attention.q_proj.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert attention.q_conv.weight.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.15)
        assert (attention.out_norm.weight == 1).all()


@pytest.mark.parametrize("attention", ["flow", "mobile", "linear"])
def test_padding_is_nothing_to_a_classifier_of_series(attention: str) -> None:
    torch.manual_seed(0)
    model = SeriesClassifier(
        3, 4, 30, dim=16, num_heads=2, num_layers=2, ffn_dim=16, attention=attention, attention_options=OPTIONS
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    padded = torch.cat([x, torch.full((2, 9, 3), torch.nan, dtype=x.dtype)], 1)
    mask = torch.arange(29).expand(2, -1) < 20
    whole = torch.cat([padded[:, :20], x.new_zeros(2, 10, 3)], 1)
    same(model(padded, mask), model(whole, torch.arange(30).expand(2, -1) < 20))


@pytest.mark.parametrize("attention", ["flow", "aft_full"])
def test_image_models_take_them(attention: str) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "embed_dims": (16, 24), "depths": (1, 1), "num_heads": 2}
    model = VisionModel(5, **sizes, attention=attention, attention_options=OPTIONS)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "conv" in name)
    with pytest.raises(ValueError, match=r"AFTConv: conv=4 is along a sequence"):
        VisionModel(5, **sizes, attention="aft_conv", attention_options={"kernel_size": (3, 3), "conv": 4})
