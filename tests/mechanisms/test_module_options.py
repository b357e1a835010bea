"""Options that every attention module has: short convolution, output norm and output gate. Laws are in laws.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flowformer import create_attention, list_attentions
from flowformer.mechanisms import AFTConv, Attention, FlowAttention, ModuleState, find_attention
from flowformer.mechanisms.aft.modules import AFT
from flowformer.mechanisms.draws import DrawnAttention
from flowformer.mechanisms.maps import attention_rows, flow_maps, has_flows, model_maps
from flowformer.mechanisms.registry import option_names
from flowformer.models.initialization import reset_parameters

DIM, HEADS, MAX_LENGTH = 12, 3, 600
OPTIONS: dict[str, Any] = {"conv": 3, "output_norm": True, "output_gate": True}
ROWS = [find_attention(name) for name in list_attentions()]
FORMS = [(row.name, causal) for row in ROWS for causal in ((False, True) if row.can("causal") else (False,))]

each = pytest.mark.parametrize("name", list_attentions())
each_form = pytest.mark.parametrize(("name", "causal"), FORMS)
SMOOTH = [form for form in FORMS if find_attention(form[0]).can("smooth")]  # whose steps of rounding stay small
each_smooth_form = pytest.mark.parametrize(("name", "causal"), SMOOTH)
each_causal = pytest.mark.parametrize("name", [name for name, causal in FORMS if causal])


def seeded(name: str) -> dict[str, int]:
    """A seed for modules that would draw one from PyTorch's generator."""
    return {"seed": 0} if issubclass(find_attention(name).module, DrawnAttention) else {}


def build(name: str, causal: bool = False, dtype: torch.dtype = torch.float64, **options: Any) -> Attention:
    torch.manual_seed(0)
    options = {"max_length": MAX_LENGTH, **OPTIONS, **seeded(name), **options}
    return create_attention(name, DIM, HEADS, causal=causal, **options).to(dtype).eval()


def tokens(length: int, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed + length)
    return torch.randn(batch, length, DIM, generator=random, dtype=torch.float64).to(dtype)


