"""Export a trained run as a folder for ``from_pretrained``: model, tokenizer, and a card that says how to load it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from flowformer.interop.hf.conversion import to_hf
from flowformer.interop.hf.modeling import FlowformerForCausalLM
from flowformer.models.language import LanguageModel
from flowformer.tasks.text.tokenizers import Tokenizer

# Names of special tokens in published tokenizers; the first is added where there is none.
_END = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]")
_PADDING = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- flowformer
---

# A Flowformer language model

{attention} attention, {layers} layers of {dim} channels, {parameters:,} parameters; written by `flowformer export`.
The model's code is in the package `flowformer`, and nothing here is executed: `trust_remote_code` is not needed.

```bash
pip install "flowformer[text]"
```

```python
import flowformer.interop.hf  # registers the model type "flowformer"
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompts = tokenizer(["One", "Another one"], padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=20), skip_special_tokens=True))
```

Without the import, transformers says that it does not recognize the model type `flowformer`.

Prompts are padded on the left with `{pad}`, and padding does not change results. A text ends with `{eos}`.
{added}"""

_ADDED = """
{names} had no place in the vocabulary that the model was trained with, and were added: their embeddings and scores are
the means of the others, so that each has a probability of at most 1 / {vocabulary}. `{pad}` is never generated.
"""


def save_run(model: LanguageModel, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a model and its tokenizer to a folder for Hugging Face's ``from_pretrained``, whole or not at all.

    Tokens for padding and for the end of a text are added to the vocabulary where the tokenizer has none.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to write; made if it is not there.

    Raises:
        ValueError: for a folder that holds files, or a tokenizer of another vocabulary than the model's.
        OSError: for a path that cannot be written; the message names it.
    """
    folder = Path(folder).absolute()
    _check_free(folder)
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}")
    theirs = to_hf_tokenizer(tokenizer)
    made = to_hf(model)
    if made.config.max_position_embeddings:
        theirs.model_max_length = made.config.max_position_embeddings
        made.generation_config.max_length = made.config.max_position_embeddings
    card = _write_card(made, theirs, tokenizer.vocab_size)
    _make_room(made, theirs)
    with _staged(folder) as staging, _without_progress():
        made.save_pretrained(staging)
        theirs.save_pretrained(staging)
        (staging / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _without_progress() -> Iterator[None]:
    """Keep transformers from drawing a bar for the second that writing takes."""
    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def to_hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Convert a tokenizer to one of transformers, with the same token ids.

    It pads on the left, as generation needs it, and has tokens for padding and for the end of a text: its own, or new
    ones with the next ids.
    """
    form = tokenizer.to_hugging_face()
    backend = form.tokenizer
    # Models are trained on text without the special tokens that a published tokenizer puts around it.
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    special = {"eos_token": _find_special(backend, _END), "pad_token": _find_special(backend, _PADDING)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="left",
        model_input_names=["input_ids", "attention_mask"], **{**special, **form.special_tokens},
    )  # fmt: skip


def _find_special(backend: Backend, names: Sequence[str]) -> str:
    """The special token of these names that a tokenizer has, or a name for a new one."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    own = next((name for name in names if name in special), None)
    if own is not None:
        return own
    name, vocabulary = names[0], backend.get_vocab(with_added_tokens=True)
    while name in vocabulary:
        name = f"<{name}>"
    return name


def _make_room(model: FlowformerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Grow the vocabulary to the tokenizer's; new tokens get the mean embedding and the mean score."""
    before, after = model.config.vocab_size, len(tokenizer)
    if after > before:
        model.resize_token_embeddings(after, mean_resizing=False)
        with torch.no_grad():
            for weight in (model.model.embed.weight, model.lm_head.weight):
                weight[before:] = weight[:before].float().mean(0)
    configs: tuple[Any, ...] = (model.config, model.generation_config)
    for config in configs:
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.generation_config.suppress_tokens = [tokenizer.pad_token_id]


def _write_card(model: FlowformerForCausalLM, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> str:
    config, pad, eos = model.config, tokenizer.pad_token, tokenizer.eos_token
    ids = tokenizer.get_vocab()
    added = [f"`{name}`" for name in (eos, pad) if ids[str(name)] >= vocabulary]
    return _CARD.format(
        attention=config.attention, layers=config.num_hidden_layers, dim=config.hidden_size,
        parameters=model.num_parameters(), pad=pad, eos=eos,
        added=_ADDED.format(names=" and ".join(added), vocabulary=vocabulary, pad=pad) if added else "",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- writing


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose a folder that is not there yet, or an empty one")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder``, which becomes it at the end, or is removed with all that is in it on an error."""
    folder = folder.resolve()
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        yield staging
        for file in staging.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        # Libraries report a full disk by errors of their own: safetensors by its class, tokenizers by Exception itself.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{folder} could not be written: {reason}") from error
        raise
