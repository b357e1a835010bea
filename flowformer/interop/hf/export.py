"""A trained run as a folder for ``from_pretrained``: model and tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from flowformer.interop.hf.conversion import to_hf
from flowformer.models.language import LanguageModel
from flowformer.tasks.text.tokenizers import Tokenizer


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
    form = tokenizer.to_hugging_face()
    return PreTrainedTokenizerFast(
        tokenizer_object=form.tokenizer, clean_up_tokenization_spaces=False, **form.special_tokens
    )