def project(module: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_queries = (module.q_proj, module.q_conv)
    of_keys = (module.k_proj, module.k_conv) if hasattr(module, "k_proj") else of_queries
    pairs = (of_queries, of_keys, (module.v_proj, module.v_conv))
    q, k, v = (module.split(conv(projection(x))[0]) for projection, conv in pairs)
    return q, k, v


@each_form
def test_stand_around_the_operation(name: str, causal: bool) -> None:
    module, x, row = build(name, causal), tokens(20), find_attention(name)
    nn.init.normal_(module.out_norm.weight)
    out = row.operation(*project(module, x), *module.learned(), causal=causal, **module.arguments())
    out = out * (out.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * module.out_norm.weight
    out = out.flatten(2) if out.ndim == 4 else out
    gate = module.gate_proj(x)
    torch.testing.assert_close(module(x), module.out_proj(out * gate * gate.sigmoid()), rtol=1e-10, atol=1e-10)


@each_form
@pytest.mark.parametrize("options", [{"head_dim": 5}, {"head_dim": 5, "bias": False}])
def test_shapes(name: str, causal: bool, options: dict[str, Any]) -> None:
    module, row = build(name, causal, **options), find_attention(name)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes["q_conv.weight"] == shapes["v_conv.weight"] == (15, 3)
    assert shapes.get("k_conv.weight", shapes["q_conv.weight"]) == (module.key_width, 3)
    assert shapes["gate_proj.weight"] == (15, DIM)
    assert ("gate_proj.bias" in shapes) == options.get("bias", True)
    assert shapes["out_norm.weight"] == ((15,) if issubclass(row.module, AFT) else (5,))
    assert module(tokens(9)).shape == (2, 9, DIM)


@each
def test_are_listed(name: str) -> None:
    assert set(OPTIONS) <= set(option_names(name))
    module = build(name)
    assert {option: getattr(module, option) for option in OPTIONS} == OPTIONS
    text = repr(module)
    assert "(q_conv): ShortConv(12, width=3, causal=False)" in text
    assert "(out_norm): RMSNorm" in text
    assert "(gate_proj): Linear" in text


@each
def test_without_them_nothing_is_added_or_drawn(name: str) -> None:
    module = build(name, conv=0, output_norm=False, output_gate=False)
    state = torch.get_rng_state()
    own = [key for key in module.state_dict() if "." not in key] + [key for key, _ in module.named_children()][5:]
    found = [key for key, _ in module.named_children() if key not in own]
    assert found == [key for key in ("q_proj", "k_proj", "v_proj", "out_proj", "dropout") if hasattr(module, key)]
    torch.manual_seed(0)
    for wide in (DIM, *((module.key_width,) if hasattr(module, "k_proj") else ()), DIM, DIM):
        nn.Linear(DIM, wide)
    if not own and not isinstance(module, DrawnAttention):  # those draw a seed
        assert torch.equal(torch.get_rng_state(), state)
    if find_attention(name).can("causal"):
        causal = build(name, True, conv=0, output_norm=True, output_gate=True)
        assert not isinstance(causal.init_state(1), ModuleState)


@each_form
def test_padded_positions_stay_zeros(name: str, causal: bool) -> None:
    module, x = build(name, causal), tokens(9)
    mask = torch.arange(9).expand(2, -1) >= torch.tensor([[3], [9]])
    out = module(x, mask=mask)
    assert not out[~mask].any()


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.can("cross")])
def test_cross_attention_convolves_each_side_by_itself(name: str) -> None:
    module, x, context = build(name), tokens(8), tokens(11, seed=1)
    want = module(x, context)
    queries = torch.randperm(14, generator=torch.Generator().manual_seed(0)) < 8
    keys = torch.randperm(14, generator=torch.Generator().manual_seed(1)) < 11
    wide, far = (t.new_full((2, 14, DIM), torch.nan) for t in (x, context))
    wide[:, queries], far[:, keys] = x, context
    masks = {"mask": queries.expand(2, -1), "context_mask": keys.expand(2, -1)}
    out = module(wide, far, **masks)
    torch.testing.assert_close(out[:, queries], want, rtol=1e-10, atol=1e-10)
    assert not out[:, ~queries].any()
    torch.testing.assert_close(module(wide, context, mask=masks["mask"])[:, queries], want, rtol=1e-10, atol=1e-10)
    got = module(x, far, context_mask=masks["context_mask"])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------- states


@each_causal
def test_other_states_are_refused(name: str) -> None:
    module, x = build(name, True), tokens(6)
    _, state = module(x, return_state=True)
    assert isinstance(state, ModuleState)
    for bad in (state.inner, (1, 2), tuple(state)):
        with pytest.raises(TypeError, match=r"initial_state must be a ModuleState, got "):
            module(x, initial_state=bad)
        with pytest.raises(TypeError, match=r"state must be a ModuleState, got "):
            module.step(x[:, 0], bad)
    with pytest.raises(TypeError, match=r"state must be a ModuleState, got NoneType"):
        module.step(x[:, 0], None)
    for batch in (1, 3):
        with pytest.raises(ValueError, match=r"initial_state\.q must be \(2, 2, 12\) of floating point on cpu, got"):
            module(x, initial_state=module.init_state(batch))
        with pytest.raises(ValueError, match=r"state\.q must be \(2, 2, 12\) of floating point on cpu, got"):
            module.step(x[:, 0], module.init_state(batch))
    with pytest.raises(TypeError, match=r"must be a \w+State, got NoneType"):
        module.step(x[:, 0], state._replace(inner=None))
    with pytest.raises(TypeError, match=r"must be a \w+State, got ModuleState"):
        build(name, True, conv=0)(x, initial_state=state)


@each
def test_bidirectional_modules_have_no_state(name: str) -> None:
    module, x = build(name), tokens(6)
    with pytest.raises(ValueError, match="initial_state and return_state require causal=True"):
        module(x, return_state=True)
    with pytest.raises(ValueError, match="initial_state and return_state require causal=True"):
        module(x, initial_state=ModuleState(x, x, x, None))


