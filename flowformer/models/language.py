"""Language models: a decoder with any causal attention, and its published variants.

Sources: thuml/Flowformer, Flowformer_TorchModule (the GPT-style module) and Flowformer_NLP (WikiText-103, on fairseq's
transformer_lm); Zhai et al., "An Attention Free Transformer", 2021 (Enwik8, CIFAR-10).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import check_flag, check_sizes, describe
from flowformer.models import generation
from flowformer.models.cross_entropy import check_tokens, cross_entropy
from flowformer.models.decoder import LanguageState, TokenDecoder, check_token_ids, find_targets
from flowformer.models.initialization import draw_parameters
from flowformer.models.registry import register_model


class LanguageModel(TokenDecoder):
    """A causal language model: token embeddings, positions, blocks, and a language modeling head.

    Padding is invisible, on either side: positions count real tokens only, and a row of a batch gives what it gives
    alone.

    Args:
        vocab_size: Tokens of the vocabulary.
        dim: Channels.
        num_layers: Blocks.
        num_heads: Heads of each attention.
        ffn_dim: Channels inside the feed-forward networks; ``4 * dim`` if absent.
        max_length: Longest sequence. Needed by learned positions and by mechanisms with parameters for each position.
        positions: ``"learned"`` (which end at ``max_length``), ``"sinusoidal"`` (which have no end), or None.
        scale_embedding: Multiply embeddings by sqrt(dim), as fairseq does.
        norm_first: Pre-norm blocks and a final norm; ``False`` for post-norm blocks.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"`` (GPT-2's) or ``"relu"``.
        dropout: Probability, on embeddings and on the outputs of attentions and feed-forward networks.
        activation_dropout: Probability inside the feed-forward networks.
        tied: Whether the embedding is the output head too.
        attention: Name of a causal mechanism: :func:`flowformer.list_attentions`.
        attention_options: Options of the mechanism.
        init: Fresh parameters as ``"gpt"`` or ``"fairseq"`` has them:
            :class:`flowformer.models.initialization.LanguageInit`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError, TypeError: for sizes or options that do not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int | None = None,
        max_length: int | None = None,
        positions: str | None = "learned",
        scale_embedding: bool = False,
        norm_first: bool = True,
        activation: str = "gelu",
        dropout: float = 0.1,
        activation_dropout: float = 0.0,
        tied: bool = False,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        init: str = "gpt",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, dim=dim, num_layers=num_layers)
        check_flag("tied", tied)
        self.vocab_size, self.max_length, self.dim = vocab_size, max_length, dim
        self.build_decoder(
            vocab_size, dim=dim, num_layers=num_layers, num_heads=num_heads,
            ffn_dim=4 * dim if ffn_dim is None else ffn_dim, max_length=max_length, positions=positions,
            scale_embedding=scale_embedding, norm_first=norm_first, activation=activation, dropout=dropout,
            activation_dropout=activation_dropout, attention=attention, attention_options=attention_options, init=init,
            device=device, dtype=dtype,
        )  # fmt: skip
        # No second name for a tied weight: files of weights then hold it once.
        self.head = None if tied else nn.Linear(dim, vocab_size, bias=False, device=device, dtype=dtype)
        self.initialization.set_on(self)
        draw_parameters(self)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head, (vocab_size, dim)."""
        return self.embed.weight if self.head is None else self.head.weight

    @overload
    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: Literal[True],
    ) -> tuple[Tensor, LanguageState]: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, LanguageState]: ...

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LanguageState]:
        """Return the logits of the next token at each position.

        Over a large vocabulary they take much memory: :meth:`loss` does without them, and :meth:`logits` scores a
        selection of hidden states.

        Args:
            tokens: (batch, length), integers below ``vocab_size``; any at padding.
            mask: (batch, length) boolean, True = a real token; padding on either side.
            initial_state: State to continue from.
            return_state: Return the state after the last token as well.

        Returns:
            Logits (batch, length, vocab_size), undefined at padding; with ``return_state`` also the state.

        Raises:
            ValueError, TypeError: for invalid input, or a sequence beyond the learned positions.
        """
        hidden, state = self._hidden(tokens, mask, initial_state, return_state)
        return self.logits(hidden) if state is None else (self.logits(hidden), state)

    @overload
    def hidden(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def hidden(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: Literal[True],
    ) -> tuple[Tensor, LanguageState]: ...

    @overload
    def hidden(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, LanguageState]: ...

    def hidden(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LanguageState]:
        """Return the input of the head: (batch, length, dim), zeros at padding. Arguments as in :meth:`forward`."""
        hidden, state = self._hidden(tokens, mask, initial_state, return_state)
        return hidden if state is None else (hidden, state)

    def _hidden(
        self, tokens: Tensor, mask: Tensor | None, state: LanguageState | None, return_state: bool
    ) -> tuple[Tensor, LanguageState | None]:
        self._check(tokens, mask, state)
        x = self.embed_tokens(tokens, mask)
        return self.decode(x, mask, state, return_state=return_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., vocab_size) of hidden states (..., dim)."""
        return nn.functional.linear(hidden, self.head_weight)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the cross-entropy of the next tokens in nats, without storing (tokens x vocabulary) logits.

        Args:
            tokens: (batch, length).
            targets: The token that follows each, (batch, length). If absent, they are ``tokens`` shifted by one: all
                but the last token of a row are read, all but the first are predicted.
            mask: (batch, length) boolean, True = a real token. Padding does not count.
            ignore_index: Target that does not count.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``: see :func:`flowformer.models.cross_entropy.cross_entropy`.

        Returns:
            The loss; with ``"none"`` that of each target, (batch, length), or (batch, length - 1) without ``targets``.

        Raises:
            ValueError, TypeError: as :meth:`forward`; for rows without a second token; for unknown reductions.
        """
        self._check(tokens, mask, None)
        real = seen = mask
        if targets is None:
            if tokens.shape[1] < 2:
                raise ValueError(f"without targets, each row must have at least two tokens, got {describe(tokens)}")
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
            if mask is not None:
                seen, real = mask[:, :-1], find_targets(mask)[:, 1:]
        if real is not None:
            targets = targets.masked_fill(~real, ignore_index)
        return cross_entropy(
            self.hidden(tokens, seen), self.head_weight, targets, ignore_index=ignore_index, reduction=reduction
        )

    def init_state(self, batch_size: int) -> LanguageState:
        """Return the state before the first token, for a batch of ``batch_size`` sequences."""
        length = torch.zeros(batch_size, dtype=torch.int64, device=self.embed.weight.device)
        return LanguageState(length, tuple(block.attention.init_state(batch_size) for block in self.decoder.layers))

    def step(self, tokens: Tensor, state: LanguageState) -> tuple[Tensor, LanguageState]:
        """Process one token of each row.

        Args:
            tokens: (batch,).
            state: The state before them, from :meth:`init_state`, :meth:`step` or :meth:`forward`.

        Returns:
            Logits (batch, vocab_size) of the tokens that follow, and the state after these.

        Raises:
            ValueError, TypeError: for invalid input, or a sequence beyond the learned positions.
        """
        if tokens.ndim != 1:
            raise ValueError(f"step: tokens must be (batch,), got {describe(tokens)}")
        self._check(tokens.unsqueeze(1), None, state)
        check_tokens("tokens", tokens, self.vocab_size)
        x, layers = self.decoder.step(self.add_positions(self.embed(tokens), state.length), state.layers)
        return self.logits(x), LanguageState(state.length + 1, layers)

    def generate(
        self,
        prompts: Sequence[Tensor | Sequence[int]] | Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Collection[int] | None = None,
    ) -> list[Tensor]:
        """Generate text after prompts.

        The model computes in evaluation mode and without gradients, and is left in the mode that it was in. To get each
        token as soon as it is chosen, iterate over :func:`flowformer.models.generation.stream_tokens`.

        Args:
            prompts: Token ids, a sequence or a (length,) tensor of one token or more for each row, or a (batch, length)
                tensor. Lengths may differ.
            max_new_tokens: Most tokens to add to each row.
            temperature: Divides the scores. 0 always takes the likeliest token.
            top_k: Sample from the ``top_k`` likeliest tokens only.
            top_p: Sample from the fewest likeliest tokens that have probability ``top_p`` together.
            seed: Seed of the random numbers, from 0; a fresh one if absent. Row i is sampled with ``seed + i``, and so
                gives what its prompt gives alone with that seed.
            eos_token_id: Token, or tokens, after which a row ends.

        Returns:
            One (length,) int64 tensor for each row, on the model's device: the prompt and the new tokens, the one that
            ended it included.

        Raises:
            TypeError, ValueError: for invalid arguments, for more tokens than the model has
                positions, and for scores that are not finite.

        Example:
            >>> import flowformer
            >>> model = flowformer.create_model("flowformer_gpt_nano", vocab_size=65, max_length=64)
            >>> rows = model.generate([[1, 2, 3], [4]], max_new_tokens=5, temperature=0.8, seed=0)
            >>> print(*(len(row) for row in rows))
            8 6
        """
        return generation.complete(
            self, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            eos_token_id=eos_token_id,
        )  # fmt: skip

    def _check(self, tokens: Tensor, mask: Tensor | None, state: LanguageState | None) -> None:
        check_token_ids("tokens", tokens)
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be boolean, got {describe(mask)}")
            if mask.shape != tokens.shape:
                raise ValueError(f"mask must be {tuple(tokens.shape)}, got {describe(mask)}")
        if state is not None:
            if not isinstance(state, LanguageState):
                raise TypeError(f"the state must be a LanguageState, got {type(state).__name__}")
            if len(state.layers) != len(self.decoder.blocks) or state.length.shape != tokens.shape[:1]:
                raise ValueError(
                    f"the state must have {len(self.decoder.blocks)} layers and {tokens.shape[0]} rows, got"
                    f" {len(state.layers)} layers and length {describe(state.length)}"
                )


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
    """A small model for your own text: 4 layers, 4 heads, 192 channels, sinusoidal positions.

    Embeddings are scaled to the size of the sinusoidal positions, and the projections of Xavier's size: with GPT's
    initial weights of 0.02, positions would hide the tokens, and queries and keys be near zero.

    Args:
        vocab_size: Tokens of the vocabulary.
        **options: As in :class:`LanguageModel`.
    """
    shape = {
        "num_layers": 4, "num_heads": 4, "dim": 192, "positions": "sinusoidal", "scale_embedding": True,
        "init": "fairseq",
    }  # fmt: skip
    return _published(vocab_size, "flow", {"preset": "core"}, shape, options)


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
