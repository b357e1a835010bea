"""Language models by name: the published ones, and ours.

Sources: thuml/Flowformer, Flowformer_TorchModule (the GPT-style module) and Flowformer_NLP (WikiText-103, on fairseq's
transformer_lm); Zhai et al., "An Attention Free Transformer", 2021 (Enwik8, CIFAR-10).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowformer.models.language import LanguageModel
from flowformer.models.positions import knows_distance
from flowformer.models.registry import register_model


def _published(
    vocab_size: int, attention: str, attention_options: Mapping[str, Any], shape: Mapping[str, Any], options: Any
) -> LanguageModel:
    """A published model, or a departure from it; the published attention's options go with it alone."""
    merged = {**shape, "attention": attention, **options}
    if merged["attention"] == attention:
        merged["attention_options"] = {**attention_options, **(options.get("attention_options") or {})}
    return LanguageModel(vocab_size, **merged)


def _gpt(
    num_layers: int, num_heads: int, dim: int, vocab_size: int, max_length: int | None, options: Mapping[str, Any]
) -> LanguageModel:
    """Source: thuml/Flowformer, Flowformer_TorchModule/flowformergpt/model.py; its head is not tied."""
    shape = {"num_layers": num_layers, "num_heads": num_heads, "dim": dim, "max_length": max_length}
    return _published(vocab_size, "flow", {"preset": "core"}, {**shape, "activation": "gelu_tanh"}, options)


@register_model
def flowformer_gpt_nano(vocab_size: int, max_length: int | None, **options: Any) -> LanguageModel:
    """The GPT-style module's smallest: 3 layers, 3 heads, 48 channels."""
    return _gpt(3, 3, 48, vocab_size, max_length, options)


@register_model
def flowformer_gpt_micro(vocab_size: int, max_length: int | None, **options: Any) -> LanguageModel:
    """The GPT-style module with 4 layers, 4 heads, 128 channels."""
    return _gpt(4, 4, 128, vocab_size, max_length, options)


@register_model
def flowformer_gpt_mini(vocab_size: int, max_length: int | None, **options: Any) -> LanguageModel:
    """The GPT-style module with 6 layers, 6 heads, 192 channels."""
    return _gpt(6, 6, 192, vocab_size, max_length, options)


@register_model
def flowformer_gopher_44m(vocab_size: int, max_length: int | None, **options: Any) -> LanguageModel:
    """The GPT-style module with 8 layers, 16 heads, 512 channels."""
    return _gpt(8, 16, 512, vocab_size, max_length, options)


@register_model
def flowformer_gpt2(vocab_size: int = 50_257, max_length: int | None = 1_024, **options: Any) -> LanguageModel:
    """The GPT-style module in GPT-2's shape: 12 layers, 12 heads, 768 channels."""
    return _gpt(12, 12, 768, vocab_size, max_length, options)


@register_model
def flowformer_gpt2_medium(vocab_size: int = 50_257, max_length: int | None = 1_024, **options: Any) -> LanguageModel:
    """The GPT-style module in GPT-2 medium's shape: 24 layers, 16 heads, 1,024 channels."""
    return _gpt(24, 16, 1_024, vocab_size, max_length, options)


@register_model
def flowformer_gpt2_large(vocab_size: int = 50_257, max_length: int | None = 1_024, **options: Any) -> LanguageModel:
    """The GPT-style module in GPT-2 large's shape: 36 layers, 20 heads, 1,280 channels."""
    return _gpt(36, 20, 1_280, vocab_size, max_length, options)


@register_model
def flowformer_gpt2_xl(vocab_size: int = 50_257, max_length: int | None = 1_024, **options: Any) -> LanguageModel:
    """The GPT-style module in GPT-2 XL's shape: 48 layers, 25 heads, 1,600 channels."""
    return _gpt(48, 25, 1_600, vocab_size, max_length, options)


