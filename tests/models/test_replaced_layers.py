"""Models whose layers were replaced: quantized to int8, or wrapped in a layer without a weight of its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowformer import create_attention, create_model, list_attentions
from flowformer.mechanisms import find_attention


class Wrapped(nn.Module):
    """A layer of low rank beside another, as LoRA has it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        else:
            self.down, self.up = nn.Embedding(base.num_embeddings, 2), nn.Linear(2, base.embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def wrap(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, kinds):
            model.set_submodule(name, Wrapped(module))
    return model


def quantize(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this way of PyTorch's is deprecated, and still the one in use on CPUs
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).eval(), {nn.Linear}, dtype=torch.qint8)


each_change = pytest.mark.parametrize("change", [quantize, wrap])


@each_change
@pytest.mark.parametrize("name", [name for name in list_attentions() if find_attention(name).can("state", "smooth")])
def test_attention_decodes(name: str, change: Any) -> None:
    torch.manual_seed(0)
    attention = change(create_attention(name, 16, 2, causal=True, max_length=9).eval())
    x = torch.randn(2, 5, 16)
    assert not isinstance(attention.q_proj, nn.Linear)
    want, state, outs = attention(x), attention.init_state(2), []
    for token in x.unbind(1):
        out, state = attention.step(token, state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), want, rtol=0.05, atol=0.05)
    if change is wrap:
        attention(x, mask=torch.ones(2, 5, dtype=torch.bool)).sum().backward()


@each_change
@pytest.mark.parametrize("tied", [False, True])
def test_language_models_write(tied: bool, change: Any) -> None:
    torch.manual_seed(0)
    model = change(create_model("flowformer_gpt_nano", vocab_size=65, max_length=64, tied=tied).eval())
    assert not isinstance(model.decoder.blocks[0].attention.q_proj, nn.Linear)
    assert tied or not isinstance(model.head, nn.Linear)
    (row,) = model.generate([[1, 2]], max_new_tokens=3, temperature=0)
    tokens = row.unsqueeze(0)
    assert int(model(tokens)[0, 1].argmax()) == int(row[2])
    want = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[0, 1:])
    torch.testing.assert_close(model.loss(tokens), want, rtol=0.02, atol=0.02)
    assert model.init_state(3).length.shape == (3,)


def test_a_tied_embedding_may_be_wrapped() -> None:
    torch.manual_seed(0)
    model = wrap(create_model("flowformer_gpt_nano", vocab_size=65, max_length=64, tied=True).eval(), (nn.Embedding,))
    tokens = torch.tensor([[1, 2, 3]])
    whole = model.embed(torch.arange(65))
    torch.testing.assert_close(model(tokens), model.hidden(tokens) @ whole.T)
    model.loss(tokens).backward()
    assert model.embed.up.weight.grad.any()
    assert len(model.generate([[1, 2]], max_new_tokens=2)[0]) == 4


@each_change
def test_classifiers_of_series_and_images(change: Any) -> None:
    torch.manual_seed(0)
    series = create_model("flowformer_timeseries", in_chans=3, num_classes=4, max_length=9, dim=16, num_heads=2,
                          ffn_dim=16).eval()  # fmt: skip
    x = torch.randn(2, 7, 3)
    before = series(x)
    after = change(series)(x)
    assert after.shape == (2, 4)
    assert change is wrap or torch.allclose(after, before, atol=0.2)
    vision = create_model("flowformer_vision_small", num_classes=4, img_size=16, embed_dims=(8, 16), depths=(1, 1),
                          num_heads=2).eval()  # fmt: skip
    assert change(vision)(torch.randn(2, 3, 16, 16)).shape == (2, 4)
