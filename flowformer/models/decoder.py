"""A language model without its head: embeddings, positions and causal blocks.

:class:`flowformer.models.language.LanguageModel` and the models of :mod:`flowformer.interop.hf` are built on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import apply, check_flag, check_optional_sizes, check_probability, check_sizes, describe
from flowformer.core.masks import fill
from flowformer.mechanisms.dropout import Dropout
from flowformer.models.encoder import Encoder, EncoderBlock
from flowformer.models.initialization import GPT_STD, LanguageInit
from flowformer.models.positions import LearnedPositions, count_positions, create_positions
from flowformer.models.vocabulary.cross_entropy import TOKEN_DTYPES, check_tokens


class LanguageState(NamedTuple):
    """State of a language model after the tokens so far.

    Attributes:
        length: Real tokens so far, (batch,), int64.
        layers: The states of the attentions, first layer first.
    """

    length: Tensor
    layers: tuple[Any, ...]


class Decoder(Encoder):
    """A stack of causal blocks that can continue from a state. Post-norm blocks need no final norm.

    Args:
        blocks: The blocks.
        dim: Channels.
        norm_first: Whether the blocks are pre-norm.
        device: Of the norm.
        dtype: Of the norm.
    """

    def __init__(
        self,
        blocks: list[EncoderBlock],
        dim: int,
        *,
        norm_first: bool,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(blocks, dim, device=device, dtype=dtype)
        if not norm_first:
            self.norm = nn.Identity()

    @property
    def layers(self) -> list[EncoderBlock]:
        """The blocks, in order."""
        return cast("list[EncoderBlock]", list(self.blocks))

    def extend(self, x: Tensor, mask: Tensor | None, states: tuple) -> tuple[Tensor, tuple]:
        """Transform (batch, length, dim), continuing from ``states``; None is the state before the first token."""
        after = []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block(x, mask=mask, initial_state=state, return_state=True)
            after.append(state)
        return fill(self.norm(x), mask), tuple(after)

    def step(self, x: Tensor, states: tuple) -> tuple[Tensor, tuple]:
        """Process one token: (batch, dim) and the states before it, to output and states after it."""
        after = []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self.norm(x), tuple(after)


class TokenDecoder(nn.Module):
    """Token embeddings, positions and a stack of causal blocks: a language model without its head.

    A base class for models. It has no constructor of its own, because its subclasses have constructors of different
    kinds: they call :meth:`build_decoder`.

    Attributes:
        block_class: Class of the blocks.
        embed: The token embedding.
        position: The module of the positions, or None.
        scale: Factor of the embeddings.
        dropout: Dropout on the embeddings.
        decoder: The blocks.
        initialization: How fresh parameters are drawn.
    """

    block_class: ClassVar[type[EncoderBlock]] = EncoderBlock
    embed: nn.Embedding
    position: nn.Module | None
    scale: float
    dropout: nn.Dropout
    decoder: Decoder
    initialization: LanguageInit

    def build_decoder(
        self,
        vocab_size: int,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        max_length: int | None,
        positions: str | None,
        scale_embedding: bool,
        norm_first: bool,
        activation: str,
        dropout: float,
        activation_dropout: float,
        attention: str,
        attention_options: Mapping[str, Any] | None,
        init: str,
        init_std: float = GPT_STD,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the modules; their parameters are not yet initialized by ``init``.

        Args: as those of :class:`flowformer.models.language.LanguageModel`, and

            init_std: Standard deviation of ``init="gpt"``.
        """
        check_sizes(vocab_size=vocab_size, dim=dim, ffn_dim=ffn_dim)
        check_optional_sizes(max_length=max_length)
        for name, value in (("dropout", dropout), ("activation_dropout", activation_dropout)):
            check_probability(name, value)
        for name, flag in (("scale_embedding", scale_embedding), ("norm_first", norm_first)):
            check_flag(name, flag)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.initialization = LanguageInit(init, dim, num_layers, init_std)
        self.scale = math.sqrt(dim) if scale_embedding else 1.0
        self.embed = nn.Embedding(vocab_size, dim, **factory)
        self.position = create_positions(positions, dim, max_length, **factory)
        self.dropout = Dropout(dropout)
        blocks = [
            self.block_class(
                dim, num_heads, ffn_dim, dropout=dropout, attention=attention, attention_options=attention_options,
                max_length=max_length, causal=True, norm_first=norm_first, activation=activation,
                activation_dropout=activation_dropout, **factory,
            )
            for _ in range(num_layers)
        ]  # fmt: skip
        self.decoder = Decoder(blocks, dim, norm_first=norm_first, **factory)

    def embed_tokens(self, tokens: Tensor, mask: Tensor | None = None, *, name: str = "tokens") -> Tensor:
        """Return embeddings (batch, length, dim) of tokens (batch, length), which may be any numbers at padding.

        Raises:
            ValueError: for a token beyond the vocabulary; ``name`` is what the message calls the tokens.
        """
        if mask is not None:
            tokens = tokens.masked_fill(~mask, 0)
        vocabulary = getattr(self.embed, "num_embeddings", None)  # not known of a layer around the embedding
        if vocabulary is not None:
            check_tokens(name, tokens, vocabulary)
        return apply(name, self.embed, tokens)

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Scale embeddings (..., dim), add position vectors of positions (...) from 0, and apply dropout."""
        x = x * self.scale
        if self.position is not None:
            x = x + self.position(positions).to(x.dtype)
        return self.dropout(x)

    def decode(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: LanguageState | None = None,
        *,
        return_state: bool = False,
    ) -> tuple[Tensor, LanguageState | None]:
        """Run the blocks.

        Args:
            x: Embeddings (batch, length, dim), without positions.
            mask: (batch, length) boolean, True = a real token.
            state: State to continue from.
            return_state: Return the state after the last token.

        Returns:
            Hidden states (batch, length, dim), zeros at padding; and the state, or None.
        """
        before = None if state is None else state.length
        if isinstance(self.position, LearnedPositions) and mask is None and state is None:
            self.position.check(x.shape[1])  # known without a look at any value
        positions = count_positions(x[..., 0], mask, before)
        x = self.add_positions(x, positions)
        if state is None and not return_state:
            return self.decoder(x, mask), None
        layers = (None,) * len(self.decoder.blocks) if state is None else state.layers
        out, layers = self.decoder.extend(x, mask, layers)
        if not return_state:
            return out, None
        length = torch.full_like(x[:, 0, 0], x.shape[1], dtype=torch.int64)
        length = length if mask is None else mask.sum(-1)
        return out, LanguageState(length if before is None else before + length, layers)


def check_token_ids(name: str, tokens: Tensor) -> None:
    """Raise unless tokens are a batch of sequences of token ids.

    Raises:
        TypeError: for a tensor that is not of integers.
        ValueError: for another shape than (batch, length), or no tokens.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {describe(tokens)}")
    if tokens.dtype not in TOKEN_DTYPES:
        raise TypeError(f"{name} must be integers, got {describe(tokens)}")
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(f"{name} must be (batch, length) with at least one token, got {describe(tokens)}")


def find_targets(mask: Tensor) -> Tensor:
    """Return which tokens can be predicted: real ones after a real one; in the first column, all real ones.

    Args:
        mask: (batch, length) boolean, True = a real token; padding on either side.

    Returns:
        (batch, length) boolean.
    """
    return mask & nn.functional.pad(mask[:, :-1], (1, 0), value=True)
