"""How calls of nn.MultiheadAttention are translated, held to PyTorch itself: with softmax attention it is the same."""

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

import flowformer
from flowformer.mechanisms import find_attention
from flowformer.models.swap.multihead import DropInMultiheadAttention

BATCH, LENGTH, SOURCE, DIM, HEADS = 2, 7, 5, 16, 4
MECHANISMS = [
    name for name in flowformer.list_attentions() if name not in ("aft_conv", "reformer", "soft")
]  # four projections
FORMS = [(name, causal) for name in MECHANISMS for causal in (False, True)
         if not causal or find_attention(name).can("causal")]  # fmt: skip


def lengths(mechanism: str) -> dict[str, int]:
    """The longest sequence, where the mechanism's module takes it."""
    module = find_attention(mechanism).module
    return {"max_length": 12} if module.learns_positions or module.bounds_causal else {}


def build(mechanism: str = "softmax", **options) -> DropInMultiheadAttention:
    torch.manual_seed(0)
    options = {**lengths(mechanism), **options}
    module = DropInMultiheadAttention(DIM, HEADS, dtype=torch.float64, mechanism=mechanism, **options)
    return enlarge(module)


def enlarge(module):
    """Fresh biases are zero: make them matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def twins(**options) -> tuple[DropInMultiheadAttention, nn.MultiheadAttention]:
    """Ours with softmax attention, and PyTorch's, with the same weights."""
    ours, theirs = build(**options), nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def rand(*sizes: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def padding(length: int, *real: int) -> torch.Tensor:
    """PyTorch's: True = padding."""
    return torch.arange(length) >= torch.tensor(real).unsqueeze(1)


def causal_mask(length: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return hidden if dtype == torch.bool else torch.zeros(length, length, dtype=dtype).masked_fill(hidden, -torch.inf)


# ------------------------------------------------------------------------------------------------------ as PyTorch does


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("layout", ["batch_first", "length_first", "unbatched"])
@pytest.mark.parametrize("kind", ["self", "causal", "cross", "widths"])
def test_softmax_is_what_pytorch_computes(kind, layout, average):
    widths = {"kdim": 6, "vdim": 10} if kind == "widths" else {}
    ours, theirs = twins(batch_first=layout == "batch_first", **widths)
    query = rand(BATCH, LENGTH, DIM)
    key = value = query
    if kind == "cross":
        key = value = rand(BATCH, SOURCE, DIM, seed=2)
    elif kind == "widths":
        key, value = rand(BATCH, SOURCE, 6, seed=2), rand(BATCH, SOURCE, 10, seed=3)
    hidden = padding(key.shape[1], key.shape[1], 3)
    if layout == "length_first":
        same = key is query
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        key, value = (query, query) if same else (key, value)
    elif layout == "unbatched":
        same = key is query
        query, key, value, hidden = query[1], key[1], value[1], hidden[1]
        key, value = (query, query) if same else (key, value)
    query.requires_grad_()
    arguments = {"key_padding_mask": hidden, "average_attn_weights": average}
    if kind == "causal":
        arguments["attn_mask"] = causal_mask(LENGTH)
    got, got_weights = ours(query, key, value, **arguments)
    want, want_weights = theirs(query, key, value, **arguments)
    assert got.shape == want.shape
    assert got_weights.shape == want_weights.shape
    if key is query:  # PyTorch's outputs at padding depend on what stands there, ours are zeros
        real = ~(hidden.T if layout == "length_first" else hidden)
        assert not got[~real].any()
        assert not got_weights.masked_select(~(hidden[1] if hidden.ndim == 2 else hidden).view(-1, 1)).isnan().any()
        got, want = got[real], want[real]
        rows = (
            ~hidden if got_weights.ndim == hidden.ndim + 1 else (~hidden).unsqueeze(-2).expand(got_weights.shape[:-1])
        )
        got_weights, want_weights = got_weights[rows], want_weights[rows]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_weights, want_weights)
    gradients = [
        torch.autograd.grad(out.square().sum(), (query, *m.parameters())) for out, m in ((got, ours), (want, theirs))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mask", ["bool", "float", "heads", "hint"])
def test_forms_of_the_causal_mask(mask):
    ours, theirs = twins(batch_first=True)
    x = rand(BATCH, LENGTH, DIM)
    want, _ = theirs(x, x, x, attn_mask=causal_mask(LENGTH))
    given = {
        "bool": {"attn_mask": causal_mask(LENGTH)},
        "float": {"attn_mask": causal_mask(LENGTH, torch.float64)},
        "heads": {"attn_mask": causal_mask(LENGTH).expand(BATCH * HEADS, -1, -1), "is_causal": True},
        "hint": {"is_causal": True},
    }[mask]
    got, _ = ours(x, x, x, **given)
    torch.testing.assert_close(got, want)
    assert (got - ours(x, x, x)[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_that_hides_nothing_is_none(dtype):
    ours = build("flow", batch_first=True)
    x = rand(BATCH, LENGTH, DIM)
    assert torch.equal(ours(x, x, x, attn_mask=torch.zeros(LENGTH, LENGTH, dtype=dtype))[0], ours(x, x, x)[0])


def test_float_padding_is_that_of_booleans():
    ours = build("flow", batch_first=True)
    x, hidden = rand(BATCH, LENGTH, DIM), padding(LENGTH, LENGTH, 4)
    floats = torch.zeros(BATCH, LENGTH, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    want, _ = ours(x, x, x, hidden)
    assert torch.equal(ours(x, x, x, floats)[0], want)
    assert (want[1, :4] - ours(x, x, x)[0][1, :4]).abs().max() > 1e-3


def test_fresh_weights_are_those_of_pytorch():
    for options in ({}, {"bias": False}, {"kdim": 3, "vdim": 5}, {"dtype": torch.bfloat16}):
        torch.manual_seed(5)
        ours = DropInMultiheadAttention(DIM, HEADS, mechanism="flow", **options)
        torch.manual_seed(5)
        theirs = nn.MultiheadAttention(DIM, HEADS, **options).state_dict()
        assert list(ours.state_dict()) == list(theirs)
        assert all(torch.equal(ours.state_dict()[name], theirs[name]) for name in theirs)
        torch.manual_seed(5)
        ours.reset_parameters()
        assert all(torch.equal(ours.state_dict()[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3}, {"vdim": 5}], ids=str)
def test_state_dicts_load_both_ways(options):
    ours, theirs = build("flow", **options), nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    again = build("flow", **options)
    enlarge(again).load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------ every mechanism


@pytest.mark.parametrize(("mechanism", "causal"), FORMS)
def test_every_mechanism_is_what_its_own_module_computes(mechanism, causal):
    ours = build(mechanism, batch_first=True)
    own = find_attention(mechanism).module(DIM, HEADS, causal=causal, **lengths(mechanism)).double()
    weights = dict(zip(("q_proj.weight", "k_proj.weight", "v_proj.weight"), ours.in_proj_weight.chunk(3), strict=True))
    weights |= dict(zip(("q_proj.bias", "k_proj.bias", "v_proj.bias"), ours.in_proj_bias.chunk(3), strict=True))
    weights |= {f"out_proj.{name}": parameter for name, parameter in ours.out_proj.named_parameters()}
    # Learned keys of a causal form: ours is called with both forms, and has zeros there.
    weights |= {name: torch.zeros_like(null) for name, null in own.named_parameters() if name.startswith("null_")}
    weights |= {n.removeprefix("attention."): p for n, p in ours.state_dict().items() if n.startswith("attention.")}
    own.load_state_dict(weights)
    x, hidden = rand(BATCH, LENGTH, DIM), padding(LENGTH, LENGTH, 4)
    got, _ = ours(x, x, x, hidden, need_weights=False, is_causal=causal)
    torch.testing.assert_close(got, own(x, mask=~hidden))
    (gradient,) = torch.autograd.grad(got.sum(), ours.in_proj_weight)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_copies_and_files_go_on_alike(mechanism):
    ours = build(mechanism, batch_first=True).float()
    x = rand(BATCH, LENGTH, DIM).float()
    forms = [causal for name, causal in FORMS if name == mechanism]
    want = ours(x, x, x, need_weights=False, is_causal=forms[-1])[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(again(x, x, x, need_weights=False, is_causal=forms[-1])[0], want, rtol=0, atol=0)
        enlarge(again)
        again.double()
        fresh = build(mechanism, batch_first=True)
        fresh.load_state_dict(again.state_dict())
        y = x.double()
        for causal in forms:
            torch.testing.assert_close(
                *(one(y, y, y, need_weights=False, is_causal=causal)[0] for one in (again, fresh))
            )
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.fill_(torch.nan)
        again.reset_parameters()
        assert again(y, y, y, need_weights=False)[0].isfinite().all()
    torch.testing.assert_close(ours(x, x, x, need_weights=False, is_causal=forms[-1])[0], want, rtol=0, atol=0)


def test_a_mechanism_without_keys_is_refused_unless_it_has_them():
    with pytest.raises(ValueError, match=r"soft attention does not have the four projections .*'k_proj': None"):
        build("soft")
    ours, x = build("soft", batch_first=True, shared_qk=False), rand(BATCH, LENGTH, DIM)
    assert ours(x, x, x)[0].isfinite().all()


@pytest.mark.parametrize("mechanism", ["aft_local", "mobile"])
def test_self_attention_refuses_a_context(mechanism):
    ours, x = build(mechanism, batch_first=True), rand(BATCH, LENGTH, DIM)
    with pytest.raises(ValueError, match=f"{mechanism} attention is self-attention"):
        ours(x, x.clone(), x.clone())


@pytest.mark.parametrize("options", [{"conv": 4}, {"output_norm": True}, {"output_gate": True}], ids=str)
def test_options_that_need_weights_of_their_own_are_refused(options):
    with pytest.raises(
        ValueError, match=rf"{next(iter(options))}=.* is not supported: torch.nn.MultiheadAttention has"
    ):
        build("flow", **options)
    assert build("flow", conv=0, output_norm=False).attention.conv == 0


def test_keys_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"aft_conv attention does not have the four projections .* \(4, 16\)"):
        build("aft_conv")


def test_what_a_mechanism_does_not_have_is_refused(monkeypatch):
    ours, x = build("flow", batch_first=True), rand(BATCH, LENGTH, DIM)
    row = dataclasses.replace(ours.attention.mechanism, rows=None, cannot={"causal": "it is a test"})
    monkeypatch.setattr(flowformer.FlowAttention, "mechanism", row)
    with pytest.raises(ValueError, match="has no weights to return: pass need_weights=False"):
        ours(x, x, x)
    for masks in ({"is_causal": True}, {"attn_mask": causal_mask(LENGTH)}):
        with pytest.raises(ValueError, match="flow attention has no causal form, since it is a test"):
            ours(x, x, x, need_weights=False, **masks)
    assert ours(x, x, x, need_weights=False)[1] is None


def test_positions_want_a_length():
    with pytest.raises(ValueError, match="max_length is required"):
        DropInMultiheadAttention(DIM, HEADS, mechanism="aft_full")
