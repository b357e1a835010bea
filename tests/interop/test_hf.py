"""A Flowformer in transformers: held to what transformers asks of its own models, and to the numbers of the library."""

import copy
import subprocess
import sys

import pytest
import torch
from hf_models import (
    CAUSAL,
    GREEDY,
    MODES,
    MODULE_OPTIONS,
    OPTIONS,
    VOCABULARY,
    build,
    close,
    configure,
    draw,
    enliven,
    generate,
    padded,
)
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

import flowformer
from flowformer.interop.hf import (
    FlowformerConfig,
    FlowformerForCausalLM,
    FlowformerForSequenceClassification,
    FlowformerModel,
    from_hf,
    to_hf,
)
from flowformer.models.language import LanguageModel

# ------------------------------------------------------------------------------------------------ the library's numbers


@pytest.mark.parametrize(
    ("attention", "options"), [*((name, OPTIONS.get(name)) for name in CAUSAL), ("flow", MODULE_OPTIONS)]
)
def test_there_and_back(attention, options):
    model = build(attention, attention_options=options)
    language = from_hf(model)
    tokens, mask = padded("left")
    assert torch.equal(
        language(tokens, mask.bool())[mask.bool()],
        model(tokens, mask, use_cache=False).logits[mask.bool()],
    )
    again = to_hf(language, eos_token_id=5)
    assert again.config.eos_token_id == 5
    assert torch.equal(again(tokens, mask).logits, model(tokens, mask).logits)
    told, wanted = again.config.to_dict(), model.config.to_dict()
    differs = {name for name in told if told[name] != wanted[name]}
    assert differs == {"eos_token_id", "attention_options"}  # options that were not given are told with their defaults


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flowformer_gpt_nano", {"max_length": 32}),
        ("flowformer_gpt_nano", {"max_length": None, "positions": "sinusoidal", "norm_first": False}),
        ("flowformer_gpt_nano", {"max_length": 32, "positions": None, "attention_options": {"bias": False}}),
        ("flowformer_wikitext", {"dim": 16, "num_layers": 2, "activation_dropout": 0.2}),
        ("aft_enwik8_12", {"dim": 16, "num_layers": 2, "max_length": 32}),
    ],
)
def test_published_models(name, options):
    torch.manual_seed(0)
    language = enliven(flowformer.create_model(name, vocab_size=VOCABULARY, **options))
    model = to_hf(language)
    assert torch.equal(model(draw(2, 9), use_cache=False).logits, language(draw(2, 9)))
    assert repr(from_hf(model)) == repr(language)
    assert model.config.tie_word_embeddings is (language.head is None)
    assert from_hf(model).initialization == language.initialization
    assert (model.lm_head.weight is model.model.embed.weight) is (language.head is None)


def test_dtype_is_kept():
    language = flowformer.create_model("flowformer_gpt_nano", vocab_size=VOCABULARY, max_length=32).bfloat16()
    model = to_hf(language)
    assert model.dtype == torch.bfloat16
    assert from_hf(model).embed.weight.dtype == torch.bfloat16


def test_conversion_refuses_what_it_cannot_say():
    language = from_hf(build())
    with pytest.raises(ValueError, match="the model has hidden_size = 16"):
        to_hf(language, hidden_size=32)
    with pytest.raises(TypeError, match="must be a LanguageModel, got FlowformerForCausalLM"):
        to_hf(build())
    with pytest.raises(TypeError, match="must be a FlowformerForCausalLM, got LanguageModel"):
        from_hf(language)
    language.decoder.layers[1].dropout.p = 0.5
    with pytest.raises(ValueError, match="not as LanguageModel builds it"):
        to_hf(language)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": None}, ValueError, "either input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, ValueError, "either input_ids or inputs_embeds"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 16)}, ValueError, r"must be \(batch, length, dim\)"),
        ({"input_ids": torch.zeros(2, 5)}, TypeError, "input_ids must be integers"),
        ({"input_ids": draw(5)}, ValueError, r"input_ids must be \(batch, length\)"),
        ({"input_ids": draw(2, 5) + VOCABULARY}, ValueError, "input_ids must be from 0 to 60"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"attention_mask must be \(2, 5\), got"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, ValueError, r"attention_mask must be \(2, 5\), got"),
        ({"output_attentions": True}, ValueError, "no attention weights"),
        ({"position_ids": torch.arange(5)}, ValueError, r"position_ids must be \(2, 5\) or \(1, 5\)"),
        ({"labels": draw(2, 4)}, ValueError, r"labels must be \(2, 5\)"),
        ({"labels": draw(2, 5), "logits_to_keep": 1}, ValueError, "logits_to_keep is not supported with labels"),
        ({"cache": DynamicCache()}, TypeError, "DynamicCache"),
        ({"cache": DynamicCache(config=configure(num_hidden_layers=3))}, TypeError, "of 2 layers"),
        ({"cache": DynamicCache(config=configure()), "use_cache": False}, ValueError, "use_cache=False"),
    ],
)
def test_forward_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        build()(**{"input_ids": draw(2, 5), **arguments})


