"""nn.MultiheadAttention replaced in models of torchvision, of PyTorch and of a user."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from flowformer import swap_attention
from flowformer.models.swap.multihead import DropInMultiheadAttention

TRANSFORMER = {"nhead": 4, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}


class Pooling(nn.Module):
    """A user's own model: one attention in two places, keys of another width, and a forward that is not PyTorch's."""

    class Counted(nn.MultiheadAttention):
        def forward(self, *inputs, **arguments):
            return super().forward(*inputs, **arguments)

    def __init__(self, **options):
        super().__init__()
        self.mix = self.again = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.pool = nn.MultiheadAttention(16, 2, kdim=8, batch_first=True, **options)
        self.own = self.Counted(16, 2, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x):
        for one in (self.mix, self.again, self.own):
            x = x + one(x, x, x, need_weights=False)[0]
        return self.pool(self.query.expand(len(x), -1, -1), x[..., :8], x)[0]


def larger(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3 if parameter.ndim == 1 else 1.0 / math.sqrt(parameter[0].numel()))
    return model.eval()


def torchvision_vit() -> nn.Module:
    options = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return larger(pytest.importorskip("torchvision").models.VisionTransformer(**options, num_classes=5))


def transformer() -> nn.Module:
    return larger(nn.Transformer(16, num_encoder_layers=2, num_decoder_layers=2, **TRANSFORMER))


def call(model: nn.Module) -> torch.Tensor:
    if isinstance(model, nn.Transformer):
        source, target = (
            torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length)) for length in (5, 7)
        )
        mask = nn.Transformer.generate_square_subsequent_mask(7)
        return model(source, target, tgt_mask=mask, tgt_is_causal=True)
    if isinstance(model, Pooling):
        return model(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2)))
    return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("build", [torchvision_vit, transformer, lambda: larger(Pooling())], ids=["vit", "nn", "own"])
def test_softmax_in_the_place_of_pytorchs_is_what_it_was(build):
    model = build()
    want, names = call(model), [name for name, _ in model.named_parameters()]
    report = swap_attention(model, "softmax")
    torch.testing.assert_close(call(model), want, rtol=1e-4, atol=1e-5)
    assert not report.dropped
    assert not report.new
    assert list(report.kept) == [name for name, _ in model.named_parameters()] == names
    assert sum(report.kept.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("build", [torchvision_vit, transformer, lambda: larger(Pooling())], ids=["vit", "nn", "own"])
def test_flow_in_the_place_of_pytorchs(build):
    model = build()
    before, parameters = call(model), dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "swap_attention: in flow attention the queries of decoder")
        report = swap_attention(model, "flow", preset="vision")
    assert all(isinstance(model.get_submodule(name), DropInMultiheadAttention) for name in report.modules)
    # The parameters are the same objects: an optimizer that has them goes on, and those that are shared stay so.
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert set(parameters) == set(report.kept)
    out = call(model.train())
    assert (out - before).abs().max() > 1e-2
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(call(model.eval()), out)
    assert "mechanism='flow', preset='vision'" in str(model)


def test_a_module_in_two_places_is_replaced_in_both():
    model = Pooling()
    report = swap_attention(model, "linear", num_heads=8)
    assert report.modules == ("mix", "pool")
    assert model.mix is model.again
    assert (model.mix.num_heads, model.pool.num_heads, model.pool.kdim) == (8, 8, 8)
    assert type(model.own) is Pooling.Counted  # it may compute something else
    with pytest.raises(ValueError, match="unless already replaced"):
        swap_attention(model, "flow")


def test_what_a_call_says_is_causal_is_causal():
    model = larger(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, **TRANSFORMER), 2))
    swap_attention(model, "flow")
    x, mask = torch.randn(2, 7, 16), nn.Transformer.generate_square_subsequent_mask(7)
    with torch.no_grad():
        for arguments in ({"mask": mask}, {"mask": mask, "is_causal": True}, {"is_causal": True}):
            torch.testing.assert_close(model(x, **arguments)[:, :4], model(x[:, :4], mask=mask[:4, :4]))
        assert (model(x)[:, :4] - model(x[:, :4])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("attention", "options", "meet"),
    [
        ("flow", {}, True),
        ("flow", {"competition": None}, True),
        ("flow", {"competition": None, "allocation": False}, False),
        ("linear", {}, False),
        ("softmax", {}, False),
        ("aft_full", {"max_length": 9}, False),
    ],
)
def test_a_causal_decoder_stays_causal_or_a_warning_says_that_it_does_not(attention, options, meet):
    model = larger(nn.TransformerDecoder(nn.TransformerDecoderLayer(16, **TRANSFORMER), 1)).double()
    if meet:
        with pytest.warns(
            UserWarning, match=r"queries of layers\.0\.multihead_attn compete .* modules='\*self_attn'"
        ) as caught:
            swap_attention(model, attention, **options)
        assert caught[0].filename == __file__
    else:
        swap_attention(model, attention, **options)
    x, memory = torch.randn(2, 7, 16).double(), torch.randn(2, 5, 16).double()
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    difference = model(x, memory, tgt_mask=mask)[:, :4] - model(x[:, :4], memory, tgt_mask=mask[:4, :4])
    assert bool(difference.abs().max() > 1e-6) is meet


def test_modules_are_chosen_by_name():
    model = transformer()
    report = swap_attention(model, "mobile", modules="decoder*self_attn", normalize=True)
    assert report.modules == ("decoder.layers.0.self_attn", "decoder.layers.1.self_attn")
    assert (
        type(model.encoder.layers[0].self_attn) is type(model.decoder.layers[0].multihead_attn) is nn.MultiheadAttention
    )
    assert call(model).shape == (2, 7, 16)
    with pytest.raises(ValueError, match=r"no supported attention with a name like 'head\*'"):
        swap_attention(model, "flow", modules="head*")


def test_what_pytorchs_attention_has_besides_is_dropped():
    model = Pooling(dropout=0.25, add_bias_kv=True, add_zero_attn=True)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"softmax does not support the keys that mix appends"):
        swap_attention(model, "softmax")
    report = swap_attention(model, "flow", bias=False, modules="[mp]*")
    gone = {"in_proj_bias": 48, "out_proj.bias": 16, "bias_k": 16, "bias_v": 16, "dropout": 0, "add_zero_attn": 0}
    assert dict(report.dropped) == {f"{name}.{what}": gone[what] for name in ("mix", "pool") for what in gone}
    assert model.mix.dropout == 0
    assert torch.equal(model.mix.in_proj_weight, before.mix.in_proj_weight)
    model = Pooling(bias=False, dropout=0.25)
    report = swap_attention(model, "flow", dropout=0.5)
    assert model.mix.in_proj_bias is None
    assert model.mix.dropout == 0.5


def test_position_biases_of_aft_are_new():
    model = larger(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, **TRANSFORMER), 1)).double()
    model.requires_grad_(False)
    report = swap_attention(model, "aft_full", max_length=9, position_dim=3)
    names = [f"layers.0.self_attn.attention.{name}_positions" for name in ("query", "key")]
    assert dict(report.new) == dict.fromkeys(names, 27)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    assert not model.layers[0].self_attn.training
    assert model(torch.randn(2, 9, 16).double()).shape == (2, 9, 16)


@pytest.mark.parametrize(
    ("build", "attention", "options", "message"),
    [
        (lambda: nn.MultiheadAttention(16, 4), "flow", {}, r"use FlowMultiheadAttention\.from_torch"),
        (transformer, "mobile", {}, r"decoder\.layers\.0\.multihead_attn is cross-attention; modules='\*self_attn'"),
        (transformer, "aft_conv", {}, "aft_conv attention does not have the four projections"),
        (transformer, "aft_full", {}, "max_length is required"),
        (
            transformer,
            "aft_full",
            {"img_size": 32},
            "img_size does not tell the tokens of encoder.*: give max_length",
        ),
        (transformer, "flow", {"num_heads": 3}, "num_heads must divide embed_dim"),
        (transformer, "flow", {"spatial_reduction": "keep"}, "this model has no spatial reduction"),
        (transformer, "flow", {"causal": True}, "attention is causal if a call requests it"),
    ],
)
def test_what_does_not_fit_is_said_and_changes_nothing(build, attention, options, message):
    model = build()
    before, parameters = list(model.modules()), list(model.parameters())
    with pytest.raises(ValueError, match=message):
        swap_attention(model, attention, **options)
    for now, then in ((model.modules(), before), (model.parameters(), parameters)):
        assert all(one is other for one, other in zip(now, then, strict=True))