@each_form
@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be an int32 tensor, got list"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must be an int32 tensor"),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "must rise from 0 to the total length 6"),
        ({"cu_seqlens": torch.tensor([6])}, ValueError, "boundaries of N sequences"),
        ({"cu_seqlens": torch.tensor([0, 6]), "mask": torch.ones(1, 6, dtype=torch.bool)}, ValueError, "not both"),
    ],
)
def test_bad_packing_is_refused_in_words(
    name: str, causal: bool, arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        build(name, causal)(tokens(6, batch=1), **arguments)


@each_causal
def test_states_are_in_the_dtype_of_the_projections(name: str) -> None:
    module, x = build(name, True, torch.bfloat16), tokens(9, dtype=torch.bfloat16)
    out, state = module(x, return_state=True)
    for one in (state, module.init_state(2), module.step(x[:, 0], state)[1]):
        assert [part.dtype for part in one[:3]] == [torch.bfloat16] * 3
    assert out.dtype == torch.bfloat16
    module, x = build(name, True, torch.float32), tokens(9, dtype=torch.float32)
    with torch.no_grad():
        whole = module(x)
        state = module.init_state(2)
        with torch.autocast("cpu", torch.bfloat16):
            _, state = module(x[:, :7], initial_state=state, return_state=True)
            assert state.q.dtype == torch.bfloat16
            for t in (7, 8):
                out, state = module.step(x[:, t], state)
    torch.testing.assert_close(out.float(), whole[:, -1], rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------------ maps


@pytest.mark.parametrize(("name", "causal"), [form for form in FORMS if find_attention(form[0]).rows])
def test_maps_show_what_is_convolved_before_norm_and_gate(name: str, causal: bool) -> None:
    heads = DIM if issubclass(find_attention(name).module, AFT) and name != "aft_conv" else HEADS
    torch.manual_seed(0)
    module = create_attention(name, DIM, heads, causal=causal, max_length=20, **OPTIONS).double()
    if hasattr(module, "null_value"):  # which no token has
        nn.init.zeros_(module.null_value)
    x, rows = tokens(14), [13, 0, 6]
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 3:6] = mask[1, 10:] = False
    seen = []
    module.out_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(x, mask=mask)
    weights = attention_rows(module, x, rows, mask=mask)
    q, _, v, _ = module.project(x.masked_fill(~mask.unsqueeze(-1), 0), x, {"mask": mask, "context_mask": None})
    out = torch.einsum("bhrs,bshv->brhv", weights, v.reshape(2, 14, heads, -1))
    out = (nn.functional.normalize(out, dim=-1) if name == "yoso" else out).flatten(2)
    if isinstance(module, AFT):
        out = out * q[:, rows].sigmoid()
    want = seen[0].flatten(2)[:, rows]
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    if has_flows(module):
        assert flow_maps(module, x, mask=mask).competition.isfinite().all()
    assert list(model_maps(nn.Sequential(module), x, rows=rows)) == ["0"]


# ----------------------------------------------------------------------------------------- what modules are besides


@each_form
def test_copies_give_the_same(name: str, causal: bool) -> None:
    module, x = build(name, causal), tokens(20)
    want = module(x)
    assert torch.equal(copy.deepcopy(module)(x), want)
    torch.manual_seed(1)
    other = create_attention(name, DIM, HEADS, causal=causal, max_length=MAX_LENGTH, **OPTIONS).double()
    assert not torch.equal(other(x), want)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), want)


@each_form
def test_built_without_memory_and_filled_later(name: str, causal: bool) -> None:
    with torch.device("meta"):
        module = create_attention(name, DIM, HEADS, causal=causal, max_length=MAX_LENGTH, **OPTIONS, **seeded(name))
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(0)
    module.reset_parameters()
    for (key, got), want in zip(
        module.named_parameters(), build(name, causal, torch.float32).parameters(), strict=True
    ):
        assert torch.equal(got, want), key
    reset_parameters(module)
    assert module(tokens(5, dtype=torch.float32)).isfinite().all()


