"""Runs that go to Hugging Face."""

import numpy as np
import pytest
import torch
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


def test_folder_works_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = flowformer.create_model(
        "flowformer_gpt_nano", vocab_size=256, max_length=None, positions="sinusoidal", tied=True
    ).eval()
    save_run(model, BytesTokenizer(), tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(256, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens))
    write = pipeline("text-generation", model=str(tmp_path / "hf"))
    out = write("caf\u00e9", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert out.startswith("caf\u00e9")
    with pytest.raises(ValueError, match="holds files already"):
        save_run(model, BytesTokenizer(), tmp_path / "hf")
