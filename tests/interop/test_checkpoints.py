"""Published weights give published numbers."""

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowformer.common.errors import DataError
from flowformer.interop.checkpoints import (
    gpt2_state_dict,
    load_gpt,
    load_gpt2,
    load_timeseries,
    load_vision,
    timeseries_state_dict,
    vision_state_dict,
)
from flowformer.mechanisms import find_attention, list_attentions

GOLDEN = Path(__file__).parent.parent / "golden"
CAUSAL = [name for name in list_attentions() if find_attention(name).can("causal")]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "model_timeseries.safetensors")


@pytest.fixture(scope="module")
def golden_gpt():
    return load_file(GOLDEN / "model_gpt.safetensors")


def published(golden):
    return {name.removeprefix("state."): value for name, value in golden.items() if name.startswith("state.")}


def test_timeseries_matches_golden(golden):
    model = load_timeseries(published(golden), num_heads=8, mask_padding=False)
    out = model(golden["input.x"], golden["input.padding_mask"])
    torch.testing.assert_close(out, golden["output"], rtol=1e-5, atol=3e-6)


def test_timeseries_with_invisible_padding_differs_only_where_there_is_padding(golden):
    model = load_timeseries(published(golden), num_heads=8)
    mask = golden["input.padding_mask"]
    difference = (model(golden["input.x"], mask) - golden["output"]).abs().amax(-1)
    whole = mask.all(-1)
    assert whole.any()
    assert not whole.all()
    assert difference[whole].max() < 3e-6
    assert difference[~whole].min() > 1e-3


def test_every_published_name_is_used_once(golden):
    state = timeseries_state_dict(published(golden))
    assert len(state) == len(published(golden))


@pytest.fixture(scope="module")
def golden_vision():
    return load_file(GOLDEN / "model_vision.safetensors")


def test_vision_matches_golden(golden_vision):
    model = load_vision(published(golden_vision))
    torch.testing.assert_close(model(golden_vision["input.image"]), golden_vision["output"], rtol=1e-5, atol=3e-6)


def test_every_published_name_of_vision_is_used(golden_vision):
    weights = published(golden_vision)
    fused = sum(".qkv." in name for name in weights)
    assert len(vision_state_dict(weights)) == len(weights) + 2 * fused


def test_vision_weights_that_do_not_fit_are_named(golden_vision):
    weights = published(golden_vision)
    del weights["blocks.2.1.gamma"]
    with pytest.raises(ValueError, match=r"missing: stages\.2\.blocks\.1\.gamma"):
        load_vision(weights)
    with pytest.raises(ValueError, match=r"'blocks\.0\.0\.attn\.q\.weight' is not a parameter"):
        vision_state_dict({"blocks.0.0.attn.q.weight": torch.zeros(1)})


def test_unknown_name_is_refused(golden):
    with pytest.raises(ValueError, match=r"'encoder\.surprise' is not a parameter"):
        timeseries_state_dict({"encoder.surprise": torch.zeros(1)})


def test_weights_that_do_not_fit_are_named(golden):
    weights = published(golden)
    with pytest.raises(ValueError, match=r"missing: head\.weight \(in our names\)"):
        load_timeseries({name: tensor for name, tensor in weights.items() if name != "output_layer.weight"})
    weights["project_inp.bias"] = weights["project_inp.bias"][:-1]
    with pytest.raises(ValueError, match=r"of another shape: embed\.bias is \(\d+,\) and must be \(\d+,\)"):
        load_timeseries(weights)
    with pytest.raises(ValueError, match=r"missing position, embed\.weight"):
        load_timeseries({})


# ------------------------------------------------------------------------------------------------- the GPT-style module


def test_gpt_matches_golden(golden_gpt):
    model = load_gpt(published(golden_gpt), num_heads=3)
    out = model(golden_gpt["input.idx"])
    torch.testing.assert_close(out, golden_gpt["output"], rtol=1e-5, atol=1e-6)
    # And in float64, where what is left is the rounding of the record.
    out = model.double()(golden_gpt["input.idx"])
    torch.testing.assert_close(out, golden_gpt["output"].double(), rtol=1e-5, atol=1e-6)


def test_gpt_decodes_as_it_was_recorded(golden_gpt):
    model = load_gpt(published(golden_gpt), num_heads=3)
    state = model.init_state(2)
    for tokens, wanted in zip(golden_gpt["input.idx"].T, golden_gpt["output"].transpose(0, 1), strict=True):
        logits, state = model.step(tokens, state)
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)


def test_every_name_of_the_gpt_is_used_once(golden_gpt):
    weights = published(golden_gpt)
    assert len(load_gpt(weights, num_heads=3).state_dict()) == len(weights)
    with pytest.raises(
        ValueError, match=r"'transformer\.surprise' is not a parameter of the published GPT-style module"
    ):
        load_gpt({**weights, "transformer.surprise": torch.zeros(1)}, num_heads=3)


# --------------------------------------------------------------------------------------------- GPT-2 of transformers


