"""Tokenizers: text to tokens and back, streamed, and rebuilt from JSON."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from flowformer.common.errors import DataError
from flowformer.tasks.text.tokenizers import (
    BytesTokenizer,
    CharacterTokenizer,
    HuggingFaceTokenizer,
    WordTokenizer,
    create_tokenizer,
    read_tokenizer,
)

TEXT = "Der Fluss = река, 川 🌊 =\nfließt.\r\n\n Ende"


def write_bpe(path, vocab_size=400):
    """A byte-level BPE that begins every text with [CLS], cuts it after 4 tokens and pads it to 8."""
    made = tokenizers.Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["[CLS]"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    made.enable_truncation(4)
    made.enable_padding(length=8)
    made.save(str(path))
    return path


@pytest.fixture(params=["bytes", "characters", "words", "hugging-face"])
def tokenizer(request, tmp_path):
    if request.param == "hugging-face":
        return HuggingFaceTokenizer(write_bpe(tmp_path / "tokenizer.json"))
    return create_tokenizer(request.param, TEXT)


def test_decode_gives_the_text_back(tokenizer):
    expected = "Der Fluss = река, 川 🌊 =\nfließt.\n\nEnde" if tokenizer.kind == "words" else TEXT
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == tokenizer.dtype
    assert tokens.ndim == 1
    assert tokenizer.decode(tokens) == expected
    assert tokenizer.decode(tokens.tolist()) == expected


def test_stream_gives_the_text_token_by_token(tokenizer):
    pieces = list(map(tokenizer.stream(), tokenizer.encode(TEXT)))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(TEXT))
    assert "\ufffd" not in "".join(pieces)
    other = tokenizer.stream()  # streams do not know of each other
    assert "".join(map(other, tokenizer.encode("Der Fluss"))) == "Der Fluss"


def test_json_rebuilds_it(tokenizer, tmp_path):
    values = json.loads(json.dumps(tokenizer.to_json()))
    for file in tmp_path.iterdir():
        file.unlink()  # what it was made of may be gone
    again = read_tokenizer(values)
    assert (again.kind, again.vocab_size, again.dtype) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.dtype)
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    assert again.to_json() == tokenizer.to_json()


def test_tokens_outside_the_vocabulary_are_refused(tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"tokens must be 0 to {tokenizer.vocab_size - 1}, got {token}"):
            tokenizer.decode([0, token])
        with pytest.raises(ValueError, match="tokens must be"):
            tokenizer.stream()(token)


def test_empty_text(tokenizer):
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("").dtype == tokenizer.dtype
    assert tokenizer.decode([]) == ""


def test_bytes_are_those_of_utf8():
    tokenizer = BytesTokenizer()
    assert tokenizer.encode("aß").tolist() == [0x61, 0xC3, 0x9F]
    add = tokenizer.stream()
    assert [add(0xC3), add(0x9F), add(0xC3), add(0x61)] == ["", "ß", "", "\ufffda"]
    # An argument of a command line in Latin-1 reaches Python so, and is taken as the bytes it was.
    assert tokenizer.encode(b"\xdf".decode("utf-8", "surrogateescape")).tolist() == [0xDF]


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32)])
def test_the_smallest_type_that_holds_the_vocabulary(size, dtype):
    # From behind the surrogates, which are no characters of their own.
    tokenizer = CharacterTokenizer("".join(map(chr, range(0xE000, 0xE000 + size))))
    assert tokenizer.dtype == dtype
    assert tokenizer.encode(chr(0xE000 + size - 1)).tolist() == [size - 1]


def test_characters_are_in_their_order_and_others_unknown():
    tokenizer = CharacterTokenizer.fit(["bca", "ab"])
    assert tokenizer.alphabet == "abc\ufffd"
    assert tokenizer.encode("cxa🌊").tolist() == [2, 3, 0, 3]
    assert tokenizer.decode(tokenizer.encode("cxa")) == "c\ufffda"
    with pytest.raises(ValueError, match="character 'x' is not in the alphabet"):
        CharacterTokenizer("abc").encode("abxa")
    with pytest.raises(ValueError, match="must be unique, got 'a' 2 times"):
        CharacterTokenizer("aba")
    with pytest.raises(ValueError, match="at least one character"):
        CharacterTokenizer("")


def test_words_are_in_the_order_of_their_counts():
    tokenizer = WordTokenizer.fit(["b a b\n", "c b\n\n a"])
    assert tokenizer.words == ["<eos>", "b", "a", "c", "<unk>"]
    assert tokenizer.encode(" a  x b\n").tolist() == [2, 4, 1, 0]
    assert tokenizer.encode("a\n b").tolist() == [2, 0, 1]
    assert tokenizer.decode([2, 4, 0, 0, 1]) == "a <unk>\n\nb"
    with pytest.raises(ValueError, match="word 'x' is not in the vocabulary"):
        WordTokenizer(["a", "<eos>"]).encode("a x")
    with pytest.raises(ValueError, match="got 'a' more than once"):
        WordTokenizer(["a", "<eos>", "a"])
    with pytest.raises(ValueError, match="must contain '<eos>'"):
        WordTokenizer(["a", "b"])


def test_hugging_face_adds_cuts_and_pads_nothing(tmp_path):
    tokenizer = HuggingFaceTokenizer(write_bpe(tmp_path / "own.json"))
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) > 8
    assert 0 not in tokens  # [CLS]
    assert tokenizer.encode("[CLS]").tolist() == [0]  # where the text has it
    assert tokenizer.decode([0]) == "[CLS]"
    assert tokenizer.vocab_size > 256
    assert tokenizer.dtype == np.uint16


def test_hugging_face_takes_a_folder(tmp_path):
    write_bpe(tmp_path / "tokenizer.json")
    made = create_tokenizer(str(tmp_path))
    assert made.kind == "hugging-face"
    np.testing.assert_array_equal(made.encode(TEXT), create_tokenizer(str(tmp_path / "tokenizer.json")).encode(TEXT))


def test_numbers_left_out_count(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 300}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "gaps.json"))
    assert HuggingFaceTokenizer(tmp_path / "gaps.json").vocab_size == 301


@pytest.mark.slow  # importing transformers
def test_hugging_face_takes_older_files(tmp_path):
    write_bpe(tmp_path / "whole.json")
    folder = tmp_path / "older"
    folder.mkdir()
    values = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(values["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in values["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    made = create_tokenizer(str(folder))
    np.testing.assert_array_equal(made.encode(TEXT), HuggingFaceTokenizer(tmp_path / "whole.json").encode(TEXT))
    read_tokenizer(made.to_json())


@pytest.mark.slow  # importing transformers
def test_a_tokenizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no tokenizer 'nobody/nothing': expected bytes, characters, words, a tok"):
        create_tokenizer("nobody/nothing")
    with pytest.raises(ValueError, match="no tokenizer"):
        create_tokenizer(str(tmp_path))


@pytest.mark.slow  # importing transformers
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def refuse(*words, **options):
        asked.append(words)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", refuse)
    with pytest.raises(ValueError, match="no tokenizer 'nobody/nothing'") as caught:
        create_tokenizer("nobody/nothing")
    assert len(asked) == 1, asked
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("wrds", "words"), ("word", "words"), ("Bytes", "bytes"), ("chars", "characters"), ("character", "characters")],
)
def test_a_misspelt_name_is_not_asked_of_the_hub(monkeypatch, name, near):
    monkeypatch.setattr("flowformer.tasks.text.tokenizers._open_hugging_face", None)
    with pytest.raises(ValueError, match=rf"no tokenizer '{name}' \(did you mean '{near}'\?\)"):
        create_tokenizer(name)


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16"])
def test_a_tokenizer_with_a_byte_order_mark(tmp_path, form):
    path = tmp_path / "tokenizer.json"
    write_bpe(path)
    wanted = HuggingFaceTokenizer(path).encode(TEXT)
    path.write_bytes(path.read_text(encoding="utf-8").encode(form))
    np.testing.assert_array_equal(create_tokenizer(str(tmp_path)).encode(TEXT), wanted)
    path.write_bytes(b"{\xff}")
    with pytest.raises(DataError, match=r"tokenizer.json is not UTF-8: byte 1: invalid start byte"):
        create_tokenizer(str(path))


def test_what_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="contains no readable tokenizer"):
        create_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="require a training text for their vocabulary, got none"):
        create_tokenizer("characters")
    with pytest.raises(ValueError, match="must not be empty"):
        create_tokenizer("")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "must contain 'kind', got nothing"),
        ({"kind": "words"}, "must contain 'words', got kind"),
        ({"kind": "syllables"}, "must be bytes, characters, words or hugging-face, got 'syllables'"),
    ],
)
def test_descriptions_that_do_not_do(values, message):
    with pytest.raises(ValueError, match=message):
        read_tokenizer(values)
