"""Every registered model: its device and dtype, and fresh parameters drawn again."""

import copy
import math

import pytest
import torch
from torch import nn

from flowformer import create_model, list_models
from flowformer.mechanisms import find_attention, list_attentions
from flowformer.models.decision import DecisionTransformer
from flowformer.models.encoder import EncoderBlock
from flowformer.models.initialization import reset_parameters, set_initializer, truncated_normal
from flowformer.models.language import LanguageModel
from flowformer.models.registry import find_model
from flowformer.models.vision import VisionModel

LANGUAGE = {"vocab_size": 67, "max_length": 24, "dim": 48, "num_layers": 2, "num_heads": 4}
SERIES = {"in_chans": 3, "num_classes": 4, "max_length": 24, "dim": 48, "num_heads": 4, "ffn_dim": 96}
DECISION = {"observation_dim": 24, "action_dim": 24, "dim": 48, "num_layers": 2}
SEQUENCE = {"vocab_size": 67, "num_classes": 4, "max_length": 24, "dim": 48, "num_heads": 4, "ffn_dim": 96}
PYRAMID = {"img_size": 32, "embed_dims": (32, 48), "depths": (1, 2), "num_heads": 4, "layer_scale": 1e-5}
VIT = {"img_size": 64, "embed_dims": (48,), "depths": (2,), "num_heads": 4}
OPTIONS = {"aft_local": {"window": 4}, "aft_full": {"position_dim": 8}, "aft_conv": {"kernel_size": 3}}
CAUSAL = [name for name in list_attentions() if find_attention(name).can("causal")]


def tiny(name: str) -> dict:
    """Options that make a registered model small."""
    file = find_model(name).__module__.rpartition(".")[2]
    if file == "vision":
        return PYRAMID if name.startswith("flowformer") else VIT
    others = {"language_models": LANGUAGE, "timeseries": SERIES, "sequence": SEQUENCE, "decision": DECISION}
    return {**others, "lstm": {"in_chans": 3, "num_classes": 5, "dim": 8}}[file]


BUILDERS = {name: (lambda name=name, **more: create_model(name, **tiny(name), **more)) for name in list_models()}
for _attention in list_attentions():
    BUILDERS[f"vision-{_attention}"] = lambda a=_attention, **more: VisionModel(5, **PYRAMID, attention=a, **more)
for _attention in CAUSAL:
    BUILDERS[f"decision-{_attention}"] = lambda a=_attention, **more: DecisionTransformer(
        24, num_actions=24, dim=48, max_length=8, attention=a, attention_options=OPTIONS.get(a), **more
    )
    for _init in ("gpt", "fairseq"):
        BUILDERS[f"language-{_attention}-{_init}"] = lambda a=_attention, i=_init, **more: LanguageModel(
            **LANGUAGE, attention=a, attention_options=OPTIONS.get(a), init=i, **more
        )
MODULE_OPTIONS = {"conv": 3, "output_norm": True, "output_gate": True}
for _init in ("gpt", "fairseq"):
    BUILDERS[f"language-options-{_init}"] = lambda i=_init, **more: LanguageModel(
        **LANGUAGE, attention_options=MODULE_OPTIONS, init=i, **more
    )