def test_learned_positions_end():
    with pytest.raises(ValueError, match="end at max_length = 64"):
        build(positions="learned")(draw(2, 65))


def test_flow_attention_knows_distance_by_default():
    config = FlowformerConfig()
    assert (config.positions, config.attention_options) == (None, {"preset": "distance"})
    assert FlowformerConfig(attention="softmax").positions == "learned"
    assert FlowformerConfig(attention_options={"preset": "core"}).positions == "learned"
    assert FlowformerConfig(attention="softmax", attention_options={"decay": "fixed"}).positions is None
    assert FlowformerConfig(positions="sinusoidal").positions == "sinusoidal"
    assert FlowformerConfig.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()


def test_a_cache_refuses_what_contradicts_it():
    model = build()
    cache = model(*padded("left")).cache
    with pytest.raises(ValueError, match="the batch size of the cache is 3, that of the input 2"):
        model(draw(2, 1), cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 1\) or \(3, 10\), got"):
        model(draw(3, 1), torch.ones(3, 9), cache)
    with pytest.raises(ValueError, match=r"marks \[9, 9, 9\] of the earlier tokens as real.*\[9, 4, 1\]"):
        model(draw(3, 1), torch.ones(3, 10), cache)
    with pytest.raises(ValueError, match="cannot remove 2 tokens"):
        cache.crop(-2)
    with pytest.raises(TypeError, match="states, not keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    cache.crop(0)
    assert cache.get_seq_length() == 9


def test_configurations_refuse():
    with pytest.raises(ValueError, match='init must be "gpt" or "fairseq", got'):
        configure(init="xavier")
    with pytest.raises(ValueError, match="num_hidden_layers must be positive"):
        FlowformerModel(configure(num_hidden_layers=0))
    with pytest.raises(ValueError, match="unknown attention 'flwo'"):
        FlowformerModel(configure("flwo"))
    with pytest.raises(ValueError, match="requires max_length"):
        FlowformerModel(configure(max_position_embeddings=None, positions="learned"))
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        configure(hidden_size="wide")
    config = configure()
    config.output_attentions = True
    with pytest.raises(ValueError, match="no attention weights"):
        FlowformerModel(config)(draw(1, 3))


def test_both_families_of_names():
    config = FlowformerConfig(dim=32, num_layers=3, num_heads=4, vocab_size=9)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert (config.dim, config.num_layers, config.num_heads, config.ffn_dim) == (32, 3, 4, 128)
    assert config.to_dict()["intermediate_size"] == 128


# ------------------------------------------------------------------------------------------------ loss and training


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_loss_is_the_library_s(side):
    model = build()
    tokens, mask = (draw(3, 9), None) if side is None else padded(side)
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, 7)  # a label at padding does not count
    loss = model(tokens, mask, labels=labels).loss
    close(loss, from_hf(model).loss(tokens, mask=None if mask is None else mask.bool()))
    # Trainer counts the labels that are not -100 and not the first of a row, of this batch and another of its size.
    close(model(tokens, mask, labels=labels, num_items_in_batch=2 * 24).loss, loss / 2)


def test_labels_may_not_count_or_be_shifted():
    model = build()
    tokens = draw(2, 9)
    labels = tokens.clone()
    labels[0, 4:] = labels[1] = -100
    close(model(tokens, labels=labels).loss, model(tokens[:1, :4], labels=tokens[:1, :4]).loss)
    shifted = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), 1)
    assert torch.equal(model(tokens, labels=labels, shift_labels=shifted).loss, model(tokens, labels=tokens).loss)


