"""FlowMultiheadAttention in the place of nn.MultiheadAttention: alone, and in PyTorch's transformers."""

import contextlib
import copy
import doctest
import importlib
import inspect
import io
from itertools import product

import pytest
import torch
from torch import nn

import flowformer
from flowformer import FlowAttention, FlowMultiheadAttention

BATCH, LENGTH, SOURCE, DIM, HEADS = 2, 7, 5, 16, 4


def enlarge(module: nn.Module) -> nn.Module:
    """Fresh queries and keys are so small that all attention is nearly the mean: make them matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1 if "proj" in name else 0.3))
    return module


def build(**options) -> FlowMultiheadAttention:
    module = FlowMultiheadAttention(DIM, HEADS, **{"batch_first": True, "dtype": torch.float64, **options})
    return enlarge(module)


def rand(*sizes: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def padding(length: int, *real: int) -> torch.Tensor:
    """PyTorch's: True = padding."""
    return torch.arange(length) >= torch.tensor(real).unsqueeze(1)


def causal_mask(length: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def attend(module: FlowAttention, x, context=None, real=None, real_context=None):
    """Call the library's own module, where True is a real token."""
    return module(x, context, mask=real, context_mask=real_context)


def own(module: FlowMultiheadAttention, causal: bool = False) -> FlowAttention:
    """The library's own module with the same weights."""
    attention = FlowAttention(DIM, HEADS, causal=causal, bias=module.in_proj_bias is not None).double()
    for name, part in zip(("q_proj", "k_proj", "v_proj"), module.in_proj_weight.chunk(3), strict=True):
        getattr(attention, name).weight = nn.Parameter(part.detach().clone())
    if module.in_proj_bias is not None:
        for name, part in zip(("q_proj", "k_proj", "v_proj"), module.in_proj_bias.chunk(3), strict=True):
            getattr(attention, name).bias = nn.Parameter(part.detach().clone())
    attention.out_proj.load_state_dict(module.out_proj.state_dict())
    return attention


class Reference(nn.Module):
    """The library's own modules behind the signature of PyTorch's, for batches that come first."""

    batch_first, num_heads, _qkv_same_embed_dim, in_proj_bias = True, HEADS, False, None

    def __init__(self, module: FlowMultiheadAttention) -> None:
        super().__init__()
        self.forms = nn.ModuleList([own(module), own(module, causal=True)])

    def forward(self, query, key, value, attn_mask, key_padding_mask, need_weights, is_causal):
        real = None if key_padding_mask is None else key_padding_mask == 0
        if query is key:
            return attend(self.forms[attn_mask is not None], query, real=real), None
        assert attn_mask is None
        return attend(self.forms[0], query, key, real_context=real), None


# ---------------------------------------------------------------------------------------------------------------- alone


def test_signatures_are_those_of_pytorch():
    for function in ("__init__", "forward"):
        ours = inspect.signature(getattr(FlowMultiheadAttention, function)).parameters
        theirs = inspect.signature(getattr(nn.MultiheadAttention, function)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert [ours[name].default for name in theirs] == [theirs[name].default for name in theirs]
        further = list(ours.values())[len(theirs) :]
        assert all(one.kind in (one.KEYWORD_ONLY, one.VAR_KEYWORD) for one in further)


@pytest.mark.parametrize("layout", ["batch_first", "length_first", "unbatched"])
@pytest.mark.parametrize("kind", ["self", "causal", "cross", "equal lengths"])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_librarys_own_attention(kind, layout, padded):
    ours = build(batch_first=layout == "batch_first")
    theirs = own(ours, causal=kind == "causal")
    x, real = rand(BATCH, LENGTH, DIM).requires_grad_(), ~padding(LENGTH, 4, LENGTH) if padded else None
    context = real_context = None
    if kind in ("cross", "equal lengths"):
        source = LENGTH if kind == "equal lengths" else SOURCE
        context = rand(BATCH, source, DIM, seed=2)
        real_context, real = (~padding(source, 3, source) if padded else None), None
    want = attend(theirs, x, context, real, real_context)

    def lay_out(y):
        return {"batch_first": y, "length_first": y.transpose(0, 1), "unbatched": y[0]}[layout]

    query = lay_out(x)
    key = query if context is None else lay_out(context)
    hidden = None if not padded else ~(real if context is None else real_context)
    hidden = hidden[0] if padded and layout == "unbatched" else hidden
    unknown = kind == "equal lengths" and padded  # padding of the queries
    with pytest.warns(UserWarning, match="of one length") if unknown else contextlib.nullcontext():
        got, weights = ours(query, key, key, hidden, need_weights=False, is_causal=kind == "causal")
    assert weights is None
    torch.testing.assert_close(got, lay_out(want))
    ones = torch.autograd.grad(got.square().sum(), [x, ours.in_proj_weight, ours.in_proj_bias, ours.out_proj.weight])
    parts = [getattr(theirs, name) for name in ("q_proj", "k_proj", "v_proj")]
    wanted = [x, *(part.weight for part in parts), *(part.bias for part in parts), theirs.out_proj.weight]
    others = torch.autograd.grad(lay_out(want).square().sum(), wanted)
    others = [others[0], torch.cat(others[1:4]), torch.cat(others[4:7]), others[7]]
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *product(("self", "causal", "cross"), ({}, {"bias": False}, {"preset": "lra"})),
        ("cross", {"kdim": 6, "vdim": 10}),
    ],
    ids=str,
)
def test_outputs_are_values_under_the_weights(kind, options):
    ours = build(**options)
    query = rand(BATCH, LENGTH, DIM)
    key = value = query
    if kind == "cross":
        key, value = rand(BATCH, SOURCE, ours.kdim, seed=2), rand(BATCH, SOURCE, ours.vdim, seed=3)
    hidden = padding(key.shape[1], key.shape[1], 3)
    arguments = {"key_padding_mask": hidden, "is_causal": kind == "causal"}
    out, weights = ours(query, key, value, average_attn_weights=False, **arguments)
    assert weights.shape == (BATCH, HEADS, LENGTH, key.shape[1])
    assert not weights.requires_grad
    weight = ours.v_proj_weight if ours.in_proj_weight is None else ours.in_proj_weight[-DIM:]
    v = nn.functional.linear(value, weight, None if ours.in_proj_bias is None else ours.in_proj_bias[-DIM:])
    v = v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    want = ours.out_proj((weights @ v).transpose(1, 2).flatten(2))
    if kind != "cross":
        want = want.masked_fill(hidden.unsqueeze(-1), 0)
    torch.testing.assert_close(out, want)
    assert not weights.transpose(1, 3)[hidden].any()
    if kind == "causal":
        assert not weights.triu(1).any()
    torch.testing.assert_close(ours(query, key, value, **arguments)[1], weights.mean(1))