def gpt2(**settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(37, (2, 16))


@pytest.mark.parametrize(
    "settings", [{}, {"n_inner": 40, "activation_function": "relu"}, {"tie_word_embeddings": False}], ids=str
)
def test_softmax_gives_the_logits_of_gpt2(settings, tokens, tmp_path):
    model = gpt2(**settings)
    wanted = model(tokens).logits
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path, str(tmp_path)):
        ours = load_gpt2(source, attention="softmax")
        torch.testing.assert_close(ours(tokens), wanted, rtol=1e-5, atol=1e-5)


def test_gpt2_decodes_and_pads(tokens):
    model, mask = gpt2(), torch.ones(2, 16, dtype=torch.bool)
    mask[0, :5] = False
    wanted = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    ours = load_gpt2(model, attention="softmax")
    _, state = ours(tokens[:, :10], mask[:, :10], return_state=True)
    for time in range(10, 16):
        logits, state = ours.step(tokens[:, time], state)
        torch.testing.assert_close(logits, wanted[:, time], rtol=1e-5, atol=1e-5)


def test_parts_and_older_files_are_read(tokens, tmp_path):
    model = gpt2()
    wanted = model(tokens).logits
    model.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    # Before safetensors: names without "transformer.", and tables of ones beside the weights.
    weights = {name.removeprefix("transformer."): tensor for name, tensor in model.transformer.state_dict().items()}
    weights |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    (tmp_path / "old").mkdir()
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "config.json").write_text(json.dumps(model.config.to_dict()))
    for folder in ("parts", "old"):
        out = load_gpt2(tmp_path / folder, attention="softmax")(tokens)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", CAUSAL)
def test_another_attention_keeps_everything_else(attention, tokens):
    theirs = gpt2()
    options = {"aft_conv": {"kernel_size": 3}, "reformer": {"shared_qk": False}}.get(attention, {})
    ours = load_gpt2(theirs, attention=attention, attention_options=options)
    state, wanted = ours.state_dict(), gpt2_state_dict(theirs.state_dict())
    kept = {name for name, tensor in wanted.items() if name in state and state[name].shape == tensor.shape}
    for name in kept:
        torch.testing.assert_close(state[name], wanted[name], rtol=0, atol=0)
    lost = {name for name in wanted if name not in kept} - {"head.weight"}
    assert all(attention == "aft_conv" and ".attention.k_proj." in name for name in lost)
    assert all(".attention." in name for name in set(state) - kept)
    assert ours(tokens).isfinite().all()
    assert ours.head is None


def test_options_of_the_module_begin_anew(tokens):
    ours = load_gpt2(gpt2(), attention_options={"conv": 4, "output_norm": True, "output_gate": True})
    assert ours(tokens).isfinite().all()
    fresh = set(ours.state_dict()) - set(load_gpt2(gpt2()).state_dict())
    names = {name.removeprefix("decoder.blocks.0.attention.") for name in fresh if ".blocks.0." in name}
    assert {name.split(".")[0] for name in names} == {"q_conv", "k_conv", "v_conv", "out_norm", "gate_proj"}


def test_flow_is_the_default_and_is_not_softmax(tokens):
    theirs = gpt2()
    ours = load_gpt2(theirs)
    assert ours.decoder.layers[0].attention.preset == "core"
    assert set(ours.state_dict()) == set(load_gpt2(theirs, attention="softmax").state_dict())
    assert (ours(tokens) - theirs(tokens).logits).abs().max() > 1e-2


def test_the_dtype_of_the_weights_is_kept(tokens):
    assert load_gpt2(gpt2().bfloat16())(tokens).dtype == torch.bfloat16


