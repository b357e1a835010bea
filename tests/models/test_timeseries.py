"""The series classifier: the published numbers, and padding that does not matter."""

import pytest
import torch
from torch import nn

import flowformer
from flowformer.models.encoder import Encoder, EncoderBlock
from flowformer.models.timeseries import SeriesClassifier

SMALL = {"in_chans": 3, "num_classes": 4, "max_length": 20, "dim": 16, "num_heads": 2, "ffn_dim": 32}


def build(seed: int = 0, **options) -> SeriesClassifier:
    torch.manual_seed(seed)
    return flowformer.create_model("flowformer_timeseries", **{**SMALL, **options}).eval()


def batch(length: int = 20, lengths: tuple[int, ...] = (20, 7, 1)):
    torch.manual_seed(1)
    x = torch.randn(len(lengths), length, 3)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return x.masked_fill(~mask.unsqueeze(-1), 0), mask


def test_published_size():
    model = flowformer.create_model("flowformer_timeseries", in_chans=12, num_classes=9, max_length=26)
    # Counted from the published shapes: embedding, positions, two layers of 4 projections, 2 convolutions and 2 norms,
    # the final norm, and the classifier over 26 x 512 features.
    layer = 4 * (512 * 512 + 512) + (512 * 2048 + 2048) + (2048 * 512 + 512) + 4 * 512
    wanted = (12 * 512 + 512) + 26 * 512 + 2 * layer + 2 * 512 + (26 * 512 * 9 + 9)
    assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize("attention", flowformer.list_attentions())
def test_padding_is_invisible(attention):
    model = build(attention=attention)
    x, mask = batch()
    alone = torch.cat([model(x[i : i + 1, : int(n)]) for i, n in enumerate(mask.sum(-1))])
    noisy = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(model(noisy, mask), alone, rtol=1e-4, atol=1e-5)


def test_published_behaviour_lets_padding_take_part():
    model = build(mask_padding=False)
    x, mask = batch()
    short = model(x[1:2, :7], mask[1:2, :7])
    assert (model(x[1:2], mask[1:2]) - short).abs().max() > 1e-3


@pytest.mark.parametrize("attention", flowformer.list_attentions())
def test_trimmed_batch_equals_padded_batch(attention):
    model = build(attention=attention)
    x, mask = batch(lengths=(9, 7, 1))
    torch.testing.assert_close(model(x[:, :9], mask[:, :9]), model(x, mask), rtol=1e-4, atol=1e-5)


def test_packed_encoder_equals_masked_encoder(monkeypatch):
    model = build()
    x, mask = batch()
    packed = model(x, mask)
    gradients = torch.autograd.grad(packed.sum(), list(model.parameters()))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the path that traced graphs take
    masked = model(x, mask)
    torch.testing.assert_close(masked, packed, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(masked.sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_encoder_spends_nothing_on_padding():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, **where):
            seen.append(x.shape)
            return x

    encoder = Encoder([EncoderBlock(8, 2, 8)], 8)
    encoder.blocks = nn.ModuleList([Spy()])
    _, mask = batch()
    out = encoder(torch.randn(3, 20, 8), mask)
    assert seen == [(1, 28, 8)]
    assert (out[~mask] == 0).all()


def test_whole_batch_is_not_packed():
    x, mask = batch(lengths=(20, 20, 20))
    model = build()
    torch.testing.assert_close(model(x, mask), model(x), rtol=0, atol=0)


def test_gradients_reach_every_parameter():
    model = build().train()
    x, mask = batch()
    nn.functional.cross_entropy(model(x, mask), torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.slow  # test_waiting_models.py compiles it in training
def test_compiles_in_one_graph():
    model = build()
    x, mask = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), model(x, mask), rtol=1e-4, atol=1e-5)


def test_refuses_what_does_not_fit():
    model = build()
    with pytest.raises(ValueError, match=r"x has 21 steps, but this model supports at most max_length = 20"):
        model(torch.zeros(1, 21, 3))
    with pytest.raises(ValueError, match=r"x must be \(batch, length, 3\), got \(1, 5, 4\)"):
        model(torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match="mask must have shape"):
        model(torch.zeros(1, 5, 3), torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be positive"):
        build(num_classes=0)
    with pytest.raises(ValueError, match="did you mean 'flowformer_timeseries'"):
        flowformer.create_model("flowformer_timeserie")
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        build(attention="sofmax")
