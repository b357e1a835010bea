"""Runs that go to Hugging Face."""

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import flowformer
from flowformer.interop.hf.export import save_run, to_hf_tokenizer
from flowformer.tasks.text.tokenizers import BytesTokenizer, CharacterTokenizer, HuggingFaceTokenizer, WordTokenizer

TEXT = "One caf\u00e9, two \u20ac 3.\n  A tab:\t\x00\u00a0 \U0001f600 end\n"


def ours(kind, tmp_path):
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "characters":
        return CharacterTokenizer.fit(TEXT)
    if kind == "words":
        return WordTokenizer.fit(TEXT)
    path = tmp_path / "tokenizer.json"
    to_hf_tokenizer(BytesTokenizer()).backend_tokenizer.save(str(path))
    return HuggingFaceTokenizer(path)


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "hugging-face"])
def test_tokenizers_give_the_same_numbers(kind, tmp_path):
    tokenizer = ours(kind, tmp_path)
    theirs = to_hf_tokenizer(tokenizer)
    wanted = tokenizer.encode(TEXT)
    np.testing.assert_array_equal(theirs(TEXT)["input_ids"], wanted)
    if kind != "words":
        assert theirs.decode(wanted) == TEXT
    theirs.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again(TEXT)["input_ids"], wanted)


def test_unknown_ones_become_the_unknown_token():
    for tokenizer, text in ((CharacterTokenizer.fit("ab"), "axb"), (WordTokenizer.fit("a b\n"), "a x b\n")):
        np.testing.assert_array_equal(to_hf_tokenizer(tokenizer)(text)["input_ids"], tokenizer.encode(text))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return flowformer.create_model("flowformer_gpt_nano", vocab_size=256, max_length=64).eval()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    save_run(model, BytesTokenizer(), folder)
    return folder


PROMPTS = ["caf\u00e9 to", "a"]


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "hugging-face"])
def test_tokenizers_pad_on_the_left(kind, tmp_path):
    tokenizer = ours(kind, tmp_path)
    theirs = to_hf_tokenizer(tokenizer)
    out = theirs(["end", "two end"], padding=True, return_tensors="pt")
    assert set(out) == {"input_ids", "attention_mask"}
    real = len(tokenizer.encode("end"))
    assert out.attention_mask[0].tolist() == [0] * (out.input_ids.shape[1] - real) + [1] * real
    assert theirs.pad_token_id != theirs.eos_token_id
    assert {theirs.pad_token_id, theirs.eos_token_id} <= set(range(len(theirs)))
    assert len(theirs) == tokenizer.vocab_size + {"words": 1, "hugging-face": 0}.get(kind, 2)
    assert theirs.decode(out.input_ids[0], skip_special_tokens=True) == "end"


def test_a_published_tokenizer_keeps_its_special_tokens(tmp_path):
    published = to_hf_tokenizer(BytesTokenizer()).backend_tokenizer
    published.add_special_tokens(["<s>", "</s>"])  # after <|endoftext|> and <|pad|>
    both = [("<s>", 258), ("</s>", 259)]
    published.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=both)
    published.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    theirs = to_hf_tokenizer(tokenizer)
    assert (theirs.eos_token, theirs.pad_token, len(theirs)) == ("<|endoftext|>", "<|pad|>", 260)
    np.testing.assert_array_equal(theirs("One")["input_ids"], tokenizer.encode("One"))  # nothing around the text


def test_names_of_new_tokens_are_new():
    words = WordTokenizer(["<eos>", "<unk>", "<|pad|>"])
    theirs = to_hf_tokenizer(words)
    assert (theirs.pad_token, theirs.pad_token_id) == ("<<|pad|>>", 3)


def test_added_tokens_change_nothing(model, exported):
    loaded = AutoModelForCausalLM.from_pretrained(exported).eval()
    tokens = torch.randint(256, (2, 9))
    with torch.no_grad():
        logits = loaded(tokens).logits
        torch.testing.assert_close(logits[..., :256], model(tokens))
        assert (logits.softmax(-1)[..., 256:] <= 1 / 256).all()
    assert (loaded.config.eos_token_id, loaded.config.pad_token_id) == (256, 257)
    sampled = loaded.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, max_new_tokens=50)
    assert (sampled != 257).all()


def test_several_prompts_at_once(model, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 64)
    write = pipeline("text-generation", model=str(exported), batch_size=2)
    both = write(PROMPTS, max_new_tokens=5, do_sample=False)
    for prompt, (out,) in zip(PROMPTS, both, strict=True):
        (alone,) = model.generate([tokenizer(prompt)["input_ids"]], max_new_tokens=5, temperature=0)
        assert out["generated_text"] == tokenizer.decode(alone)
    (out,) = write(PROMPTS[0], do_sample=False)  # no length is given: the text ends with the positions
    assert len(tokenizer(out["generated_text"])["input_ids"]) >= 64


def test_the_card_says_how_to_load(exported, capsys):
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "`trust_remote_code` is not needed" in card
    assert "auto_map" not in (exported / "config.json").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(exported))
    assert code.startswith("import flowformer.interop.hf")
    exec(code)
    assert "Another one" in capsys.readouterr().out


def test_folder_works_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = flowformer.create_model(
        "flowformer_gpt_nano", vocab_size=256, max_length=None, positions="sinusoidal", tied=True
    ).eval()
    save_run(model, BytesTokenizer(), tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(256, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits[..., :256], model(tokens))
    write = pipeline("text-generation", model=str(tmp_path / "hf"))
    out = write("caf\u00e9", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert out.startswith("caf\u00e9")


# ------------------------------------------------------------------------------------------------ whole or not at all


def test_nothing_that_is_there_is_touched(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, error, message in (
        ("file", NotADirectoryError, "file is a file: choose a folder"),
        ("full", ValueError, "full is not empty: choose another folder"),
        ("file/below", OSError, "file/below could not be written"),
        ("a" * 300, OSError, "too long"),
    ):
        with pytest.raises(error, match=message):
            save_run(model, BytesTokenizer(), tmp_path / name)
    save_run(model, BytesTokenizer(), tmp_path / "empty")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "empty").config.vocab_size == 258
    assert {path.name for path in tmp_path.iterdir()} == {"file", "full", "empty"}
    assert (tmp_path / "full" / "file").read_text() == (tmp_path / "file").read_text() == "mine"


FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device"),
    Exception("No space left on device"),  # as tokenizers has it
]


@pytest.mark.parametrize("error", FULL, ids=["system", "safetensors", "tokenizers"])
def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch, error):
    def fail(self, folder, **options):
        (folder / "tokenizer.json").write_text("half")
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(OSError, match=r"hf could not be written: .*No space left on device"):
        save_run(model, BytesTokenizer(), tmp_path / "hf")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # no error of a disk
        save_run(model, BytesTokenizer(), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = flowformer.create_model("flowformer_gpt_nano", vocab_size=255, max_length=64)
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model only 255"):
        save_run(model, BytesTokenizer(), tmp_path / "hf")
