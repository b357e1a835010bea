"""A Flowformer in transformers generates: caching equals no caching, and padding none, in every way."""

import copy

import pytest
import torch
from hf_models import CAUSAL, GREEDY, MODES, MODULE_OPTIONS, VOCABULARY, build, close, draw, generate, padded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TextStreamer

from flowformer.interop.hf import FlowformerModel

# ------------------------------------------------------------------------------------------------ caches and padding


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("attention", CAUSAL)
def test_caching_equals_no_caching(attention, side):
    model = build(attention)
    tokens, mask = (draw(3, 9), None) if side is None else padded(side)
    later = draw(3, 7, seed=2)
    whole = torch.cat((tokens, later), 1)
    grown = None if mask is None else torch.cat((mask, torch.ones_like(later)), 1)
    wanted = model(whole, grown, use_cache=False).logits
    cache, parts, at = None, [], 0
    for length in (9, 4, 1, 2):  # a prompt, a further piece, a token, a piece
        at += length
        out = model(whole[:, at - length : at], None if mask is None else grown[:, :at], cache)
        cache, parts = out.cache, [*parts, out.logits]
    real = torch.ones_like(whole, dtype=torch.bool) if mask is None else grown.bool()
    close(torch.cat(parts, 1)[real], wanted[real])
    assert cache.get_seq_length() == 16
    assert cache.layers[0].length.tolist() == real.sum(1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", CAUSAL)
def test_padding_is_none(attention, side):
    model = build(attention)
    tokens, mask = padded(side)
    for cached in (True, False):
        out = model(tokens, mask, use_cache=cached, output_hidden_states=True)
        for row, real in zip(range(3), mask.bool(), strict=True):
            alone = model(tokens[row : row + 1, real], use_cache=cached, output_hidden_states=True)
            close(out.logits[row, real], alone.logits[0])
            for hidden, wanted in zip(out.hidden_states, alone.hidden_states, strict=True):
                close(hidden[row, real], wanted[0])
        assert (out.hidden_states[-1][~mask.bool()] == 0).all()


def test_what_is_at_padding_has_no_gradient():
    model = build(kind=FlowformerModel)
    _, mask = padded("left")
    embeds = torch.randn(3, 9, 16).masked_fill(~mask.bool().unsqueeze(-1), torch.nan).requires_grad_()
    model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state.square().sum().backward()
    assert (embeds.grad[~mask.bool()] == 0).all()
    assert (embeds.grad[mask.bool()] != 0).any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_cache_keeps_its_size():
    def size(cache):
        return sum(part.numel() for layer in cache.layers for part in tree_leaves(layer.state))

    for attention, fixed in (("flow", True), ("softmax", False)):
        model = build(attention)
        sizes = [size(model(draw(2, length)).cache) for length in (5, 50)]
        assert (sizes[0] == sizes[1]) is fixed


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, MODULE_OPTIONS], ids=["plain", "options"])
def test_rows_of_a_cache(options):
    model = build(attention_options=options)
    cache = model(draw(3, 6)).cache
    nothing = DynamicCache(config=model.config)
    assert (cache.batch_size, nothing.batch_size) == (3, -1)
    wanted = model(draw(3, 1), cache=copy.deepcopy(cache)).logits
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        change(nothing)
        close(model(draw(3, 1)[rows], cache=changed).logits, wanted[rows])
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, nothing.get_seq_length()) == (0, -1, 0)
    assert torch.equal(model(draw(3, 6), cache=cache).logits, model(draw(3, 6)).logits)


def test_a_cache_that_is_given_goes_on():
    model = build()
    cache = DynamicCache(config=model.config)
    assert model(draw(2, 5), cache=cache).cache is cache
    assert model.train()(draw(2, 5), cache=cache).cache is cache
    assert cache.get_seq_length() == 10
    assert cache.get_mask_sizes(3, 0) == (13, 0)
    assert cache.get_max_length() == -1
    assert model(draw(2, 5)).cache is None  # in training
    assert model.eval()(draw(2, 5), use_cache=False).cache is None
    model.config.use_cache = False
    assert model(draw(2, 5)).cache is None
    assert model(draw(2, 5), use_cache=True).cache.get_seq_length() == 5


