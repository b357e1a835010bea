"""Models of images: shapes, sizes, positions, and what training needs of them."""

import re
from pathlib import Path

import pytest
import torch

from flowformer import FlowAttention, create_model, list_attentions, list_models
from flowformer.models.vision import VisionModel
from flowformer.models.vision_blocks import DropPath

DOCS = Path(__file__).parents[2] / "docs" / "vision.md"
FAMILIES = ("flowformer_vision_", "deit_", "aft_conv_")
MODELS = [name for name in list_models() if name.startswith(FAMILIES)]
SMALL = {"embed_dims": (16, 24), "depths": (1, 2), "num_heads": 4, "img_size": 32}


def small(num_classes=5, **options):
    torch.manual_seed(0)
    return VisionModel(num_classes, **{**SMALL, **options}).eval()


def rows_of_sizes():
    """Name, our parameters and the published ones, in millions, of each row of the table in docs/vision.md."""
    found = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+|-) \|", DOCS.read_text(encoding="utf-8"), re.M)
    return {name: (float(ours), None if published == "-" else float(published)) for name, ours, published in found}


def test_table_of_sizes_has_every_model():
    assert sorted(rows_of_sizes()) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_table_and_published(name):
    ours, published = rows_of_sizes()[name]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in create_model(name).parameters()) / 1e6
    assert size == pytest.approx(ours, abs=0.005)
    if published is not None:
        assert abs(size - published) < 0.1


def test_published_shape():
    with torch.device("meta"):
        model = create_model("flowformer_vision_small", drop_path_rate=0.2)
    assert model.embed_dims == (96, 192, 384, 768)
    assert [len(stage.blocks) for stage in model.stages] == [3, 3, 10, 3]
    assert model.grids(224) == [(56, 56), (28, 28), (14, 14), (7, 7)]
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert {block.attention.num_heads for block in blocks} == {12}
    assert [block.drop_path.probability for block in blocks] == pytest.approx([0.2 * i / 18 for i in range(19)])
    assert all(block.gamma is not None for block in blocks)


def test_stages_may_have_a_mechanism_each():
    model = small(attention=("performer", "flow"), attention_options=({"num_features": 5}, {"clamp": 2.0}))
    first, last = (stage.blocks[0].attention for stage in model.stages)
    assert (first.num_features, last.options.clamp, last.preset) == (5, 2.0, "vision")
    for wrong in ({"attention": ("flow",)}, {"attention_options": ({}, {}, {})}, {"attention": None}):
        with pytest.raises(ValueError, match="must be one for all stages, or one for each of the 2"):
            small(**wrong)


@pytest.mark.parametrize("attention", list_attentions())
def test_every_mechanism_learns(attention):
    model = small(attention=attention).train()
    loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (1, 200)])
def test_any_size(size):
    model = small()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)
    maps = model.features(torch.randn(2, 3, *size))
    assert [tuple(one.shape[2:]) for one in maps] == model.grids(size)


def test_features_only():
    model = small(features_only=True)
    maps = model(torch.randn(2, 3, 32, 32))
    assert [one.shape for one in maps] == [(2, 16, 8, 8), (2, 24, 4, 4)]
    assert not any(name.startswith(("head", "norm.")) for name, _ in model.named_parameters())


def test_maps_are_what_the_head_sees():
    model, images = small(), torch.randn(2, 3, 32, 32)
    pooled = model.norm(model.features(images)[-1].flatten(2).transpose(1, 2)).mean(1)
    torch.testing.assert_close(model.pool_features(images), pooled)
    torch.testing.assert_close(model(images), model.head(pooled))


def test_positions_are_interpolated_as_a_picture():
    # A position table that is a plane stays that plane on a grid twice as fine, but for its edges.
    model = small()
    rows = torch.arange(8.0).view(8, 1, 1).expand(8, 8, 16)
    model.position.data = rows.reshape(64, 16).clone()
    fine = model._interpolate(model.position, (8, 8), (16, 16)).view(16, 16, 16)
    torch.testing.assert_close(fine[4:12, :, 0], ((torch.arange(4.0, 12) + 0.5) / 2 - 0.5)[:, None].expand(8, 16))


def test_the_class_token_keeps_its_position():
    model = small(class_token=True, embed_dims=(16,), depths=(1,))
    resized = model._interpolate(model.position, (8, 8), (4, 6))
    assert resized.shape == (25, 16)
    torch.testing.assert_close(resized[0], model.position[0])