def test_gpt2_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx = True is not supported, only False"):
        load_gpt2(gpt2(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ValueError, match="activation_function must be one of"):
        load_gpt2(gpt2(activation_function="silu"))
    with pytest.raises(TypeError, match="source must be a folder or a GPT2LMHeadModel, got dict"):
        load_gpt2({})
    with pytest.raises(FileNotFoundError, match=r"config\.json not found"):
        load_gpt2(tmp_path)
    gpt2().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for change, message in (
        ({"transformer.h.1.ln_1.bias": None}, r"missing: decoder\.blocks\.1\.norm1\.bias \(in our names\)"),
        ({"transformer.h.9.ln_1.bias": torch.ones(24)}, r"unexpected: decoder\.blocks\.9\.norm1\.bias"),
        (
            {"transformer.ln_f.bias": torch.ones(2)},
            r"of another shape: decoder\.norm\.bias is \(2,\) and must be \(24,\)",
        ),
        (
            {"transformer.h.0.attn.c_proj.weight": torch.ones(24, 2)},
            r"out_proj\.weight is \(2, 24\) and must be \(24, 24\)",
        ),
        ({"transformer.h.0.attn.c_attn.weight": None}, r"missing: decoder\.blocks\.0\.attention\.k_proj\.weight, "),
        ({"transformer.wpe.weight": None}, r"missing position\.weight"),
        ({"score.weight": torch.ones(2, 24)}, r"'transformer\.score\.weight' is not a parameter of GPT-2"),
    ):
        save_file({name: t.contiguous() for name, t in (weights | change).items() if t is not None}, file)
        with pytest.raises(ValueError, match=message):
            load_gpt2(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neo"}')
    with pytest.raises(ValueError, match="the model must be a GPT-2, got model_type 'gpt_neo'"):
        load_gpt2(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_gpt2(tmp_path)


# ------------------------------------------------------------------------------------------------ files of others


class Payload:
    def __reduce__(self):
        return (Path.mkdir, (Path("RAN"),))


def sharded(folder: Path) -> None:
    gpt2().save_pretrained(folder, max_shard_size="10KB")


DAMAGES = {
    "no object": ("config.json", lambda data: b"[]", "config.json must contain a JSON object, got list"),
    "no JSON": ("config.json", lambda data: data[:20], "config.json is not JSON"),
    "another encoding": ("config.json", lambda data: b"\xff\xfe{}", "config.json is not JSON"),
    "deep": ("config.json", lambda data: b"[" * 100_000, "config.json is not JSON"),
    "no heads": ("config.json", lambda data: b'{"model_type": "gpt2"}', "n_head must be an integer, got None"),
    "empty": ("model.safetensors", lambda data: b"", "model.safetensors is damaged"),
    "cut": ("model.safetensors", lambda data: data[:-100], "model.safetensors is damaged"),
    "cut header": ("model.safetensors", lambda data: data[:50], "model.safetensors is damaged"),
    "huge header": ("model.safetensors", lambda data: b"\xff" * 8 + data[8:], "model.safetensors is damaged"),
    "a page": ("model.safetensors", lambda data: b"<html>not found</html>", "model.safetensors is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_by_file(tmp_path, damage):
    name, change, message = DAMAGES[damage]
    gpt2().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load_gpt2(tmp_path)
    assert "\n" not in str(caught.value)


def pickled(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


PICKLES = {
    "code": (lambda: pickle.dumps({"w": Payload()}, protocol=2), "it contains more than tensors"),
    "code in torch's form": (lambda: pickled({"w": Payload()}), "it contains more than tensors"),
    "no pickle": (lambda: b"nothing of the kind", "is damaged, or holds no weights"),
    "empty": (lambda: b"", "is damaged, or holds no weights"),
    "cut": (lambda: pickled({"w": torch.ones(1000)})[:-200], "is damaged, or holds no weights"),
    "a list": (lambda: pickled([torch.ones(1)]), "must contain tensors by name, got list"),
    "a checkpoint": (lambda: pickled({"state_dict": {"w": torch.ones(1)}}), "got dict at 'state_dict'"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_of_others_run_no_code(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = PICKLES[kind]
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_head": 3}')
    (tmp_path / "pytorch_model.bin").write_bytes(make())
    with pytest.raises(ValueError, match=message) as caught:
        load_gpt2(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "RAN").exists()


def test_parts_of_weights_are_there_and_beside_their_index(tmp_path):
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    part = sorted(set(whole["weight_map"].values()))[1]
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{part} not found"):
        load_gpt2(tmp_path)
    for content, message in (
        ({"weight_map": {"w": "../elsewhere"}}, r"a part must be a file beside it, got '\.\./elsewhere'"),
        ({"weight_map": ["w"]}, "must contain a weight_map"),
        ({}, "must contain a weight_map"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            load_gpt2(tmp_path)


@pytest.mark.parametrize(
    ("load", "name", "value", "error", "message"),
    [
        (load_gpt2, "transformer.wte.weight", torch.ones(24), ValueError, r"embed\.weight must have 2 axes"),
        (load_gpt2, "transformer.wpe.weight", torch.ones(0, 24), ValueError, "none of them empty"),
        (load_gpt2, "transformer.h.0.attn.c_attn.bias", torch.ones(7), ValueError, "queries, keys and values in one"),
        (load_gpt2, "transformer.ln_f.bias", torch.ones(24, dtype=torch.int64), TypeError, "floating point numbers"),
    ],
)
def test_tensors_that_are_none_of_such_a_model(tmp_path, load, name, value, error, message):
    gpt2().save_pretrained(tmp_path)
    weights = {key: tensor.contiguous() for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file({**weights, name: value}, tmp_path / "model.safetensors")
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_state_dicts_of_something_else(golden):
    state = published(golden)
    for load in (load_timeseries, load_vision):
        with pytest.raises(TypeError, match="must be a state dict, got list"):
            load(list(state.items()))
        with pytest.raises(ValueError, match="missing position"):
            load({})
    with pytest.raises(TypeError, match=r"'pos_enc\.pe' of the published time-series classifier must be a tensor"):
        load_timeseries({**state, "pos_enc.pe": [1.0]})
    with pytest.raises(ValueError, match="position must have 2 axes"):
        load_timeseries({**state, "pos_enc.pe": torch.ones(3)})
