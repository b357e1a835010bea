"""The language model: no future, no padding, no difference between reading and decoding."""

import math

import pytest
import torch
from torch import nn

import flowformer
from flowformer.mechanisms import find_attention, list_attentions
from flowformer.models.language import LanguageModel, LanguageState
from flowformer.models.language_models import flowformer_gpt_nano
from flowformer.models.positions import SinusoidalPositions

CAUSAL = [name for name in list_attentions() if find_attention(name).can("causal")]
VOCABULARY, LENGTH = 31, 24
SMALL = {"dim": 16, "num_layers": 2, "num_heads": 2, "max_length": LENGTH}
OPTIONS = {
    "aft_local": {"window": 4, "position_dim": 3},
    "aft_full": {"position_dim": 3},
    "aft_conv": {"kernel_size": 3},
}


def build(attention: str = "flow", seed: int = 0, **options) -> LanguageModel:
    """A model in float64 whose parameters are all of a size to matter."""
    torch.manual_seed(seed)
    options = {**SMALL, "attention": attention, "attention_options": OPTIONS.get(attention), **options}
    model = LanguageModel(VOCABULARY, **options).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def draw(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(VOCABULARY, shape)


def padded(side: str, lengths: tuple[int, ...] = (9, 4, 1), length: int = 9):
    """Tokens with nonsense at padding, and what is real."""
    places = torch.arange(length)
    wanted = torch.tensor(lengths)[:, None]
    mask = places < wanted if side == "right" else places >= length - wanted
    return draw(len(lengths), length).masked_fill(~mask, -7), mask


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", CAUSAL)
def test_no_future(attention):
    model, tokens = build(attention), draw(2, LENGTH)
    changed = tokens.clone()
    changed[:, 11:] = (tokens[:, 11:] + 1) % VOCABULARY
    one, other = model(tokens), model(changed)
    assert torch.equal(one[:, :11], other[:, :11])
    assert (one[:, 11:] != other[:, 11:]).all()


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", None])
@pytest.mark.parametrize("attention", CAUSAL)
def test_prefill_and_steps_equal_the_parallel_form(attention, positions, norm_first):
    model, tokens = build(attention, positions=positions, norm_first=norm_first), draw(2, 12)
    wanted = model(tokens)
    state = model.init_state(2)
    for time in range(3):
        logits, state = model.step(tokens[:, time], state)
        same(logits, wanted[:, time])
    logits, state = model(tokens[:, 3:8], initial_state=state, return_state=True)
    same(logits, wanted[:, 3:8])
    assert state.length.tolist() == [8, 8]
    for time in range(8, 12):
        logits, state = model.step(tokens[:, time], state)
        same(logits, wanted[:, time])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", CAUSAL)
def test_padding_is_none(attention, side):
    model = build(attention)
    tokens, mask = padded(side)
    packed, masked = model(tokens, mask), model(tokens, mask, return_state=True)[0]
    for row, real, one, other in zip(tokens, mask, packed, masked, strict=True):
        alone = model(row[real].unsqueeze(0)).squeeze(0)
        same(one[real], alone)
        same(other[real], alone)
    assert (model.hidden(tokens, mask)[~mask] == 0).all()
    assert (model.hidden(tokens, mask, return_state=True)[0][~mask] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", CAUSAL)
def test_rows_of_other_lengths_decode_as_alone(attention, side):
    model, after = build(attention), draw(3, 5)
    tokens, mask = padded(side)
    _, state = model(tokens, mask, return_state=True)
    assert state.length.tolist() == [9, 4, 1]
    # A second padded piece, and then steps.
    more = torch.tensor([[True, True], [False, True], [True, True]])
    second, state = model(after[:, :2], more, initial_state=state, return_state=True)
    logits, state = model.step(after[:, 2], state)
    for row in range(3):
        start = tokens[row][mask[row]]
        whole = torch.cat((start, after[row, :2][more[row]], after[row, 2:3]))
        alone = model(whole.unsqueeze(0)).squeeze(0)
        same(logits[row], alone[-1])
        same(second[row][more[row]], alone[len(start) : -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", CAUSAL)
def test_low_precision_decodes_as_it_reads(attention, dtype):
    model, tokens = build(attention, positions="sinusoidal"), draw(2, 10)
    exact = model(tokens)
    model, autocast = model.to(dtype), build(attention, positions="sinusoidal").float()
    for one, enabled in ((model, False), (autocast, True)):
        with torch.autocast("cpu", dtype, enabled=enabled):
            whole = one(tokens)
            _, state = one(tokens[:, :6], return_state=True)
            for time in range(6, 10):
                logits, state = one.step(tokens[:, time], state)
        assert whole.dtype == logits.dtype == dtype
        scale = exact.std().item()
        assert (whole.double() - exact).abs().max() < 0.25 * scale
        assert (logits.double() - exact[:, -1]).abs().max() < 0.25 * scale


def test_a_state_is_not_changed():
    model, tokens = build(), draw(2, 4)
    _, state = model(tokens, return_state=True)
    kept = [part.clone() for layer in state.layers for part in layer]
    model.step(tokens[:, 0], state)
    model(tokens, initial_state=state)
    assert state.length.tolist() == [4, 4]
    assert all(torch.equal(a, b) for a, b in zip(kept, (p for layer in state.layers for p in layer), strict=True))


def test_learned_positions_end():
    model = build()
    tokens = draw(1, LENGTH + 1)
    message = f"position {LENGTH + 1} is too large: the learned positions of this model end at max_length = {LENGTH}"
    with pytest.raises(ValueError, match=message):
        model(tokens)
    _, state = model(tokens[:, :-1], return_state=True)
    with pytest.raises(ValueError, match=message):
        model.step(tokens[:, -1], state)
    with pytest.raises(ValueError, match=message):
        model(tokens[:, -1:], initial_state=state)
    # Padding is no token beyond the table.
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    same(model(tokens, mask)[:, 1:], model(tokens[:, 1:]))
    same(model(tokens[:, -1:], ~mask[:, -1:], initial_state=state, return_state=True)[1].length, state.length)


def test_sinusoidal_positions_have_no_end():
    model = build(positions="sinusoidal", max_length=None)
    tokens = draw(1, 300)
    whole = model(tokens)
    _, state = model(tokens[:, :-1], return_state=True)
    same(model.step(tokens[:, -1], state)[0], whole[:, -1])


def test_sinusoidal_positions_are_those_of_fairseq():
    dim, half = 7, 3
    places = torch.tensor([0, 1, 511, 1_000_000])
    frequencies = [math.exp(-math.log(10_000) * i / (half - 1)) for i in range(half)]
    wanted = [
        [f((place + 2) * w) for f in (math.sin, math.cos) for w in frequencies] + [0.0] for place in places.tolist()
    ]
    torch.testing.assert_close(SinusoidalPositions(dim)(places), torch.tensor(wanted), rtol=0, atol=1e-7)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_that_of_the_next_real_token(reduction, side):
    model = build()
    tokens, mask = (draw(3, 9), None) if side is None else padded(side)
    rows = [
        row if mask is None else row[real] for row, real in zip(tokens, tokens if mask is None else mask, strict=True)
    ]
    each = [
        nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none") for row in rows if len(row) > 1
    ]
    wanted = torch.cat(each)
    loss = model.loss(tokens, mask=mask, reduction=reduction)
    if reduction == "none":
        assert loss.shape == (3, 8)
        same(loss[loss != 0], wanted)
    else:
        same(loss, wanted.mean() if reduction == "mean" else wanted.sum())


def test_loss_of_given_targets():
    model, tokens, targets = build(), draw(2, 6), draw(2, 6).flip(0)
    targets[0, 2] = -100
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 4:] = False
    logits = model(tokens, mask)
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~mask, -100).flatten())
    same(model.loss(tokens, targets, mask), wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_has_the_gradients_of_the_plain_one(tied):
    model, tokens = build(tied=tied), draw(2, 8)
    wanted = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (model.loss(tokens), wanted))
    for one, other in zip(ours, theirs, strict=True):
        same(one, other)


@pytest.mark.parametrize("attention", CAUSAL)
def test_gradients_reach_every_parameter(attention):
    model = build(attention).train()
    model.loss(draw(2, LENGTH + 1)[:, :LENGTH]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # The biases of keys do not matter to softmax, nor to aft: a constant in every exponent.
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_learns():
    torch.manual_seed(0)
    model = LanguageModel(5, dim=16, num_layers=1, num_heads=2, max_length=20, dropout=0.0)
    tokens = torch.arange(20).remainder(5).repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = model.loss(tokens).item()
    assert first == pytest.approx(math.log(5), rel=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
    assert model.loss(tokens) < 0.1


# ------------------------------------------------------------------------------------------------------ published sizes


def parameters(name: str, **options) -> int:
    with torch.device("meta"):
        model = flowformer.create_model(name, **options)
    return sum(parameter.numel() for parameter in model.parameters())


def decoder_parameters(layers: int, dim: int, inside: int) -> int:
    """Four projections, two feed-forward layers, two norms; and the norm after the last."""
    return layers * (4 * (dim * dim + dim) + 2 * dim * inside + inside + dim + 4 * dim) + 2 * dim


# GPT-2's published sizes, its head being tied: 124M, 355M, 774M, 1,558M, to the parameter as transformers counts them.
GPT2 = {
    "flowformer_gpt2": 124_439_808,
    "flowformer_gpt2_medium": 354_823_168,
    "flowformer_gpt2_large": 774_030_080,
    "flowformer_gpt2_xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_sizes(name):
    assert parameters(name, tied=True) == GPT2[name]


@pytest.mark.parametrize(
    ("name", "layers", "dim"),
    [
        ("flowformer_gpt_nano", 3, 48),
        ("flowformer_gpt_micro", 4, 128),
        ("flowformer_gpt_mini", 6, 192),
        ("flowformer_gopher_44m", 8, 512),
    ],
)
def test_gpt_sizes(name, layers, dim):
    wanted = (2 * 65 + 64) * dim + decoder_parameters(layers, dim, 4 * dim)
    assert parameters(name, vocab_size=65, max_length=64) == wanted


def test_gopher_has_44_million():
    # Embeddings of GPT-2's vocabulary and the decoder, without the head, as the published code counts.
    count = parameters("flowformer_gopher_44m", vocab_size=50_257, max_length=1024, tied=True)
    assert count == pytest.approx(44e6 + 7e6, rel=0.02)


def test_wikitext_size():
    assert parameters("flowformer_wikitext") == 267_735 * 512 + decoder_parameters(6, 512, 2048)


@pytest.mark.parametrize(("name", "layers", "dim"), [("aft_enwik8_12", 12, 512), ("aft_enwik8_24", 24, 256)])
def test_enwik8_sizes(name, layers, dim):
    factors = 2 * 1024 * 256
    wanted = (2 * 256 + 1024) * dim + decoder_parameters(layers, dim, 4 * dim) + layers * factors
    assert parameters(name) == wanted
    assert parameters(name, attention="softmax", num_heads=8) == wanted - layers * factors


def test_published_attentions():
    with torch.device("meta"):
        wikitext = flowformer.create_model("flowformer_wikitext").decoder.layers[0]
        enwik8 = flowformer.create_model("aft_enwik8_24").decoder.layers[0]
        gpt = flowformer_gpt_nano(65, 64, attention_options={"clamp": 2.0}).decoder.layers[0]
    assert wikitext.attention.options == flowformer.ops.flow_options("wikitext")
    assert isinstance(wikitext.activation, nn.ReLU)
    assert (enwik8.attention.window, enwik8.attention.query_positions.shape) == (32, (1024, 256))
    assert gpt.attention.options == flowformer.ops.flow_options("core", clamp=2.0)
    assert gpt.activation.approximate == "tanh"


def test_fresh_gpt_parameters():
    torch.manual_seed(0)
    model = flowformer.create_model("flowformer_gpt_micro", vocab_size=65, max_length=64)
    block = model.decoder.layers[0]
    for weight in (model.embed.weight, model.position.weight, block.attention.out_proj.weight, block.linear1.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.linear2.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_fresh_fairseq_parameters():
    torch.manual_seed(0)
    model = flowformer.create_model("flowformer_wikitext", vocab_size=100, num_layers=1)
    attention = model.decoder.layers[0].attention
    assert model.scale == pytest.approx(math.sqrt(512))
    assert model.embed.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert attention.q_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 1024 / 2), rel=0.01)
    assert attention.out_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 1024), rel=0.01)
    assert (attention.out_proj.bias == 0).all()


def test_tied_weights_have_one_name():
    model = build(tied=True)
    assert model.scorer is model.embed.weight
    assert not any(name.startswith("head") for name in model.state_dict())


def test_refuses_what_does_not_fit():
    model, tokens = build(), draw(2, 4)
    state = model.init_state(3)
    cases = [
        (TypeError, "tokens must be integers, got", lambda: model(tokens.double())),
        (ValueError, r"tokens must be \(batch, length\) with at least one token", lambda: model(tokens[0])),
        (ValueError, r"tokens must be \(batch, length\) with at least one token", lambda: model(tokens[:, :0])),
        (ValueError, "tokens must be from 0 to 30, got 31", lambda: model(tokens + 31 - tokens[0, 0])),
        (TypeError, "mask must be a boolean tensor", lambda: model(tokens, tokens)),
        (ValueError, r"mask must have shape \(2, 4\)", lambda: model(tokens, torch.ones(2, 5, dtype=torch.bool))),
        (ValueError, r"step: tokens must be \(batch,\)", lambda: model.step(tokens, state)),
        (ValueError, "the state must have 2 layers and 2 rows", lambda: model.step(tokens[:, 0], state)),
        (TypeError, "the state must be a LanguageState, got tuple", lambda: model(tokens, initial_state=())),
        (ValueError, "have 2 layers", lambda: model(tokens, initial_state=LanguageState(torch.zeros(2), ()))),
        (ValueError, "without targets, each row must have at least two tokens", lambda: model.loss(tokens[:, :1])),
        (ValueError, "reduction must be", lambda: model.loss(tokens, reduction="max")),
        (ValueError, "requires max_length", lambda: build(max_length=None)),
        (ValueError, "positions must be", lambda: build(positions="rotary")),
        (ValueError, "activation must be one of", lambda: build(activation="swish")),
        (ValueError, "init must be", lambda: build(init="zeros")),
        (ValueError, "must be positive", lambda: build(num_layers=0)),
        (ValueError, "did you mean 'softmax'", lambda: build("sofmax")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_gradients_of_each_row_by_torch_func(positions):
    model, tokens = build(positions=positions), torch.arange(30).view(3, 10)
    parameters = {name: one.detach() for name, one in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],), {"targets": row[None]})

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    wanted = torch.func.grad(loss)(parameters, tokens[1])
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name][1], grad, rtol=1e-4, atol=1e-6)
