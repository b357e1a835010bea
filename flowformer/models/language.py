"""Language models: one decoder, and the published variants of it.

Sources: thuml/Flowformer, Flowformer_TorchModule (the GPT-style module) and Flowformer_NLP (WikiText-103, on fairseq's
transformer_lm); Zhai et al., "An Attention Free Transformer", 2021 (Enwik8, CIFAR-10).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flowformer.core.checks import describe
from flowformer.models.cross_entropy import check_tokens, cross_entropy
from flowformer.models.encoder import Encoder, EncoderBlock
from flowformer.models.positions import count_positions, create_positions
from flowformer.models.registry import register_model


class LanguageState(NamedTuple):
    """What a language model remembers of the past.

    Attributes:
        length: Real tokens so far, (batch,), int64.
        layers: The states of the attentions, first layer first.
    """

    length: Tensor
    layers: tuple[Any, ...]


class Decoder(Encoder):
    """A stack of causal blocks, which can go on from a state. Post-norm blocks need no norm after the last.

    Args:
        blocks: The blocks.
        dim: Channels.
        norm_first: Whether the blocks are pre-norm.
    """

    def __init__(self, blocks: list[EncoderBlock], dim: int, *, norm_first: bool) -> None:
        super().__init__(blocks, dim)
        if not norm_first:
            self.norm = nn.Identity()

    @property
    def layers(self) -> list[EncoderBlock]:
        """The blocks, first one first."""
        return cast("list[EncoderBlock]", list(self.blocks))

    def extend(self, x: Tensor, mask: Tensor | None, states: tuple) -> tuple[Tensor, tuple]:
        """Transform (batch, length, dim) after what ``states`` remember; a state of None is that of a beginning."""
        after = []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block(x, mask=mask, initial_state=state, return_state=True)
            after.append(state)
        x = self.norm(x)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        return x, tuple(after)

    def step(self, x: Tensor, states: tuple) -> tuple[Tensor, tuple]:
        """One token: (batch, dim) and the states before it, to the same after it."""
        after = []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self.norm(x), tuple(after)


class LanguageModel(nn.Module):
    """A decoder: embed tokens, transform them block by block, and score the vocabulary for the token that follows.

    Padding is invisible, on either side: positions count real tokens only, and a row gives what it gives alone.

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
        init: Fresh parameters as ``"gpt"`` (:meth:`init_gpt`) or ``"fairseq"`` (:meth:`init_fairseq`) has them.

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
    ) -> None:
        super().__init__()
        if vocab_size < 1 or num_layers < 1:
            raise ValueError(f"vocab_size and num_layers must be positive, got {vocab_size} and {num_layers}")
        if init not in ("gpt", "fairseq"):
            raise ValueError(f'init must be "gpt" or "fairseq", got {init!r}')
        self.vocab_size, self.max_length, self.dim = vocab_size, max_length, dim
        self.scale = math.sqrt(dim) if scale_embedding else 1.0
        self.embed = nn.Embedding(vocab_size, dim)
        self.position = create_positions(positions, dim, max_length)
        self.dropout = nn.Dropout(dropout)
        blocks = [
            EncoderBlock(
                dim, num_heads, 4 * dim if ffn_dim is None else ffn_dim, dropout=dropout, attention=attention,
                attention_options=attention_options, max_length=max_length, causal=True, norm_first=norm_first,
                activation=activation, activation_dropout=activation_dropout,
            )
            for _ in range(num_layers)
        ]  # fmt: skip
        self.decoder = Decoder(blocks, dim, norm_first=norm_first)
        # No second name for a tied weight: files of weights then hold it once.
        self.head = None if tied else nn.Linear(dim, vocab_size, bias=False)
        self.init_gpt() if init == "gpt" else self.init_fairseq()

    @property
    def head_weight(self) -> Tensor:
        """The output head, (vocab_size, dim)."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Scores of the token that follows, at each position.

        For a large vocabulary they are large: :meth:`loss` does without, and :meth:`logits` scores those hidden states
        that are wanted.

        Args:
            tokens: (batch, length), integers below ``vocab_size``; any at padding.
            mask: (batch, length) boolean, True = a real token; padding on either side.
            initial_state: State to go on from.
            return_state: Return the state after the last token as well.

        Returns:
            Logits (batch, length, vocab_size), which mean nothing at padding; with ``return_state`` also the state.

        Raises:
            ValueError, TypeError: for input that is not as said above, or a sequence beyond the learned positions.
        """
        out = self.hidden(tokens, mask, initial_state=initial_state, return_state=return_state)
        return (self.logits(out[0]), out[1]) if return_state else self.logits(out)

    def hidden(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        initial_state: LanguageState | None = None,
        return_state: bool = False,
    ) -> Any:
        """What the output head sees: (batch, length, dim), zeros at padding. Arguments as those of :meth:`forward`."""
        self._check(tokens, mask, initial_state)
        if mask is not None:
            tokens = tokens.masked_fill(~mask, 0)
        check_tokens("tokens", tokens, self.vocab_size)
        before = None if initial_state is None else initial_state.length
        x = self._embed(tokens, count_positions(tokens, mask, before))
        if initial_state is None and not return_state:
            return self.decoder(x, mask)
        layers = (None,) * len(self.decoder.blocks) if initial_state is None else initial_state.layers
        out, layers = self.decoder.extend(x, mask, layers)
        if not return_state:
            return out
        length = torch.full_like(tokens[:, 0], tokens.shape[1], dtype=torch.int64)
        length = length if mask is None else mask.sum(-1)
        return out, LanguageState(length if before is None else before + length, layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocab_size) of hidden states (..., dim)."""
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
        """Cross-entropy of the tokens that follow, in nats, without ever holding (tokens x vocabulary) scores.

        Args:
            tokens: (batch, length).
            targets: The token that follows each, (batch, length). If absent, each row of ``tokens`` is its own target:
                all but its last token are seen, and all but its first are to be foretold.
            mask: (batch, length) boolean, True = a real token. The rest does not count.
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
                raise ValueError(f"without targets, tokens must be two or more in a row, got {describe(tokens)}")
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
            if mask is not None:
                # After left padding the first real token has nothing before it to be foretold from.
                seen, real = mask[:, :-1], mask[:, 1:] & mask[:, :-1]
        if real is not None:
            targets = targets.masked_fill(~real, ignore_index)
        return cross_entropy(
            self.hidden(tokens, seen), self.head_weight, targets, ignore_index=ignore_index, reduction=reduction
        )

    def init_state(self, batch_size: int) -> LanguageState:
        """The state before the first token, for a batch of ``batch_size`` sequences."""
        length = torch.zeros(batch_size, dtype=torch.int64, device=self.embed.weight.device)
        return LanguageState(length, tuple(block.attention.init_state(batch_size) for block in self.decoder.layers))

    def step(self, tokens: Tensor, state: LanguageState) -> tuple[Tensor, LanguageState]:
        """One token of each row.

        Args:
            tokens: (batch,).
            state: The state before them, from :meth:`init_state`, :meth:`step` or :meth:`forward`.

        Returns:
            Logits (batch, vocab_size) of the tokens that follow, and the state after these.

        Raises:
            ValueError, TypeError: for input that is not as said above, or a sequence beyond the learned positions.
        """
        if tokens.ndim != 1:
            raise ValueError(f"step: tokens must be (batch,), got {describe(tokens)}")
        self._check(tokens.unsqueeze(1), None, state)
        check_tokens("tokens", tokens, self.vocab_size)
        x, layers = self.decoder.step(self._embed(tokens, state.length), state.layers)
        return self.logits(x), LanguageState(state.length + 1, layers)

    def init_gpt(self) -> None:
        """Fresh parameters as the GPT-style module has them: N(0, 0.02), no biases, the last layers scaled down.

        Its scaling by 1 / sqrt(2 num_layers), GPT-2's, looks for the name ``c_proj``, and so finds the second layer of
        each feed-forward network but not the output projections of its attentions. What it trained with is kept here.
        Parameters of mechanisms that are not linear layers keep their own.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.decoder.layers:
            nn.init.normal_(block.linear2.weight, std=0.02 / math.sqrt(2 * len(self.decoder.blocks)))

    def init_fairseq(self) -> None:
        """Fresh parameters as fairseq's transformer_lm has them.

        Embeddings N(0, 1/sqrt(dim)); Xavier-uniform projections in attentions, by 1/sqrt(2) but for the output's, whose
        biases are zero; PyTorch's own elsewhere.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.dim**-0.5)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.dim**-0.5)
        for block in self.decoder.layers:
            attention = block.attention
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
            nn.init.xavier_uniform_(attention.out_proj.weight)
            if attention.out_proj.bias is not None:
                nn.init.zeros_(attention.out_proj.bias)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        if self.position is not None:
            x = x + self.position(positions).to(x.dtype)
        return self.dropout(x)

    def _check(self, tokens: Tensor, mask: Tensor | None, state: LanguageState | None) -> None:
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens must be integers, got {describe(tokens)}")
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens must be (batch, length) with one token or more, got {describe(tokens)}")
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
                    f"the state must be of {len(self.decoder.blocks)} layers and {tokens.shape[0]} rows, got"
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
    """A model of our own for a text of one's own: 4 layers, 4 heads, 192 channels, positions without end.

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
    """Source: Zhai et al., tables 2 and 4. It does not say which GELU or ReLU, nor how parameters start."""
    shape = {"num_layers": num_layers, "num_heads": 1, "dim": dim, "max_length": max_length}
    return _published(vocab_size, "aft_local", local, shape, options)


_AFT_ENWIK8 = {"window": 32, "position_dim": 256}
_AFT_CIFAR = {"window": 256, "position_dim": 64}


@register_model
def aft_enwik8_12(vocab_size: int = 256, max_length: int | None = 1_024, **options: Any) -> LanguageModel:
    """AFT-local's model of Enwik8, bytes: 12 layers of 512 channels, window 32. Options as in :class:`LanguageModel`.

    The Transformer beside it has 8 heads: ``attention="softmax", num_heads=8``.
    """
    return _aft(12, 512, _AFT_ENWIK8, vocab_size, max_length, options)


@register_model
def aft_enwik8_24(vocab_size: int = 256, max_length: int | None = 1_024, **options: Any) -> LanguageModel:
    """AFT-local's model of Enwik8, bytes: 24 layers of 256 channels, window 32. Options as in :class:`LanguageModel`.

    The Transformer beside it has 4 heads: ``attention="softmax", num_heads=4``.
    """
    return _aft(24, 256, _AFT_ENWIK8, vocab_size, max_length, options)


@register_model
def aft_cifar_12(vocab_size: int = 256, max_length: int | None = 3_072, **options: Any) -> LanguageModel:
    """AFT-local's model of CIFAR-10, sub-pixels: 12 layers of 512 channels, window 256.

    Options as in :class:`LanguageModel`. The Transformer beside it has 4 heads: ``attention="softmax", num_heads=4``.
    """
    return _aft(12, 512, _AFT_CIFAR, vocab_size, max_length, options)


@register_model
def aft_cifar_24(vocab_size: int = 256, max_length: int | None = 3_072, **options: Any) -> LanguageModel:
    """AFT-local's model of CIFAR-10, sub-pixels: 24 layers of 256 channels, window 256.

    Options as in :class:`LanguageModel`. The Transformer beside it has 2 heads: ``attention="softmax", num_heads=2``.
    """
    return _aft(24, 256, _AFT_CIFAR, vocab_size, max_length, options)