@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
@pytest.mark.parametrize("junk", [1e3, torch.nan, torch.inf])
def test_padding_is_invisible(kind, junk):
    ours = build()
    query = rand(BATCH, LENGTH, DIM)
    key = rand(BATCH, LENGTH, DIM, seed=2) if kind == "cross" else query
    hidden, other = padding(LENGTH, LENGTH, 3), padding(LENGTH, 6, LENGTH)
    masks = {"key_padding_mask": hidden, "is_causal": kind == "causal"}
    if kind == "cross":
        masks["query_padding_mask"] = other
    want, _ = ours(query, key, key, **masks)
    dirty = key.masked_fill(hidden.unsqueeze(-1), junk)
    dirty_query = query.masked_fill(other.unsqueeze(-1), junk) if kind == "cross" else dirty
    got, _ = ours(dirty_query, dirty, dirty, **masks)
    assert torch.equal(got, want)
    assert not got[other if kind == "cross" else hidden].any()


def test_padded_queries_of_cross_attention_are_part_of_the_flow_unless_they_are_marked():
    ours = build()
    query, key = rand(1, LENGTH, DIM), rand(1, SOURCE, DIM, seed=2)
    want, _ = ours(query[:, :4], key, key)
    assert (ours(query, key, key)[0][:, :4] - want).abs().max() > 1e-3
    hidden = padding(LENGTH, 4)
    torch.testing.assert_close(ours(query, key, key, query_padding_mask=hidden)[0][:, :4], want)
    apart = build(competition=None, allocation=False)
    torch.testing.assert_close(apart(query, key, key)[0][:, :4], apart(query[:, :4], key, key)[0])


def test_positions_added_to_queries_and_keys_leave_it_self_attention():
    """As in DETR: values come without positions."""
    ours = build()
    x, places, hidden = rand(BATCH, LENGTH, DIM), rand(BATCH, LENGTH, DIM, seed=2), padding(LENGTH, LENGTH, 3)
    where = x + places
    got, _ = ours(where, where, x, hidden)
    short, _ = ours(where[1:, :3], where[1:, :3], x[1:, :3])
    torch.testing.assert_close(got[1:, :3], short)


