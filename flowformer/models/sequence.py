"""Classifiers of long sequences of tokens, and of pairs of them.

Source: the Transformer encoder of google-research/long-range-arena, lra_benchmarks/models (Tay et al., ICLR 2021), in
which Flowformer_LRA of thuml/Flowformer replaces the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import (
    check_flag,
    check_mask,
    check_optional_sizes,
    check_probability,
    check_sizes,
    describe,
)
from flowformer.core.masks import fill
from flowformer.mechanisms.dropout import Dropout
from flowformer.models.encoder import Encoder, EncoderBlock
from flowformer.models.initialization import Initializer, set_initializer, truncated_normal
from flowformer.models.positions import LearnedPositions, SinusoidalPositions, count_positions
from flowformer.models.registry import register_model
from flowformer.models.vocabulary.cross_entropy import TOKEN_DTYPES, check_tokens

Positions = Literal["sinusoidal", "learned"]
Pool = Literal["class", "mean"]
Pairs = Literal["joined", "interaction"]
NORM_EPS = 1e-6  # of flax's LayerNorm
POSITION_STD = 0.02  # of learned positions; long-range-arena, models/layers/common_layers.py
_BIAS_STD = 1e-6  # of the feed-forward networks, likewise


class SequenceClassifier(nn.Module):
    """The published classifier of Long Range Arena: embed tokens, encode, pool, and classify by two linear layers.

    Pre-norm blocks without biases in the attention, a norm after the last, and of its outputs that of a class token
    before the sequence, or their mean. With ``pairs``, two sequences are encoded by the same weights, and classified by
    what was pooled of both.

    Args:
        vocab_size: Number of tokens, padding included if there is any.
        num_classes: Number of classes.
        max_length: Longest sequence.
        dim: Channels of the encoder.
        num_heads: Heads of each attention.
        head_dim: Channels of a head of queries, keys and values; ``dim // num_heads`` if absent.
        num_layers: Blocks.
        ffn_dim: Channels inside the feed-forward networks, and of the classifier's first layer.
        dropout: Probability: of embeddings, of the output of attentions, after both layers of feed-forward networks.
        positions: ``"sinusoidal"``, ``"learned"``, or ``None`` for none.
        pool: ``"class"`` for a class token before the sequence, ``"mean"`` for the mean over tokens.
        pairs: ``None``: the input is one sequence. ``"joined"``: two sequences, whose pooled vectors a and b are
            joined. ``"interaction"``: a, b, a * b and a - b are joined.
        attention: Name of the mechanism: :func:`flowformer.list_attentions`.
        attention_options: Options of the mechanism; for ``"flow"`` the preset ``"lra"`` unless one is given.
        mask_padding: Whether padding is invisible. ``False`` is the published behaviour: padding takes part in
            attention and in the mean, so that an answer depends on how far its batch is padded.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError, TypeError: for sizes or options that do not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        max_length: int,
        *,
        dim: int = 512,
        num_heads: int = 2,
        head_dim: int | None = None,
        num_layers: int = 1,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        positions: Positions | None = "sinusoidal",
        pool: Pool = "class",
        pairs: Pairs | None = None,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        mask_padding: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, num_classes=num_classes, max_length=max_length)
        check_sizes(dim=dim, num_heads=num_heads, num_layers=num_layers, ffn_dim=ffn_dim)
        check_optional_sizes(head_dim=head_dim)
        check_probability("dropout", dropout)
        check_flag("mask_padding", mask_padding)
        _check_choice("positions", positions, (*get_args(Positions), None))
        _check_choice("pool", pool, get_args(Pool))
        _check_choice("pairs", pairs, (*get_args(Pairs), None))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {"bias": False, "head_dim": head_dim, **(attention_options or {})}
        if attention == "flow":
            options.setdefault("preset", "lra")
        self.vocab_size, self.num_classes, self.max_length = vocab_size, num_classes, max_length
        self.pool, self.pairs, self.mask_padding = pool, pairs, mask_padding
        seen = max_length + (pool == "class")  # by the encoder
        self.embed = nn.Embedding(vocab_size, dim, **factory)
        self.class_token = nn.Parameter(torch.zeros(dim, **factory)) if pool == "class" else None
        self.positions = _create_positions(positions, dim, seen, factory)
        self.dropout = Dropout(dropout)
        self.encoder = Encoder(
            [
                EncoderBlock(
                    dim, num_heads, ffn_dim, dropout=dropout, attention=attention, attention_options=options,
                    max_length=seen, norm_first=True, **factory,
                )
                for _ in range(num_layers)
            ],
            dim, **factory,
        )  # fmt: skip
        pooled = dim * {None: 1, "joined": 2, "interaction": 4}[pairs]
        widths = (pooled, ffn_dim, *((ffn_dim // 2,) if pairs else ()), num_classes)
        layers = [nn.Linear(*two, **factory) for two in pairwise(widths)]
        self.head = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
        self._set_initializers()

    def _set_initializers(self) -> None:
        """Set what layers draw, and draw it; the token embedding is N(0, 1), as PyTorch's is."""
        for module in self.encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = NORM_EPS
        draws: list[tuple[Any, Initializer]] = [(part, _lecun) for part in self.head if isinstance(part, nn.Linear)]
        for block in self.encoder.blocks:
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    draws.append((layer, _xavier if name.startswith("attention") else _feed_forward))
        if isinstance(self.positions, nn.Embedding):
            draws.append((self.positions, _position))
        for layer, initializer in draws:
            set_initializer(layer, initializer)
            layer.reset_parameters()

    def reset_parameters(self) -> None:
        """Re-initialize the class token with zeros; submodules are reset separately."""
        if self.class_token is not None:
            nn.init.zeros_(self.class_token)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that a recipe may spare from weight decay: positions and class token."""
        return {name for name, _ in self.named_parameters() if name.startswith(("positions.", "class_token"))}

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return class logits of a batch of sequences.

        Args:
            tokens: (batch, length) integers below ``vocab_size``, with length at most ``max_length``; with ``pairs``
                (batch, 2, length). They may be any numbers at padding, unless it takes part.
            mask: Of the shape of ``tokens``, boolean, True = a real token. Positions count real tokens.

        Returns:
            Logits (batch, num_classes).

        Raises:
            TypeError, ValueError: for another shape or dtype, a longer sequence, or a token beyond the vocabulary.
        """
        self._check(tokens, mask)
        if self.pairs is None:
            return self.head(self.encode(tokens, mask))
        a, b = self.encode(tokens.flatten(0, 1), None if mask is None else mask.flatten(0, 1)).view(
            len(tokens), 2, -1
        ).unbind(1)  # fmt: skip
        parts = (a, b) if self.pairs == "joined" else (a, b, a * b, a - b)
        return self.head(torch.cat(parts, -1))

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return one vector for each sequence, (batch, dim), of (batch, length) tokens and mask, as :meth:`forward`."""
        if mask is not None and self.mask_padding:
            tokens = tokens.masked_fill(~mask, 0)
        else:
            mask = None
        check_tokens("tokens", tokens, self.vocab_size)
        x = self.embed(tokens.to(torch.int64))
        if self.class_token is not None:
            first = self.class_token.to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat((first, x), 1)
            if mask is not None:
                mask = nn.functional.pad(mask, (1, 0), value=True)
        if self.positions is not None:
            x = x + self.positions(count_positions(x[..., 0], mask, None)).to(x.dtype)
        x = self.encoder(self.dropout(x), mask)
        if self.class_token is not None:
            return x[:, 0]
        if mask is None:
            return x.mean(1)
        # A sequence without tokens has the mean 0.
        return fill(x, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def _check(self, tokens: Tensor, mask: Tensor | None) -> None:
        shape = "(batch, length)" if self.pairs is None else "(batch, 2, length)"
        if not isinstance(tokens, Tensor) or tokens.dtype not in TOKEN_DTYPES:
            raise TypeError(f"tokens must be a tensor of integers, got {describe(tokens)}")
        if tokens.ndim != shape.count(",") + 1 or not tokens.shape[-1] or (self.pairs and tokens.shape[1] != 2):
            raise ValueError(f"tokens must have the shape {shape} with at least one position, got {describe(tokens)}")
        if tokens.shape[-1] > self.max_length:
            raise ValueError(
                f"tokens have {tokens.shape[-1]} positions, but this model supports at most max_length = "
                f"{self.max_length}"
            )
        if mask is not None:
            check_mask("mask", mask, tokens.shape, tokens.device)


def _check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if not isinstance(value, (str, type(None))) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _create_positions(kind: Positions | None, dim: int, length: int, factory: Mapping[str, Any]) -> nn.Module | None:
    if kind is None:
        return None
    if kind == "learned":
        return LearnedPositions(length, dim, **factory)
    return SinusoidalPositions(dim, first=0, interleaved=True)


_lecun: Initializer = partial(truncated_normal, std=None)


def _xavier(layer: Any) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _feed_forward(layer: Any) -> None:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.normal_(layer.bias, std=_BIAS_STD)


def _position(layer: Any) -> None:
    nn.init.normal_(layer.weight, std=POSITION_STD)


@register_model
def flowformer_sequence(vocab_size: int, num_classes: int, max_length: int, **options: Any) -> SequenceClassifier:
    """The classifier of Long Range Arena in the size of its ListOps: 1 layer, 512 channels, 2 heads, 1,024 inside.

    Args:
        vocab_size: Number of tokens.
        num_classes: Number of classes.
        max_length: Longest sequence.
        **options: As in :class:`SequenceClassifier`.
    """
    return SequenceClassifier(vocab_size, num_classes, max_length, **options)
