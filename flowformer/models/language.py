"""The language model: a decoder with any causal attention. Its published variants are in ``language_models.py``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import check_flag, check_mask, check_sizes, describe
from flowformer.core.precision import dtype_and_device
from flowformer.models import generation
from flowformer.models.decoder import LanguageState, TokenDecoder, check_token_ids, find_targets
from flowformer.models.initialization import draw_parameters
from flowformer.models.vocabulary.cross_entropy import check_tokens, cross_entropy, weight_or_layer


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
    def scorer(self) -> Tensor | nn.Module:
        """What scores hidden states: a weight (vocab_size, dim), or an output head that is to be called."""
        if self.head is not None:
            return weight_or_layer(self.head)
        scorer = weight_or_layer(self.embed)
        if isinstance(scorer, Tensor):
            return scorer
        return self.embed(torch.arange(self.vocab_size, device=dtype_and_device(self)["device"]))

    @overload
    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        targets: Tensor,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor: ...

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
        targets: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        initial_state: LanguageState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LanguageState]:
        """Return the logits of the next token at each position, or with ``targets`` their cross-entropy.

        Over a large vocabulary logits take much memory: the cross-entropy does without them, and :meth:`logits` scores
        a selection of hidden states.

        Args:
            tokens: (batch, length), integers below ``vocab_size``; any at padding.
            mask: (batch, length) boolean, True = a real token; padding on either side.
            targets: The token that follows each, (batch, length): return the loss instead, as :meth:`loss` does.
            ignore_index: Target that does not count, as padding does not.
            reduction: Of the loss: ``"mean"``, ``"sum"`` or ``"none"``.
            initial_state: State to continue from.
            return_state: Return the state after the last token as well; not with ``targets``.

        Returns:
            Logits (batch, length, vocab_size), undefined at padding; with ``return_state`` also the state. With
            ``targets`` the loss.

        Raises:
            ValueError, TypeError: for invalid input, or a sequence beyond the learned positions.
        """
        if targets is not None and return_state:
            raise ValueError("targets and return_state are not supported together: the loss comes without a state")
        hidden, state = self._hidden(tokens, mask, initial_state, return_state)
        if targets is None:
            return self.logits(hidden) if state is None else (self.logits(hidden), state)
        if mask is not None and isinstance(targets, Tensor) and targets.shape == mask.shape:
            targets = targets.masked_fill(~mask, ignore_index)
        return cross_entropy(hidden, self.scorer, targets, ignore_index=ignore_index, reduction=reduction)

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
        return nn.functional.linear(hidden, cast("Tensor", self.scorer)) if self.head is None else self.head(hidden)

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

        :meth:`forward` computes it, so that hooks of the model run. A wrapper with a forward of its own, such as
        ``DistributedDataParallel``, is called itself: ``wrapped(tokens, targets=targets)``.

        Args:
            tokens: (batch, length).
            targets: The token that follows each, (batch, length). If absent, they are ``tokens`` shifted by one: all
                but the last token of a row are read, all but the first are predicted.
            mask: (batch, length) boolean, True = a real token. Padding does not count.
            ignore_index: Target that does not count.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``: see
                :func:`flowformer.models.vocabulary.cross_entropy.cross_entropy`.

        Returns:
            The loss; with ``"none"`` that of each target, (batch, length), or (batch, length - 1) without ``targets``.

        Raises:
            ValueError, TypeError: as :meth:`forward`; for rows without a second token; for unknown reductions.
        """
        self._check(tokens, mask, None)
        if targets is None:
            if tokens.shape[1] < 2:
                raise ValueError(f"without targets, each row must have at least two tokens, got {describe(tokens)}")
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
            if mask is not None:
                targets, mask = targets.masked_fill(~find_targets(mask)[:, 1:], ignore_index), mask[:, :-1]
        return self(tokens, mask, targets=targets, ignore_index=ignore_index, reduction=reduction)

    def init_state(self, batch_size: int) -> LanguageState:
        """Return the state before the first token, for a batch of ``batch_size`` sequences."""
        layers = tuple(block.attention.init_state(batch_size) for block in self.decoder.layers)
        return LanguageState(
            torch.zeros(batch_size, dtype=torch.int64, device=dtype_and_device(self)["device"]), layers
        )

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
        if not isinstance(tokens, Tensor) or tokens.ndim != 1:
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
        cuda_graph: bool = False,
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
            cuda_graph: Whether to capture the step as one CUDA graph: see
                :func:`flowformer.models.generation.stream_tokens`.

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
            eos_token_id=eos_token_id, cuda_graph=cuda_graph,
        )  # fmt: skip

    def _check(self, tokens: Tensor, mask: Tensor | None, state: LanguageState | None) -> None:
        check_token_ids("tokens", tokens)
        if mask is not None:
            check_mask("mask", mask, tokens.shape, tokens.device)
        if state is not None:
            if not isinstance(state, LanguageState):
                raise TypeError(f"the state must be a LanguageState, got {type(state).__name__}")
            if len(state.layers) != len(self.decoder.blocks) or state.length.shape != tokens.shape[:1]:
                raise ValueError(
                    f"the state must have {len(self.decoder.blocks)} layers and {tokens.shape[0]} rows, got"
                    f" {len(state.layers)} layers and length {describe(state.length)}"
                )