def test_the_class_token_is_classified():
    model = small(class_token=True, embed_dims=(16,), depths=(1,))
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    model.class_token.data += torch.randn(1, 16)
    assert (model(images) - before).abs().max() > 1e-3
    assert model.features(images)[0].shape == (2, 16, 8, 8)


@pytest.mark.parametrize("options", [{}, {"attention_options": {"position_dim": None}}, {"class_token": True}])
def test_aft_full_is_resized(options):
    shape = {"attention": "aft_full", "embed_dims": (16,), "depths": (2,)}
    model, images = small(**shape, **options), torch.randn(2, 3, 32, 32)
    before = model(images)
    with pytest.raises(ValueError, match=r"AFTFull has learned positions for images of \(32, 32\), got \(48, 40\)"):
        model(torch.randn(2, 3, 48, 40))
    # Shorter ones too: the first positions of a long table are not those of a small picture.
    with pytest.raises(ValueError, match="resize"):
        model(torch.randn(2, 3, 16, 16))
    # A state dict of the resized model fits one that was built for the size.
    model.resize((48, 40))
    assert model.stages[0].blocks[0].attention.max_length == len(model.position)
    assert model(torch.randn(2, 3, 48, 40)).shape == (2, 5)
    small(**shape, **options, **{"img_size": (48, 40)}).load_state_dict(model.state_dict())
    assert (small(**shape, **options).resize((32, 32))(images) - before).abs().max() == 0


def test_resized_positions_go_on_learning():
    model = small(attention="aft_full").resize(48).train()
    model(torch.randn(1, 3, 48, 48)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_resize_changes_nothing_of_flow():
    model, images = small(), torch.randn(1, 3, 48, 48)
    before = model(images)
    torch.testing.assert_close(model.resize(48)(images), before)


def test_flow_is_the_preset_of_vision_unless_said():
    for options, preset in (({}, "vision"), ({"preset": "core"}, "core")):
        attention = small(attention_options=options).stages[0].blocks[0].attention
        assert attention.options == FlowAttention(16, 4, preset=preset).options


def test_filters_of_images_have_two_dimensions():
    assert small(attention="aft_conv").stages[0].blocks[0].attention.kernel_size == (11, 11)
    with pytest.raises(ValueError, match="without class token"):
        small(attention="aft_conv", class_token=True, embed_dims=(16,), depths=(1,))


def test_mobile_keeps_its_scale_at_any_resolution():
    model = create_model("deit_tiny_mobile", num_classes=3, img_size=64).eval()
    attention = model.stages[0].blocks[0].attention
    token = torch.randn(1, 1, 192)
    few, many = (attention(token.expand(1, tokens, 192)).std() for tokens in (17, 1700))
    assert 0.9 < many / few < 1.1


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(20_000, 2)
    out = drop(x)
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.75]))
    assert (out[:, 0] == out[:, 1]).all()
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(x), x)


def test_fresh_weights():
    published, wide = small(embed_dims=(64, 64)), small(embed_dims=(64, 64), weight_std=None)
    assert published.stages[0].blocks[0].linear1.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.05)
    assert wide.stages[0].blocks[0].linear1.weight.std().item() == pytest.approx(0.88 / 8, rel=0.05)
    assert published.head.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embed_dims": (16,)}, r"one entry for each stage, got \(16,\), \(1, 2\), \(4,\)"),
        ({"num_heads": (4, 4, 4)}, "one entry for each stage"),
        ({"depths": (1, 0)}, "must be positive"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"img_size": 0}, "img_size must be positive, got 0"),
        ({"class_token": True}, "requires a single stage, got 2"),
        ({"attention": "flwo"}, "did you mean 'flow'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        small(**options)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \(batch, 3, height, width\), got"):
        small()(torch.zeros(shape))


def test_tokens_that_decay_leaves_alone():
    names = {name for name, _ in small(class_token=True, embed_dims=(16,), depths=(1,)).named_parameters()}
    assert small().no_weight_decay() <= names


@pytest.mark.slow  # test_waiting_models.py compiles one in training
def test_compiles_without_breaks():
    model, images = small(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_no_classes_no_head():
    model = small(num_classes=0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.num_features) == (2, 24)
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    with pytest.raises(ValueError, match="num_classes must not be negative, got -1"):
        small(num_classes=-1)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_dropped_unless_asked_for(name):
    with torch.device("meta"):
        blocks = [block for stage in create_model(name).stages for block in stage.blocks]
    assert {block.drop_path.probability for block in blocks} == {0}