@pytest.mark.parametrize("options", [{"preset": "lra"}, {"preset": "vision", "competition": None}], ids=str)
def test_options_are_those_of_flow_attention(options):
    ours, x = build(**options), rand(BATCH, LENGTH, DIM)
    theirs = FlowAttention(DIM, HEADS, **options).double()
    theirs.load_state_dict(own(ours).state_dict())
    got, _ = ours(x, x, x)
    torch.testing.assert_close(got, theirs(x))
    assert (got - build()(x, x, x)[0]).abs().max() > 1e-3


def test_dropout_is_that_of_outputs_in_training():
    ours = build(dropout=0.5)
    x = rand(BATCH, LENGTH, DIM)
    out, weights = ours(x, x, x)
    kept = out != 0
    assert 0.2 < kept.double().mean() < 0.8
    ours.eval()
    want, want_weights = ours(x, x, x)
    torch.testing.assert_close(out[kept], 2 * want[kept])
    torch.testing.assert_close(weights, want_weights)


def test_weights_of_pytorch_and_back():
    theirs = enlarge(nn.MultiheadAttention(DIM, HEADS, dropout=0.25, kdim=3, dtype=torch.float64)).eval()
    theirs.in_proj_bias.requires_grad_(False)
    ours = FlowMultiheadAttention.from_torch(theirs, preset="vision")
    assert not ours.training
    assert not ours.in_proj_bias.requires_grad
    assert (ours.dropout, ours.kdim, ours.batch_first) == (0.25, 3, False)
    query, key, value = rand(LENGTH, BATCH, DIM), rand(SOURCE, BATCH, 3), rand(SOURCE, BATCH, DIM)
    other = build(kdim=3, batch_first=False, preset="vision")
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(query, key, value)[0], other(query, key, value)[0])
    again = ours.to_torch()
    assert type(again) is nn.MultiheadAttention
    assert torch.equal(again(query, key, value)[0], theirs(query, key, value)[0])
    with torch.no_grad():
        ours.out_proj.bias.add_(1)
    assert torch.equal(again(query, key, value)[0], theirs(query, key, value)[0])
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.MultiheadAttention, got Linear"):
        FlowMultiheadAttention.from_torch(nn.Linear(2, 2))


def test_copies_and_files():
    ours, x = build(preset="vision"), rand(BATCH, LENGTH, DIM)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        for causal in (False, True):
            assert torch.equal(again(x, x, x, is_causal=causal)[0], ours(x, x, x, is_causal=causal)[0])
        assert not again._qkv_same_embed_dim


def test_devices_and_dtypes():
    ours = FlowMultiheadAttention(DIM, HEADS, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.bfloat16)}
    x = torch.randn(LENGTH, BATCH, DIM, dtype=torch.bfloat16)
    ours.to_empty(device="cpu").reset_parameters()
    out, weights = ours(x, x, x)
    assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16)


def test_autocast():
    ours = build(dtype=torch.float32)
    x = rand(BATCH, LENGTH, DIM).float()
    hidden = padding(LENGTH, LENGTH, 4)
    want, want_weights = ours(x, x, x, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        got, weights = ours(x, x, x, hidden)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True).eval()
        layer.self_attn = ours.eval()
        assert layer(x, src_key_padding_mask=hidden).isfinite().all()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05 * want.std().item())
    torch.testing.assert_close(weights.float(), want_weights, rtol=0.1, atol=0.05 * want_weights.std().item())


# ------------------------------------------------------------------------------------------- in PyTorch's transformers


LAYER = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}


