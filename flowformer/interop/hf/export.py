"""A trained run as a folder for ``from_pretrained``: model and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flowformer.interop.hf.conversion import to_hf
from flowformer.models.language import LanguageModel
from flowformer.tasks.tokenizers import END_OF_LINE, UNKNOWN_CHARACTER, UNKNOWN_WORD, Tokenizer


def save_run(model: LanguageModel, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a model and its tokenizer as Hugging Face's ``from_pretrained`` reads them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to write; made if it is not there.

    Raises:
        ValueError: for a folder that holds files.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files already: give another folder")
    theirs = to_hf_tokenizer(tokenizer)
    to_hf(model, eos_token_id=theirs.eos_token_id).save_pretrained(folder)
    theirs.save_pretrained(folder)


def to_hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer as one of transformers: the same numbers for the same text."""
    made, special = _BUILDERS[tokenizer.kind](tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)


def _bytes(tokenizer: Any) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    made = tokenizers.Tokenizer(models.BPE({_byte_name(byte): byte for byte in range(256)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made, {}


def _byte_name(byte: int) -> str:
    """The character that stands for a byte in byte-level vocabularies: itself where it can be seen (GPT-2's rule)."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in seen:
        return chr(byte)
    return chr(256 + sum(other not in seen for other in range(byte)))


def _characters(tokenizer: Any) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    vocabulary = {character: token for token, character in enumerate(tokenizer.alphabet)}
    # Without a character for all others there is no token for them: tokenizers then leaves them out.
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, UNKNOWN_CHARACTER))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made, {"unk_token": UNKNOWN_CHARACTER} if UNKNOWN_CHARACTER in vocabulary else {}


def _words(tokenizer: Any) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    vocabulary = {word: token for token, word in enumerate(tokenizer.words)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, UNKNOWN_WORD))
    made.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made, {"eos_token": END_OF_LINE, **({"unk_token": UNKNOWN_WORD} if UNKNOWN_WORD in vocabulary else {})}


def _hugging_face(tokenizer: Any) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_json()["tokenizer"])), {}


_BUILDERS = {"bytes": _bytes, "characters": _characters, "words": _words, "hugging-face": _hugging_face}
