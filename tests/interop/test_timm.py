"""Our image models in timm: created, trained, cut up and read by its own tools."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import timm
import timm.data
import timm.optim
import torch
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from timm.models._features import FeatureGetterNet
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor

import flowformer
from flowformer.interop import timm as interop
from flowformer.interop.checkpoints import load_vision
from flowformer.models.vision import VisionModel

NAMES = ["flowformer_vision_tiny", "flowformer_vision_small", "flowformer_vision_base", "flowformer_vision_micro",
         "flowformer_vision_soft",
         *(f"deit_{size}_{attention}" for size in ("tiny", "small") for attention in ("flow", "mobile", "aft_full")),
         "aft_conv_tiny_11_32", "aft_conv_tiny_11_192", "aft_conv_small_11_16", "aft_conv_small_11_384",
         "aft_conv_small_15_384"]  # fmt: skip
SMALL = {"img_size": 32, "embed_dims": (16,), "depths": (3,), "num_heads": (2,), "num_classes": 5}
DEIT = ("deit_tiny_flow", {**SMALL, "patch_size": 8})
AFT_FULL = ("deit_tiny_aft_full", {**SMALL, "patch_size": 8})
AFT_CONV = ("aft_conv_tiny_11_32", {**SMALL, "patch_size": 8})
PYRAMID = ("flowformer_vision_tiny", {**SMALL, "embed_dims": (8, 16, 24), "depths": (1, 2, 1), "num_heads": 2})
KINDS = pytest.mark.parametrize(
    ("name", "options"), [DEIT, AFT_FULL, AFT_CONV, PYRAMID], ids=lambda given: str(given)[:12]
)


def build(name: str, options: dict, **more):
    torch.manual_seed(0)
    return timm.create_model(name, **{**options, **more}).eval()


def images(size: int = 32, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_timm_knows_the_models():
    assert set(NAMES) <= set(timm.list_models())
    assert sorted(name for name in flowformer.list_models() if timm.is_model(name)) == sorted(NAMES)
    assert not set(NAMES) & set(timm.list_models(pretrained=True))
    assert interop.deit_tiny_flow.__name__ == "deit_tiny_flow"
    assert set(NAMES) < set(interop.__all__)


@pytest.mark.parametrize("name", ["deit_small_flow", "flowformer_vision_small"])
def test_the_real_models_are_the_same(name):
    with torch.device("meta"):
        theirs, mine = timm.create_model(name), flowformer.create_model(name)
    assert isinstance(theirs, interop.TimmVisionModel)
    shapes = [[(key, tuple(one.shape)) for key, one in model.state_dict().items()] for model in (theirs, mine)]
    assert shapes[0] == shapes[1]
    assert theirs.num_features == theirs.head_hidden_size == {"deit_small_flow": 384}.get(name, 768)


@KINDS
def test_weights_go_both_ways(name, options):
    model, x = build(name, options), images()
    mine = flowformer.create_model(name, **options).eval()
    assert not torch.equal(mine(x), model(x))
    mine.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), mine(x), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), mine.pool_features(x))
    model.load_state_dict(mine.state_dict())
    torch.testing.assert_close(copy.deepcopy(model)(x), mine(x), rtol=0, atol=0)


@KINDS
def test_the_head_is_replaced(name, options):
    model, x = build(name, options), images()
    assert model.get_classifier() is model.head
    assert (model.num_classes, model(x).shape) == (5, (2, 5))
    model.double().reset_classifier(7)
    assert model(x.double()).shape == (2, 7)
    assert model.num_classes == 7
    assert (model.head.weight.dtype, model.head.bias.any()) == (torch.float64, False)
    model.reset_classifier(0, "")
    assert torch.equal(model(x.double()), model.forward_features(x.double()))
    model.reset_classifier(3, "avg")
    features = model.forward_features(x.double())[:, model.num_prefix_tokens :]
    torch.testing.assert_close(model(x.double()), model.head(features.mean(1)))


def test_a_model_without_a_head():
    model = build(*DEIT, num_classes=0)
    assert model(images()).shape == (2, 16)
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    assert build(*DEIT, num_classes=0, global_pool="")(images()).shape == (2, 17, 16)


def test_timms_arguments_mean_what_they_say():
    model = build(*PYRAMID, in_chans=1, drop_path_rate=0.3, drop_rate=0.25, proj_drop_rate=0.125)
    assert model(images(channels=1)).shape == (2, 5)
    rates = [block.drop_path.probability for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert model.head_drop.p == 0.25
    block = model.stages[0].blocks[0]
    assert (block.attention.dropout.p, block.dropout.p) == (0.125, 0.125)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(images(channels=1)), model(images(channels=1)))
    pooled = build(*DEIT, global_pool="avg")
    torch.testing.assert_close(pooled(images()), pooled.head(pooled.forward_features(images())[:, 1:].mean(1)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_drop_rate": 0.1}, TypeError, "attn_drop_rate"),
        ({"dropout": 0.1}, TypeError, "timm calls it proj_drop_rate"),
        ({"image_size": 64}, TypeError, "image_size"),
        ({"global_pool": "map"}, ValueError, "global_pool must be one of 'token', 'avg', '' in this model, got 'map'"),
        ({"num_classes": -1}, ValueError, "num_classes must not be negative"),
        ({"pretrained": True}, RuntimeError, "No pretrained weights exist for deit_tiny_flow"),
    ],
)
def test_what_is_not_known_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        build(*DEIT, **options)


def test_pooling_that_a_model_has_not_is_refused():
    with pytest.raises(ValueError, match="must be one of 'avg', '' in this model, got 'token'"):
        build(*PYRAMID).reset_classifier(3, "token")


# ------------------------------------------------------------------------------------------------------------- features


def test_maps_of_a_pyramid():
    model = build(*PYRAMID, features_only=True)
    assert isinstance(model, FeatureGetterNet)
    assert model.feature_info.channels() == [8, 16, 24]
    assert model.feature_info.reduction() == [4, 8, 16]
    maps = model(images())
    assert [tuple(one.shape) for one in maps] == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 24, 2, 2)]
    whole = build(*PYRAMID)
    for got, want in zip(maps, whole.features(images()), strict=True):
        assert torch.equal(got, want)
    assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"position", "stages"}  # all are used


def test_maps_of_a_deit():
    model = build(*DEIT, features_only=True)  # the last three blocks
    assert model.feature_info.reduction() == [8, 8, 8]
    maps = model(images())
    assert [tuple(one.shape) for one in maps] == [(2, 16, 4, 4)] * 3
    whole = build(*DEIT)
    assert torch.equal(maps[-1], whole.features(images())[0])
    assert not torch.equal(maps[0], maps[1])


@KINDS
def test_what_maps_do_not_need_is_left_out(name, options):
    model = build(name, options, features_only=True, out_indices=(1,))
    (got,) = model(images())
    whole = build(name, options)
    want = whole.forward_intermediates(images(), intermediates_only=True)[1]
    assert torch.equal(got, want)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(1 for _ in model.parameters()) < sum(1 for _ in whole.parameters())


@KINDS
def test_intermediates(name, options):
    model, x = build(name, options), images()
    final, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(model.feature_info) == 3
    tokens = final[:, model.num_prefix_tokens :]
    torch.testing.assert_close(maps[-1], tokens.transpose(1, 2).reshape(maps[-1].shape))
    rows = model.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(rows[-1], tokens)
    early = model.forward_intermediates(x, [0, 1], stop_early=True, intermediates_only=True)
    both = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(early, both, strict=True))
    for info in model.feature_info:
        model.get_submodule(info["module"])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_early_stops_are_early():
    model = build(*DEIT)
    model.stages[0].blocks[2].register_forward_hook(lambda *_: pytest.fail("computed what was not asked for"))
    model.forward_intermediates(images(), [0, 1], stop_early=True, intermediates_only=True)


def test_norm_fits_the_last_stage_only():
    model, x = build(*PYRAMID), images()
    plain, normed = (model.forward_intermediates(x, norm=norm, intermediates_only=True) for norm in (False, True))
    assert torch.equal(plain[0], normed[0])
    assert not torch.equal(plain[2], normed[2])
    model.prune_intermediate_layers([0, 1], prune_head=False)  # the norm and the head of a stage that is gone
    assert model.num_features == 16
    assert model(x).shape == (2, 16, 16)
    kept = build(*PYRAMID)
    kept.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(kept(x), build(*PYRAMID)(x))


# ------------------------------------------------------------------------------------------------------------- training


def test_images_are_prepared_as_published():
    from PIL import Image

    model = timm.create_model("deit_tiny_flow", depths=(1,))
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    assert config["input_size"] == (3, 224, 224)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.875)
    transform = timm.data.create_transform(**config)
    x = transform(Image.new("RGB", (300, 280), (124, 116, 104)))  # ImageNet's mean, in bytes
    assert x.shape == (3, 224, 224)
    assert x.abs().max() < 0.02
    assert model.pretrained_cfg["architecture"] == "deit_tiny_flow"
    assert timm.create_model("flowformer_vision_micro").pretrained_cfg["input_size"] == (3, 32, 32)


@KINDS
def test_weight_decay_leaves_alone_what_it_should(name, options):
    model = build(name, options)
    groups = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    spared = {names[id(one)] for group in groups if group["weight_decay"] == 0 for one in group["params"]}
    wanted = {key for key, one in model.named_parameters() if one.ndim == 1 or key in ("position", "class_token")}
    assert spared == wanted
    assert sum(len(group["params"]) for group in groups) == len(names)


@KINDS
def test_learning_rates_decay_with_depth(name, options):
    model = build(name, options)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    assert scales["head.weight"] == 1
    assert scales["stages.0.embed.weight"] == min(scales.values())
    order = [scales[f"{info['module']}.linear1.weight"] for info in model.feature_info]
    assert order == sorted(order)
    assert len(set(order)) == 3
    if len(model.stages) > 1:  # what embeds a stage learns with its first block, or the block before
        assert scales["stages.1.embed.weight"] <= scales["stages.1.blocks.0.linear1.weight"]
        assert scales["stages.1.embed.weight"] >= scales["stages.0.blocks.0.linear1.weight"]
    assert set(model.group_matcher(coarse=True)) == {"stem", "blocks"}


@KINDS
def test_checkpointed_gradients_are_the_same(name, options, monkeypatch):
    calls, found, checkpoint = [], [], interop.checkpoint
    monkeypatch.setattr(interop, "checkpoint", lambda *given, **more: (calls.append(1), checkpoint(*given, **more))[1])
    for enable in (False, True):
        model = build(name, options).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images()).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert len(calls) == sum(len(stage.blocks) for stage in model.stages)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@KINDS
def test_another_size(name, options):
    model = build(name, options)
    if "aft_full" in name:
        with pytest.raises(ValueError, match="interpolates them"):
            model(images(64))
    else:
        assert model(images(64)).shape == (2, 5)
    model.set_input_size((64, 64))
    assert model(images(64)).shape == (2, 5)
    with pytest.raises(ValueError, match="cannot be changed, got patch_size=4"):
        model.set_input_size(64, patch_size=4)
    assert model.pretrained_cfg["fixed_input_size"] is ("aft_full" in name)


def test_it_learns_in_timms_hands():
    model = build(*PYRAMID).train()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05)
    x, y = images(batch=10), torch.arange(10) % 5
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < losses[0]


def test_it_is_a_vision_model():
    assert isinstance(build(*DEIT), VisionModel)


# ------------------------------------------------------------------------------------------------------------ as timm's


# What initializes anew or reads weights of JAX, and names that timm keeps for older code; what softmax alone can do.
OTHERS = {"fix_init_weight", "init_weights", "load_pretrained", "freeze_patch_emb"}
SOFTMAX = {"attn_mask", "is_causal"}


@pytest.mark.parametrize("theirs", [VisionTransformer, PyramidVisionTransformerV2])
def test_methods_of_timms_models(theirs):
    methods = {name: value for name, value in vars(theirs).items() if callable(value) and not name.startswith("_")}
    assert len(methods) > 7
    for name in set(methods) - OTHERS:
        wanted = set(inspect.signature(methods[name]).parameters) - SOFTMAX
        found = list(inspect.signature(getattr(interop.TimmVisionModel, name)).parameters)
        # The image is the first argument, by whatever name.
        assert wanted - {"x"} <= set(found), (name, wanted, found)


@KINDS
def test_intermediates_as_timms_vit_has_them(name, options):
    model, x = build(name, options), images()
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5, depth=3).eval()
    for given in (
        {"return_prefix_tokens": True, "intermediates_only": True},
        {"return_prefix_tokens": True, "norm": True},
        {"output_dict": True},
        {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True, "output_fmt": "NLC"},
    ):
        ours, wanted = (one.forward_intermediates(x, [0, 2], **given) for one in (model, theirs))
        if model.num_prefix_tokens:
            assert structure(ours) == structure(wanted)
        maps = ours["image_intermediates"] if isinstance(ours, dict) else ours[-1] if isinstance(ours, tuple) else ours
        assert len(maps) == 2
    _, maps = model.forward_intermediates(x, norm=True, return_prefix_tokens=True)
    if model.num_prefix_tokens:
        final = model.forward_features(x)
        torch.testing.assert_close(maps[-1][1], final[:, :1])
        assert [one.shape for one in model.get_intermediate_layers(x, 2)] == [(2, 16, 16)] * 2
        assert model.get_intermediate_layers(x, [1], reshape=True, return_prefix_tokens=True)[0][1].shape == (2, 1, 16)
    features = model.forward_features(x)
    assert torch.equal(model.pool(features, "avg"), features[:, model.num_prefix_tokens :].mean(1))
    assert torch.equal(model.pool(features, ""), features)


def structure(value):
    """The nesting of a result, with the number of axes of its tensors."""
    if isinstance(value, torch.Tensor):
        return value.ndim
    if isinstance(value, dict):
        return {name: structure(value[name]) for name in sorted(value)}
    return type(value).__name__, [structure(one) for one in value]


def test_a_new_head_is_in_the_mode_of_the_model():
    model = build(*DEIT)
    model.reset_classifier(7)
    assert not model.head.training
    model.train().reset_classifier(3)
    assert model.head.training


# ------------------------------------------------------------------------------------------------------------- weights

TABLES = [
    DEIT, AFT_FULL, PYRAMID, AFT_CONV,
    ("deit_tiny_flow", {**SMALL, "patch_size": 8, "attention": "aft_local", "attention_options": {"window": 3}}),
    ("flowformer_vision_tiny", {**PYRAMID[1], "attention": "aft_full"}),
    ("deit_tiny_aft_full", {**AFT_FULL[1], "attention_options": {"position_dim": None}}),
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("name", "options"), TABLES, ids=lambda given: str(given)[:12])
def test_weights_of_another_size_are_those_resized(tmp_path, name, options, suffix):
    small = build(name, options)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    path = tmp_path / f"weights.{suffix}"
    save_file(small.state_dict(), path) if suffix == "safetensors" else torch.save({"model": small.state_dict()}, path)
    overlay = {"file": str(path), "num_classes": 5}
    large = build(name, options, img_size=48, pretrained=True, pretrained_cfg_overlay=overlay)
    loaded = build(name, options, img_size=48)
    load_checkpoint(loaded, str(path), filter_fn=interop.checkpoint_filter_fn)
    small.resize(48)
    for found in (large, loaded):
        torch.testing.assert_close(found(images(48)), small(images(48)), rtol=0, atol=0)
    headless = build(name, options, img_size=48, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(headless.stages[0].embed.weight, small.stages[0].embed.weight)
    assert headless(images(48)).shape == (2, 3)
    maps = build(name, options, img_size=48, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(maps(images(48))[-1], small.forward_intermediates(images(48))[1][-1])


def test_weights_of_images_that_are_no_squares(tmp_path):
    wide = build(*DEIT, img_size=(16, 40))  # 2 x 5 patches
    torch.save(wide.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    with pytest.raises(ValueError, match=r"position has 10 patches, which are no square.*input_size"):
        build(*DEIT, pretrained=True, pretrained_cfg_overlay=overlay)
    found = build(*DEIT, pretrained=True, pretrained_cfg_overlay={**overlay, "input_size": (3, 16, 40)})
    torch.testing.assert_close(found(images()), wide.resize(32)(images()), rtol=0, atol=0)


def test_published_weights_load_through_timm():
    golden = load_file(Path(__file__).parent.parent / "golden" / "model_vision.safetensors")
    published = {name.removeprefix("state."): value for name, value in golden.items() if name.startswith("state.")}
    ours = load_vision(published, num_heads=2)
    shape = {"embed_dims": ours.embed_dims, "depths": [len(stage.blocks) for stage in ours.stages], "num_heads": 2}
    sizes = {"img_size": ours.img_size, "patch_size": ours.strides[0], "num_classes": ours.num_classes}
    ratio = ours.stages[0].blocks[0].linear1.out_features / ours.embed_dims[0]
    model = build("flowformer_vision_small", {**shape, **sizes, "mlp_ratio": ratio})
    model.load_state_dict(interop.checkpoint_filter_fn(published, model))
    x = images(ours.img_size[0])
    torch.testing.assert_close(model(x), ours(x))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        (b"", "could not be loaded"),
        (b"nothing of the kind", "could not be loaded"),
        (pickle.dumps({"w": Path("x")}, protocol=2), "could not be loaded.*weights_only=True blocked"),
        ({"head.bias": torch.ones(5)}, "could not be loaded.*Missing key"),
        ([torch.ones(1)], "could not be loaded"),
    ],
    ids=["missing", "empty", "text", "code", "others", "list"],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_hold_no_weights_are_named(tmp_path, content, message, suffix):
    path = tmp_path / f"weights.{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    overlay = {"file": str(path), "num_classes": 5}
    with pytest.raises((ValueError, OSError), match=message if suffix == "pth" else "not found|could not be") as caught:
        build(*DEIT, pretrained=True, pretrained_cfg_overlay=overlay)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize(("name", "options"), [DEIT, AFT_CONV, PYRAMID], ids=lambda given: str(given)[:12])
def test_a_batch_may_be_empty(name, options):
    model = build(name, options).train()
    nothing = images(batch=0)
    assert model(nothing).shape == (0, 5)
    assert [one.shape[0] for one in model.forward_intermediates(nothing, intermediates_only=True)] == [0, 0, 0]
    model(nothing).sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of every check of a shape
@pytest.mark.parametrize(("name", "options"), [DEIT, AFT_CONV, PYRAMID], ids=lambda given: str(given)[:12])
def test_a_trace_takes_any_batch(name, options):
    model = build(name, options, depths=[1] * len(options["depths"]))
    traced = torch.jit.trace(model, images(batch=2))
    for batch in (1, 3):
        torch.testing.assert_close(traced(images(batch=batch)), model(images(batch=batch)))


@pytest.mark.parametrize(("name", "options"), [AFT_FULL, AFT_CONV], ids=lambda given: str(given)[:12])
def test_an_exported_program_takes_any_batch(name, options):
    model = build(name, options, depths=[1] * len(options["depths"]))
    free = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images(),), dynamic_shapes=free).module()
    torch.testing.assert_close(program(images(batch=5)), model(images(batch=5)))


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_traced_says_so():
    with pytest.raises(TypeError, match=r"torch\.jit\.trace cannot trace AFT-full attention: use torch\.export"):
        torch.jit.trace(build(*AFT_FULL), images())
    with pytest.raises(TypeError, match=r"torch\.fx cannot trace this model.*features_only=True"):
        torch.fx.symbolic_trace(build(*DEIT))
    with pytest.raises(TypeError, match=r"torch\.fx cannot trace this model"):
        create_feature_extractor(build(*DEIT), ["norm"])