BUILDERS["vision-options"] = lambda **more: VisionModel(5, **PYRAMID, attention_options=MODULE_OPTIONS, **more)
EVERY = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def fill(build, order) -> nn.Module:
    """A model made without memory, given memory full of NaN, and reset module by module."""
    with torch.device("meta"):
        model = build()
    assert {tensor.device.type for tensor in tensors(model).values()} == {"meta"}
    model.to_empty(device="cpu")
    for tensor in tensors(model).values():
        if tensor.is_floating_point():
            tensor.data.fill_(torch.nan)
    for module in order(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


@pytest.mark.parametrize("order", [list, reversed], ids=["parents-first", "children-first"])
@EVERY
def test_a_model_that_was_reset_is_like_a_fresh_one(build, order):
    torch.manual_seed(0)
    fresh, filled = tensors(build()), tensors(fill(build, order))
    assert list(fresh) == list(filled)
    for name, tensor in filled.items():
        assert tensor.isfinite().all(), name
        if fresh[name].unique().numel() == 1:
            assert torch.equal(tensor, fresh[name]), name
            continue
        # Two samples of one distribution: means and deviations differ by a few standard errors.
        (deviation, mean), (other, other_mean) = (torch.std_mean(t.detach().double()) for t in (fresh[name], tensor))
        error = 8 * float(deviation) / math.sqrt(tensor.numel())
        assert float(other) == pytest.approx(float(deviation), abs=error), name
        assert float(other_mean) == pytest.approx(float(mean), abs=error), name


@EVERY
def test_a_seed_gives_the_same_numbers_whatever_was_there(build):
    one, other = build(), fill(build, list)
    for model in (one, other):
        torch.manual_seed(3)
        reset_parameters(model)
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name


@EVERY
def test_device_and_dtype(build):
    for tensor in tensors(build(device="meta", dtype=torch.float64)).values():
        assert tensor.device.type == "meta"
        assert tensor.dtype == torch.float64 or not tensor.is_floating_point()
    assert {tensor.dtype for tensor in tensors(build()).values() if tensor.is_floating_point()} == {torch.float32}


def test_a_model_in_another_dtype_computes_in_it():
    assert create_model("flowformer_timeseries", **SERIES, dtype=torch.float64)(
        torch.randn(2, 9, 3, dtype=torch.float64)
    ).dtype == torch.float64  # fmt: skip
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert VisionModel(5, **PYRAMID, class_token=False, dtype=torch.float64)(images).dtype == torch.float64
    model = LanguageModel(**LANGUAGE, dtype=torch.bfloat16, positions="sinusoidal")
    assert model(torch.zeros(2, 9, dtype=torch.int64)).dtype == torch.bfloat16


@pytest.mark.parametrize("init", ["gpt", "fairseq"])
def test_language_models_begin_as_published(init):
    torch.manual_seed(0)
    model = LanguageModel(500, dim=64, num_layers=8, num_heads=4, max_length=64, init=init)
    block = model.decoder.layers[1]
    xavier = math.sqrt(2 / 128)  # of Xavier's uniform distribution between 64 and 64 channels
    wanted = {
        "gpt": (0.02, 0.02, 0.02, 0.02, 0.02, 0.02 / 4),
        "fairseq": (1 / 8, 1 / 8, xavier / math.sqrt(2), xavier, 1 / 8 / math.sqrt(3), 1 / 16 / math.sqrt(3)),
    }[init]
    weights = (
        model.embed, model.head, block.attention.k_proj, block.attention.out_proj, block.linear1, block.linear2,
    )  # fmt: skip
    for layer, deviation in zip(weights, wanted, strict=True):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert block.attention.out_proj.bias.abs().max() == 0
    assert (block.linear2.bias.abs().max() == 0) == (init == "gpt")


def test_an_initializer_goes_with_a_copy_and_leaves_parameters_alone():
    layer = nn.Linear(4, 3)
    before = layer.weight.clone()
    set_initializer(layer, lambda layer: nn.init.constant_(layer.weight, 2.0))
    assert type(layer) is nn.Linear  # quantization, for one, looks for this class and no other
    assert repr(layer) == repr(nn.Linear(4, 3))
    assert torch.equal(layer.weight, before)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    assert (other.weight == 2).all()
    assert torch.equal(layer.weight, before)
    with pytest.raises(TypeError, match="must be a linear layer or an embedding, got LayerNorm"):
        set_initializer(nn.LayerNorm(3), truncated_normal)


def test_blocks_reset_what_they_own():
    model = VisionModel(5, **{**PYRAMID, "layer_scale": 0.25})
    gamma = model.stages[0].blocks[0].gamma
    nn.init.zeros_(gamma)
    reset_parameters(model)
    assert (gamma == 0.25).all()
    assert not hasattr(EncoderBlock(8, 2, 8), "reset_parameters")  # nothing of its own: its layers have theirs
