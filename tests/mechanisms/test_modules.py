"""Attention as modules: every one of the registry. What only AFT has is in test_aft_modules.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowformer.mechanisms import Attention, FlowAttention, create_attention, find_attention, list_attentions
from flowformer.mechanisms.aft.modules import AFT

DIM, NUM_HEADS, MAX_LENGTH = 12, 3, 600

ROWS = [find_attention(name) for name in list_attentions()]
FORMS = [(row.name, causal) for row in ROWS for causal in ((False, True) if row.can("causal") else (False,))]
WITH_HEADS = [row.name for row in ROWS if not issubclass(row.module, AFT)]

each = pytest.mark.parametrize("name", list_attentions())
each_form = pytest.mark.parametrize(("name", "causal"), FORMS)
each_form_with_heads = pytest.mark.parametrize(("name", "causal"), [form for form in FORMS if form[0] in WITH_HEADS])
SMOOTH = [form for form in FORMS if find_attention(form[0]).can("smooth")]  # whose steps of rounding stay small
each_smooth_form = pytest.mark.parametrize(("name", "causal"), SMOOTH)
each_causal = pytest.mark.parametrize("name", [row.name for row in ROWS if row.can("causal")])
each_cross = pytest.mark.parametrize("name", [row.name for row in ROWS if row.can("cross")])


def build(name: str, *, causal: bool = False, dtype: torch.dtype = torch.float64, **options: Any) -> Attention:
    torch.manual_seed(0)
    options = {"max_length": MAX_LENGTH, **options}
    return create_attention(name, DIM, NUM_HEADS, causal=causal, **options).to(dtype).eval()


def has_keys(name: str) -> bool:
    """Whether keys have a projection of their own; else they are the queries."""
    return name not in ("reformer", "soft")


def tokens(length: int, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed + length)
    return torch.randn(batch, length, DIM, generator=random, dtype=torch.float64).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max()


# --------------------------------------------------------------------------------------------------------- forward


@each_form_with_heads
def test_is_the_operation_between_projections(name: str, causal: bool) -> None:
    module, x, row = build(name, causal=causal), tokens(20), find_attention(name)
    assert isinstance(module, row.module)
    q, k, v = (
        nn.functional.linear(x, p.weight, p.bias).unflatten(-1, (NUM_HEADS, DIM // NUM_HEADS))
        for p in (module.q_proj, getattr(module, "k_proj", module.q_proj), module.v_proj)
    )
    out = row.operation(q, k, v, *module.learned(x), causal=causal, **module.arguments()).flatten(2)
    close(module(x), nn.functional.linear(out, module.out_proj.weight, module.out_proj.bias))


@each
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"head_dim": 5}, {"head_dim": 5, "bias": False}])
def test_shapes(name: str, options: dict[str, Any]) -> None:
    module = build(name, **options)
    assert module(tokens(20)).shape == (2, 20, DIM)
    inner = NUM_HEADS * options.get("head_dim", DIM // NUM_HEADS)
    assert module.q_proj.weight.shape == module.v_proj.weight.shape == (inner, DIM)
    if has_keys(name):
        assert module.k_proj.weight.shape == (NUM_HEADS if name == "aft_conv" else inner, DIM)
    assert module.out_proj.weight.shape == (DIM, inner)
    biases = [p for parameter, p in module.named_parameters() if parameter.endswith("bias")]
    assert len(biases) == ((4 if has_keys(name) else 3) if options.get("bias", True) else 0)
    if find_attention(name).can("cross"):
        assert module(tokens(20), tokens(7)).shape == (2, 20, DIM)
    if find_attention(name).can("causal"):
        causal = build(name, causal=True, **options)
        out, _ = causal.step(tokens(1)[:, 0], causal.init_state(2))
        assert out.shape == (2, DIM)


@each
def test_dropout_comes_after_the_output_projection(name: str) -> None:
    module, x = build(name, dropout=0.5), tokens(20)
    want = module(x)
    close(module(x), want, 0)  # none in evaluation
    module.train()
    out = module(x)
    dropped = out == 0
    assert 0.3 < dropped.double().mean() < 0.7
    close(out[~dropped], 2 * want[~dropped])


# --------------------------------------------------------------------------------------------------------- padding


@each_form
def test_padding_is_invisible_and_zero(name: str, causal: bool) -> None:
    module, x = build(name, causal=causal), tokens(20)
    padded = torch.cat([x, torch.full((2, 9, DIM), torch.nan, dtype=x.dtype)], 1)
    mask = torch.arange(29).expand(2, -1) < 20
    out = module(padded, mask=mask)
    close(out[:, :20], module(x))
    assert not out[:, 20:].any()  # where the bias of the output projection alone would stand


@each_form
def test_the_input_as_its_own_context_is_self_attention(name: str, causal: bool) -> None:
    module, x = build(name, causal=causal), tokens(20)
    mask = torch.arange(20).expand(2, -1) < torch.tensor([[15], [20]])
    close(module(x, x, mask=mask), module(x, mask=mask), 0)
    close(module(x, context=x), module(x), 0)


@each_cross
def test_another_context_of_the_same_length_is_not_masked_by_the_queries(name: str) -> None:
    module, x, context = build(name), tokens(20), tokens(20, seed=1)
    mask = torch.arange(20).expand(2, -1) < 15
    close(module(x, context, mask=mask)[:, :15], module(x[:, :15], context))


@each_cross
@pytest.mark.parametrize("length", [20, 11])
def test_a_mask_of_a_context_leaves_the_queries_real(name: str, length: int) -> None:
    module, x, context = build(name), tokens(length), tokens(20, seed=1)
    mask = torch.arange(20).expand(2, -1) < 15  # of the shape of x where lengths are equal, yet none of its business
    out = module(x, context, context_mask=mask)
    close(out, module(x, context[:, :15]))
    assert out.abs().sum(-1).all()
    queries = torch.arange(length).expand(2, -1) < 9
    out = module(x, context, context_mask=mask, mask=queries)
    close(out[:, :9], module(x[:, :9], context[:, :15]))
    assert not out[:, 9:].any()


@each_form
def test_packed_equals_one_by_one(name: str, causal: bool) -> None:
    module, x = build(name, causal=causal), tokens(20, batch=1)
    out = module(x, cu_seqlens=torch.tensor([0, 6, 6, 20], dtype=torch.int32))
    close(out, torch.cat([module(x[:, :6]), module(x[:, 6:])], 1))


# ---------------------------------------------------------------------------------------------------------- states


@each_causal
@pytest.mark.parametrize("prompt", [0, 1, 13])
def test_prefill_and_steps_equal_forward(name: str, prompt: int) -> None:
    module, x = build(name, causal=True), tokens(20)
    want, state, outs = module(x), module.init_state(2), []
    if prompt:
        out, state = module(x[:, :prompt], return_state=True)
        outs.append(out)
    for t in range(prompt, 20):
        out, state = module.step(x[:, t], state)
        outs.append(out.unsqueeze(1))
    close(torch.cat(outs, 1), want)


@each_causal
def test_forward_continues_from_a_state(name: str) -> None:
    module, x = build(name, causal=True), tokens(20)
    first, state = module(x[:, :7], return_state=True, initial_state=module.init_state(2))
    second = module(x[:, 7:], initial_state=state)
    close(torch.cat([first, second], 1), module(x))


@each
def test_only_causal_modules_have_states(name: str) -> None:
    module, x = build(name), tokens(5)
    for refuse in (lambda: module.init_state(2), lambda: module.step(x[:, 0], None)):
        with pytest.raises(ValueError, match="only a causal module has a state; build it with causal=True"):
            refuse()
    with pytest.raises(ValueError, match="initial_state and return_state require causal=True"):
        module(x, return_state=True)
    if find_attention(name).can("causal"):
        with pytest.raises(TypeError, match=r"must be a \w*State, got tuple"):
            build(name, causal=True)(x, initial_state=(1, 2))


# ------------------------------------------------------------------------------------------------------- precision


# Under relu, a query of next to no positive channel gives one output or another, depending on rounding: with many
# channels there is none.
WIDE = {"cosformer": {"head_dim": 32}}


@each_smooth_form
def test_autocast_sums_in_float32(name: str, causal: bool) -> None:
    # Long, of large mean: sums in bfloat16 would be wrong by far more than the rounding of the projections.
    module = build(name, causal=causal, dtype=torch.float32, **WIDE.get(name, {}))
    x = tokens(600, dtype=torch.float32)
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    close(out, want, 2e-2)


@each_form
def test_autocast_does_not_touch_the_operation(name: str, causal: bool) -> None:
    module, x = build(name, causal=causal, dtype=torch.float32), tokens(600, dtype=torch.float32)
    q, k, v = (module.split(t) for t in (x, x[..., : module.key_width] + 1, x - 1))
    row, learned, options = module.mechanism, module.learned(), module.arguments()

    def run() -> Tensor:
        if not causal:
            return row.operation(q, k, v, *learned, **options)
        out, state = row.operation(q[:, :-1], k[:, :-1], v[:, :-1], *learned, causal=True, return_state=True, **options)
        last, _ = row.step(q[:, -1], k[:, -1], v[:, -1], state, *learned, **options)
        return torch.cat([out, last.unsqueeze(1)], 1)

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        out = run()
    assert out.dtype == torch.float32
    for part, other in zip(out.split(599, 1), want.split(599, 1), strict=True):  # the last is the step
        close(part, other, 1e-5)


@each_form
def test_gradients_taken_within_autocast(name: str, causal: bool) -> None:
    module, x = build(name, causal=causal, dtype=torch.float32), tokens(100, dtype=torch.float32).requires_grad_()
    grads = []
    for within in (False, True):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x).float().square().sum()
            if within:
                loss.backward()
        if not within:
            loss.backward()
        grads.append(x.grad)
    if (causal and name not in ("mobile", "reformer", "routing", "sinkhorn", "synthesizer")) or name.startswith("aft"):
        assert torch.equal(*grads)  # their passes are written by hand; those of others are PyTorch's, in bfloat16
    else:
        close(grads[1], grads[0], 2e-2)


@each_smooth_form
def test_half_precision_modules(name: str, causal: bool) -> None:
    module = build(name, causal=causal, dtype=torch.float32, **WIDE.get(name, {}))
    x = tokens(600, dtype=torch.float32)
    half = copy.deepcopy(module).bfloat16()
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    close(out, module(x), 2e-2)
    if causal:
        state, outs = half.init_state(2), []
        for t in range(50):
            out, state = half.step(x[:, t].bfloat16(), state)
            outs.append(out)
        assert out.dtype == torch.bfloat16
        close(torch.stack(outs, 1), module(x)[:, :50], 2e-2)


@each_form
def test_gradients_reach_every_parameter(name: str, causal: bool) -> None:
    module, x = build(name, causal=causal), tokens(20).requires_grad_()
    module(x).square().sum().backward()
    for tensor in (x, *module.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    for projection in (module.q_proj, getattr(module, "k_proj", module.q_proj), module.v_proj, module.out_proj):
        assert projection.weight.grad is not None
        assert projection.weight.grad.any()


# ----------------------------------------------------------------------------------------- what modules are besides


@each_form
def test_copies_give_the_same(name: str, causal: bool) -> None:
    module, x = build(name, causal=causal), tokens(20)
    want = module(x)
    close(copy.deepcopy(module)(x), want, 0)
    close(pickle.loads(pickle.dumps(module))(x), want, 0)
    torch.manual_seed(1)
    other = create_attention(name, DIM, NUM_HEADS, causal=causal, max_length=MAX_LENGTH).double()
    assert not torch.equal(other(x), want)
    other.load_state_dict(module.state_dict())
    close(other(x), want, 0)
    own = {key for key in module.state_dict() if "." not in key} | {"tables"}
    keys = {"k_proj"} if has_keys(name) else set()
    assert {key.split(".")[0] for key in module.state_dict()} - own == {"q_proj", "v_proj", "out_proj"} | keys


@each
def test_says_what_it_is(name: str) -> None:
    row = find_attention(name)
    text = repr(build(name, causal=row.can("causal"), head_dim=5))
    assert text.startswith(row.module.__name__)
    assert f"dim=12, num_heads=3, head_dim=5, causal={row.can('causal')}" in text


def test_flow_says_its_options() -> None:
    text = repr(FlowAttention(DIM, NUM_HEADS, preset="wikitext", allocation=False))
    assert "preset='wikitext', feature_map='sigmoid', clamp=5.0, eps=1e-06" in text
    assert "competition='sequence', allocation=False" in text


@pytest.mark.parametrize("causal", [False, True])
def test_flow_hands_its_preset_and_overrides_on(causal: bool) -> None:
    x = tokens(20)
    core = build("flow", causal=causal)
    for options in ({"preset": "lra"}, {"preset": "timeseries"}, {"clamp": 0.5}, {"feature_map": "relu"}):
        other = build("flow", causal=causal, **options)
        assert not torch.allclose(other(x), core(x))
        if causal:
            (out, _), want = other.step(x[:, 0], other.init_state(2)), other(x)[:, 0]
            close(out, want)
    with pytest.raises(ValueError, match=r"unknown preset 'corr'.*did you mean 'core'"):
        FlowAttention(DIM, NUM_HEADS, preset="corr")
    with pytest.raises(TypeError, match=r"no option 'epz'.*did you mean 'eps'"):
        FlowAttention(DIM, NUM_HEADS, epz=1.0)


def test_linear_hands_its_eps_on() -> None:
    x = tokens(20)
    module, plain = build("linear", causal=True, eps=1.0), build("linear", causal=True)
    assert not torch.allclose(module(x), plain(x))
    out, _ = module.step(x[:, 0], module.init_state(2))
    close(out, module(x)[:, 0])


# ------------------------------------------------------------------------------------------------------- bad input


@each
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="num_heads must divide dim unless head_dim is given, got dim 12 and num_heads 5"
    ):
        create_attention(name, 12, 5)
    for sizes in ((0, 1), (12, 0), (-12, 3)):
        with pytest.raises(ValueError, match="must be positive, got"):
            create_attention(name, *sizes)
    with pytest.raises(ValueError, match="head_dim must be positive, got 0"):
        create_attention(name, 12, 3, head_dim=0)
    with pytest.raises(TypeError, match="no_such_option"):
        create_attention(name, 12, 3, no_such_option=1)
    with pytest.raises(ValueError, match="max_length must be positive, got 0"):
        create_attention(name, 12, 3, max_length=0)


@each
def test_max_length_reaches_those_that_learn_positions(name: str) -> None:
    module = create_attention(name, 12, 3, max_length=9)
    assert isinstance(module, Attention)
    assert getattr(module, "max_length", None) == (9 if module.learns_positions else None)
    if not module.learns_positions:
        assert isinstance(create_attention(name, 12, 3), Attention)
    else:
        with pytest.raises(ValueError, match="max_length is required"):
            create_attention(name, 12, 3)


@each
def test_bad_input_is_refused(name: str) -> None:
    module, x = build(name), tokens(6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    for bad in (x[0], x[..., :5], x.unsqueeze(0)):
        with pytest.raises(ValueError, match=r"x must be \(batch, length, 12\), got \("):
            module(bad)
    with pytest.raises(ValueError, match="context_mask requires context"):
        module(x, context_mask=mask)
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        module(x, mask=mask.float())
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 6\), got \(2, 5\)"):
        module(x, mask=mask[:, :5])
    with pytest.raises(ValueError, match="pass cu_seqlens or masks, not both"):
        module(x[:1], mask=mask[:1], cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))


@each_form
def test_inputs_of_another_dtype_or_device_are_refused(name: str, causal: bool) -> None:
    module, x = build(name, causal=causal), tokens(6)
    for bad in (x.long(), x.to(torch.complex64), [1.0], None):
        with pytest.raises(TypeError, match="x must be a tensor of dtype float16, bfloat16, float32 or float64, got"):
            module(bad)
    for bad in (x.float(), x.half(), x.to("meta")):
        with pytest.raises(TypeError, match="inputs must be float64 on cpu like the weights of the module, got"):
            module(bad)
        if causal:
            with pytest.raises(TypeError, match="inputs must be float64 on cpu like the weights of the module, got"):
                module.step(bad[:, 0], module.init_state(2))
    with pytest.raises(ValueError, match=r"x must have at least one token, got \(2, 0, 12\)"):
        module(x[:, :0])
    with pytest.raises(ValueError, match="mask must be on cpu like its tokens"):
        module(x, mask=torch.ones(2, 6, dtype=torch.bool, device="meta"))
    for bad in ([True], "mask", torch.ones(2, 6)):
        with pytest.raises(TypeError, match="mask must be a boolean tensor"):
            module(x, mask=bad)


@each_causal
def test_states_of_another_batch_are_refused(name: str) -> None:
    module, x = build(name, causal=True), tokens(6)
    for bad, error in ((-1, ValueError), (2.5, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match=r"init_state: batch must be (at least 0|a whole number), got"):
            module.init_state(bad)
    assert all(part.shape[0] == 0 for part in module.init_state(0))
    with pytest.raises(ValueError, match=r"state\.\w+ must be .* got"):
        module(x, initial_state=module.init_state(3))
    with pytest.raises(ValueError, match=r"state\.\w+ must be .* got"):
        module.step(x[:, 0], module.init_state(3))
    for bad in (x[:, 0].long(), None):
        with pytest.raises(TypeError, match="step: x must be a tensor of dtype"):
            module.step(bad, module.init_state(2))


@each_causal
def test_fresh_states_of_impossible_sizes_are_refused(name: str) -> None:
    row = find_attention(name)
    learned, options = build(name, causal=True).learned(), build(name, causal=True).arguments()
    sizes = (2, NUM_HEADS, DIM // NUM_HEADS, DIM // NUM_HEADS)
    for batch, error in ((-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="batch must be"):
            row.init_state(batch, *sizes[1:], *learned, **options)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        row.init_state(*sizes[:3], 0, *learned, **options)


@each_cross
def test_a_bad_context_is_refused(name: str) -> None:
    module, x = build(name), tokens(6)
    for bad in (x[0], x[..., :5], x.unsqueeze(0)):
        with pytest.raises(ValueError, match=r"context must be \(batch, length, 12\), got \("):
            module(x, bad)
    with pytest.raises(ValueError, match="batch"):
        module(x, x[:1])


@each_causal
def test_causal_modules_refuse_bad_steps_and_a_context(name: str) -> None:
    module, x = build(name, causal=True), tokens(6)
    for bad in (x, x[:, 0, :5], x[0, 0]):
        with pytest.raises(ValueError, match=r"step: x must be \(batch, 12\), got \("):
            module.step(bad, module.init_state(2))
    with pytest.raises(
        ValueError, match=r"a causal module does not support context; build it with|context is not supported, since "
    ):
        module(x, x.clone())


@each
def test_what_a_mechanism_does_not_have_is_refused(name: str) -> None:
    row = find_attention(name)
    if not row.can("causal"):
        with pytest.raises(ValueError, match="causal"):
            build(name, causal=True)
    if not row.can("cross"):
        with pytest.raises(ValueError, match="context is not supported, since "):
            build(name)(tokens(6), tokens(6))


def test_unknown_names_suggest_the_nearest() -> None:
    for function in (find_attention, lambda name: create_attention(name, 12, 3)):
        with pytest.raises(
            ValueError, match=r"unknown attention 'flwo'; available: .*flow, .*\(did you mean 'flow'\?\)"
        ):
            function("flwo")
        with pytest.raises(ValueError, match=r"unknown attention 'zzz'; available: .*yoso$"):
            function("zzz")
    assert list_attentions() == sorted(list_attentions())


@each_causal
def test_steps_under_autocast_continue_a_state_made_outside(name: str) -> None:
    torch.manual_seed(0)
    module = create_attention(name, 16, 2, causal=True, max_length=MAX_LENGTH).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        whole = module(x)
        state = module.init_state(2)
        with torch.autocast("cpu", torch.bfloat16):
            _, state = module(x[:, :3], initial_state=state, return_state=True)
            for t in (3, 4):
                out, state = module.step(x[:, t], state)
    torch.testing.assert_close(out.float(), whole[:, -1], rtol=0.05, atol=0.02)
