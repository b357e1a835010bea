"""Weights in the layout of fairseq's transformer_lm, with Flow-Attention or its own, give what that code computes.

``recompute`` is written from fairseq's and Flowformer_NLP's code, by names of their state dict: time first, prefix sums
of whole sequences, a pre-norm decoder. It shares nothing with the library.
"""

import argparse
import math

import pytest
import torch
from torch import nn

from flowformer.interop.checkpoints import load_wikitext, wikitext_state_dict

WORDS, DIM, HEADS, INNER, LAYERS, LENGTH = 37, 24, 3, 40, 2, 20
BANDS, WIDTHS = (10, 15, 12), (24, 6, 3)  # of an adaptive model, words and channels


def draw(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def published(head="tied", final_norm=True):
    """A state dict as fairseq saves it."""
    shapes = {}
    for layer in range(LAYERS):
        own = f"decoder.layers.{layer}."
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= {f"{own}self_attn.{part}.weight": (DIM, DIM), f"{own}self_attn.{part}.bias": (DIM,)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{own}{norm}.weight": (DIM,), f"{own}{norm}.bias": (DIM,)}
        shapes |= {f"{own}fc1.weight": (INNER, DIM), f"{own}fc1.bias": (INNER,)}
        shapes |= {f"{own}fc2.weight": (DIM, INNER), f"{own}fc2.bias": (DIM,)}
    if final_norm:
        shapes |= {"decoder.layer_norm.weight": (DIM,), "decoder.layer_norm.bias": (DIM,)}
    if head in ("tied", "untied", "adaptive"):
        shapes["decoder.embed_tokens.weight"] = (WORDS, DIM)
    if head == "untied":
        shapes["decoder.output_projection.weight"] = (WORDS, DIM)
    if head in ("adaptive", "adaptive-tied"):
        shapes |= adaptive_shapes(head)
    state = draw(**shapes)
    if head == "tied":
        state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    if head == "adaptive-tied":
        share(state)
    buffers = {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    if "adaptive" in head:
        buffers["decoder.adaptive_softmax.version"] = torch.tensor([1])
    return {**buffers, **state}


def adaptive_shapes(head):
    softmax, tails = "decoder.adaptive_softmax.", list(zip(BANDS[1:], WIDTHS[1:], strict=True))
    if head == "adaptive":
        shapes = {f"{softmax}head.weight": (BANDS[0] + len(tails), DIM)}
        for number, (size, width) in enumerate(tails):
            shapes |= {
                f"{softmax}tail.{number}.0.weight": (width, DIM),
                f"{softmax}tail.{number}.2.weight": (size, width),
            }
        return shapes
    shapes = {f"{softmax}head.class_proj.weight": (len(tails), DIM)}
    for number, (size, width) in enumerate(zip(BANDS, WIDTHS, strict=True)):
        band = f"decoder.embed_tokens.embeddings.{number}."
        shapes |= {f"{band}0.weight": (size, width), f"{band}1.weight": (DIM, width)}
    return shapes


def share(state):
    """Tensors that an adaptive softmax shares with an adaptive embedding, tables and projections."""
    bands, softmax = "decoder.embed_tokens.embeddings.", "decoder.adaptive_softmax."
    state[f"{softmax}head.word_proj.weight"] = state[f"{bands}0.0.weight"]
    for number in (0, 1):
        state[f"{softmax}tail.{number}.0.weight"] = state[f"{bands}{number + 1}.1.weight"]
        state[f"{softmax}tail.{number}.2.weight"] = state[f"{bands}{number + 1}.0.weight"]
    state["decoder.embed_tokens._float_tensor"] = torch.zeros(1)
    state[f"{softmax}head._float_tensor"] = torch.zeros(1)


# ------------------------------------------------------------------------------------------------ the re-computation


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x, state, name):
    return nn.functional.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"])


def flow(q, k, v):
    """Causal Flow-Attention of (rows, time, channels); conserved flows of sources are clamped to 5."""
    e, count = 1e-6, torch.arange(1, q.shape[1] + 1, dtype=q.dtype)
    q, k = q.sigmoid(), k.sigmoid()
    incoming = ((q + e) * (k.cumsum(1) + e)).sum(-1)
    outgoing = ((k + e) * (q.cumsum(1) + e)).sum(-1)
    sinks = ((q + e) * ((k * (count / outgoing)[..., None]).cumsum(1) + e)).sum(-1) / count
    sources = ((k + e) * ((q * (count / incoming)[..., None]).cumsum(1) + e)).sum(-1) / count
    weights = sources.clamp(-5, 5).exp()
    competing = v * (weights / weights.cumsum(1) * count)[..., None]
    sums = (k[..., :, None] * competing[..., None, :]).cumsum(1)
    return torch.einsum("nld,nldm->nlm", q / incoming[..., None], sums) * sinks.sigmoid()[..., None]


def softmax(q, k, v):
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ v


def embed(tokens, state):
    if "decoder.embed_tokens.weight" in state:
        return state["decoder.embed_tokens.weight"][tokens]
    bands = [
        state[f"decoder.embed_tokens.embeddings.{n}.0.weight"]
        @ state[f"decoder.embed_tokens.embeddings.{n}.1.weight"].T
        for n in range(len(BANDS))
    ]
    return torch.cat(bands)[tokens]


def score(x, state):
    """Logits, or log-probabilities of an adaptive softmax."""
    if "decoder.output_projection.weight" in state:
        return x @ state["decoder.output_projection.weight"].T
    own = "decoder.adaptive_softmax."
    words = state.get(f"{own}head.word_proj.weight")
    first = state[f"{own}head.weight"] if words is None else torch.cat((words, state[f"{own}head.class_proj.weight"]))
    head = (x @ first.T).log_softmax(-1)
    parts = [head[..., : BANDS[0]]]
    for number, size in enumerate(BANDS[1:]):
        narrow = state[f"{own}tail.{number}.0.weight"]
        narrow = x @ (narrow if len(narrow) == DIM else narrow.T)
        tail = (narrow @ state[f"{own}tail.{number}.2.weight"].T).log_softmax(-1)
        assert tail.shape[-1] == size
        parts.append(tail + head[..., BANDS[0] + number, None])
    return torch.cat(parts, -1)


def recompute(tokens, state, attend):
    state = {name: tensor.double() for name, tensor in state.items()}
    batch, length = tokens.shape
    half = DIM // 2
    # The first token is at position 2, after the number of the padding symbol.
    frequencies = torch.exp(torch.arange(half).double() * -(math.log(10_000) / (half - 1)))
    angles = torch.arange(2, length + 2)[:, None] * frequencies
    positions = torch.cat((angles.sin(), angles.cos()), 1).float().double()
    x = (embed(tokens, state) * math.sqrt(DIM) + positions).transpose(0, 1)  # time first
    for layer in range(LAYERS):
        own = f"decoder.layers.{layer}."
        seen = norm(x, state, f"{own}self_attn_layer_norm")
        q, k, v = (
            linear(seen, state, f"{own}self_attn.{part}_proj").reshape(length, batch * HEADS, -1).transpose(0, 1)
            for part in "qkv"
        )
        heads = attend(q, k, v).transpose(0, 1).reshape(length, batch, DIM)
        x = x + linear(heads, state, f"{own}self_attn.out_proj")
        inner = linear(norm(x, state, f"{own}final_layer_norm"), state, f"{own}fc1").relu()
        x = x + linear(inner, state, f"{own}fc2")
    if "decoder.layer_norm.weight" in state:
        x = norm(x, state, "decoder.layer_norm")
    return score(x.transpose(0, 1), state)


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture
def tokens():
    return torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("head", ["tied", "untied", "adaptive", "adaptive-tied"])
def test_logits_are_those_of_the_published_code(head, tokens):
    state = published(head)
    wanted = recompute(tokens, state, flow)
    model = load_wikitext(state, num_heads=HEADS)
    torch.testing.assert_close(model(tokens).double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.double()(tokens), wanted, rtol=1e-10, atol=1e-10)
    loss = nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.loss(tokens), loss, rtol=1e-10, atol=0)


def test_a_model_of_fairseq_itself(tokens):
    state = published("adaptive-tied", final_norm=False)  # as transformer_lm_wiki103
    model = load_wikitext(state, num_heads=HEADS, attention="softmax").double()
    torch.testing.assert_close(model(tokens), recompute(tokens, state, softmax), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head", ["tied", "adaptive-tied"])
def test_loaded_models_decode(head, tokens):
    model = load_wikitext(published(head), num_heads=HEADS)
    wanted, state = model(tokens), model.init_state(2)
    for time in range(LENGTH):
        logits, state = model.step(tokens[:, time], state)
        torch.testing.assert_close(logits, wanted[:, time], rtol=1e-4, atol=1e-4)
    assert [len(row) for row in model.generate(tokens[:, :3], max_new_tokens=4, seed=0)] == [7, 7]


def test_log_probabilities_of_an_adaptive_softmax_sum_to_one(tokens):
    out = load_wikitext(published("adaptive"), num_heads=HEADS)(tokens)
    assert out.shape == (2, LENGTH, WORDS)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(2, LENGTH))


def test_a_projection_as_wide_as_the_model_is_turned_only_where_it_is_tied(tokens):
    state = published("adaptive-tied")
    square = draw(a=(DIM, DIM), b=(BANDS[1], DIM))
    for tied in (True, False):
        state |= {
            "decoder.embed_tokens.embeddings.1.0.weight": square["b"],
            "decoder.adaptive_softmax.tail.0.2.weight": square["b"],
            "decoder.embed_tokens.embeddings.1.1.weight": square["a"],
            "decoder.adaptive_softmax.tail.0.0.weight": square["a"] if tied else 2 * square["a"].T,
        }
        ours = wikitext_state_dict(state)["head.projections.1.weight"]
        torch.testing.assert_close(ours, square["a"].T * (1 if tied else 2), rtol=0, atol=0)


def test_older_names_and_the_dtype_of_the_weights():
    state = published("untied")
    state["decoder.embed_out"] = state.pop("decoder.output_projection.weight")
    del state["decoder.version"]
    model = load_wikitext({name: tensor.half() for name, tensor in state.items()}, num_heads=HEADS)
    assert torch.equal(model.head.weight, state["decoder.embed_out"].half())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_projections_that_are_one_tensor_in_old_versions(tokens):
    state = published()
    joined = dict(state)
    for layer in range(LAYERS):
        name = f"decoder.layers.{layer}.self_attn"
        for part in ("weight", "bias"):
            joined[f"{name}.in_proj_{part}"] = torch.cat([joined.pop(f"{name}.{one}_proj.{part}") for one in "qkv"])
    wanted = load_wikitext(state, num_heads=HEADS)(tokens)
    assert torch.equal(load_wikitext(joined, num_heads=HEADS)(tokens), wanted)


def test_names_are_text():
    with pytest.raises(TypeError, match="names of the weights of the published WikiText-103 model must be text, got 1"):
        load_wikitext({1: torch.zeros(1)})


def test_a_tied_head_is_loaded_once():
    model = load_wikitext(published(), num_heads=HEADS)
    assert model.head is None
    assert len(model.state_dict()) == len(published()) - 3  # two buffers, and the head
    attention = model.decoder.layers[0].attention
    assert (attention.preset, attention.options.clamp) == ("wikitext", 5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.layers.1.fc2.bias": None}, r"missing: decoder\.blocks\.1\.linear2\.bias \(in our names\)"),
        ({"decoder.layer_norm.bias": None}, r"missing: decoder\.norm\.bias"),
        ({"decoder.layers.9.fc2.bias": torch.ones(DIM)}, r"unexpected: decoder\.blocks\.9\.linear2\.bias"),
        ({"decoder.layer_norm.bias": torch.ones(2)}, r"decoder\.norm\.bias is \(2,\) and must be \(24,\)"),
        ({"decoder.embed_tokens.weight": None}, r"missing embed\.weight"),
        ({"decoder.embed_positions.weight": torch.ones(9, DIM)}, "'decoder.embed_positions.weight' is not a parameter"),
        ({"encoder.layers.0.fc1.bias": torch.ones(1)}, "is not a parameter of the published WikiText-103 model"),
        ({"decoder.adaptive_softmax.tail.0.2.weight": torch.ones(3, 2)}, r"missing head\.tables\.0\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    state = {name: tensor for name, tensor in (published() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load_wikitext(state, num_heads=HEADS)


def test_a_file_of_fairseq_is_read_without_running_code(tmp_path, tokens):
    """As in docs/language.md: a checkpoint has settings in a Namespace beside the weights."""
    checkpoint = {
        "args": None, "cfg": {"model": argparse.Namespace(arch="transformer_lm"), "task": {"tokens_per_sample": 512}},
        "model": published(), "optimizer_history": [{"num_updates": 150_000}], "extra_state": {"val_loss": 4.9},
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "checkpoint_best.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        read = torch.load(tmp_path / "checkpoint_best.pt", weights_only=True)
    model = load_wikitext(read["model"], num_heads=HEADS).double()
    torch.testing.assert_close(model(tokens), recompute(tokens, published(), flow), rtol=1e-10, atol=1e-10)
    with pytest.raises(TypeError, match=r"'args' of the published WikiText-103 model must be a tensor"):
        load_wikitext(read, num_heads=HEADS)
    with pytest.raises(TypeError, match="must be a state dict, got list"):
        load_wikitext([], num_heads=HEADS)