def test_logits_to_keep():
    model = build()
    logits = model(draw(2, 9)).logits
    assert model(draw(2, 9), logits_to_keep=1).logits.shape == (2, 1, VOCABULARY)
    close(model(draw(2, 9), logits_to_keep=1).logits, logits[:, -1:])
    close(model(draw(2, 9), logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attention", ["flow", "softmax", "aft_simple", "aft_local"])
def test_checkpointed_gradients_are_the_same(attention, reentrant):
    def gradients(model):
        model.zero_grad()
        tokens, mask = padded("left", (9, 9, 4))
        model.train()(tokens, mask, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model = build(attention, dropout=0.0)
    wanted = gradients(model)
    calls = []
    model.model.decoder.layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model)
    assert len(calls) == 2
    for name, gradient in wanted.items():
        close(found[name], gradient)
    with pytest.raises(ValueError, match="use_cache is not supported with gradient checkpointing"):
        model(draw(1, 3), cache=DynamicCache(config=model.config))
    assert model(draw(1, 3), use_cache=True).cache is None
    assert model(draw(2, 9), labels=draw(2, 9), output_hidden_states=True).hidden_states[1].shape == (2, 9, 16)
    assert model.eval()(draw(1, 3)).cache is not None


def test_hidden_states_have_gradients():
    model = build(kind=FlowformerModel)
    out = model(*padded("left"), output_hidden_states=True)
    out.hidden_states[0].retain_grad()
    out.last_hidden_state.flatten()[-1].backward()
    assert out.hidden_states[0].grad.abs().sum() > 0
    assert len(model(draw(1, 3), output_hidden_states=[-1]).hidden_states) == 3
    assert len(model(draw(1, 3), return_dict=False, use_cache=False)) == 1


def test_trainer(tmp_path):
    pattern = torch.arange(12) % 5
    rows = [{"input_ids": pattern.roll(i), "labels": pattern.roll(i)} for i in range(16)]
    torch.manual_seed(0)
    model = FlowformerForCausalLM(configure(dropout=0.0))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=10, report_to=[], use_cpu=True, disable_tqdm=True, eval_strategy="no",
        save_strategy="steps", save_steps=30, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    # The loss of a step is the mean over all its tokens, whatever parts it was computed in.
    assert before == pytest.approx(float(torch.log(torch.tensor(VOCABULARY))), rel=0.05)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] < 1.2 * before
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-30")
    close(again(rows[0]["input_ids"][None]).logits, model.eval()(rows[0]["input_ids"][None]).logits)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("attention", CAUSAL)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tmp_path, attention, tied):
    model = build(attention, tie_word_embeddings=tied)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is FlowformerForCausalLM
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    close(again(draw(2, 9)).logits, model(draw(2, 9)).logits)
    assert (again.lm_head.weight is again.model.embed.weight) is tied
    assert torch.equal(generate(again, draw(2, 9), **GREEDY), generate(model, draw(2, 9), **GREEDY))
    assert AutoConfig.from_pretrained(tmp_path).attention == attention
    base = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(weight, base.state_dict()[name]) for name, weight in model.model.state_dict().items())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(draw(2, 9)).logits.dtype == torch.bfloat16


def test_a_classifier_begins_from_a_language_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    classifier, told = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert type(classifier) is FlowformerForSequenceClassification
    assert told["missing_keys"] == {"score.weight"}
    assert torch.equal(classifier.model.embed.weight, model.model.embed.weight)
    assert 0 < classifier.score.weight.std() < 0.05
    model.model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.model.embed.weight, model.model.embed.weight)


@pytest.mark.parametrize("init", ["gpt", "fairseq"])
@pytest.mark.parametrize("attention", CAUSAL)
def test_parameters_begin_as_in_the_library(attention, init):
    torch.manual_seed(0)
    config = configure(attention, init=init, hidden_size=64, num_attention_heads=16)
    sizes = {"dim": 64, "num_layers": 2, "num_heads": 16, "max_length": 64}
    language = LanguageModel(
        VOCABULARY, attention=attention, attention_options=config.attention_options, positions=config.positions,
        init=init, **sizes,
    )  # fmt: skip
    wanted = dict(language.named_parameters())
    for model in (
        FlowformerForCausalLM(config),
        # Here nothing but transformers' protocol begins a parameter.
        FlowformerForCausalLM.from_pretrained(None, config=config, state_dict={}),
    ):
        found = {name.removeprefix("lm_").removeprefix("model."): p for name, p in model.named_parameters()}
        assert set(found) == set(wanted)
        for name, parameter in wanted.items():
            # Two samples of one distribution: means and deviations differ by a few standard errors.
            (deviation, mean), (ours, our_mean) = (torch.std_mean(p.detach()) for p in (parameter, found[name]))
            error = 8 * float(deviation) / parameter.numel() ** 0.5
            assert float(ours) == pytest.approx(float(deviation), abs=error), name
            assert float(our_mean) == pytest.approx(float(mean), abs=error), name


