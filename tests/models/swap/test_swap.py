"""Attention swapped in models of timm: what stays, what goes, and that softmax stays what it was."""

import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import flowformer
from flowformer import AFTConv, swap_attention
from flowformer.mechanisms import find_attention
from flowformer.models.swap import SwappedAttention, SwappedSpatialAttention

timm = pytest.importorskip("timm")

MECHANISMS = flowformer.list_attentions()
LEARN_POSITIONS = [name for name in MECHANISMS if find_attention(name).module.learns_positions]
VIT = {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
PVT = {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "num_classes": 5}


def enlarge(model: nn.Module) -> nn.Module:
    """Fresh queries and keys are so small that all attention is the mean: make them matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn." in name:
                parameter.normal_(std=0.3 if parameter.ndim == 1 else 1.5 / math.sqrt(parameter[0].numel()))
    return model.eval()


def vit(name: str = "deit_tiny_patch16_224", **options) -> nn.Module:
    torch.manual_seed(0)
    return enlarge(timm.create_model(name, **{**VIT, **options}))


def pvt(**options) -> nn.Module:
    torch.manual_seed(0)
    return enlarge(timm.create_model("pvt_v2_b0", **{**PVT, **options}))


def narrowing() -> nn.Module:
    model = vit()
    model.blocks[1].attn = timm.layers.Attention(32, num_heads=4, dim_out=16)
    return model


def images(height: int = 64, width: int | None = None, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------ the real models


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_v2_b0", "deit_tiny_distilled_patch16_224"])
def test_softmax_is_what_it_was(name, dtype, tolerance):
    torch.manual_seed(0)
    model = enlarge(timm.create_model(name)).to(dtype)
    swapped = copy.deepcopy(model)
    report = swap_attention(swapped, "softmax")
    assert not report.dropped
    assert not report.new
    x = images(224, batch=1).to(dtype)
    with torch.no_grad():
        want, got = model(x), swapped(x)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.std().item())
    # The weights that were copied matter: another order of the heads' channels is another model.
    attention = next(module for module in swapped.modules() if isinstance(module, flowformer.SoftmaxAttention))
    attention.q_proj.weight.data = attention.q_proj.weight.data.flip(0)
    with torch.no_grad():
        assert (swapped(x) - want).abs().max() > 100 * tolerance * want.std()


@pytest.mark.parametrize("attention", ["flow", "mobile", "aft_conv", "aft_full"])
def test_deit_tiny(attention):
    model = timm.create_model("deit_tiny_patch16_224")
    report = swap_attention(model, attention)
    print(report)
    total, projection = 5_717_416, 192 * 192 + 192
    new = {
        "aft_conv": 12 * (projection + 192 * 3 + 3 + 3 * 121 + 2 * 3),
        "aft_full": 12 * 2 * 197 * 128,
    }.get(attention, 0)
    # Position embeddings, class token, key and query projections: what AFT's paper does not copy.
    dropped = 198 * 192 + 12 * 2 * projection if attention == "aft_conv" else 0
    assert sum(report.kept.values()) == total - dropped
    assert sum(report.dropped.values()) == dropped
    assert sum(report.new.values()) == new
    assert weights(model) == total - dropped + new
    assert len(report.modules) == 12
    with torch.no_grad():
        assert model.eval()(images(224, batch=1)).shape == (1, 1000)


@pytest.mark.parametrize(("attention", "reduction"), [("flow", None), ("flow", "keep"), ("aft_conv", None)])
def test_pvt_v2_b0(attention, reduction):
    model = timm.create_model("pvt_v2_b0")
    report = swap_attention(model, attention, spatial_reduction=reduction)
    print(report)
    dims, ratios, heads = (32, 64, 160), (8, 4, 2), (1, 2, 5, 8)
    gone = sum(2 * (dim * dim * ratio**2 + 3 * dim) for dim, ratio in zip(dims, ratios, strict=True))
    gone = 0 if reduction == "keep" else gone
    new = 0
    if attention == "aft_conv":
        for dim, head in zip((*dims, 256), heads, strict=True):
            gone += 2 * 2 * (dim * dim + dim)
            new += 2 * (dim * dim + dim + dim * head + head + 123 * head)
    assert sum(report.dropped.values()) == gone
    assert sum(report.new.values()) == new
    assert sum(report.kept.values()) == 3_666_760 - gone
    assert weights(model) == 3_666_760 - gone + new
    with torch.no_grad():
        assert model.eval()(images(224, batch=1)).shape == (1, 1000)


# ------------------------------------------------------------------------------------------------------- what is copied


def test_options_of_the_module_begin_anew():
    model = vit()
    report = swap_attention(model, "flow", conv=3, output_norm=True, output_gate=True)
    new = {name.partition(".attn.attention.")[2].split(".")[0] for name in report.new}
    assert new == {"q_conv", "k_conv", "v_conv", "out_norm", "gate_proj"}
    model.eval()(images()).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in report.new)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"proj_bias": False}], ids=str)
@pytest.mark.parametrize("attention", ["flow", "aft_conv", "aft_local"])
def test_projections_of_a_vit_are_copied(attention, options):
    model = vit(**options)
    before = [copy.deepcopy(block.attn) for block in model.blocks]
    report = swap_attention(model, attention)
    for old, block in zip(before, model.blocks, strict=True):
        new = block.attn.attention
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), old.qkv.weight.chunk(3), strict=True))
        parts["out_proj"] = old.proj.weight
        for name, want in parts.items():
            got = getattr(new, name)
            if attention == "aft_conv" and name in ("q_proj", "k_proj"):
                assert got.weight.std() < 0.03  # fresh
                assert got.bias is None or not got.bias.any()
            else:
                assert torch.equal(got.weight, want)
            has_bias = (old.proj if name == "out_proj" else old.qkv).bias is not None
            assert (got.bias is not None) is has_bias
        if attention != "aft_conv" and old.qkv.bias is not None:
            assert torch.equal(torch.cat([new.q_proj.bias, new.k_proj.bias, new.v_proj.bias]), old.qkv.bias)
        if old.proj.bias is not None:
            assert torch.equal(new.out_proj.bias, old.proj.bias)
    assert set(report.kept) | set(report.new) == {name for name, _ in model.named_parameters()}
    assert not set(report.kept) & set(report.new)


@pytest.mark.parametrize("heads", [None, 32])
def test_queries_and_keys_of_aft_conv_are_new_even_where_they_would_fit(heads):
    model = vit()
    report = swap_attention(model, "aft_conv", num_heads=heads)
    assert model.blocks[0].attn.attention.num_heads == (heads or 4)
    assert "blocks.0.attn.attention.k_proj.weight" in report.new
    assert "blocks.0.attn.attention.q_proj.weight" in report.new
    assert report.dropped["blocks.1.attn.qkv.weight[key]"] == 32 * 32
    assert report.dropped["blocks.1.attn.qkv.bias[query]"] == 32
    assert "blocks.0.attn.attention.v_proj.weight" in report.kept
    assert "blocks.0.mlp.fc1.weight" in report.kept


def test_projections_of_a_pvt_are_copied():
    model = pvt()
    old = copy.deepcopy(model.stages[1].blocks[0].attn)
    report = swap_attention(model, "flow", spatial_reduction="keep")
    new = model.stages[1].blocks[0].attn
    assert isinstance(new, SwappedSpatialAttention)
    assert torch.equal(new.attention.q_proj.weight, old.q.weight)
    assert torch.equal(torch.cat([new.attention.k_proj.weight, new.attention.v_proj.weight]), old.kv.weight)
    assert torch.equal(torch.cat([new.attention.k_proj.bias, new.attention.v_proj.bias]), old.kv.bias)
    assert torch.equal(new.attention.out_proj.weight, old.proj.weight)
    assert torch.equal(new.sr.weight, old.sr.weight)
    assert "stages.1.blocks.0.attn.sr.weight" in report.kept


def test_frozen_weights_stay_frozen_and_dtype_and_mode_stay():
    model = vit().double().train()
    model.blocks[0].attn.requires_grad_(False)
    swap_attention(model, "aft_full")
    first, second = (block.attn for block in model.blocks)
    assert not any(one.requires_grad for name, one in first.named_parameters() if "proj" in name)
    assert first.attention.query_positions.requires_grad
    assert all(parameter.requires_grad for parameter in second.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert first.training
    assert first.attention.dropout.training


def test_dropout_is_taken_over_but_not_that_of_attention_weights():
    model = vit(proj_drop_rate=0.25, attn_drop_rate=0.5)
    report = swap_attention(model, "mobile", normalize=True)
    attention = model.blocks[0].attn.attention
    assert attention.dropout.p == 0.25
    assert attention.options.normalize
    assert dict(report.dropped) == {"blocks.0.attn.attn_drop": 0, "blocks.1.attn.attn_drop": 0}
    model = vit(proj_drop_rate=0.25)
    swap_attention(model, "flow", dropout=0.0, preset="core")
    attention = model.blocks[0].attn.attention
    assert (attention.dropout.p, attention.preset) == (0.0, "core")


def test_flow_follows_the_preset_of_vision():
    model = vit()
    swap_attention(model, "flow")
    assert model.blocks[0].attn.attention.preset == "vision"


def test_biases_that_are_not_wanted_are_dropped():
    report = swap_attention(vit(), "flow", bias=False)
    assert set(report.dropped) == {
        f"blocks.{block}.attn.{name}" for block in (0, 1)
        for name in ("qkv.bias[query]", "qkv.bias[key]", "qkv.bias[value]", "proj.bias")
    }  # fmt: skip


def test_norms_without_a_place_are_dropped_or_refused():
    options = {"qk_norm": True, "scale_attn_norm": True}
    report = swap_attention(vit("vit_tiny_patch16_224", **options), "flow")
    names = [f"blocks.0.attn.{norm}.{what}" for norm in ("q_norm", "k_norm", "norm") for what in ("weight", "bias")]
    assert [name for name in report.dropped if "blocks.0" in name] == names
    model = vit("vit_tiny_patch16_224", **options)
    with pytest.raises(ValueError, match=r"softmax does not support blocks\.0\.attn\.q_norm\.weight"):
        swap_attention(model, "softmax")
    assert not any(isinstance(module, SwappedAttention) for module in model.modules())


# --------------------------------------------------------------------------------------------------- how it is attended


@pytest.mark.parametrize("attention", MECHANISMS)
@pytest.mark.parametrize("build", [vit, pvt])
def test_every_mechanism_learns_and_survives(build, attention):
    model = build()
    swap_attention(model, attention, **({"img_size": 64} if build is pvt else {}))
    x = images()
    model.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    before = model.eval()(x)
    other = build()
    swap_attention(other, attention, **({"img_size": 64} if build is pvt else {}))
    other.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), other, torch.load(buffer, weights_only=False)):
        model(images(64, batch=1))  # must not disturb the copies
        torch.testing.assert_close(again.eval()(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("attention", MECHANISMS)
def test_another_resolution(attention):
    model = vit(dynamic_img_size=True)
    swap_attention(model, attention)
    assert model(images(64)).shape == (2, 5)
    if attention not in LEARN_POSITIONS:
        assert model(images(128)).shape == (2, 5)
        return
    with pytest.raises(ValueError, match="has 17 positions, got 65 tokens"):
        model(images(128))
    model = vit(dynamic_img_size=True)
    swap_attention(model, attention, img_size=(128, 96))
    assert model(images(128, 96)).shape == model(images(64)).shape == (2, 5)
    assert model.blocks[0].attn.attention.max_length == 8 * 6 + 1


@pytest.mark.parametrize("attention", ["flow", "mobile", "aft_conv"])
def test_deit_at_224_and_448(attention):
    model = timm.create_model("deit_tiny_patch16_224", depth=1, dynamic_img_size=True, num_classes=3).eval()
    swap_attention(model, attention)
    with torch.no_grad():
        for size in (224, 448):
            assert model(images(size, batch=1)).shape == (1, 3)


def seen(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes that an attention is called with from now on."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    return shapes


def test_aft_conv_sees_the_grid_of_the_image():
    model = vit(dynamic_img_size=True, dynamic_img_pad=True)
    swap_attention(model, "aft_conv")
    shapes = seen(model.blocks[1].attn.attention)
    for height, width in ((64, 64), (32, 128), (128, 32), (33, 60)):  # the first three have as many patches
        model(images(height, width))
    assert shapes == [(2, 4, 4, 32), (2, 2, 8, 32), (2, 8, 2, 32), (2, 3, 4, 32)]


def test_aft_conv_attends_on_the_grid_as_it_lies():
    model = vit(dynamic_img_size=True)
    swap_attention(model, "aft_conv", kernel_size=(3, 3))
    attention = model.blocks[0].attn.attention
    nn.init.normal_(attention.gamma)
    model(images(32, 96))
    tokens = torch.randn(2, 12, 32)
    want = attention(tokens.view(2, 2, 6, 32)).view(2, 12, 32)
    assert torch.equal(model.blocks[0].attn(tokens), want)
    assert not torch.allclose(attention(tokens.view(2, 6, 2, 32)).view(2, 12, 32), want, atol=1e-3)
    with pytest.raises(ValueError, match=r"tokens of a grid \(2, 6\), got"):
        model.blocks[0].attn(tokens[:, :10])


def test_aft_conv_has_no_tokens_but_patches():
    model = vit("vit_tiny_patch16_224", reg_tokens=3)
    report = swap_attention(model, "aft_conv")
    assert (model.cls_token, model.reg_token, model.pos_embed) == (None, None, None)
    assert (model.num_prefix_tokens, model.has_class_token, model.global_pool) == (0, False, "avg")
    assert {"cls_token", "reg_token", "pos_embed"} <= set(report.dropped)
    assert report.dropped["pos_embed"] == 20 * 32
    x = images()
    features = model.forward_features(x)
    assert features.shape == (2, 16, 32)
    torch.testing.assert_close(model(x), model.head(features.mean(1)))
    _, maps = model.forward_intermediates(x)
    assert [tuple(one.shape) for one in maps] == [(2, 32, 4, 4)] * 2


def test_aft_conv_over_the_sequence_keeps_the_tokens():
    model = vit("deit_tiny_distilled_patch16_224")
    report = swap_attention(model, "aft_conv", kernel_size=3)
    assert "cls_token" in report.kept
    assert model(images()).shape == (2, 5)


def test_checkpointed_gradients_are_the_same():
    model = vit()
    swap_attention(model, "aft_conv")
    x, gradients = images(), []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        model.train()(x).sum().backward()
        gradients.append(model.blocks[0].attn.attention.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_aft_conv_in_a_pvt_sees_its_maps():
    model = pvt()
    swap_attention(model, "aft_conv")
    shapes = [seen(stage.blocks[0].attn.attention) for stage in model.stages]
    model(images(64, 128))
    assert [one for (one,) in shapes] == [(2, 16, 32, 8), (2, 8, 16, 16), (2, 4, 8, 16), (2, 2, 4, 32)]


@pytest.mark.parametrize("options", [{}, {"linear": True}], ids=["reduced", "pooled"])
@pytest.mark.parametrize(("attention", "reduction"), [("softmax", None), ("flow", "keep"), ("flow", None)])
def test_whom_the_queries_of_a_pvt_look_at(attention, reduction, options):
    model = pvt(**options)
    want = model(images(64, 128))
    swap_attention(model, attention, spatial_reduction=reduction)
    contexts = []
    for stage in model.stages:
        stage.blocks[0].attn.attention.register_forward_pre_hook(
            lambda _, given: contexts.append(given[1] if given[1] is None else given[1].shape[1])
        )
    got = model(images(64, 128))
    if attention == "softmax":
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if (attention, reduction) == ("flow", None):
        assert contexts == [None] * 4
        assert model.stages[0].blocks[0].attn.sr is None
    else:
        assert contexts == ([49] * 4 if options else [8, 8, 8, None])


def test_the_length_of_each_stage_is_known():
    model = pvt()
    swap_attention(model, "aft_local", img_size=(60, 100))
    lengths = [stage.blocks[0].attn.attention.max_length for stage in model.stages]
    assert lengths == [15 * 25, 8 * 13, 4 * 7, 2 * 4]
    assert model(images(60, 100)).shape == (2, 5)
    model = pvt()
    swap_attention(model, "aft_full")  # 224 x 224, as timm has it
    assert model.stages[0].blocks[0].attn.attention.max_length == 56 * 56


def test_masks_are_refused():
    model = vit()
    swap_attention(model, "flow")
    for arguments in ({"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="does not support masks"):
            model(images(), **arguments)


def test_modules_are_chosen_by_name():
    model = vit()
    assert swap_attention(model, "flow", modules="blocks.1.*").modules == ("blocks.1.attn",)
    assert isinstance(model.blocks[0].attn, timm.layers.Attention)


def test_blocks_with_several_attentions():
    model = timm.create_model("vit_small_patch16_18x2_224", **VIT).eval()
    want = model(images())
    report = swap_attention(model, "softmax")
    assert report.modules == ("blocks.0.attns.0.attn", "blocks.0.attns.1.attn", "blocks.1.attns.0.attn",
                              "blocks.1.attns.1.attn")  # fmt: skip
    torch.testing.assert_close(model(images()), want)


@pytest.mark.parametrize("attention", ["softmax", "mobile"])
def test_heads_wider_than_their_share(attention):
    model = vit()
    model.blocks[1].attn = timm.layers.Attention(32, num_heads=4, attn_head_dim=12)
    want = enlarge(model)(images())
    swap_attention(model, attention)
    assert model.blocks[1].attn.attention.head_dim == 12
    if attention == "softmax":
        torch.testing.assert_close(model(images()), want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("build", "attention", "options", "message"),
    [
        (vit, "flw", {}, "unknown attention 'flw'"),
        (vit, "flow", {"num_heads": 5}, r"num_heads must divide 32 in blocks\.0\.attn, got 5"),
        (vit, "flow", {"preset": "visoin"}, "visoin"),
        (vit, "flow", {"spatial_reduction": "keep"}, "this model has no spatial reduction"),
        (vit, "flow", {"causal": True}, "causal is not supported"),
        (narrowing, "flow", {}, r"blocks\.1\.attn makes 16 channels of 32"),
        (pvt, "flow", {"spatial_reduction": "leave"}, "must be 'keep', 'drop' or None, got 'leave'"),
        (pvt, "mobile", {"spatial_reduction": "keep"}, "mobile requires as many keys as queries"),
        (lambda: vit("deit_tiny_distilled_patch16_224"), "aft_conv", {}, "two heads of a distilled model"),
        (lambda: vit(patch_drop_rate=0.5), "aft_conv", {}, "patch_drop_rate"),
        (lambda: timm.create_model("resnet18"), "flow", {}, "ResNet has no supported attention"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "flow", {}, "no supported attention"),
        (lambda: timm.create_model("xcit_nano_12_p16_224"), "flow", {}, "no supported attention"),
        (lambda: timm.create_model("pit_ti_224"), "aft_conv", {}, "requires a VisionTransformer of timm"),
    ],
)
def test_what_does_not_fit_is_said_and_changes_nothing(build, attention, options, message):
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match=message):
        swap_attention(model, attention, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_wrong_types_are_said():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        swap_attention("deit_tiny_patch16_224", "flow")
    with pytest.raises(TypeError, match="window"):
        swap_attention(vit(), "aft_simple", window=3)


def test_a_model_is_swapped_once():
    model = vit()
    swap_attention(model, "flow")
    with pytest.raises(ValueError, match="unless already replaced"):
        swap_attention(model, "mobile")


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_report_prints_blocks_together():
    report = swap_attention(vit(), "aft_conv", kernel_size=(3, 3))
    lines = str(report).splitlines()
    assert lines[0] == "aft_conv in 2 attention modules"
    assert lines[1].split()[:2] == ["kept", f"{sum(report.kept.values()):,}"]
    assert "               2,048   blocks.*.attn.qkv.weight[key]" in lines
    assert "                  72   blocks.*.attn.attention.kernel" in lines
    assert len(lines) < 20


@pytest.mark.slow
def test_timm_is_not_imported():
    code = "import sys, flowformer; flowformer.swap_attention; assert not {'timm', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_filters_start_as_zero():
    model = vit()
    swap_attention(model, "aft_conv")
    attention = model.blocks[0].attn.attention
    assert isinstance(attention, AFTConv)
    assert attention.kernel_size == (11, 11)
    assert not attention.filters.any()