def replace(model: nn.Module, reference: bool) -> nn.Module:
    """Every attention of a model by ours, or by the library's own modules behind PyTorch's signature."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            ours = FlowMultiheadAttention.from_torch(module)
            model.set_submodule(name, Reference(ours) if reference else ours)
    return model


def floats(hidden: torch.Tensor) -> torch.Tensor:
    """A mask of PyTorch in floating point, as it wants it beside a causal mask in floating point."""
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)


def hide(x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    return x if hidden is None else x.masked_fill(hidden.unsqueeze(-1), 0)


@pytest.mark.parametrize("mask", [None, "padding", "causal", "both"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(norm_first, mask):
    plain = enlarge(nn.TransformerEncoderLayer(DIM, HEADS, norm_first=norm_first, **LAYER))
    layer, reference = replace(plain, reference=False), replace(plain, reference=True)
    x = rand(BATCH, LENGTH, DIM)
    hidden = padding(LENGTH, LENGTH, 4) if mask in ("padding", "both") else None
    arguments = {
        "src_key_padding_mask": floats(hidden) if mask == "both" else hidden,
        "src_mask": causal_mask(LENGTH) if mask in ("causal", "both") else None,
    }
    want = reference(x, **arguments)
    torch.testing.assert_close(layer(x, **arguments), want)
    with torch.no_grad():  # where PyTorch would compute softmax attention by itself
        torch.testing.assert_close(layer.eval()(x, **arguments), want)
        softmax = plain.eval()(x, **arguments)
    assert (hide(softmax, hidden) - hide(want, hidden)).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("mask", [None, "padding", "left", "causal", "both"])
def test_encoder_with_nested_tensors_and_without(mask):
    """One built with PyTorch's attention uses nested tensors in evaluation; results must not tell."""
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, **LAYER), 3)
    encoder, reference = (replace(enlarge(plain), reference=flag) for flag in (False, True))
    seen = []
    encoder.layers[1].self_attn.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_nested))
    x = rand(BATCH, LENGTH, DIM)
    hidden = padding(LENGTH, LENGTH, 4) if mask in ("padding", "both") else None
    hidden = ~padding(LENGTH, 0, 2) if mask == "left" else hidden
    given = floats(hidden) if mask == "both" else hidden
    arguments = {"src_key_padding_mask": given, "mask": causal_mask(LENGTH) if mask in ("causal", "both") else None}
    want = hide(reference(x, **arguments), hidden)
    torch.testing.assert_close(hide(encoder(x, **arguments), hidden), want)
    with torch.no_grad():
        torch.testing.assert_close(hide(encoder.eval()(x, **arguments), hidden), want)
    assert seen == [False, mask == "padding"]


def test_encoder_that_is_built_with_it_says_that_it_uses_no_nested_tensors():
    layer = replace(nn.TransformerEncoderLayer(DIM, HEADS, **LAYER), reference=False)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        encoder = nn.TransformerEncoder(enlarge(layer), 2)
    assert not encoder.use_nested_tensor
    quiet = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, hidden = rand(BATCH, LENGTH, DIM), padding(LENGTH, LENGTH, 4)
    want = encoder(x, src_key_padding_mask=hidden)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=hidden), want)
        torch.testing.assert_close(quiet(x, src_key_padding_mask=hidden), want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    ours = build()
    x, y = rand(BATCH, LENGTH, DIM), rand(BATCH, SOURCE, DIM, seed=2)
    want = [ours(one, one, one)[0] for one in (x[0], x[1, :4])]
    nested = torch.nested.as_nested_tensor([x[0], x[1, :4]], layout=layout)
    out, weights = ours(nested, nested, nested)
    assert out.layout == layout
    assert weights.shape == (BATCH, LENGTH, LENGTH)
    for got, wanted in zip((nested + out).unbind(), want, strict=True):
        torch.testing.assert_close(got - (x[0] if len(got) == LENGTH else x[1, :4]), wanted)
    source = torch.nested.as_nested_tensor([y[0, :2], y[1]], layout=layout)
    want = [ours(*one)[0] for one in ((x[0], y[0, :2], y[0, :2]), (x[1, :4], y[1], y[1]))]
    for got, wanted in zip(ours(nested, source, source)[0].unbind(), want, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_decoder_layer(causal):
    plain = enlarge(nn.TransformerDecoderLayer(DIM, HEADS, **LAYER))
    layer, reference = replace(plain, reference=False), replace(plain, reference=True)
    x, memory = rand(BATCH, LENGTH, DIM), rand(BATCH, SOURCE, DIM, seed=2)
    arguments = {
        "tgt_mask": causal_mask(LENGTH) if causal else None,
        "tgt_key_padding_mask": floats(padding(LENGTH, LENGTH, 4)),
        "memory_key_padding_mask": floats(padding(SOURCE, 3, SOURCE)),
    }
    want = reference(x, memory, **arguments)
    torch.testing.assert_close(layer(x, memory, **arguments), want)
    arguments["tgt_is_causal"] = causal
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x, memory, **arguments), want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but .*batch_first was not True")
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first):
    plain = enlarge(nn.Transformer(DIM, HEADS, 2, 2, **{**LAYER, "batch_first": batch_first}))
    ours = replace(plain, reference=False)
    plain = nn.Transformer(DIM, HEADS, 2, 2, **LAYER)
    plain.load_state_dict(ours.state_dict())
    reference = replace(plain, reference=True)
    x, y = rand(BATCH, SOURCE, DIM), rand(BATCH, LENGTH, DIM, seed=2)
    hidden = padding(SOURCE, SOURCE, 3)
    masks = {
        "tgt_mask": causal_mask(LENGTH),
        "tgt_key_padding_mask": floats(padding(LENGTH, 5, LENGTH)),
        "memory_key_padding_mask": floats(hidden),
    }
    want = reference(x, y, src_key_padding_mask=hidden, **masks)

    def run():
        if batch_first:
            return ours(x, y, src_key_padding_mask=hidden, **masks)
        return ours(x.transpose(0, 1), y.transpose(0, 1), src_key_padding_mask=hidden, **masks).transpose(0, 1)

    got = run()
    torch.testing.assert_close(got, want)
    got.square().mean().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    with torch.no_grad():
        ours.eval()
        torch.testing.assert_close(run(), want)