@pytest.mark.parametrize("init", ["gpt", "fairseq"])
def test_what_is_loaded_is_not_begun_again(init):
    model = build("aft_full", init=init)
    state = {name: weight for name, weight in model.state_dict().items() if "blocks.1" not in name}
    again, told = FlowformerForCausalLM.from_pretrained(
        None, config=model.config, state_dict=dict(state), output_loading_info=True
    )
    assert "model.decoder.blocks.1.attention.query_positions" in told["missing_keys"]
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in state.items())
    assert again.model.decoder.blocks[1].attention.query_positions.std() > 0.05


@pytest.mark.parametrize("tied", [True, False])
def test_more_tokens_and_fewer(tied):
    model = build(tie_word_embeddings=tied)
    logits = model(draw(2, 9)).logits
    embedding = model.resize_token_embeddings(70)
    assert (model.config.vocab_size, embedding.weight.shape[0], model.lm_head.weight.shape[0]) == (70, 70, 70)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    close(model(draw(2, 9)).logits[..., :VOCABULARY], logits)
    assert model(torch.full((1, 3), 69), labels=torch.full((1, 3), 69)).loss.isfinite()
    assert generate(model, torch.full((1, 3), 69), **GREEDY).shape == (1, 11)
    assert from_hf(model)(torch.full((1, 3), 69)).shape == (1, 3, 70)
    model.resize_token_embeddings(VOCABULARY)
    close(model(draw(2, 9)).logits, logits)


# ------------------------------------------------------------------------------------------------ classification


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_is_classified(side):
    model = build(kind=FlowformerForSequenceClassification, num_labels=3)
    tokens, mask = padded(side)
    logits = model(tokens, mask).logits
    assert logits.shape == (3, 3)
    for row, real in zip(range(3), mask.bool(), strict=True):
        close(logits[row : row + 1], model(tokens[row : row + 1, real]).logits)


def test_padding_that_no_mask_tells_of():
    model = build(kind=FlowformerForSequenceClassification, num_labels=3)
    tokens = draw(2, 9).clamp(min=1)
    tokens[1, 4:] = 0
    everything = model(tokens).logits
    model.config.pad_token_id = 0
    found = model(tokens).logits
    close(found[:1], everything[:1])
    close(found[1:], model(tokens[1:, :4]).logits)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, torch.tensor([0.5, 1.5]), "regression"),
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), "multi_label_classification"),
    ],
)
def test_problems_of_classification(num_labels, labels, problem):
    model = build(kind=FlowformerForSequenceClassification, num_labels=num_labels)
    out = model(draw(2, 9), labels=labels)
    assert model.config.problem_type == problem
    wanted = {
        "regression": lambda: (out.logits.squeeze() - labels).square().mean(),
        "single_label_classification": lambda: torch.nn.functional.cross_entropy(out.logits, labels),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels),
    }
    close(out.loss, wanted[problem]())
    out.loss.backward()
    assert model.model.embed.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ elsewhere


def test_low_precision():
    model = build()
    tokens, mask = padded("left")
    wanted = model(tokens, mask).logits
    half = copy.deepcopy(model).bfloat16()
    found = half(tokens, mask).logits
    assert found.dtype == torch.bfloat16
    real = mask.bool()
    assert (found[real] - wanted[real]).norm() < 0.05 * wanted[real].norm()
    assert generate(half, tokens, mask, **MODES["beams"]).shape == (3, 17)


# Without a cache the graph is part of that with one.
@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiles_whole(cached):
    model = build(num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for tokens, mask in ((draw(3, 9), None), padded("left")):
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        with torch.no_grad():
            out = compiled(tokens, mask, use_cache=cached)
            close(out.logits[real], model(tokens, mask).logits[real])
            assert (out.cache is not None) is cached


def test_pipeline(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!", padding_side="left")
    model = build(vocab_size=256, pad_token_id=tokenizer.pad_token_id)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    both = write(["Hello", "To be, or not"], max_new_tokens=6, batch_size=2, **GREEDY)
    for prompt, out in zip(["Hello", "To be, or not"], both, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        assert out[0]["generated_text"] == tokenizer.decode(generate(model, tokens, max_new_tokens=6, **GREEDY)[0])


def test_the_library_does_without_transformers():
    code = "import sys, flowformer, flowformer.models; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert flowformer.FlowformerModel is FlowformerModel
    assert {"FlowformerConfig", "FlowformerForCausalLM", "FlowformerForSequenceClassification"} < set(dir(flowformer))