@each_form
def test_gradients_reach_every_parameter(name: str, causal: bool) -> None:
    module, x = build(name, causal), tokens(20).requires_grad_()
    if isinstance(module, AFTConv):  # whose filters begin as zeros
        nn.init.normal_(module.gamma)
    module(x).square().sum().backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", ["linear", "softmax", "mobile"])
def test_gradcheck(name: str) -> None:
    module, x = build(name), tokens(5, batch=1).requires_grad_()
    torch.autograd.gradcheck(module, (x,))


@each_smooth_form
def test_autocast(name: str, causal: bool) -> None:
    wide = {"head_dim": 32} if name == "cosformer" else {}  # under relu, a query may have no positive channel of few
    module, x = build(name, causal, torch.float32, **wide), tokens(100, dtype=torch.float32)
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).abs().max() < 0.05 * want.abs().max()


QUICK = [("linear", True)]
each_traced = pytest.mark.parametrize(
    ("name", "causal"), [pytest.param(*form, marks=() if form in QUICK else pytest.mark.slow) for form in FORMS]
)


@each_traced
def test_one_exported_program_for_all_masks(name: str, causal: bool) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = build(name, causal, torch.float32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.attention(x, mask=mask)

    module = Masked()
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
    example = (torch.randn(2, 40, DIM), torch.rand(2, 40) < 0.8)
    program = torch.export.export(module, example, dynamic_shapes=(sizes, sizes)).module()
    for batch, length in ((3, 7), (1, 2), (2, 130), (1, 512)):
        x, mask = torch.randn(batch, length, DIM), torch.rand(batch, length) < 0.7
        torch.testing.assert_close(program(x, mask), module(x, mask), rtol=1e-4, atol=1e-4)


@each_traced
def test_compiles_into_one_graph(name: str, causal: bool) -> None:
    torch._dynamo.reset()
    attention, x = build(name, causal, torch.float32), torch.randn(1, 30, DIM)
    compiled = torch.compile(attention, fullgraph=True, backend="eager", dynamic=False)
    for bounds in ([0, 5, 5, 25, 30], [0, 1, 9, 10, 30]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        want = attention(x, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(compiled(x, cu_seqlens=cu_seqlens), want, rtol=1e-4, atol=1e-4)
    if causal:
        got, want = (one(x, return_state=True) for one in (compiled, attention))
        for part, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"conv": 1}, ValueError, "conv must be 0 for no convolution, or a width from 2 to 16, got 1"),
        ({"conv": "4"}, TypeError, "conv must be a whole number, got '4'"),
        ({"output_norm": 1}, TypeError, "output_norm must be True or False, got 1"),
        ({"output_gate": "yes"}, TypeError, "output_gate must be True or False, got 'yes'"),
    ],
)
@each
def test_wrong_options_are_refused(name: str, options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        build(name, **options)


def test_attention_over_images_has_no_convolution_along_a_sequence() -> None:
    with pytest.raises(
        ValueError, match=r"AFTConv: conv=4 is along a sequence, and kernel_size \(3, 5\) is for images"
    ):
        AFTConv(DIM, HEADS, kernel_size=(3, 5), conv=4)
    image = torch.randn(2, 4, 6, DIM)
    mask = torch.rand(2, 4, 6) < 0.5
    out = AFTConv(DIM, HEADS, kernel_size=(3, 5), output_norm=True, output_gate=True)(image, mask=mask)
    assert out.shape == image.shape
    assert not out[~mask].any()


def test_flow_takes_them_beside_its_overrides() -> None:
    module = FlowAttention(DIM, HEADS, causal=True, clamp=2.0, **OPTIONS)
    assert module.overrides == {"clamp": 2.0}
    best = torch.tensor([1, 1, 0])
    state = tree_map(lambda part: part[best], module(torch.randn(2, 5, DIM), return_state=True)[1])
    assert module.step(torch.randn(3, DIM), state)[0].shape == (3, DIM)