@pytest.mark.parametrize("mask", [pytest.param(None, marks=pytest.mark.slow), "padding", "causal"])
def test_compiled_encoder_layer(mask):
    layer = replace(enlarge(nn.TransformerEncoderLayer(DIM, HEADS, **LAYER)), reference=False)
    x = rand(BATCH, LENGTH, DIM)
    arguments = {
        None: {},
        "padding": {"src_key_padding_mask": padding(LENGTH, LENGTH, 4)},
        "causal": {"src_mask": causal_mask(LENGTH), "is_causal": True},
    }[mask]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want, got = layer(x, **arguments), compiled(x, **arguments)
    torch.testing.assert_close(got, want)
    weight = layer.self_attn.in_proj_weight
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), weight)[0] for out in (got, want)))
    if mask == "padding":
        with pytest.raises(RuntimeError, match="key_padding_mask must contain only 0 and -inf"):
            compiled(x, src_key_padding_mask=padding(LENGTH, LENGTH, 4).double())


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"add_bias_kv": True}, ValueError, "add_bias_kv=True adds a key without a query"),
        ({"add_zero_attn": True}, ValueError, "add_zero_attn=True adds a key without a query"),
        ({"num_heads": 3}, ValueError, "num_heads must divide embed_dim, got embed_dim 16, num_heads 3"),
        ({"num_heads": 0}, ValueError, "num_heads must divide embed_dim"),
        ({"preset": "visoin"}, ValueError, "visoin"),
        ({"window": 3}, TypeError, "window"),
        ({"causal": True}, TypeError, "causal is not an option: pass is_causal=True"),
        ({"head_dim": 8}, ValueError, "does not have the four projections"),
        ({"dropout": 1.5}, ValueError, "dropout is a probability from 0 to 1, got 1.5"),
        ({"dropout": float("nan")}, ValueError, "dropout must be finite, got nan"),
        ({"kdim": 0}, ValueError, "kdim must be at least 1, got 0"),
        ({"vdim": -1}, ValueError, "vdim must be at least 1, got -1"),
        ({"dtype": torch.int64}, TypeError, "dtype must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"dtype": "float32"}, TypeError, "dtype must be float16, bfloat16, float32 or float64, got float32"),
    ],
    ids=str,
)
def test_options_that_cannot_be_honoured(options, error, message):
    with pytest.raises(error, match=message):
        FlowMultiheadAttention(DIM, **{"num_heads": HEADS, **options})


def refused(message, error=ValueError, **arguments):
    return pytest.param(arguments, error, message, id=message[:40])