@torch.no_grad()
def test_the_old_name_of_a_cache():
    model = build()
    cache = model(draw(2, 5)).cache
    with pytest.warns(FutureWarning, match="past_key_values"):
        old = model(draw(2, 1), past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(old, model(draw(2, 1), cache=cache).logits)


# ------------------------------------------------------------------------------------------------ generation


# A cache has one code for all mechanisms: all modes for a state of fixed size (flow) and one that grows (softmax).
EVERYWHERE, SHOWN = ("greedy",), ("flow", "softmax")
GENERATIONS = [
    pytest.param(attention, mode, marks=() if mode in EVERYWHERE or attention in SHOWN else pytest.mark.slow)
    for attention in CAUSAL
    for mode in MODES
]


@pytest.mark.parametrize(("attention", "mode"), GENERATIONS)
def test_generation_with_a_cache_is_that_without(attention, mode):
    model = build(attention)
    tokens, mask = padded("left")
    out = generate(model, tokens, mask, **MODES[mode])
    assert out.shape[1] == 17
    assert torch.equal(out, generate(model, tokens, mask, use_cache=False, **MODES[mode]))


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("attention", ["flow", "softmax"])
def test_generation_with_a_cache_of_a_module_with_options(attention, mode):
    model = build(attention, attention_options=MODULE_OPTIONS)
    tokens, mask = padded("left")
    out = generate(model, tokens, mask, **MODES[mode])
    assert torch.equal(out, generate(model, tokens, mask, use_cache=False, **MODES[mode]))


@pytest.mark.parametrize("mode", [GREEDY, MODES["beams"]], ids=["greedy", "beams"])
def test_a_padded_batch_generates_what_each_row_does(mode):
    model = build()
    tokens, mask = padded("left")
    out = generate(model, tokens, mask, **mode)
    for row, real in zip(range(3), mask.bool(), strict=True):
        assert torch.equal(out[row, 9:], generate(model, tokens[row : row + 1, real], **mode)[0, real.sum() :])


def test_rows_end_by_themselves():
    model = build()
    tokens, mask = padded("left")
    out = generate(model, tokens, mask, **GREEDY)
    eos = int(out[1, 11])
    ended = generate(model, tokens, mask, eos_token_id=eos, pad_token_id=60, **GREEDY)
    for row in range(3):
        new = out[row, 9:].tolist()
        stop = new.index(eos) + 1 if eos in new else 8
        assert ended[row, 9:].tolist() == (new[:stop] + [60] * 8)[: ended.shape[1] - 9]


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("attention", ["flow", "aft_local", "softmax"])
def test_generation_goes_on_from_a_cache(attention, padding):
    model = build(attention)
    tokens, mask = padded("left") if padding else (draw(3, 9), torch.ones(3, 9, dtype=torch.int64))
    wanted = generate(model, tokens, mask, max_new_tokens=10, **GREEDY)
    first = generate(model, tokens, mask, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    assert first.cache.get_seq_length() == 12
    longer = torch.cat((mask, mask.new_ones(3, 4)), 1)
    assert torch.equal(wanted, generate(model, first.sequences, longer, max_new_tokens=6, cache=first.cache, **GREEDY))


@pytest.mark.parametrize("attention", ["flow", "aft_conv"])
def test_prompts_are_read_in_chunks(attention):
    model = build(attention)
    for tokens, mask in (padded("left"), (draw(3, 9), None)):
        wanted = generate(model, tokens, mask, **GREEDY)
        assert torch.equal(wanted, generate(model, tokens, mask, prefill_chunk_size=4, **GREEDY))


def test_generation_from_embeddings():
    model = build(scale_embedding=True)
    tokens, mask = padded("left")
    embeds = model.get_input_embeddings()(tokens.masked_fill(mask == 0, 0))
    for mode in (GREEDY, MODES["beams"]):
        wanted = generate(model, tokens, mask, **mode)[:, 9:]
        assert torch.equal(wanted, generate(model, mask=mask, inputs_embeds=embeds, **mode))


def test_generation_tells_what_it_did():
    model = build()
    out = generate(
        model, draw(2, 5), return_dict_in_generate=True, output_scores=True, output_hidden_states=True, **GREEDY
    )
    assert len(out.scores) == len(out.hidden_states) == 8
    assert [state[-1].shape for state in out.hidden_states[:2]] == [(2, 5, 16), (2, 1, 16)]
    close(model.lm_head(out.hidden_states[-1][-1])[:, -1], out.scores[-1])
    close(model(out.sequences[:, :-1]).logits[:, -1], out.scores[-1])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def test_generation_stops_at_a_string():
    """Each row ends with the first string of these, and is padded after it; the cache is used all the same."""
    model, tokenizer = build(vocab_size=258, pad_token_id=256, attention_options={"preset": "core"}), byte_tokenizer()
    prompts = tokenizer(["hello", "a", "to"], padding=True, return_tensors="pt", return_token_type_ids=False)
    letters = tokenizer.convert_tokens_to_ids(["x", "y"])
    others = [token for token in range(258) if token not in letters]
    options = {"max_new_tokens": 20, "do_sample": True, "suppress_tokens": others, "eos_token_id": 257}
    torch.manual_seed(0)
    out = model.generate(**prompts, **options, stop_strings=["xyx", "yy"], tokenizer=tokenizer)
    ends = 0
    for text in tokenizer.batch_decode(out[:, 5:], skip_special_tokens=True):
        stops = [text.find(stop) + len(stop) for stop in ("xyx", "yy") if stop in text]
        assert min(stops, default=20) == len(text)
        ends += bool(stops)
    assert ends == 2  # the third row has none of them in 20 tokens


def test_generation_streams(capsys):
    model, tokenizer = build(vocab_size=258), byte_tokenizer()
    prompt = tokenizer("hello", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**prompt, max_new_tokens=5, streamer=TextStreamer(tokenizer), **GREEDY)
    assert capsys.readouterr().out == tokenizer.decode(out[0]) + "\n"


@pytest.mark.parametrize(
    "attention", [pytest.param(name, marks=() if name in SHOWN else pytest.mark.slow) for name in CAUSAL]
)
def test_a_draft_for_another_model(attention):
    """What an assistant proposes does not change what the model writes; its cache takes tokens back."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None)).eval()
    draft = build(attention, pad_token_id=0)
    for prompt in (draw(1, 9), draw(1, 1)):
        wanted = generate(theirs, prompt, max_new_tokens=20, **GREEDY)
        assert torch.equal(generate(theirs, prompt, max_new_tokens=20, assistant_model=draft, **GREEDY), wanted)


@torch.no_grad()
def test_a_recording_cache_takes_tokens_back():
    model, tokens = build(), draw(2, 9)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    assert cache.is_croppable
    logits = [model(tokens[:, :5], cache=cache).logits]
    logits += [model(tokens[:, at : at + 1], cache=cache).logits for at in (5, 6, 7)]
    close(torch.cat(logits, 1), model(tokens[:, :8]).logits)
    cache.crop(-4)
    assert cache.get_seq_length() == 4
    close(model(tokens[:, 4:7], cache=cache).logits, model(tokens[:, :7]).logits[:, 4:])
    cache.crop(-1)
    close(model(tokens[:, 6:], cache=cache).logits, model(tokens).logits[:, 6:])
    with pytest.raises(ValueError, match="cannot remove 5 tokens from a state"):
        cache.crop(-5)


def test_generation_refuses():
    model = build()
    for kind in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation is not supported.*{kind}"):
            generate(model, draw(1, 3), cache_implementation=kind)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, draw(1, 3), prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, draw(1, 3), assistant_model=build())
    with pytest.raises(ValueError, match="no attention weights"):
        generate(model, draw(1, 3), output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="token_type_ids"):
        generate(model, draw(1, 3), token_type_ids=torch.zeros(1, 3))


@pytest.mark.parametrize("rows", [1, 3])
def test_padding_behind_a_prompt_is_refused(rows):
    tokens, mask = draw(rows, 9), torch.ones(rows, 9, dtype=torch.int64)
    mask[-1, 6:] = 0
    with pytest.raises(
        ValueError, match=rf"padded on the left, got padding behind the last token of rows \[{rows - 1}\]"
    ):
        build("flow").generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