@register_model
def flowformer_wikitext(vocab_size: int = 267_735, **options: Any) -> LanguageModel:
    """The WikiText-103 model: fairseq's transformer_lm with Flow-Attention, of 6 layers, 8 heads, 512 channels.

    Source: thuml/Flowformer, Flowformer_NLP, and fairseq, models/transformer_lm.py.

    Args:
        vocab_size: Words; 267,735 are those of the training set with the end of a line.
        **options: As in :class:`LanguageModel`.
    """
    shape = {
        "num_layers": 6, "num_heads": 8, "dim": 512, "ffn_dim": 2_048, "positions": "sinusoidal",
        "scale_embedding": True, "activation": "relu", "tied": True, "init": "fairseq",
    }  # fmt: skip
    return _published(vocab_size, "flow", {"preset": "wikitext"}, shape, options)


@register_model
def flowformer_text(vocab_size: int, **options: Any) -> LanguageModel:
    """A small model for your own text: 4 layers, 4 heads, 192 channels, Flow-Attention that knows distance.

    Without positions: Flow-Attention with decay and convolution does better without, and writes past the length it was
    trained at (docs/distance.md). Attention that knows no distance has sinusoidal positions here. Embeddings are scaled
    to their size, and the projections are of Xavier's: with GPT's initial weights of 0.02, positions would hide the
    tokens, and queries and keys be near zero.

    Args:
        vocab_size: Tokens of the vocabulary.
        **options: As in :class:`LanguageModel`.
    """
    own = {"preset": "distance"}
    attention, given = options.get("attention", "flow"), options.get("attention_options") or {}
    distance = knows_distance({**own, **given} if attention == "flow" else given)
    shape = {
        "num_layers": 4, "num_heads": 4, "dim": 192, "positions": None if distance else "sinusoidal",
        "scale_embedding": True, "init": "fairseq",
    }  # fmt: skip
    return _published(vocab_size, "flow", own, shape, options)


def _aft(
    num_layers: int, dim: int, local: Mapping[str, Any], vocab_size: int, max_length: int | None, options: Any
) -> LanguageModel:
    """Source: Zhai et al., tables 2 and 4. It specifies neither which GELU or ReLU, nor the initialization."""
    shape = {"num_layers": num_layers, "num_heads": 1, "dim": dim, "max_length": max_length}
    return _published(vocab_size, "aft_local", local, shape, options)


_AFT_ENWIK8 = {"window": 32, "position_dim": 256}
_AFT_CIFAR = {"window": 256, "position_dim": 64}


@register_model
def aft_enwik8_12(vocab_size: int = 256, max_length: int | None = 1_024, **options: Any) -> LanguageModel:
    """AFT-local for Enwik8, byte by byte: 12 layers of 512 channels, window 32. Options as in :class:`LanguageModel`.

    The Transformer beside it has 8 heads: ``attention="softmax", num_heads=8``.
    """
    return _aft(12, 512, _AFT_ENWIK8, vocab_size, max_length, options)


@register_model
def aft_enwik8_24(vocab_size: int = 256, max_length: int | None = 1_024, **options: Any) -> LanguageModel:
    """AFT-local for Enwik8, byte by byte: 24 layers of 256 channels, window 32. Options as in :class:`LanguageModel`.

    The Transformer beside it has 4 heads: ``attention="softmax", num_heads=4``.
    """
    return _aft(24, 256, _AFT_ENWIK8, vocab_size, max_length, options)


@register_model
def aft_cifar_12(vocab_size: int = 256, max_length: int | None = 3_072, **options: Any) -> LanguageModel:
    """AFT-local for CIFAR-10, sub-pixel by sub-pixel: 12 layers of 512 channels, window 256.

    Options as in :class:`LanguageModel`. The Transformer beside it has 4 heads: ``attention="softmax", num_heads=4``.
    """
    return _aft(12, 512, _AFT_CIFAR, vocab_size, max_length, options)


@register_model
def aft_cifar_24(vocab_size: int = 256, max_length: int | None = 3_072, **options: Any) -> LanguageModel:
    """AFT-local for CIFAR-10, sub-pixel by sub-pixel: 24 layers of 256 channels, window 256.

    Options as in :class:`LanguageModel`. The Transformer beside it has 2 heads: ``attention="softmax", num_heads=2``.
    """
    return _aft(24, 256, _AFT_CIFAR, vocab_size, max_length, options)