X, Y = rand(BATCH, LENGTH, DIM), rand(BATCH, SOURCE, DIM, seed=2)
BIAS = torch.linspace(-1, 0, LENGTH**2, dtype=torch.float64).view(LENGTH, LENGTH)
NESTED = torch.nested.as_nested_tensor([X[0], X[1, :4]], layout=torch.jagged)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        refused("attn_mask must contain only 0 and -inf", attn_mask=BIAS),
        refused("attn_mask must be the causal mask", attn_mask=torch.ones(LENGTH, LENGTH).tril(-1).bool()),
        refused("attn_mask must be the causal mask", attn_mask=torch.eye(LENGTH).bool(), is_causal=True),
        refused("attn_mask must be the causal mask", attn_mask=torch.zeros(LENGTH, LENGTH), is_causal=True),
        refused(r"attn_mask must have shape \(7, 7\) or \(8, 7, 7\), got \(6, 6\)", attn_mask=causal_mask(LENGTH - 1)),
        refused("attn_mask must be boolean", TypeError, attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.int64)),
        refused("key_padding_mask must contain only 0 and -inf", key_padding_mask=torch.ones(BATCH, LENGTH)),
        refused("key_padding_mask must be boolean", TypeError, key_padding_mask=torch.ones(BATCH, LENGTH).int()),
        refused(r"must have shape \(2, 7\), got \(7, 2\)", key_padding_mask=padding(LENGTH, 3, 4).T),
        refused("query_padding_mask is for cross-attention", query_padding_mask=padding(LENGTH, 3, 4)),
        refused("causal attention requires as many queries as keys, got 7 and 5", key=Y, value=Y, is_causal=True),
        refused(
            "in causal attention with padding",
            key=X.clone(),
            value=X.clone(),
            is_causal=True,
            key_padding_mask=padding(LENGTH, 3, 4),
        ),
        refused(r"must have \(16, 16, 16\) channels", query=X[..., :8], key=X[..., :8], value=X[..., :8]),
        refused("key and value must agree in batch and length", key=X, value=Y),
        refused("query and key must agree in batch", query=X[:1], key=Y, value=Y),
        refused("query must be a tensor of floating-point numbers, got list", TypeError, query=[[1.0]]),
        refused("key must be a tensor of floating-point numbers, got NoneType", TypeError, key=None),
        refused("value must be a tensor of floating-point numbers, got ndarray", TypeError, value=X.numpy()),
        refused(r"query must be a tensor of floating-point numbers.*int64", TypeError, query=X.long()),
        refused(r"query must be a tensor of floating-point numbers.*complex64", TypeError, query=X.to(torch.complex64)),
        refused(r"key must be float64 like the weights, got .*float32", TypeError, key=X.float()),
        refused(r"value must be on cpu like the weights, got .*meta", value=X.to("meta")),
        refused("must have at least one token", query=X[:, :0], key=X[:, :0], value=X[:, :0]),
        refused("key_padding_mask must have shape", key_padding_mask=[[False] * LENGTH] * BATCH),
        refused("causal must be True or False, got 'yes'", TypeError, is_causal="yes"),
        refused("must all have 3 axes, or 2", query=X[0], key=X, value=X),
        refused("must all have 3 axes, or 2", query=X[None], key=X[None], value=X[None]),
        refused(
            "padding masks are not supported",
            query=NESTED,
            key=NESTED,
            value=NESTED,
            key_padding_mask=padding(LENGTH, 7, 4),
        ),
        refused("query, key and value must all be nested tensors", query=NESTED, key=X, value=X),
    ],
)
def test_calls_that_cannot_be_honoured(arguments, error, message):
    given = {"query": X, "key": X, "value": X, **arguments}
    with pytest.raises(error, match=message):
        build()(**given)


def test_nested_tensors_want_the_batch_first():
    with pytest.raises(ValueError, match="with batch_first=True"):
        build(batch_first=False)(NESTED, NESTED, NESTED)


def test_the_example_runs():
    outcome = doctest.testmod(importlib.import_module("flowformer.interop.torch"))
    assert outcome.attempted
    assert not outcome.failed


def test_the_name_is_public():
    assert "FlowMultiheadAttention" in flowformer.__all__
    assert flowformer.FlowMultiheadAttention.__module__ == "flowformer.interop.torch"


# -------------------------------------------------------------------------------- one tensor, or two of the same length


def test_the_same_view_written_twice_is_self_attention() -> None:
    module = FlowMultiheadAttention(16, 2, batch_first=True).eval()
    x, padding = torch.randn(2, 5, 16), torch.arange(5).expand(2, -1) > 2
    x = x.transpose(0, 1)
    want, _ = module(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), key_padding_mask=padding)
    one = x.transpose(0, 1)
    torch.testing.assert_close(want, module(one, one, one, key_padding_mask=padding)[0])
    assert not want[:, 3:].any()


def test_padding_of_queries_that_is_not_known_is_warned_of() -> None:
    module = FlowMultiheadAttention(16, 2, batch_first=True)
    x, padding = torch.randn(2, 5, 16), torch.arange(5).expand(2, -1) > 2
    with pytest.warns(UserWarning, match="of one length but not the same tensor"):
        module(x, x.clone(), x.clone(), key_padding_mask=padding)
    module(x, x.clone(), x.clone(), key_padding_mask=padding, query_padding_mask=padding)  # warnings are errors here
